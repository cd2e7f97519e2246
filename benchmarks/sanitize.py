"""Run by ``sanitize.sh``: every CUDA kernel once, on small maps with awkward sizes."""

from __future__ import annotations

import itertools

import torch

import fastkd

SHAPES = [(2, 24, 40, 48), (1, 3, 33, 35), (3, 16, 72, 64)]


def main() -> None:
    count = 0
    dtypes = itertools.cycle([torch.float32, torch.bfloat16, torch.float16, torch.float64])
    layouts = (torch.contiguous_format, torch.channels_last)
    with fastkd.use_backend("cuda"):
        for shape, dims, layout in itertools.product(SHAPES, ("hw", "nhw", "c", "chw"), layouts):
            dtype = next(dtypes)
            student, teacher = (torch.randn(shape, device="cuda").to(dtype).to(memory_format=layout) for _ in range(2))
            for weight in (1.0, 1.0, 1.0, 2.0):  # upstream gradients of 1 (no rescaling) and 2
                x = student.clone().requires_grad_()
                (weight * fastkd.nfd_loss(x, teacher, dims=dims)).backward()
                count += bool(x.grad.isfinite().all())
            other = teacher.float() if dtype != torch.float64 else teacher  # also mixed dtypes
            fastkd.nfd_loss(student, other, dims=dims)
        for (n, c, h, w), layout in itertools.product([*SHAPES, (1, 150, 9, 16), (1, 4096, 2, 8)], layouts):
            dtype = next(dtypes)
            student, teacher = (
                torch.randn(n, c, h, w, device="cuda").to(dtype).to(memory_format=layout) for _ in range(2)
            )
            labels = torch.randint(0, c, (n, h, w), device="cuda", dtype=torch.int32)
            labels[:, 0] = 255
            for weight in (1.0, 1.0, 1.0, 2.0):
                x = student.clone().requires_grad_()
                (weight * fastkd.kd_loss(x, teacher, target=labels)).backward()
                count += bool(x.grad.isfinite().all())
            fastkd.kd_loss(student, teacher, reduction="none")
        for (n, c, h, w), layout in itertools.product([(2, 19, 9, 70), (1, 150, 7, 11), (1, 4096, 3, 5)], layouts):
            dtype = next(dtypes)
            student, teacher = (
                torch.randn(n, c, h, w, device="cuda").to(dtype).to(memory_format=layout) for _ in range(2)
            )
            size = (3 * h + 1, 5 * w)
            labels = torch.randint(0, c, (n, *size), device="cuda", dtype=torch.int32)
            labels[:, 0] = 255
            pixel_weight = torch.rand(n, 4, 6, device="cuda", dtype=torch.float64)
            for weight in (1.0, 1.0, 1.0, 2.0):
                x = student.clone().requires_grad_()
                ce = fastkd.resized_cross_entropy(x, labels, pixel_weight=pixel_weight)
                kd = fastkd.resized_kd_loss(x, teacher, size=size, target=labels)
                (weight * (ce + kd)).backward()
                count += bool(x.grad.isfinite().all())
            fastkd.resized_cross_entropy(student, labels, reduction="none")
    torch.cuda.synchronize()
    print(f"{count} steps")


if __name__ == "__main__":
    main()
