"""The training loop, on Hugging Face Accelerate.

Every random number of a step is a function of (seed, step): the step seeds torch, and each sample is drawn under its
own seed (`loader.py`). A resumed run is therefore bitwise equal to an uninterrupted one, for any number of loader
processes, and runs that differ only in the method see the same crops.

A batch is split over processes and, within a process, over accumulation steps ("parts"). Means over valid pixels are
those of the whole batch, however it is split: see `Run._shares`.
"""

from __future__ import annotations

import errno
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from torch import Tensor

from fastkd.train import checkpoint

from fastkd.train.config import (  # isort: skip
    Config, DataConfig, TrainConfig, check, differences, labelled_share, to_dict, unlabelled_size, write_yaml,
)  # fmt: skip
from fastkd.train.data import build_dataset, evaluation_set, train_transform
from fastkd.train.data.check import Seen
from fastkd.train.data.unlabelled import split
from fastkd.train.evaluation import Scores, SegmentationSet, evaluate
from fastkd.train.files import write_json
from fastkd.train.gradients import Latest, cut, gradient_statistics, send_back
from fastkd.train.loader import Part, train_loader
from fastkd.train.log import PANELS, Progress, RunLog, Stopwatch, versions
from fastkd.train.loss_cost import Shapes, loss_cost, shapes_of
from fastkd.train.methods import Objective, Terms, student_features, teacher_forward
from fastkd.train.models import Output, SegmentationModel, Student, build_model, is_memory, refused
from fastkd.train.pictures import MAPS, difficulty, predictions, sample
from fastkd.train.report import write_report
from fastkd.train.schedule import build_optimizer, build_schedule
from fastkd.train.student import Average, freeze_unused, set_batch_norm, train_mode

RESULT = "result.json"
PICTURES = 20  # maximum number of panels per run
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def train(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    show: bool = True,
    datasets: tuple[SegmentationSet, SegmentationSet] | None = None,
) -> dict[str, Any]:
    """Trains and validates a run; returns the contents of `<out>/result.json`.

    Args:
        config: the run.
        resume: continue from `<out>/last.pt`, or from `last.prev.pt` if that is damaged; a finished run returns its
            result at once.
        overwrite: discard an earlier run in `<out>`.
        show: print progress.
        datasets: training and validation set, to share between runs; None builds them (`build_datasets`).

    Raises:
        FileExistsError: `<out>` holds a run and neither flag is given.
        CheckpointError, FileNotFoundError: `last.pt` or the teacher cannot be read or belongs to another configuration,
            or a checkpoint cannot be written.
        ValueError: inconsistent configuration.
        FloatingPointError: the loss is no longer finite.
        MemoryError: out of memory on the device or the host.
        OSError: a file cannot be written.
    """
    check(config)
    out = Path(config.out)
    if checkpoint.exists(out) and not (resume or overwrite):
        raise FileExistsError(
            f"{out} already holds a run; go on with --resume, discard it with --overwrite, or change --out"
        )
    try:
        return Run(config, show=show, datasets=datasets).run(resume=resume)
    except RuntimeError as error:
        if is_memory(error):
            raise MemoryError(_too_little_memory(config.train, str(error))) from error
        raise
    except OSError as error:
        if error.errno in FULL:
            raise OSError(
                error.errno,
                f"{error.strerror} while writing to {out}; the checkpoints there are whole: make room and go on with --resume",
            ) from error
        raise


class Step(NamedTuple):
    """The result of a step.

    Args:
        rate: its learning rate.
        info: 0-d values to log besides the losses.
        given: inputs of the losses in its last part, if requested.
    """

    rate: float
    info: dict[str, Tensor]
    given: tuple[Output, Output | None, Tensor] | None


class Run:
    """One run: builds everything from the configuration; `run` trains."""

    def __init__(
        self, config: Config, *, show: bool = True, datasets: tuple[SegmentationSet, SegmentationSet] | None = None
    ):
        self.config, self.out = config, Path(config.out)
        self.accelerator = _accelerator(config.train)
        self.device, self.world = self.accelerator.device, self.accelerator.num_processes
        self.main = self.accelerator.is_main_process
        self.show = show and self.main
        self.train_set, self.val_set = datasets or build_datasets(config.data)
        self.classes = list(self.train_set.classes)
        data = config.data
        self.labelled, self.unlabelled = split(
            self.train_set, labelled=labelled_share(data), seed=data.labelled_seed, unlabelled=data.unlabelled
        )

        set_seed(config.seed)
        network = build_model(config.model, len(self.classes))
        self.teacher, self.teacher_digest = self._teacher()
        student = Student(network, student_features(config.method, config.loss, network, self.teacher))
        self.parameters = sum(p.numel() for p in network.parameters())
        self.objective = Objective(
            config.method,
            config.loss,
            total_steps=config.train.steps,
            student=network,
            teacher=self.teacher,
            ignore_index=self.train_set.ignore_index,
        ).to(self.device)
        self._prepare(student)
        self.step, self.best = 0, -1.0
        self.whole = True  # whether last.pt, if it exists, can be read
        self.totals: dict[str, float] | None = None
        self.losses: Latest | None = None
        self.seen = Seen(self.classes, len(self.labelled))
        self.shapes: Shapes | None = None  # of the losses' inputs, set by the first step

    def _teacher(self) -> tuple[SegmentationModel | None, str | None]:
        config = self.config
        if config.teacher is None or config.method == "none":
            return None, None
        teacher, state = checkpoint.load_network(config.teacher)
        if list(state["classes"]) != self.classes:
            raise ValueError(
                f"teacher {config.teacher} was trained on the classes {list(state['classes'])}, the data has {self.classes}"
            )
        teacher = teacher.requires_grad_(False).to(self.device)
        if config.train.channels_last:
            teacher = teacher.to(memory_format=torch.channels_last)
        return teacher, checkpoint.digest(state["model"])

    def _prepare(self, student: Student) -> None:
        """Sets up batch norms, moving average, compilation, optimiser and processes."""
        options = self.config.train
        student = set_batch_norm(student, options.batch_norm, processes=self.world, device=self.device).to(self.device)
        if options.channels_last:
            student = student.to(memory_format=torch.channels_last)
        if self.world > 1:
            freeze_unused(student, aux=self.objective.aux_weight > 0)
        self.average = None if options.ema is None else Average(student.model, options.ema)
        self.teach: Callable[[Tensor], Output] | None = self.teacher
        if options.compile:
            student.model.tapped.pin()
            student.compile()
            if self.teacher is not None:
                self.teacher.tapped.pin()
                self.teach = torch.compile(self.teacher)  # the teacher itself stays eager, for pictures of any size
        self.student = student
        # For training steps: averages gradients over processes, or is the student itself with one process.
        self.called, self.optimizer = self.accelerator.prepare(student, build_optimizer(self.config.optim, student))
        # Removes Accelerate's autocast wrapper, which casts outputs to fp32: the losses take half precision.
        self.accelerator.unwrap_model(self.called, keep_fp32_wrapper=False)

    @property
    def network(self) -> SegmentationModel:
        """The network to evaluate and save: the student's, or its moving average."""
        return self.student.model if self.average is None else self.average.network

    def run(self, *, resume: bool) -> dict[str, Any]:
        config, steps = self.config, self.config.train.steps
        seconds = self._restore() if resume and checkpoint.exists(self.out) else 0.0
        if self.step == steps and (self.out / RESULT).exists():
            return json.loads((self.out / RESULT).read_text(encoding="utf-8"))
        self.schedule = build_schedule(self.optimizer.optimizer, config.optim, steps, done=self.step)
        self.accelerator.wait_for_everyone()  # after this the first process overwrites files that the others have read
        self.log = RunLog(self.out, enabled=self.main)
        progress = Progress(config.name or self.out.name, total=steps, done=self.step, show=self.show)
        watch = Stopwatch(self.device, self.totals)
        with closing(self.log), closing(progress):
            self.log.open(keep_to=self.step)
            if self.main:
                write_yaml(config, self.out / "config.yaml")
            started = time.perf_counter() - seconds
            scores = self._steps(watch, progress, started) or self._evaluate()
            result = self._result(scores, watch, time.perf_counter() - started)
        if self.main:
            write_json(self.out / RESULT, result)
            self._report()
        self.accelerator.wait_for_everyone()
        return result

    def _steps(self, watch: Stopwatch, progress: Progress, started: float) -> Scores | None:
        """The remaining steps, with logging, validation and checkpoints; returns the last scores."""
        config, steps, scores = self.config, self.config.train.steps, None
        every = (config.train.log_every, config.eval.every, config.train.checkpoint_every)
        batches = self._batches()
        train_mode(self.student, config.train.batch_norm)
        while self.step < steps:
            log, score, save = ((self.step + 1) % n == 0 or self.step + 1 == steps for n in every)
            done = self._step(batches, watch, keep=log)
            self.step += 1
            if self.seen.due(self.step == steps):
                counts = self.accelerator.reduce(self.seen.counts.to(self.device), "sum")
                if (message := self.seen.missing(counts)) and self.main:
                    warnings.warn(message, stacklevel=2)
            values = self._values(done) if log or save else {}  # synchronises
            del done  # frees the step's tensors
            progress.step(self.step, values.get("loss"))
            if log:
                self.log.write(self.step, time.perf_counter() - started, "train", values | watch.means())
            if score:
                scores = self._evaluate()
                found = {"miou": scores.miou, "pixel_accuracy": scores.pixel_accuracy}
                self.log.write(self.step, time.perf_counter() - started, "val", found)
                progress.say(f"step {self.step}: mIoU {100 * scores.miou:.2f} %")
                self._draw()
                if scores.miou > self.best:
                    self.best = scores.miou
                    self._save("best.pt")
            if save:
                self._save(checkpoint.LAST, watch=watch, seconds=time.perf_counter() - started)
        return scores

    def _batches(self) -> Iterator[list[Tensor]]:
        return iter(
            train_loader(
                self.labelled,
                batch_size=self.config.train.batch_size,
                steps=range(self.step, self.config.train.steps),
                seed=self.config.seed,
                workers=self.config.data.workers,
                part=Part(self.accelerator.process_index, self.world, self.config.train.accumulate),
                pin_memory=self.device.type == "cuda",
                unlabelled=self.unlabelled,
                unlabelled_size=unlabelled_size(self.config),
            )
        )

    def _step(self, batches: Iterator[list[Tensor]], watch: Stopwatch, *, keep: bool = False) -> Step:
        """One optimiser step."""
        config, parts = self.config, self.config.train.accumulate
        watch.begin()
        loaded = [next(batches) for _ in range(parts)]
        watch.data_ready()
        self.seen.see([labels for _, labels in loaded], config.train.batch_size)
        rate = float(self.schedule.get_last_lr()[0])
        torch.manual_seed(step_seed(config.seed, self.step, self.accelerator.process_index))
        moved = [self._to_device(images, labels) for images, labels in loaded]
        shares = self._shares([labels for _, labels in moved])
        losses: dict[str, Tensor] = {}
        info: dict[str, Tensor] = {}
        for number, ((images, labels), share) in enumerate(zip(moved, shares, strict=True)):
            with nullcontext() if number == parts - 1 else self.accelerator.no_sync(self.called):
                given, terms = self._part(images, labels, share, watch)
            for whole, part in ((losses, terms.parts), (info, {k: v / parts for k, v in terms.info.items()})):
                for name, value in part.items():
                    whole[name] = whole[name] + value.detach() if name in whole else value.detach()
        if config.optim.clip is not None:
            self.accelerator.clip_grad_norm_(self.student.parameters(), config.optim.clip)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.student.model)
        values = torch.stack([value.float() for value in losses.values()])
        self.losses = self.losses or Latest(losses, values, self.step + 1)
        self.losses.see(values, self.step + 1)
        watch.end()
        return Step(rate, info, given if keep else None)

    def _to_device(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        images, labels = (x.to(self.device, non_blocking=True) for x in (images, labels))
        if self.config.train.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, labels

    def _shares(self, labels: list[Tensor]) -> list[Tensor | None]:
        """Weights that turn the parts' means over valid pixels into the batch's mean, times the number of processes.

        Gradients are averaged over processes and summed over parts. A mean over all pixels or elements needs only a
        factor 1 / parts; a mean over valid pixels needs its part's share of the valid pixels in the batch.
        """
        if self.world * len(labels) == 1:
            return [None]
        valid = torch.stack([(label != self.train_set.ignore_index).sum() for label in labels]).float()
        total = self.accelerator.reduce(valid.sum(), "sum")  # does not synchronise with the host
        return list(valid * self.world / total.clamp(min=1))

    def _part(
        self, images: Tensor, labels: Tensor, share: Tensor | None, watch: Stopwatch
    ) -> tuple[tuple[Output, Output | None, Tensor], Terms]:
        """Forward and backward of a part; returns its losses, weighted by its share of the step."""
        network, size = self.teacher, images.shape[-2:]
        try:
            with self.accelerator.autocast():
                teacher = None if self.teach is None else teacher_forward(self.teach, images)
                network = self.student.model
                student = self.called(images)
        except (RuntimeError, AssertionError, ValueError) as error:  # raised by the networks' libraries
            raise refused(network or self.student.model, size, error, value="data.crop") from error
        leaves, pairs = cut(student)
        self.shapes = self.shapes or shapes_of(leaves, teacher, labels)
        watch.loss_begins()
        terms = self.objective(leaves, teacher, labels, self.step)
        if share is not None:
            even = 1 / self.config.train.accumulate
            means = self.objective.valid_means
            parts = {name: part * (share if name in means else even) for name, part in terms.parts.items()}
            terms = terms._replace(total=torch.stack(list(parts.values())).sum(), parts=parts)
        scaler = self.accelerator.scaler
        (terms.total if scaler is None else scaler.scale(terms.total)).backward()
        watch.loss_ends()
        send_back(pairs)
        return (leaves, teacher, labels), terms

    def _values(self, done: Step) -> dict[str, float]:
        """The logged values of a step over all processes, with one synchronisation. FloatingPointError names a loss."""
        assert self.losses is not None
        found = dict(done.info)
        if done.given is not None:
            student, teacher, labels = done.given
            terms = self.objective(student, teacher, labels, self.step - 1)
            found |= gradient_statistics(terms.parts, student, self.objective.task)
        others = [value.float()[None] for value in found.values()]
        read = self.accelerator.reduce(torch.cat([self.losses.values, *others]), "mean").tolist()
        losses = dict(zip(self.losses.names, read, strict=False))
        if wrong := [name for name, value in losses.items() if not math.isfinite(value)]:
            raise FloatingPointError(
                f"the loss {' and '.join(wrong)} is no longer finite at step {int(self.losses.step)} ({losses}); lower "
                f"--optim.lr ({self.config.optim.lr}), set --optim.clip, or lower the weight of that loss"
            )
        values = {"loss": sum(losses.values())} | {f"loss/{name}": value for name, value in losses.items()}
        weights = {f"weight/{name}": self.objective.weights[name] for name in losses}
        return values | weights | dict(zip(found, read[len(losses) :], strict=True)) | {"lr": done.rate}

    def _evaluate(self) -> Scores:
        found = evaluate(
            self.network,
            self.val_set,
            self.config.eval,
            device=self.device,
            workers=self.config.data.workers,
            rank=self.accelerator.process_index,
            world=self.world,
            progress="validation" if self.show and sys.stderr.isatty() else None,
        )
        train_mode(self.student, self.config.train.batch_norm)
        return found

    def _draw(self) -> None:
        """A panel of validation images and predictions, at no more than `PICTURES` evaluations of a run."""
        config = self.config
        number, evaluations = -(-self.step // config.eval.every), -(-config.train.steps // config.eval.every)
        due = number % -(-evaluations // PICTURES) == 0 or self.step == config.train.steps
        if not (self.main and due and config.train.panels):
            return
        samples = sample(self.val_set, config.train.panels)
        network = self.network.eval()
        if self.teacher is None:
            picture = predictions({"prediction": network}, samples, self.val_set, config.eval)
        else:
            picture = difficulty(self.teacher, network, samples, self.val_set, config.eval)
        train_mode(self.student, config.train.batch_norm)
        self.log.picture(self.step, picture)

    def _save(self, name: str, *, watch: Stopwatch | None = None, seconds: float = 0.0) -> None:
        """best.pt holds only the network; last.pt (with `watch`) also the state needed to resume."""
        if not self.main:
            return
        state: dict[str, Any] = {
            "config": to_dict(self.config),
            "classes": self.classes,
            "palette": torch.as_tensor(self.train_set.palette).tolist(),
            "step": self.step,
            "model": self.network.state_dict(),
        }
        previous = None
        if watch is not None:
            scaler = self.accelerator.scaler
            state |= {
                "student": None if self.average is None else self.student.model.state_dict(),
                "average": None if self.average is None else self.average.count,
                "adapters": self.student.adapters.state_dict(),
                "objective": self.objective.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "best": self.best,
                "teacher_digest": self.teacher_digest,
                "totals": watch.totals(),
                "seconds": seconds,
            }
            previous = self.out / checkpoint.PREVIOUS if self.whole else None
        checkpoint.save(state, self.out / name, previous=previous)
        self.whole = self.whole or watch is not None

    def _restore(self) -> float:
        """Loads the last readable checkpoint; returns the training time so far in seconds."""
        state, self.whole = checkpoint.load_last(self.out)
        if changed := differences(state["config"], to_dict(self.config)):
            raise checkpoint.CheckpointError(
                f"{self.out} belongs to another configuration: {', '.join(changed)} differ; "
                "restore them, or start again with --overwrite"
            )
        if state["teacher_digest"] != self.teacher_digest:
            raise checkpoint.CheckpointError(
                f"{self.out} was distilled from another teacher than {self.config.teacher} now holds; "
                "start again with --overwrite"
            )
        if self.average is None:
            self.student.model.load_state_dict(state["model"])
        else:
            self.student.model.load_state_dict(state["student"])
            self.average.restore(state["model"], state["average"])
        self.student.adapters.load_state_dict(state["adapters"])
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.best, self.totals = state["step"], state["best"], state["totals"]
        return state["seconds"]

    def _result(self, scores: Scores, watch: Stopwatch, seconds: float) -> dict[str, Any]:
        totals = watch.totals()
        model = self.config.model
        return {
            "name": self.config.name or self.out.name,
            "method": self.config.method,
            "model": f"{model.arch} {model.encoder}" if model.library == "smp" else model.arch,
            "params": self.parameters,
            "steps": self.step,
            "images": self._images(),
            "miou": scores.miou,
            "pixel_accuracy": scores.pixel_accuracy,
            "class_iou": scores.class_iou,
            "seconds_per_step": totals["step_s"] / max(totals["steps"], 1),
            "loss_share": totals["loss_s"] / totals["step_s"] if totals["step_s"] else 0.0,
            "losses": self._loss_cost(),
            "seconds": seconds,
            "seed": self.config.seed,
            "processes": self.world,
            "versions": versions(),
        }

    def _images(self) -> dict[str, dict[str, int]]:
        """Number of images of each kind, and of crops taken from them."""
        without = unlabelled_size(self.config)
        sizes = {"labelled": self.config.train.batch_size - without, "unlabelled": without}
        counts = {"labelled": len(self.labelled), "unlabelled": len(self.unlabelled or ())}
        return {kind: {"images": counts[kind], "crops": self.step * size} for kind, size in sizes.items()}

    def _loss_cost(self) -> dict[str, Any] | None:
        if self.shapes is None or not self.main:
            return None
        return loss_cost(self.objective, self.shapes, step=self.config.train.steps - 1, device=self.device)

    def _report(self) -> None:
        about = "Predictions on validation images, at the last step."
        if self.teacher is not None:
            about += f" {MAPS.format('this student')}"
        panels = [(about, panel) for panel in sorted((self.out / PANELS).glob("*.jpg"))[-1:]]
        write_report(self.out, [self.out], title=self.config.name or self.out.name, panels=panels)


def build_datasets(data: DataConfig) -> tuple[SegmentationSet, SegmentationSet]:
    """Training set with augmentation, validation set without."""
    build: Callable[..., Any] = build_dataset
    crops = train_transform(
        data.crop,
        scale=data.scale,
        scale_step=data.scale_step,
        cat_max_ratio=data.cat_max_ratio,
        flip=data.flip,
        jitter=data.jitter,
    )
    return (
        build(data.name, root=data.root, split="train", transform=crops, **data.options),
        evaluation_set(data),
    )


def step_seed(seed: int, step: int, rank: int) -> int:
    return (seed * 1_000_003 + step * 1_009 + rank) % 2**63


def _accelerator(options: TrainConfig) -> Accelerator:
    if not torch.distributed.is_initialized():
        AcceleratorState._reset_state(
            reset_partial_state=True
        )  # an earlier run in this process may have had other options
    cpu = options.device == "cpu"
    if options.precision == "fp16" and (cpu or not torch.accelerator.is_available()):
        raise ValueError("train.precision fp16 needs a GPU; on a CPU use --train.precision bf16 or no")
    # Otherwise the processes' statistics would drift apart.
    processes = DistributedDataParallelKwargs(
        broadcast_buffers=options.batch_norm == "local", gradient_as_bucket_view=True
    )
    accelerator = Accelerator(cpu=cpu, mixed_precision=options.precision, kwargs_handlers=[processes])
    kind = accelerator.distributed_type.value
    if kind != "NO" and not kind.startswith("MULTI_"):
        raise ValueError(f"the trainer only supports data parallelism (DDP); {kind} was requested")
    return accelerator


def _too_little_memory(options: TrainConfig, error: str) -> str:
    return (
        f"too little memory: {error.splitlines()[0]}. Lower --train.batch_size ({options.batch_size}) or --data.crop, raise "
        f"--train.accumulate ({options.accumulate}), or use --train.precision bf16 ({options.precision})"
    )
