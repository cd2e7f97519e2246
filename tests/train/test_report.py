"""The report and its pictures, from run directories that are complete, truncated or broken."""

import base64
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

from fastkd.train.pictures import colourise, heatmap, overlay, panel  # noqa: E402
from fastkd.train.report import write_report  # noqa: E402
from fastkd.train.runs import grouped, load_runs, read_run, verdict  # noqa: E402

CLASSES = ("road", "sky", "traffic sign")
PALETTE = np.array([(128, 64, 128), (70, 130, 180), (220, 220, 0)], dtype=np.uint8)


def make_run(root, name, method, miou, *, model="unet small", steps=40, seed=0, finished=True):
    path = root / name
    path.mkdir(parents=True)
    with (path / "log.jsonl").open("w") as log:
        for step in range(1, steps + 1):
            loss = 2 * math.exp(-step / 10) + 0.1
            log.write(json.dumps({"step": step, "time": 1.0 * step, "split": "train", "loss": loss, "lr": 0.1}) + "\n")
            if step % 10 == 0:
                log.write(
                    json.dumps(
                        {
                            "step": step,
                            "time": 1.0 * step,
                            "split": "val",
                            "miou": miou * step / steps,
                            "pixel_accuracy": 0.8,
                        }
                    )
                    + "\n"
                )
    (path / "config.yaml").write_text(f"name: {name}\nmethod: {method}\nseed: {seed}\n")
    if finished:
        result = {
            "name": name, "method": method, "model": model, "params": 1_900_000, "steps": steps, "miou": miou,
            "pixel_accuracy": 0.8, "class_iou": {"road": miou, "sky": 0.5, "traffic sign": None},
            "seconds_per_step": 0.25, "loss_share": 0.07, "seconds": 0.25 * steps, "seed": seed, "versions": {"torch": "2.10"},
        }  # fmt: skip
        (path / "result.json").write_text(json.dumps(result))
    return path


@pytest.fixture
def runs(tmp_path):
    return [
        make_run(tmp_path, "teacher", "none", 0.70, model="unet large"),
        make_run(tmp_path, "plain", "none", 0.50),
        make_run(tmp_path, "nfd", "nfd", 0.55),
        make_run(tmp_path, "rdd", "rdd", 0.502),
        make_run(tmp_path, "cwd", "cwd", 0.45),
    ]


class Strict(HTMLParser):
    """Checks that tags nest, and collects the resources that a page would load."""

    VOID = ("meta", "img", "br", "path", "use", "link")

    def __init__(self):
        super().__init__()
        self.stack, self.loads, self.ids = [], [], []

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.stack.append(tag)
        assert tag not in ("script", "link", "iframe")
        self.loads += [v for k, v in attributes if k in ("src", "href", "xlink:href")]
        self.ids += [v for k, v in attributes if k == "id"]

    def handle_startendtag(self, tag, attributes):
        self.loads += [v for k, v in attributes if k in ("src", "href", "xlink:href")]
        self.ids += [v for k, v in attributes if k == "id"]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.stack.pop() == tag


def parse(page):
    parser = Strict()
    parser.feed(page)
    assert parser.stack == []
    return parser


def test_page_is_whole_and_self_contained(runs, tmp_path):
    picture = Image.new("RGB", (8, 4), (200, 10, 10))
    picture.save(tmp_path / "p.png")
    picture.save(tmp_path / "p.jpg")
    path = write_report(
        tmp_path / "out", runs, title="A <title>", notes="First & only.\n\nSecond.",
        panels=[("Drawn", tmp_path / "p.png"), ("Photo", tmp_path / "p.jpg"), ("Gone", tmp_path / "none.png")],
    )  # fmt: skip
    page = path.read_text()
    parser = parse(page)
    assert all(link.startswith(("#", "data:image/")) for link in parser.loads)
    assert len(parser.ids) == len(set(parser.ids))
    assert {link[1:] for link in parser.loads if link.startswith("#")} <= set(parser.ids)
    assert not re.search(r"url\((?!#)|@import", page)
    assert "A &lt;title&gt;" in page
    assert "<title>A <title>" not in page
    assert "First &amp; only." in page
    assert "picture left out" in page
    inside = re.findall(r'src="data:image/(png|jpeg);base64,([^"]+)"', page)
    assert [kind for kind, _ in inside] == ["png", "jpeg"]
    for (_, data), file in zip(inside, ("p.png", "p.jpg"), strict=True):
        assert base64.b64decode(data) == (tmp_path / file).read_bytes()
    for text in ("55.0", "nfd", "1.90 M", "0.25", "7.0", "traffic sign", "method: rdd", "torch 2.10"):
        assert text in page
    assert page.count("<svg") == 2
    assert Image.open(tmp_path / "out" / "curves.png").size[0] > 800


def test_report_is_reproducible(runs, tmp_path):
    one = write_report(tmp_path / "one", runs[:2], title="T").read_bytes()
    assert one == write_report(tmp_path / "two", runs[:2], title="T").read_bytes()


def test_markdown(runs, tmp_path):
    write_report(tmp_path / "out", runs, title="T")
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| nfd | nfd | 55.0 | 80.0 | 0.25 | 7.0 | 1.90 M | 40 | \N{EN DASH} | 10 s |" in text
    # The teacher is not a student. The best student is marked; with ties, all of them.
    assert "| road | 70.0 | 50.0 | **55.0** | 50.2 | 45.0 |" in text
    assert "| sky | 50.0 | **50.0** | **50.0** | **50.0** | **50.0** |" in text
    assert "| traffic sign |" + " \N{EN DASH} |" * 5 in text


def test_what_the_losses_cost(runs, tmp_path):
    def with_losses(path, losses):
        result = json.loads((path / "result.json").read_text()) | {"losses": losses}
        (path / "result.json").write_text(json.dumps(result))

    with_losses(
        runs[2],
        {
            "backends": ["cpu"],
            "ours": {"bytes": 3 * 2**19, "seconds": 0.02, "images": 8},
            "eager": {"bytes": 3 * 2**30, "seconds": 0.5, "images": 1},
            "note": None,
        },
    )
    with_losses(runs[3], {"backends": ["triton"], "ours": None, "eager": None, "note": "not measured: <reason>"})
    with_losses(runs[4], {"backends": 3, "ours": {"bytes": "many"}})
    page = write_report(tmp_path / "out", runs, title="T").read_text()
    parse(page)
    for text in ("1.5 MiB", "3 GiB*", "25×", "2048×", "rdd: not measured: &lt;reason&gt;."):
        assert text in page
    assert "| nfd | cpu | 7.0 | 20 | 500* | 25× | 1.5 MiB | 3 GiB* |" in (tmp_path / "out" / "table.md").read_text()
    assert "What the losses cost" not in write_report(tmp_path / "out", runs[:2], title="T").read_text()


def judged(paths):
    return "\n".join(verdict(grouped(load_runs(paths))))


def test_verdict_sorts_gains_losses_and_ties(runs):
    text = judged(runs)
    assert "gap is 20.0 points" in text
    assert "Gained over the plain student, in points of mIoU: nfd (+5.0, 25 % of the gap)." in text
    assert "No clear difference from the plain student: rdd (+0.2)." in text
    assert "Lost against the plain student: cwd (-5.0)." in text
    assert "Not every method has several seeds" in text


def test_verdict_without_a_plain_student(runs):
    text = judged([runs[0], runs[2]])
    assert "No plain student of the same model was finished, so nothing can be said of nfd" in text
    assert "Gained" not in text


def test_a_teacher_may_be_a_wider_network_of_the_same_name(runs):
    for path, width in zip(runs, (256, *4 * [64]), strict=True):
        result = json.loads((path / "result.json").read_text()) | {"model": "unet"}
        (path / "result.json").write_text(json.dumps(result))
        with (path / "config.yaml").open("a") as config:
            config.write(f"model: {{options: {{decoder_channels: {width}}}}}\n")
    assert [group.role for group in grouped(load_runs(runs))] == ["teacher", "plain", *3 * ["distilled"]]
    assert "gap is 20.0 points" in judged(runs)


def test_verdict_names_unlike_runs(runs, tmp_path):
    longer = make_run(tmp_path, "kd", "kd", 0.56, steps=80, seed=3)
    text = judged([*runs, longer])
    assert (
        "kd (+6.0, 30 % of the gap, in 2.0 times the time) [not like for like: steps 80 instead of 40, seed 3 instead of 0]"
    ) in text


def test_verdict_at_equal_time(runs, tmp_path):
    """A second plain student, trained for as long as a distilled one, is also compared."""
    for path in runs[2:]:
        result = json.loads((path / "result.json").read_text()) | {"seconds": 20.0}
        (path / "result.json").write_text(json.dumps(result))
    paths = [*runs, make_run(tmp_path, "plain, as long", "none", 0.53, steps=80)]
    groups = grouped(load_runs(paths))
    assert len({group.colour for group in groups}) == len(groups)
    text = "\n".join(verdict(groups))
    assert (
        "Gained over the plain student, in points of mIoU: nfd (+5.0, 25 % of the gap, in 2.0 times the time)." in text
    )
    assert (
        "Gained over plain, as long (53.0 %), in points of mIoU: "
        "nfd (+2.0, in 1.0 times the time) [not like for like: steps 40 instead of 80]."
    ) in text
    assert "Lost against plain, as long (53.0 %): rdd (-2.8" in text


@pytest.fixture
def seeds(tmp_path):
    """A teacher, and three seeds each of a plain student and two distilled ones; seeds differ more than methods."""
    paths = [make_run(tmp_path, "teacher", "none", 0.70, model="unet large")]
    for name, method, change in (("plain", "none", 0.0), ("nfd", "nfd", 0.02), ("kd", "kd", None)):
        for seed, base in enumerate((0.48, 0.50, 0.53)):
            noise = (0.03, -0.02, 0.01)[seed] if change is None else change + 0.001 * seed * (change > 0)
            paths.append(make_run(tmp_path, f"{name}-s{seed}", method, base + noise, seed=seed))
    return paths


def test_seeds_of_one_configuration_are_one_row(seeds, tmp_path):
    groups = grouped(load_runs(seeds))
    assert [(group.name, len(group.runs)) for group in groups] == [("teacher", 1), ("plain", 3), ("nfd", 3), ("kd", 3)]
    plain = groups[1]
    assert plain.mean("miou") == pytest.approx((0.48 + 0.50 + 0.53) / 3)
    assert plain.spread("miou") == pytest.approx(math.sqrt((0.0233333**2 + 0.0033333**2 + 0.0266667**2) / 2), rel=1e-4)
    assert plain.curve("val/miou")[-1] == pytest.approx((40, 0.5033333, 0.48, 0.53))
    page = write_report(tmp_path / "out", seeds, title="T").read_text()
    parse(page)
    for text in ("nfd (3 seeds)", "52.4 ± 2.6", "Each seed", "A band spans the seeds"):
        assert text in page
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| plain (3 seeds) | none | 50.3 ± 2.5 | 80.0 ± 0.0 |" in table
    assert "| plain-s2 | 2 | 53.0 |" in table


def test_verdict_over_seeds(seeds):
    """Per seed nfd always gains 2 points although the seeds differ by 5; kd gains in one seed what it loses in
    another."""
    text = judged(seeds)
    assert "the plain student (plain) 50.3 ± 2.5 %" in text
    assert "Gained over the plain student, in points of mIoU: nfd (+2.1 ± 0.1 over 3 seeds, 11 % of the gap)." in text
    assert "No clear difference from the plain student: kd (+0.7 ± 2.5 over 3 seeds, 3 % of the gap)." in text
    assert "twice its standard error" in text
    one = judged([*seeds[:4], seeds[4]])
    assert "nfd-s0 (+2.0 with seed 0, 10 % of the gap)." in one
    assert "Not every method has several seeds" in one


def test_runs_of_other_configurations_are_no_seeds(tmp_path):
    paths = [make_run(tmp_path, f"kd-{i}", "kd", 0.5, seed=i) for i in range(2)]
    paths.append(make_run(tmp_path, "longer", "kd", 0.5, seed=2, steps=80))
    paths.append(make_run(tmp_path, "again", "kd", 0.5, seed=1))
    assert [len(group.runs) for group in grouped(load_runs(paths))] == [2, 1, 1]


def test_one_run_shows_its_losses_and_their_gradients(tmp_path):
    path = make_run(tmp_path, "kd", "kd", 0.5)
    with (path / "log.jsonl").open("a") as log:
        for step in (41, 42):
            line = {"step": step, "split": "train", "loss/task": 1.0, "loss/kd": 0.5, "grad/task": 0.1, "grad/kd": 0.2}
            log.write(json.dumps(line | {"grad_cosine": -0.25}) + "\n")
    page = write_report(tmp_path / "out", [path], title="T").read_text()
    parse(page)
    assert page.count("<svg") == 5
    assert "below 0 the two pull apart" in page
    assert "compare a run with itself" not in page
    assert Image.open(tmp_path / "out" / "curves.png").size[0] > 1600


def test_verdict_with_a_poor_teacher(tmp_path):
    paths = [
        make_run(tmp_path, "t", "none", 0.4, model="other"),
        make_run(tmp_path, "p", "none", 0.5),
        make_run(tmp_path, "k", "kd", 0.6),
    ]
    text = judged(paths)
    assert "no better than the plain student" in text
    assert "of the gap" not in text


def test_verdict_without_distillation(tmp_path):
    text = judged([make_run(tmp_path, "p", "none", 0.5)])
    assert text == "p reaches 50.0 % mIoU after 40 steps."
    text = judged([tmp_path / "p", make_run(tmp_path, "q", "none", 0.6)])
    assert "no distilled run to judge. The best run is q with 60.0 % mIoU" in text


def test_verdict_on_two_networks_is_in_the_order_of_the_page(tmp_path):
    kinds = [(model, *kind) for model in "ab" for kind in (("none", 0.5), ("kd", 0.6))]
    text = judged([make_run(tmp_path, f"{model} {method}", method, miou, model=model) for model, method, miou in kinds])
    assert text.index("The plain student (a none)") < text.index("a kd (+10.0)")
    assert text.index("a kd (+10.0)") < text.index("The plain student (b none)") < text.index("b kd (+10.0)")


def test_verdict_on_a_result_without_steps(tmp_path):
    path = make_run(tmp_path, "p", "none", 0.5)
    (path / "result.json").write_text('{"method": "none", "miou": 0.5}')
    assert judged([path]) == "p reaches 50.0 % mIoU."


def test_unfinished_run_is_shown_as_such(runs, tmp_path):
    cut = make_run(tmp_path, "stopped", "kd", 0.9, finished=False)
    log = cut / "log.jsonl"
    log.write_bytes(log.read_bytes()[:-40])  # within a line
    page = write_report(tmp_path / "out", [*runs, cut], title="T").read_text()
    parse(page)
    assert "unfinished" in page
    assert "(stopped)" in page
    assert "no result.json" in page
    assert "unreadable line" not in page
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| stopped | kd |" in text
    assert "unfinished or unreadable: stopped" in text


def test_broken_runs_never_stop_the_report(runs, tmp_path):
    def broken(name):
        return make_run(tmp_path, name, "kd", 0.5)

    empty = tmp_path / "empty"
    empty.mkdir()
    bad_json = broken("bad_json")
    (bad_json / "result.json").write_text('{"name": "bad_json", "miou": ')
    a_list = broken("a_list")
    (a_list / "result.json").write_text("[1, 2]")
    odd = broken("odd")
    (odd / "result.json").write_text(
        json.dumps(
            {"name": None, "method": 3, "miou": "high", "class_iou": [1], "params": None, "versions": 1, "seed": None}
        )
    )
    nan = broken("nan")
    (nan / "result.json").write_text(
        '{"method": "kd", "model": "unet small", "miou": NaN, "class_iou": {"road": Infinity}, "seconds": NaN}'
    )
    holes = broken("holes")
    (holes / "log.jsonl").write_text(
        'null\n[1]\n{"step": "x"}\n{"step": 1, "split": "train", "loss": NaN}\n{"step": 2, "split": "val", "miou": 0.1}\n'
    )
    (holes / "config.yaml").unlink()
    binary = broken("binary")
    (binary / "log.jsonl").write_bytes(b"\xff\xfe\x00\n" * 3)
    paths = [*runs, empty, tmp_path / "never", bad_json, a_list, odd, nan, holes, binary]
    page = write_report(tmp_path / "out", paths, title="T").read_text()
    parse(page)
    for words in (
        "no such run directory",
        "result.json cannot be read",
        "does not hold an object",
        "3 unreadable lines",
        "no config.yaml",
    ):
        assert words in page
    assert not re.search(r"<td[^>]*>(nan|inf|None)", page)
    assert "No run finished" in judged([empty, tmp_path / "never"])


def test_no_runs(tmp_path):
    with pytest.raises(ValueError, match="at least one run"):
        write_report(tmp_path, [], title="T")


def test_read_run(runs):
    run = read_run(runs[1])
    assert run.finished
    assert run.problems == []
    assert len(run.curves["train/loss"]) == 40
    assert run.curves["val/miou"][-1] == (40, 0.5)
    assert verdict([]) == ["No run finished: there is nothing to compare."]
    assert judged([make_run(runs[0].parent, "cut", "kd", 0.5, finished=False)]) == (
        "cut did not finish, or cannot be read; it stopped at step 40."
    )


# Panels


def test_colourise():
    label = torch.tensor([[0, 1], [2, 255]], dtype=torch.uint8)
    assert colourise(label, torch.from_numpy(PALETTE)).tolist() == [
        [[128, 64, 128], [70, 130, 180]],
        [[220, 220, 0], [0, 0, 0]],
    ]
    with pytest.raises(ValueError, match="holds 3, the palette has 3"):
        colourise(np.array([[3]]), PALETTE)
    with pytest.raises(ValueError, match="holds -1"):
        colourise(np.array([[-1, 2]]), PALETTE)


def test_overlay():
    image = np.full((1, 2, 3), 100, np.uint8)
    mixed = overlay(image, np.array([[1, 255]], np.uint8), PALETTE, alpha=0.5)
    assert mixed.tolist() == [[[85, 115, 140], [100, 100, 100]]]
    with pytest.raises(ValueError, match="same height and width"):
        overlay(image, np.zeros((2, 2), np.uint8), PALETTE)


def test_heatmap():
    ramp = heatmap(torch.linspace(-0.5, 1.5, 64)[None])
    assert ramp.shape == (1, 64, 3)
    assert ramp.dtype == np.uint8
    luminance = ramp[0].astype(float) @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(luminance) >= 0).all()
    assert luminance[0] < 20
    assert luminance[-1] > 235
    assert heatmap(torch.tensor([[True, False]])).tolist() == heatmap(torch.tensor([[1.0, 0.0]])).tolist()
    assert len(set(heatmap(torch.tensor([[float("nan")]])).ravel())) == 1


def test_panel():
    image, label = np.full((16, 32, 3), 77, np.uint8), np.zeros((16, 32), np.uint8)
    titles = ["image", "label", "a very long title that does not fit its column"]
    rows = [[image, colourise(label, PALETTE), image]] * 2
    sheet = panel(titles, rows, legend=CLASSES, palette=PALETTE)
    assert sheet.mode == "RGB"
    assert 3 * 256 < sheet.width < 3 * 300
    assert 2 * 128 < sheet.height < 2 * 128 + 120
    colours = {colour for _, colour in sheet.getcolors(1 << 20)}
    assert (77, 77, 77) in colours
    assert {tuple(c) for c in PALETTE.tolist()} <= colours
    with pytest.raises(ValueError, match="every row needs 2"):
        panel(["a", "b"], [[image]])
