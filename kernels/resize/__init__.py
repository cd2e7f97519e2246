"""Shared by the losses at label resolution: one lane per cell (docs/full-resolution.md).

A cell is the space between four neighbouring logits; borders are cells too. Label pixels in a cell depend on these four
logits only, forward and backward. Consecutive lanes take consecutive cells. A lane keeps ROWS x COLUMNS label pixels of
its cell in registers, as tuples. The loop over classes loads four corners, interpolates vertically once per row, and
spends one FMA and one exponential per label pixel. Cells are numbered across samples, rows and columns, so that small
maps fill the lanes too.

Three kernels compute loss and gradient:

- :func:`prepare` copies the logits, of any layout and dtype, to a plane in the accumulator dtype: scaled by
  log2(e) / tau, -inf made finite, edges replicated, with the maximum over the classes of each logit.
- The loss's kernel computes loss and gradient, and accumulates the cells' contributions in two planes: what each logit
  gets from the cells below it, and from the cells above it.
- :func:`join` adds the planes, scales, casts, and writes in the student's layout.

The softmax needs no pass for its maximum: the largest corner bounds every interpolated value. Label pixels so far below
the bound that terms would underflow are recomputed about their true maximum.

Sampling positions are exact integer ratios: x * (in - 1) / (out - 1) with align_corners, else ((2 x + 1) * in - out) /
(2 out).

A loss supplies three pieces. Values are base 2 and in tuples with one entry per label pixel:

1. Sums over the classes: a loop over :func:`values` (``resized_cross_entropy.sums``).
2. A term from these sums, times the label pixel's factor from :func:`weigh`.
3. A formula ``(k, class, student's value, teacher's value, kept, state)``, called by :func:`write_gradient` for each
   class and label pixel ``k``. It returns the gradient with respect to the value, and what to keep for the next class.
   With ``numbers``, their entries for the class replace the teacher's value.

Its kernel loops over the parts of a cell: :func:`locate`, :func:`parts_of`, :func:`part_of`, :func:`read_labels`, the
three pieces, and partial sums of the loss and of the mean's denominator. Its launcher calls :func:`plan`,
:func:`prepare`, the kernel with one warp, and :func:`join`. ``resized_cross_entropy.py`` is the shortest example.

planning.py tiles the work, preparation.py copies the logits, cells.py locates label pixels, interpolation.py
interpolates, labels.py reads labels and weights, gradient.py is the transpose, tuples.py has tuple helpers.
"""

from .cells import Cell, locate, locate_apart, part_of, parts_of
from .gradient import join, join_planes, next_class, shares_of, spread, write_gradient
from .interpolation import (
    LN2,
    Shift,
    View,
    advance,
    any_lane,
    begin,
    bound,
    each,
    far_below,
    has,
    largest,
    load_each,
    one_pixel,
    one_view,
    plane_of,
    taps_of,
    values,
)
from .labels import Labels, Worth, read_labels, resize_weight, weigh, write_pixels
from .planning import plan, plan_apart
from .preparation import LOW32, LOW64, Logits, prepare
from .tuples import any_of, fill, nothing, pick, put, sum_of

__all__ = [
    "LN2",
    "LOW32",
    "LOW64",
    "Cell",
    "Labels",
    "Logits",
    "Shift",
    "View",
    "Worth",
    "advance",
    "any_lane",
    "any_of",
    "begin",
    "bound",
    "each",
    "far_below",
    "fill",
    "has",
    "join",
    "join_planes",
    "largest",
    "load_each",
    "locate",
    "locate_apart",
    "next_class",
    "nothing",
    "one_pixel",
    "one_view",
    "part_of",
    "parts_of",
    "pick",
    "plan",
    "plan_apart",
    "plane_of",
    "prepare",
    "put",
    "read_labels",
    "resize_weight",
    "shares_of",
    "spread",
    "sum_of",
    "taps_of",
    "values",
    "weigh",
    "write_gradient",
    "write_pixels",
]
