"""What every loss at label resolution shares: one thread owns a cell (docs/full-resolution.md).

A cell is the space between four neighbouring logits; the borders are cells too. The label pixels in a cell are
interpolated from those four logits alone, and their gradients go to those four alone. Lanes run along cells, and the
label pixels of a cell, ROWS x COLUMNS at a time, are tuples in a lane's registers. A loop over the classes loads four
corners, blends them once a row, and spends one FMA and one exponential a label pixel. Cells are numbered in one line over
samples, rows and columns, so that small maps fill the lanes too.

Three kernels make a gradient. :func:`prepare` copies the logits to an accumulator plane that is scaled by log2(e) / tau,
with -inf made finite, edges repeated and the largest class of each logit beside it, whatever their layout and dtype. The
loss's own kernel computes loss and gradient, and adds the cells' shares in two planes: what each logit gets from the cells
below it, and from the cells above it. :func:`join` adds the planes, scales, casts, and writes in the student's layout.

The softmax needs no pass for its maximum: the largest corner bounds every interpolated value. Where a label pixel is so
far below its bound that terms would underflow, it is done again about its true maximum.

Taps are exact integers: x * (in - 1) / (out - 1) with aligned corners, ((2 x + 1) * in - out) / (2 out) without.

A loss plugs in with what it makes of a label pixel's values, base 2 and as tuples of one entry a label pixel:

1. Sums over the classes: a loop that calls :func:`values` and carries its sums (``resized_cross_entropy.sums``).
2. A term from these sums, times the label pixel's factor of :func:`weigh`.
3. A formula ``(k, class, student's value, teacher's value, kept, state)`` that :func:`write_gradient` calls for every class
   and label pixel ``k``; it returns the gradient by that value, and what it keeps from class to class. With ``numbers``, it
   gets what its class has of each of them in the place of the teacher's value.

Its kernel is a loop over the parts of a cell: :func:`locate`, :func:`parts_of`, :func:`part_of`, :func:`read_labels`, the
three above, and a partial sum of the loss and of what the mean divides by. Its launcher calls :func:`plan`,
:func:`prepare`, the kernel with one warp, and :func:`join`. ``resized_cross_entropy.py`` is the shortest example.

planning.py cuts the work, preparation.py copies the logits, cells.py finds a lane's label pixels, interpolation.py blends,
labels.py reads what label pixels are worth, gradient.py transposes to logit size, tuples.py has what all need of tuples.
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
