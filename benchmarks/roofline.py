"""The hardware's limit: time = max(bytes / bandwidth, exponentials / special-function rate).

A prediction from datasheets, for kernels that move each byte and compute each exponential once and overlap both. It
ignores launches, caches and all other computation, so a measurement can only be slower.
"""

from __future__ import annotations

from typing import NamedTuple


class Work(NamedTuple):
    """The necessary work of one forward and backward, counted by hand as each bench file explains."""

    bytes: float
    exponentials: float = 0.0

    def seconds(self, bytes_per_second: float, exponentials_per_second: float | None) -> float:
        """Time at these rates, with both overlapped. Without a rate of exponentials, only the bytes count."""
        exponentials = self.exponentials / exponentials_per_second if exponentials_per_second else 0.0
        return max(self.bytes / bytes_per_second, exponentials)


class GPU(NamedTuple):
    """Datasheet numbers: bandwidth in bytes per second, multiprocessors (compute units), clock in Hz."""

    bandwidth: float
    units: int
    clock: float
    source: str

    @property
    def exponentials_per_second(self) -> float:
        return PER_CLOCK * self.units * self.clock


# Special functions per clock and multiprocessor. NVIDIA: CUDA C++ Programming Guide, "Throughput of Native Arithmetic
# Instructions", exp2 of compute capability 8.0, 9.0 and 10.0. AMD: four 16-wide SIMDs a compute unit (ROCm, "Pipeline
# descriptions"), transcendentals at quarter rate (LLVM's SISchedule.td).
PER_CLOCK = 16

GPUS = {
    "A100": GPU(2.039e12, 108, 1.41e9, "A100 80GB SXM datasheet; boost clock of the GA100 whitepaper"),
    "H100": GPU(3.35e12, 132, 1.98e9, "H100 SXM datasheet; clock from its 67 TFLOPS fp32 over 132 × 128 × 2"),
    "H200": GPU(4.8e12, 132, 1.98e9, "H200 SXM datasheet; clock as H100"),
    "B200": GPU(8.0e12, 148, 1.98e9, "HGX B200 datasheet; clock from its 75 TFLOPS fp32 over 148 × 128 × 2"),
    "MI300X": GPU(5.3e12, 304, 2.1e9, "MI300X datasheet: 304 compute units, 2100 MHz"),
}


def special_function_rate(device_name: str) -> float | None:
    """Exponentials per second of the GPU named ``device_name``, None if it is not in the list."""
    for name, gpu in GPUS.items():
        if name in device_name:
            return gpu.exponentials_per_second
    return None
