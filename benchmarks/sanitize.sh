#!/usr/bin/env bash
# The CUDA kernels under NVIDIA's compute-sanitizer: bad addresses, races in shared memory, uninitialised reads, barriers.
#
#     benchmarks/sanitize.sh [memcheck racecheck initcheck synccheck]
#
# Needs a GPU, a build with the CUDA kernels, and compute-sanitizer (in the CUDA toolkit) in PATH or CUDA_HOME/bin.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not there: it comes with the CUDA toolkit"; exit 2; }
if [ $# -eq 0 ]; then set -- memcheck racecheck initcheck synccheck; fi
for tool in "$@"; do
    echo "== $tool"
    # Without torch's cache every tensor is an allocation of its own, so that reads past its end are seen.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 --print-limit 20 \
        "${PYTHON:-python3}" -m benchmarks.sanitize
done
