"""Classes of other distillation projects, by their names, arguments, defaults and numbers, on these kernels.

`fastkd.compat.cirkd`, `fastkd.compat.mmrazor` and `fastkd.compat.torchdistill`. They need torch alone, none of the projects;
docs/drop-in.md shows the lines to change. Where a number differs, the class says by how much.
"""
