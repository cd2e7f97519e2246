"""Names of a build: operator namespaces, compiled libraries, the Triton package.

Builds for the Kernel Hub have a namespace of their own, so that two versions can be loaded into one process: hub/stage.py
replaces this file.
"""

NAMESPACES = {"cpu": "fastkd_cpu", "triton": "fastkd_triton", "cuda": "fastkd_cuda"}
LIBRARIES = {"cpu": "_cpu.so", "cuda": "_cuda.so"}
KERNELS = f"{__package__}.kernels"
