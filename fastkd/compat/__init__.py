"""Loss classes of other projects, with their names, arguments, defaults and numerical results, on these kernels.

They need only torch. docs/drop-in.md shows the lines to change; a class whose numbers differ says by how much.
"""
