"""Triton kernels of the losses, one file per operator family, registered as the namespace ``fastkd_triton``.

Importing this imports Triton; ``fastkd`` does so at the first call that needs a kernel. With ``TRITON_INTERPRET=1`` set
before that, the kernels run in Triton's interpreter and take CPU tensors too.
"""

import torch
import triton

from fastkd.ops import cwd as _cwd_op
from fastkd.ops import kd as _kd_op
from fastkd.ops import nfd as _nfd_op

from . import cwd, kd, nfd

library = torch.library.Library("fastkd_triton", "DEF")  # the operators live as long as this object

for _op, _launchers in ((_nfd_op, nfd), (_kd_op, kd), (_cwd_op, cwd)):
    for _schema, _launcher in ((_op.FORWARD, _launchers.forward), (_op.BACKWARD, _launchers.backward)):
        library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
        for _key in ("CUDA", "CPU") if triton.knobs.runtime.interpret else ("CUDA",):
            library.impl(_schema.partition("(")[0], _launcher, _key)
