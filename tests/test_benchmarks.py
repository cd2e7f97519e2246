"""The logic of the benchmarks: what is timed, excluded, stored and predicted."""

import json
import re
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import bench_step, cases, gpu_check, gpu_kernels, harness, publish, report, training
from benchmarks.harness import Case
from benchmarks.roofline import GPU, GPUS, Work, special_function_rate
from fastkd import backends, cli
from fastkd.train.runs import read_run

SHAPE = (2, 3, 4, 8)


@pytest.fixture
def no_compile(monkeypatch):
    """Replaces the rival "compile" by eager mode and skips emptying the caches: the same logic in a second."""
    monkeypatch.setattr(torch, "compile", lambda loss, **_: loss)
    monkeypatch.setitem(harness.FLUSH_BYTES, "cpu", 4)


def square(student, teacher):
    return (student - teacher).square().sum()


def make(op="square", **rivals):
    return Case(
        op, SHAPE, torch.float32, lambda device, shape: {"ours": square, "eager": square} | rivals, Work(1e3, 1e3)
    )


def by_rival(records):
    return {record["rival"]: record for record in records}


def record(rival="ours", ms="", commit="a", device="box", op="NFD", **more):
    key = {"device": device, "op": op, "shape": "8x512x64x128", "size": "", "dtype": "bfloat16"}
    times = {"p20_ms": ms, "median_ms": ms, "p80_ms": ms}
    return dict.fromkeys(harness.COLUMNS, "") | key | times | {"rival": rival, "commit": commit, "torch": "2"} | more


def test_percentiles():
    assert harness.percentiles([5.0, 1.0, 4.0, 2.0, 3.0, 6.0, 7.0, 8.0, 9.0]) == (2.0, 5.0, 8.0)


def test_every_rival_is_timed(no_compile):
    records = by_rival(harness.run(make(), "cpu", 0.01))
    assert set(records) >= {"ours", "eager", "compile"}
    for name in ("ours", "eager", "compile"):
        low, median, high = (float(records[name][c]) for c in ("p20_ms", "median_ms", "p80_ms"))
        assert 0 < low <= median <= high
        assert float(records[name]["error"]) < 1e-6
        assert not records[name]["note"]
    ours = harness.rows(records.values())[(records["ours"]["device"], *make().key)]
    assert ours.ratio("eager") > 0
    assert ours.over_floor > 0
    assert ours.copy_share() > 0


@pytest.mark.parametrize("wrong", [1.01, float("nan")])
def test_no_speed_where_the_error_check_fails(no_compile, wrong):
    records = harness.run(make(ours=lambda s, t: wrong * square(s, t)), "cpu", 0.01)
    ours = by_rival(records)["ours"]
    assert not any(ours[c] for c in ("p20_ms", "median_ms", "p80_ms"))
    assert "error check failed" in ours["note"]
    assert by_rival(records)["eager"]["median_ms"]
    (row,) = harness.rows(records).values()
    assert row.ratio("eager") is None
    assert row.over_floor is None
    line = report.losses_table({("box", *make().key): row}, {}).splitlines()[2]
    assert line.count("–") >= 4
    assert "error check failed" in line


def test_a_rival_that_cannot_run_says_why(no_compile):
    def broken(student, teacher):
        raise RuntimeError("no compiler\nand more")

    records = by_rival(harness.run(make(liger="it is not here", eager=square, broken=broken), "cpu", 0.01))
    assert records["liger"]["note"] == "it is not here"
    assert records["broken"]["note"] == "RuntimeError: no compiler"
    assert records["ours"]["median_ms"]


def test_too_little_memory(no_compile, monkeypatch):
    """The check runs on sizes that fit; rivals that do not fit are skipped, our kernel is not."""
    needed = harness.float64_bytes(make())
    assert needed == 8 * 8 * 2 * 3 * 4 * 8
    monkeypatch.setattr(harness, "free_bytes", lambda device: 0.6 * needed)
    assert "checked on 1 of 2 samples" in by_rival(harness.run(make(), "cpu", 0.01))["ours"]["note"]
    monkeypatch.setattr(harness, "free_bytes", lambda device: 0.5 * needed - 1)
    (only,) = harness.run(make(), "cpu", 0.01)
    assert "float64 check of one sample needs" in only["note"]
    eight = Case("square", (8, *SHAPE[1:]), torch.float32, make().rivals, Work(1e3))
    monkeypatch.setattr(harness, "free_bytes", lambda device: harness.float64_bytes(eight) / 4)
    records = by_rival(harness.run(eight, "cpu", 0.01))
    assert records["ours"]["median_ms"]
    assert not records["eager"]["median_ms"]
    assert "are free" in records["eager"]["note"]


def test_rows_are_appended_and_resumed(no_compile, tmp_path):
    path = tmp_path / "results" / "cpu.csv"
    first = harness.measure([make()], path, "cpu", seconds=0.01)
    assert harness.read(path) == first
    again = harness.measure([make(), make("other")], path, "cpu", resume=True, seconds=0.01)
    assert {r["op"] for r in again} == {"other"}
    assert harness.read(path) == first + again
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"cpu\.csv has the columns a,b; expected date,"):
        harness.append(first, path)
    assert path.read_text() == "a,b\n1,2\n"
    path.write_text(",".join(harness.COLUMNS) + "\n1,2\n")
    with pytest.raises(ValueError, match=r"cpu\.csv has a row"):
        harness.read(path)


def test_newest_run_of_a_case():
    """Rows of different runs are never compared; of two machines, the last measured one is used."""
    old = [record("ours", "2", "a"), record("eager", "8", "a"), record("compile", "4", "a")]
    new = [record("ours", "1", "b"), record("eager", "3", "b")]
    (row,) = harness.rows(old + new).values()
    assert row.ratio("eager") == 3
    assert row.ratio("compile") is None
    other = [record("ours", "5", "a", device="other"), record("eager", "10", "a", device="other")]
    both = harness.rows(old + other + new)
    assert len(both) == 2
    assert [key[0] for key in harness.newest(both)] == ["box"]


def test_roofline_by_hand():
    gpu = GPU(bandwidth=2e12, units=100, clock=1e9, source="")
    assert gpu.exponentials_per_second == 1.6e12
    assert Work(4e6, 1.6e6).seconds(gpu.bandwidth, gpu.exponentials_per_second) == 2e-6  # memory
    assert Work(1e6, 1.6e7).seconds(gpu.bandwidth, gpu.exponentials_per_second) == 1e-5  # exponentials
    assert Work(4e6, 1e9).seconds(2e12, None) == 2e-6
    assert special_function_rate("NVIDIA H100 80GB HBM3") == 16 * 132 * 1.98e9
    assert special_function_rate("some other card") is None
    # 5 × 8·512·64·128 × 2 bytes at 3.35 TB/s; 2 × 16·150·512·512 exponentials at 4.18 a picosecond.
    nfd = cases.LOSSES["nfd"]((8, 512, 64, 128), None, torch.bfloat16)
    assert nfd.work.bytes == 335_544_320
    assert nfd.work.seconds(GPUS["H100"].bandwidth, GPUS["H100"].exponentials_per_second) == pytest.approx(
        100.2e-6, rel=1e-3
    )
    ce = cases.LOSSES["resized_ce"]((16, 150, 64, 64), (512, 512), torch.bfloat16)
    assert ce.work.exponentials == 1_258_291_200
    assert ce.work.seconds(GPUS["H100"].bandwidth, GPUS["H100"].exponentials_per_second) == pytest.approx(
        300.9e-6, rel=1e-3
    )


@pytest.mark.parametrize(
    ("name", "transfers", "label_bytes", "exponentials"),
    [
        ("nfd", 5, 0, 0),
        ("kd", 5, 0, 4 * 3 * 2 * 8),
        ("cwd", 5, 0, 4 * 3 * 2 * 8),
        ("resized_ce", 2, 8, 2 * 3 * 4 * 16),
        ("resized_kd", 3, 0, 4 * 3 * 4 * 16),
        ("resized_smooth_ce", 2, 8, 2 * 3 * 4 * 16),
        ("resized_focal_ce", 2, 8, 2 * 3 * 4 * 16),
        ("resized_dice", 3, 16, 2 * 3 * 4 * 16),
        ("resized_ce_dice", 3, 16, 2 * 3 * 4 * 16),
        ("resized_bce", 2, 3, 3 * 4 * 16),
        ("kd_sigmoid", 3, 0, 2 * 3 * 2 * 8),
        ("resized_kd_sigmoid", 3, 0, 2 * 3 * 4 * 16),
        ("rdd_tfe", 5, 8, 2 * 3 * 4 * 16),
        ("rdd_tse", 5, 10, 4 * 3 * 4 * 16),
    ],
)
def test_work_is_counted_and_rivals_agree(no_compile, name, transfers, label_bytes, exponentials):
    """On logits (1, 3, 2, 8) and labels of 4 × 16 in bf16."""
    case = cases.LOSSES[name]((1, 3, 2, 8), (4, 16), torch.bfloat16)
    assert case.work == Work(transfers * 3 * 16 * 2 + label_bytes * 64, exponentials)
    records = by_rival(harness.run(case, "cpu", 0.01))
    assert records["ours"]["median_ms"], records["ours"]["note"]
    assert records["eager"]["median_ms"], records["eager"]["note"]


def test_a_gpu_round_times_the_gpu(monkeypatch):
    """With a fake clock: flushes that are long enough, events around the call only, one synchronisation per round."""
    clock, waits = [0.0], [0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock[0]

        def elapsed_time(self, end):
            return end.at - self.at

    class Flush:
        fills = 0

        def fill_(self, value):
            clock[0] += 0.1
            Flush.fills += 1

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.__setitem__(0, waits[0] + 1))
    monkeypatch.setattr(harness, "host_microseconds", lambda call, times: 440.0)
    calls = {
        "fast": lambda: clock.__setitem__(0, clock[0] + 0.02),
        "slow": lambda: clock.__setitem__(0, clock[0] + 3.0),
    }
    flush = Flush()
    a_round = harness._GpuRound(calls, flush)
    Flush.fills, waits[0] = 0, 0
    times = a_round(calls, flush)
    assert times == {"fast": pytest.approx(0.02), "slow": pytest.approx(3.0)}
    assert Flush.fills == 2 * 7  # 0.44 ms on the host plus half, hidden behind fills of 0.1 ms
    assert waits[0] == 1


def test_cases_of_the_recipes():
    gpu = cases.gpu_cases()
    assert len({case.key for case in gpu}) == len(gpu)
    assert gpu[0].key == ("NFD", "16x512x64x64", "", "bfloat16")
    assert {case.op for case in cases.cpu_cases(["rdd_tse"])} == {"RDD TSE"}
    assert all(case.targets for case in cases.cpu_cases() if case.dtype == torch.float32)


def test_every_loss_of_the_kernel_times_runs(monkeypatch):
    """In both layouts on small maps: errors before the kernel should not cost GPU time."""
    for name in ("ADE20K", "Cityscapes", "Cityscapes, full"):
        monkeypatch.setitem(cases.RECIPES, name, cases.Recipe(1, 3, (32, 64)))
    monkeypatch.setattr(gpu_kernels, "BACKENDS", ("auto", "eager"))
    monkeypatch.setattr(gpu_kernels, "COMPOSED", tuple(cases.LOSSES))
    ran = 0
    for key in gpu_kernels.measured():
        for backend, call in gpu_kernels.calls(*key):
            call()
            ran += backend != "eager"
    assert ran == len(gpu_kernels.measured())


def test_the_choice_on_a_gpu_follows_the_committed_rows():
    """The default backend is the faster one by kernel time, or slower by less host time than it saves."""
    commit = re.search(r" at (\w+)$", backends.BASIS)[1]
    records = harness.read(harness.RESULTS / "cuda_kernels.csv")
    times = {
        (r["recipe"], r["loss"], r["layout"], r["dtype"], r["backend"]): float(r["kernel_us"])
        for r in records
        if r["commit"] == commit
    }
    host = {
        (r["loss"], r["backend"]): float(r["forward_us"]) + float(r["backward_us"])
        for r in harness.read(harness.RESULTS / "cuda_host.csv")
    }
    names = ("kd_loss", "resized_cross_entropy", "resized_kd_loss")
    saved = {name: host[name, "triton"] - host[name, "default"] for name in names}
    compared, slower = set(), 0
    for (recipe, loss, layout, dtype, backend), us in times.items():
        op = publish.OPERATORS.get(loss)
        if backend != "triton" or (recipe, loss, layout, dtype, "cuda") not in times or op is None:
            continue
        assert backends.CHOICE[op]["cuda"] == ("cuda", "triton")
        other = times[recipe, loss, layout, dtype, "cuda"]
        if op == "nfd":
            chosen = publish.default_backend(recipe, loss, layout)
            assert chosen == ("cuda" if other < us else "triton"), (recipe, layout)
        else:
            allowed = saved["kd_loss"] if loss in ("kd", "kd_sigmoid") else min(saved[name] for name in names[1:])
            assert other < us + allowed, (recipe, loss, layout)
            slower += other > us
        compared.add(op)
    assert compared == {op for op, order in backends.CHOICE.items() if len(order["cuda"]) > 1} - {"difficulty_mask"}
    assert slower < len(times) / 6
    for loss in ("rdd_tse", "rdd_tfe"):  # also the difficulty mask
        key = ("Cityscapes", loss, "NCHW", "bfloat16")
        stage = f"rdd_loss, {loss.removeprefix('rdd_').upper()}"
        assert times[(*key, "auto")] < times[(*key, "triton")] + host[stage, "triton"] - host[stage, "default"]


def test_tables_say_what_is_measured_and_what_is_not():
    case = cases.LOSSES["nfd"]((8, 512, 64, 128), None, torch.bfloat16)
    assert "| 100.2 m |" in report.predictions_table([case], {})
    assert report.predictions_table([case], {}).endswith("| not yet run |")
    ours = record("ours", "0.1234", device="H100", bytes="335544320", copy_gbs="3000", floor_ms="0.1", host_us="31")
    found = harness.rows([ours, record("eager", "1.0", device="H100")])
    assert report.predictions_table([case], found).endswith("| 123.4 (H100) |")
    table = report.losses_table(found, {case.key: {"eager": 9, "compile": 2}})
    assert "8.10× (≥ 9: missed)" in table
    assert "91%" in table  # 335544320 bytes in 123.4 µs are 2719 GB/s of 3000
    targets = publish.targets_table(found, [])
    assert "91% (NFD 8x512x64x128 bfloat16)" in targets
    assert "31 µs" in targets
    assert publish.targets_table({}, []).count("not yet run") == len(publish.TARGETS) + 1


def test_published_pages_are_those_of_the_rows():
    for path, text in publish.pages().items():
        assert path.read_text() == text, f"{path.name} is out of date; run python -m benchmarks.publish"


def test_readmes_comparison_is_that_of_the_rows():
    """The four numbers next to the code at its top."""
    found = harness.newest(harness.rows(harness.read(publish.RESULTS / "cuda.csv")))
    (row,) = [row for key, row in found.items() if key[1:3] == ("resized CE", "16x150x64x64")]
    said = (publish.ROOT / "README.md").read_text()
    eager, ours = (row.value(rival, "median_ms") for rival in ("eager", "ours"))
    memory, own = (row.value(rival, "peak_bytes") for rival in ("eager", "ours"))
    assert f"# before: {eager:.1f} ms and {memory / 1e9:.1f} GB beyond" in said
    assert f"# after: {ours:.2f} ms and {own / 1e6:.0f} MB" in said


def test_readmes_ratios_are_those_of_the_kernel_times():
    times, _ = publish.kernel_times(harness.read(publish.RESULTS / "cuda_kernels.csv"))
    ratios = {150: [], 19: []}
    for (recipe, loss, layout), found in times.items():
        if layout == "NCHW" and loss not in ("NFD", "KD", "CWD", "KD, sigmoid"):
            ratios[cases.RECIPES[recipe].classes].append(found["eager"] / found["default"])
    most, few = (f"{min(ratios[n]):.0f} to {max(ratios[n]):.0f} times" for n in (150, 19))
    said = " ".join((publish.ROOT / "README.md").read_text().split())
    assert f"are {most} faster than eager with 150 classes, {few} with 19" in said


def test_kernel_tables_do_not_mix_commits_of_ours():
    def row(backend, us, commit, loss="resized_ce"):
        place = {
            "recipe": "Cityscapes",
            "layout": "NCHW",
            "dtype": "bfloat16",
            "device": "NVIDIA H100",
            "kernels": "Triton",
        }
        return place | {"loss": loss, "backend": backend, "kernel_us": us, "commit": commit}

    old = [row("triton", "9", "36b6442"), row("cuda", "8", "old"), row("eager", "100", "old")]
    times, floors = publish.kernel_times([*old, row("triton", "5", "new"), row("cuda", "4", "new", "resized_kd")])
    assert times == {
        ("Cityscapes", "resized CE", "NCHW"): {"triton": 5.0, "eager": 100.0},
        ("Cityscapes", "resized KD", "NCHW"): {"cuda": 4.0, "default": 4.0},
    }
    assert floors["Cityscapes", "resized CE"] == pytest.approx(38.1, abs=0.1)
    line = report.kernels_table(times, floors).splitlines()[-1]
    assert line.startswith("| Cityscapes | resized KD | 4.0 | – | 4.0 | – | – | 0.1× |")


def test_readme_must_have_its_markers():
    assert (
        publish.between_markers("a\n<!-- cpu -->\nold\n<!-- end cpu -->\nb", "cpu", "new")
        == "a\n<!-- cpu -->\nnew\n<!-- end cpu -->\nb"
    )
    with pytest.raises(ValueError, match="must have"):
        publish.between_markers("no markers", "cpu", "new")


def test_rows_of_another_folder_are_taken_in_once(monkeypatch, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    monkeypatch.setattr(publish, "RESULTS", here)
    harness.append([record("ours", "1")], there / "cuda.csv")
    publish.add(there)
    publish.add(there)
    assert harness.read(here / "cuda.csv") == [record("ours", "1")]


def test_step_hands_the_gradient_on():
    """Losses on detached outputs give the student the same gradient as one backward through everything."""

    def network(seed):
        torch.manual_seed(seed)
        inner = torch.nn.Module()
        inner.backbone = lambda x: {"out": x, "aux": x}
        inner.classifier, inner.aux_classifier = torch.nn.Conv2d(3, 5, 3), torch.nn.Conv2d(3, 5, 3)
        return bench_step.Network(inner, torch.nn.Conv2d(3, 4, 1))

    teacher, student = network(0).requires_grad_(False), network(1)
    images, target = torch.randn(2, 3, 10, 10), torch.randint(0, 5, (2, 16, 16))
    got = {}
    for name, parameter in student.named_parameters():
        parameter.register_hook(lambda grad, name=name: got.__setitem__(name, grad))
    for make_losses in bench_step.LOSSES.values():
        for ours in (True, False):
            whole, losses = bench_step.Step(teacher, student, images, target)(make_losses(ours))()
            assert 0 < losses < whole
            stepped = dict(got)
            make_losses(ours)(student(images), teacher(images), target).backward()
            student.zero_grad()
            assert stepped
            for name, grad in got.items():
                torch.testing.assert_close(stepped[name], grad)
            got.clear()


def test_bench_command(no_compile, tmp_path, capsys):
    words = ["bench", "--shape", "1,3,4,8", "--size", "8,16", "--dtype", "bf16", "--device", "cpu", "--seconds", "0.01"]
    files = ["--plot", str(tmp_path / "a.png"), "--csv", str(tmp_path / "a.csv")]
    assert cli.main([*words, "--losses", "kd", "resized_ce", *files]) == 0
    out = capsys.readouterr().out
    assert "| KD | 1×3×4×8 | bfloat16 |" in out
    assert "| resized CE | 1×3×4×8 → 8×16 | bfloat16 |" in out
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert {r["op"] for r in harness.read(tmp_path / "a.csv")} == {"KD", "resized CE"}
    assert cli.main(["bench", "--shape", "1,3,4,8", "--losses", "ce"]) == 1
    assert "got ce, expected some of nfd, kd," in capsys.readouterr().err
    for shape in ("1,3,4", "1,3,x,8"):
        with pytest.raises(SystemExit):
            cli.main(["bench", "--shape", shape])
        assert "--shape: must be 4 values, each a whole number at least 1" in capsys.readouterr().err


def step(name, code, **more):
    return gpu_check.Step(name, more.pop("seconds", 60), [sys.executable, "-c", code], **more)


def test_gpu_check_goes_on_where_it_stopped(tmp_path, capsys):
    marker = tmp_path / "seen"
    first = step("build", f"open({str(marker)!r}, 'a').write('x')", vital=True)
    failing = step("tests", "print('FAILED tests/test_x.py::test_y'); print('1 failed, 2 passed'); raise SystemExit(3)")
    last = step("numbers", "print('the table')")
    out = tmp_path / "out"
    assert gpu_check.check([first, failing, last], out, 8, ["a machine"]) == 1
    summary = (out / "summary.md").read_text()
    assert "| build | done |" in summary
    assert "| tests | failed, exit 3: see log.txt |" in summary
    assert "FAILED tests/test_x.py::test_y" in summary
    assert "1 failed, 2 passed" in summary
    assert summary.rstrip().endswith("the table")
    assert gpu_check.check([first, step("tests", "print('3 passed')"), last], out, 8, []) == 0
    assert marker.read_text() == "x"  # the first was not run again
    assert "build: done before" in capsys.readouterr().out
    assert "FAILED" not in (out / "summary.md").read_text()
    assert {path.name for path in out.iterdir()} == {"log.txt", "summary.md"}


def test_gpu_check_leaves_out_what_cannot_run(tmp_path):
    steps = [
        step("build", "raise SystemExit(1)", vital=True),
        step("tests", "print(1)", needs=("torch", "no_such_module")),
        step("losses", "print(1)"),
    ]
    assert gpu_check.check(steps, tmp_path, 8, []) == 1
    summary = (tmp_path / "summary.md").read_text()
    assert "left out: no no_such_module; pip install no_such_module, or --wheels" in summary
    assert "| losses | left out: build failed |" in summary
    assert gpu_check.check([step("losses", "print(1)")], tmp_path / "b", 0, []) == 1
    assert "no time left" in (tmp_path / "b" / "summary.md").read_text()


def test_gpu_check_ends_a_step_and_its_children(tmp_path):
    code = (
        "import subprocess, sys, time; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); time.sleep(60)"
    )
    begin = time.monotonic()
    assert gpu_check.check([step("tests", code, seconds=3)], tmp_path, 8, []) == 1
    assert time.monotonic() - begin < 30
    assert "| tests | out of time; run again to go on |" in (tmp_path / "summary.md").read_text()
    pid = gpu_check.sections(tmp_path / "log.txt")["tests"][0].split()[0]
    state = subprocess.run(["ps", "-o", "stat=", "-p", pid], capture_output=True, text=True, check=False).stdout.strip()
    assert state in ("", "Z") or state.startswith("Z")


def test_gpu_check_without_a_gpu_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, str(gpu_check.ROOT / "benchmarks" / "gpu_check.py"), "--out", str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "gpu_check: torch finds no GPU" in run.stderr
    assert not (tmp_path / "out").exists()


def scores(run: str, seeds: str, miou: str, **values: str) -> dict[str, str]:
    fixed = {
        "run": run,
        "seeds": seeds,
        "miou": miou,
        "pixel_accuracy": "80",
        "labels": "30",
        "unlabelled": "0",
        "steps": "9",
    }
    return dict.fromkeys(training.COLUMNS, "") | fixed | {"class_iou": "road 90.0; traffic light 10.0"} | values


def test_table_of_training_runs():
    rows = [scores("plain", "0", "30"), scores("plain", "1", "32", class_iou="road 91.0; traffic light 20.0")]
    rows += [scores("KD", "1", "33", unlabelled="450"), scores("KD", "0", "29"), scores("KD", "0", "29.5")]
    runs = training.by_run(rows)
    plain, kd = training.table(runs).splitlines()[2:]
    assert plain == "| plain | 30 | 9 | 31.0 ± 1.4 |  | 80.0 ± 0.0 |  |"
    assert kd == "| KD | 30 + 450 without | 9 | 31.2 ± 2.5 | +1.0, −0.5 | 80.0 ± 0.0 | +0.0, +0.0 |"
    assert training.class_table(runs).splitlines()[-1] == "| traffic light | 15.0 | 10.0 |"

    longer = training.by_run([*rows, scores("plain, as long", "0", "31")])
    head, _, _, kd, longer = training.table(longer).splitlines()
    assert head.count("| at equal time |") == 2
    assert "| +1.0, −0.5 | −1.5 |" in kd
    assert longer == "| plain, as long | 30 | 9 | 31.0 | +1.0 |  | 80.0 | +0.0 |  |"


def test_table_of_training_runs_kept_as_a_mean():
    rows = [
        scores(run, "0 1", "30", miou_deviation="1.5", against_plain=d) for run, d in (("plain", ""), ("KD", "0.2 -1"))
    ]
    assert training.table(training.by_run(rows)).splitlines()[-1] == "| KD | 30 | 9 | 30.0 ± 1.5 | +0.2, −1.0 | 80.0 |"


def test_row_of_a_training_run(tmp_path):
    images = {"labelled": {"images": 30}, "unlabelled": {"images": 450}}
    found = {
        "name": "nfd-1", "method": "nfd+rdd", "seed": 1, "steps": 9, "miou": 0.3456, "pixel_accuracy": 0.8, "seconds": 1.6,
        "images": images, "class_iou": {"road": 0.9, "sky": None}, "versions": {"torch": "2", "git": "abc"},
    }  # fmt: skip
    (tmp_path / "result.json").write_text(json.dumps(found))
    (tmp_path / "config.yaml").write_text("loss: {nfd: {weight: 5.0}, rdd: {weight: 1.0, kd_weight: 4.0}}")
    row = training.record(read_run(tmp_path), "page", "scores", commit="abc", threads="1")
    wanted = {"run": "nfd", "seeds": "1", "weights": "5 4", "miou": "34.56", "seconds": "2", "class_iou": "road 90.0"}
    assert {key: row[key] for key in wanted} == wanted
    (tmp_path / "result.json").unlink()
    with pytest.raises(ValueError, match="did not finish"):
        training.record(read_run(tmp_path), "page", "scores", commit="abc", threads="1")
