"""The `fastkd` command: train, convert, data, eval, predict, export, report, demo, bench, info.

`info` and `bench` need no extra packages; the other commands say how to install theirs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastkd.ranges import Count, Numbers, Positive, Shape, Share, Size

USAGE = """usage: fastkd COMMAND ...

  train     train a network, alone or with a teacher         fastkd train --help
  convert   a network with weights from elsewhere as a teacher  fastkd convert --help
  data      a data set's classes, soundness and speed        fastkd data --check --data.name camvid --data.root FOLDER
  eval      score networks on a validation set               fastkd eval RUN|CHECKPOINT...
  predict   colour overlays for images                       fastkd predict CHECKPOINT IMAGE|FOLDER...
  export    ONNX or safetensors of a checkpoint              fastkd export CHECKPOINT --out FILE.onnx
  report    compare finished runs in one page                fastkd report RUN... --out DIR
  demo      teacher, student and distilled students compared fastkd demo --out runs/demo
  bench     the losses on your own shapes and machine        fastkd bench --shape 8,19,64,128 --size 512,1024
  info      kernels that are built, loaded and chosen        fastkd info
"""
INSTALL = 'install what this command needs with: pip install "fastkd[{}]"'
EXPORT = ("onnx", "onnxruntime", "onnxscript")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status (0 success, 1 failure, 2 invalid arguments)."""
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 must not abort a run
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if words else 2
    if words[0] == "--version":
        from fastkd import __version__

        print(__version__)
        return 0
    if words[0] not in COMMANDS:
        print(f"fastkd: no command {words[0]!r}\n\n{USAGE}", file=sys.stderr)
        return 2
    try:
        return COMMANDS[words[0]](words[1:])
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] == "fastkd":
            raise
        extra = "bench" if words[0] == "bench" else "train,export" if error.name in EXPORT else "train"
        print(f"fastkd {words[0]}: no module {error.name!r}; {INSTALL.format(extra)}", file=sys.stderr)
    except (ValueError, LookupError, OSError, FloatingPointError, MemoryError) as error:
        print(f"fastkd {words[0]}: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"\nfastkd {words[0]}: stopped", file=sys.stderr)
        return 130
    return 1


def _train(words: list[str]) -> int:
    from fastkd.train.config import parse

    config, flags = parse(words)
    import torch.distributed

    from fastkd.train.engine import train

    result = train(config, **flags)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if os.environ.get("RANK", "0") == "0":  # only the first process prints
        print(_summary(result))
    return 0


def _convert(words: list[str]) -> int:
    from fastkd.train.config import parse

    config, flags = parse(words, prog="fastkd convert")
    from fastkd.train.convert import convert

    print(f"written: {convert(config, overwrite=flags['overwrite'])}")
    return 0


def _eval(words: list[str]) -> int:
    parser = Numbers(
        prog="fastkd eval",
        description="Scores networks on the validation set, all in the same way: by default as the first was in training.",
    )
    parser.add_argument("paths", type=Path, nargs="+", metavar="RUN|CHECKPOINT", help="for a run, its last checkpoint")
    parser.add_argument("--root", help="folder of the data set, if it has moved since training")
    parser.add_argument("--split", choices=("val", "test", "train"), default="val")
    parser.add_argument(
        "--size", type=Count, nargs=2, metavar=("H", "W"), help="resize images to this before the network"
    )
    parser.add_argument("--window", type=Count, nargs=2, metavar=("H", "W"), help="slide a window of this size")
    parser.add_argument(
        "--stride", type=Count, nargs=2, metavar=("H", "W"), help="step of the window; default: two thirds of it"
    )
    parser.add_argument("--scales", type=Positive, nargs="+", metavar="S", help="average over these scales")
    parser.add_argument("--flip", action="store_const", const=True, help="average with the mirror image")
    parser.add_argument("--limit", type=Count, help="only the first N images")
    parser.add_argument("--batch-size", type=Count, help="images at a time")
    parser.add_argument("--device", help="a torch device; default: an accelerator if available")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything to this file")
    args = parser.parse_args(words)
    import dataclasses

    from fastkd.train import scoreboard
    from fastkd.train.files import write_json

    names = ("size", "window", "stride", "scales", "flip", "limit", "batch_size")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    how = dataclasses.replace(scoreboard.validation_of(args.paths[0]), **given)
    entries = scoreboard.score(
        args.paths, how, root=args.root, split=args.split, device=_device(args.device), progress=sys.stderr.isatty()
    )
    if args.json:
        write_json(args.json, scoreboard.to_json(entries, how))
    print(scoreboard.class_table(entries))
    print(f"\n{scoreboard.table(scoreboard.rows(entries))}")
    return 0


def _data(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="fastkd data",
        usage="%(prog)s [--check] [--recipe NAME] [--config FILE] [--NAME VALUE ...]",
        description="Finds the data set of a run, times its loading, and with --check reads every file. "
        "Other options: see fastkd train --help.",
        allow_abbrev=False,
    )
    parser.add_argument("--check", action="store_true", help="read every file and count the pixels of each class")
    args, rest = parser.parse_known_args(words)
    from fastkd.train.config import parse

    config, _ = parse([*rest, "--method", "none"], prog="fastkd data")
    from fastkd.train.data import check, evaluation_set
    from fastkd.train.engine import build_datasets

    data = config.data
    training, validation = build_datasets(data)
    augment: Any = training.transform  # type: ignore[attr-defined]
    plain = evaluation_set(data, split="train")
    print(f"{data.name}: {len(plain.classes)} classes, {len(plain)} training and {len(validation)} validation images")
    problems: list[str] = []
    if args.check:
        bar = sys.stderr.isatty()
        splits = {"train": plain, "val": validation}
        found = {name: check.contents(split, name if bar else None) for name, split in splits.items()}
        print(check.table(plain.classes, found))
        if missing := [
            name for name, count in zip(plain.classes, found["train"].pixels[:-1], strict=True) if not count
        ]:
            print(f"fastkd data: {check.without_pixels(missing, 'of the training set')}", file=sys.stderr)
        problems = [problem for split in found.values() for problem in split.problems]
        for problem in problems:
            print(f"fastkd data: {problem}", file=sys.stderr)
    if not problems:
        speed = check.speed(plain, augment)
        print(
            f"one loader process: {1 / speed.sample:.0f} samples/s ({1e3 * speed.read:.1f} ms to read one, "
            f"{1e3 * speed.augment:.1f} ms to augment it)"
        )
        batch, workers = config.train.batch_size, max(data.workers, 1)
        print(
            f"{workers} of them, on as many free cores: a batch of {batch} every {batch * speed.sample / workers:.3f} s "
            "(data.workers); a training step that is faster waits for it"
        )
    return 1 if problems else 0


def _predict(words: list[str]) -> int:
    parser = Numbers(prog="fastkd predict", description="Writes each image with its segmentation as an overlay.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE|FOLDER")
    parser.add_argument(
        "--out", type=Path, default=Path("predictions"), help="folder to write to (default: %(default)s)"
    )
    parser.add_argument(
        "--size", type=Count, nargs=2, metavar=("H", "W"), help="resize images to this before the network"
    )
    parser.add_argument("--alpha", type=Share, default=0.55, help="opacity of the colours (default: %(default)s)")
    parser.add_argument("--device", help="a torch device; default: an accelerator if available")
    args = parser.parse_args(words)
    from fastkd.train.predict import image_files, predict

    written, failed = predict(
        args.checkpoint,
        image_files(args.images),
        args.out,
        size=args.size,
        alpha=args.alpha,
        device=_device(args.device),
    )
    for message in failed:
        print(f"fastkd predict: {message}", file=sys.stderr)
    print(f"{len(written)} images in {args.out}" + (f", {len(failed)} failed" if failed else ""))
    return 1 if failed else 0


def _export(words: list[str]) -> int:
    parser = Numbers(
        prog="fastkd export",
        description="Writes a network as ONNX or safetensors and compares the file's output with it.",
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.onnx|FILE.safetensors")
    parser.add_argument(
        "--size",
        type=Count,
        nargs=2,
        metavar=("H", "W"),
        help="image size of the ONNX graph; default: that of the validation",
    )
    args = parser.parse_args(words)
    from fastkd.train.export import export

    print(export(args.checkpoint, args.out, size=tuple(args.size) if args.size else None))
    return 0


def _report(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="fastkd report", description="One self-contained page: numbers, curves and pictures of finished runs."
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories, in the order of the page")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder to write to (default: %(default)s)")
    parser.add_argument("--title", default="Runs compared")
    parser.add_argument("--notes", help="text for the top of the page")
    parser.add_argument("--root", help="folder of the data set, if it has moved since training")
    args = parser.parse_args(words)
    from fastkd.train.comparison import compare

    print(f"report: {compare(args.out, args.runs, title=args.title, notes=args.notes, root=args.root)}")
    return 0


def _demo(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="fastkd demo",
        description="Trains a teacher, a plain student and distilled students on generated street scenes.",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder to write to (default: %(default)s)")
    args = parser.parse_args(words)
    from fastkd.train.demo import demo

    print(f"report: {demo(args.out)}")
    return 0


def _bench(words: list[str]) -> int:
    parser = Numbers(
        prog="fastkd bench",
        description="Time, memory and error of the losses on your shapes, compared with plain PyTorch and torch.compile.",
    )
    parser.add_argument("--shape", type=Shape, required=True, metavar="N,C,h,w", help="shape of the logits or features")
    parser.add_argument("--size", type=Size, metavar="H,W", help="size of the labels (default: 8 times h,w)")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="default: %(default)s")
    parser.add_argument("--losses", nargs="+", metavar="LOSS", help="only these (default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if available")
    parser.add_argument(
        "--seconds", type=Positive, help="seconds of timing per loss (default: 6 on a CPU, 0.8 on a GPU)"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="append the rows to this file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the times; needs matplotlib")
    args = parser.parse_args(words)
    import torch

    from fastkd.benchmarks import cases, harness, report

    unknown = sorted(set(args.losses or ()) - set(cases.LOSSES))
    if unknown:
        raise ValueError(f"--losses: got {', '.join(unknown)}, expected some of {', '.join(cases.LOSSES)}")
    device = args.device or harness.DEVICE
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU; `fastkd info` says more")
    size = args.size or (8 * args.shape[2], 8 * args.shape[3])
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.dtype]
    wanted = [cases.LOSSES[name](args.shape, size, dtype) for name in args.losses or cases.LOSSES]
    records = harness.measure(wanted, args.csv, device, seconds=args.seconds)
    found = harness.rows(records)
    print(f"{report.origin(records[0])}\n\n{report.losses_table(found, {})}")
    if args.plot:
        report.plot(found, args.plot)
        print(f"\nplot: {args.plot}")
    return 0


def _info(words: list[str]) -> int:
    argparse.ArgumentParser(
        prog="fastkd info", description="Kernels that are built, loaded and chosen, and why."
    ).parse_args(words)
    print("\n".join(_info_lines()))
    return 0


def _info_lines() -> Iterator[str]:
    """The lines of a bug report."""
    import importlib.metadata
    import platform

    import torch

    import fastkd

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reasons are in the lines below
        info = fastkd.backend_info()
    found = {}
    for name in ("triton", "numpy", "accelerate", "segmentation-models-pytorch", "timm", "torchvision", "liger-kernel"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    yield f"fastkd {fastkd.__version__}, Python {platform.python_version()}, torch {torch.__version__}, {platform.platform()}"
    yield f"packages: {', '.join(f'{name} {version}' for name, version in found.items()) or 'none of the optional packages'}"
    yield f"CPU: {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    if not torch.cuda.device_count():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else torch.version.hip or "CPUs"
        yield f"GPU: none that torch finds (it is built for {built})"
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        yield f"cuda:{i} {torch.cuda.get_device_name(i)}, sm_{major}{minor}, CUDA {torch.version.cuda or torch.version.hip}"
    yield f"requested: {info['requested']}"
    for name, backend in info["backends"].items():
        yield f"{name:10} {'yes' if backend['available'] else 'no'}: {backend['detail'] or backend['reason']}"
    width = max(map(len, info["operators"]))
    yield f"{'operator':{width}} {'on CPU':10} {'on GPU':10} {'order on a GPU':28} measured"
    for op, row in info["operators"].items():
        order = ", ".join([*row["cuda_order"], "reference"])
        yield f"{op:{width}} {row['cpu']:10} {row['cuda'] or '-':10} {order:28} {row['cuda_basis']}"


def _device(name: str | None) -> Any:
    import torch

    if name is not None:
        try:
            device = torch.device(name)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            why = str(error).splitlines()[0].split(". ")[0]
            raise ValueError(
                f"--device {name}: torch has no such device here ({why}); take cpu, or leave it out"
            ) from error
        return device
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def _summary(result: dict) -> str:
    return (
        f"{result['name']}: mIoU {100 * result['miou']:.2f} %, pixel accuracy {100 * result['pixel_accuracy']:.2f} %, "
        f"{result['steps']} steps of {result['seconds_per_step']:.3f} s, "
        f"{100 * result['loss_share']:.1f} % of it in the losses"
    )


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "convert": _convert,
    "data": _data,
    "eval": _eval,
    "predict": _predict,
    "export": _export,
    "report": _report,
    "demo": _demo,
    "bench": _bench,
    "info": _info,
}

if __name__ == "__main__":
    sys.exit(main())
