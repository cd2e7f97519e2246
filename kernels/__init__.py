"""Triton kernels of the losses, one file per operator family, registered as the namespace ``fastkd_triton``.

Importing this imports Triton; ``fastkd`` does so at the first call that needs a kernel. With ``TRITON_INTERPRET=1`` set
before that, the kernels run in Triton's interpreter and take CPU tensors too.
"""

import torch
import triton

from fastkd.ops._registry import families

from . import cwd, kd, nfd, rdd, resized_cross_entropy, resized_kd

LAUNCHERS = {
    "nfd_forward": nfd.forward,
    "nfd_backward": nfd.backward,
    "kd_forward": kd.forward,
    "kd_backward": kd.backward,
    "cwd_forward": cwd.forward,
    "cwd_backward": cwd.backward,
    "resized_cross_entropy_forward": resized_cross_entropy.forward,
    "resized_cross_entropy_gradient": resized_cross_entropy.gradient,
    "resized_kd_forward": resized_kd.forward,
    "resized_kd_gradient": resized_kd.gradient,
    "teacher_confidence": rdd.teacher_confidence,
    "kd_with_confidence": rdd.kd_with_confidence,
    "difficulty_mask": rdd.difficulty_mask,
    "kth_smallest": rdd.kth_smallest,
}
library = torch.library.Library("fastkd_triton", "DEF")  # the operators live as long as this object

for _family in families():
    for _schema, _ in _family.OPERATORS:
        _name = _schema.partition("(")[0]
        library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
        for _key in ("CUDA", "CPU") if triton.knobs.runtime.interpret else ("CUDA",):
            if _name in LAUNCHERS:
                library.impl(_name, LAUNCHERS[_name], _key)
