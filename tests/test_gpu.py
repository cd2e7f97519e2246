"""GPU-only behaviour: no host synchronisation, CUDA graphs, streams, devices, autocast, peak memory."""

import functools

import pytest
import torch

import fastkd
from fastkd import backends

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")

N, C, H, W, RATIO = 2, 19, 16, 24, 8


def inputs(device="cuda", dtype=torch.float32, scale: int = 1):
    g = torch.Generator().manual_seed(0)
    shape = (N, C, H * scale, W * scale)
    student, teacher, aux = (torch.randn(shape, generator=g).to(device, dtype) for _ in range(3))
    target = torch.randint(0, C, (N, H * scale * RATIO, W * scale * RATIO), generator=g)
    target[torch.rand(target.shape, generator=g) < 0.1] = 255
    return student.requires_grad_(), teacher, aux, target.to(device, torch.uint8)


@functools.cache
def elements(pixels, device):
    """Labels per class, cached: they are inputs and not part of a loss's memory."""
    g = torch.Generator().manual_seed(1)
    return torch.randint(0, 2, (pixels[0], C, *pixels[1:]), generator=g, dtype=torch.uint8).to(device)


LOSSES = {
    "nfd": lambda s, t, a, y: fastkd.nfd_loss(s, t),
    "nfd nhw": lambda s, t, a, y: fastkd.nfd_loss(s, t, dims="nhw"),
    "kd": lambda s, t, a, y: fastkd.kd_loss(s, t, temperature=2.0),
    "cwd": lambda s, t, a, y: fastkd.cwd_loss(s, t),
    "resized ce": lambda s, t, a, y: fastkd.resized_cross_entropy(s, y),
    "resized ce, weighted": lambda s, t, a, y: fastkd.resized_cross_entropy(s, y, pixel_weight=s.detach()[:, 0].abs()),
    "resized kd": lambda s, t, a, y: fastkd.resized_kd_loss(s, t, size=y.shape[1:], target=y),
    "smoothing": lambda s, t, a, y: fastkd.resized_cross_entropy(s, y, label_smoothing=0.1),
    "focal": lambda s, t, a, y: fastkd.resized_cross_entropy(s, y, focal_gamma=2.0),
    "ohem": lambda s, t, a, y: fastkd.resized_ohem_cross_entropy(s, y, min_kept=1000),
    "dice": lambda s, t, a, y: fastkd.resized_dice_loss(s, y),
    "ce + dice": lambda s, t, a, y: fastkd.resized_cross_entropy_dice_loss(s, y).loss,
    "bce": lambda s, t, a, y: fastkd.resized_binary_cross_entropy(s, elements(y.shape, y.device)),
    "kd, sigmoid": lambda s, t, a, y: fastkd.kd_loss(s, t, activation="sigmoid"),
    "resized kd, sigmoid": lambda s, t, a, y: fastkd.resized_kd_loss(
        s, t, size=y.shape[1:], target=y, activation="sigmoid"
    ),
    "tfe": lambda s, t, a, y: fastkd.rdd_loss(s, t, y, stage="tfe", teacher_aux=a).loss,
    "tse": lambda s, t, a, y: fastkd.rdd_loss(s, t, y, stage="tse").loss,
    "tse official": lambda s, t, a, y: fastkd.rdd_loss(s, t, y, stage="tse", preset="official").loss,
}
IN_CUDA = ", CUDA C++"
LOSSES |= {name + IN_CUDA: loss for name, loss in LOSSES.items() if name not in ("nfd nhw", "cwd", "tfe")}
each_loss = pytest.mark.parametrize("name", LOSSES)


def run(name, student, *rest):
    """Uses Triton, or CUDA C++ if the name says so."""
    backend = "triton"
    if name.endswith(IN_CUDA):
        if reason := backends.why_not("cuda"):
            pytest.skip(reason)
        backend = "cuda"
    with fastkd.use_backend(backend):
        loss = LOSSES[name](student, *rest)
    return loss.detach(), torch.autograd.grad(loss, student)[0]


def assert_same(got, want):
    assert all(torch.equal(a, b.to(a.device)) for a, b in zip(got, want, strict=True))


@pytest.mark.promise("gpu-queue")
@each_loss
def test_no_synchronisation(name):
    given = inputs()
    run(name, *given)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(name, *given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.promise("gpu-queue")
@each_loss
def test_cuda_graph(name):
    """Captured once and replayed with other values: bitwise equal to an ordinary call."""
    given = inputs()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run(name, *given)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(name, *given)
    with torch.no_grad():
        for x in given[:3]:
            x.copy_(x.flip(0) * 1.5)
    graph.replay()
    assert_same(captured, run(name, *given))


@pytest.mark.promise("gpu-queue")
@each_loss
def test_streams(name):
    """Two concurrent streams give the results of one."""
    many = [inputs(), inputs()]
    want = [run(name, *given) for given in many]
    streams = [torch.cuda.Stream() for _ in many]
    torch.cuda.synchronize()
    got = []
    for _ in range(3):
        got = []
        for stream, given in zip(streams, many, strict=True):
            with torch.cuda.stream(stream):
                got.append(run(name, *given))
        torch.cuda.synchronize()
    for a, b in zip(got, want, strict=True):
        assert_same(a, b)


@pytest.mark.promise("gpu-queue")
@each_loss
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU alone")
def test_another_device_than_the_current_one(name):
    want = run(name, *inputs("cuda:0"))
    with torch.cuda.device(0):
        got = run(name, *inputs("cuda:1"))
    assert got[1].device.index == 1
    assert_same(got, want)


@each_loss
def test_autocast_inserts_no_cast(name):
    given = inputs(dtype=torch.bfloat16)
    want = run(name, *given)
    with torch.autocast("cuda", dtype=torch.float16):
        got = run(name, *given)
    assert got[0].dtype == torch.float32
    assert_same(got, want)


@pytest.mark.promise("triton-bits")
@each_loss
def test_same_bits_every_time(name):
    given = inputs(dtype=torch.float16)
    assert_same(run(name, *given), run(name, *given))


@pytest.mark.promise("memory-maps")
@each_loss
def test_extra_memory(name):
    """Beyond the gradient: 1 % of the inputs; at label resolution 12 bytes a label pixel, 16 in RDD's TSE.

    At this ratio, fp32 copies of the logits and of their gradient take about 6 of these bytes. A confidence, log-sum-exp or
    resized weight of each label pixel takes 4. Plain PyTorch takes 76 for one copy of the resized logits.

    Counts what is requested: the allocator's own count includes up to 1 MiB of the rest of a block that it does not split.
    """
    given = inputs(scale=4)
    run(name, *given)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    run(name, *given)
    extra = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before - given[0].nbytes
    if name.startswith(("nfd", "kd", "cwd")):
        most = 0.01 * 2 * given[0].nbytes + 2**20
    else:
        most = (16 if name.startswith("tse") else 12) * given[3].numel()
    assert extra <= most, f"{extra} bytes, at most {most}; {extra / given[3].numel():.2f} bytes a label pixel"
