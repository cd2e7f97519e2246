"""Classes of other distillation projects, by their names, arguments, defaults and numbers, on these kernels.

They need torch only. docs/drop-in.md shows the lines to change; where a number differs, the class says by how much.
"""
