"""Operator namespaces, compiled libraries and the Triton package of this build.

Kernel Hub builds use other names, so that two versions can be loaded into one process: hub/stage.py replaces this file.
"""

NAMESPACES = {"cpu": "fastkd_cpu", "triton": "fastkd_triton", "cuda": "fastkd_cuda"}
LIBRARIES = {"cpu": "_cpu.so", "cuda": "_cuda.so"}
KERNELS = f"{__package__}.kernels"
