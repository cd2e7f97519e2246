"""The training loop, on Hugging Face Accelerate.

Every random number of a step is a function of (seed, step): the step seeds torch, and each sample is drawn under its own
seed (`loader.py`). So a resumed run is bitwise the run that was not interrupted, whatever the number of loader processes, and
runs that differ only in their method see the same crops.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from tqdm import tqdm

from fastkd.train import checkpoint
from fastkd.train.config import Config, DataConfig, check, differences, to_dict, write_yaml
from fastkd.train.data import build_dataset, eval_transform, train_transform
from fastkd.train.evaluation import Scores, SegmentationSet, evaluate
from fastkd.train.loader import train_loader
from fastkd.train.log import RunLog, Stopwatch, versions, write_json
from fastkd.train.methods import Objective, Terms, student_features, teacher_forward
from fastkd.train.models import Output, SegmentationModel, Student, build_model


def train(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    show: bool = True,
    datasets: tuple[SegmentationSet, SegmentationSet] | None = None,
) -> dict[str, Any]:
    """Trains and validates a run; returns what it wrote to `<out>/result.json`.

    Args:
        config: the run.
        resume: go on from `<out>/last.pt`; a run that is finished returns its result at once.
        overwrite: discard what `<out>` holds of an earlier run.
        show: progress bars.
        datasets: training and validation set, where several runs share them; None builds them (`build_datasets`).

    Raises:
        FileExistsError: `<out>` holds a run and neither flag is given.
        CheckpointError, FileNotFoundError: `last.pt` or the teacher cannot be read or belongs to another configuration.
        ValueError: parts of the configuration do not fit.
        FloatingPointError: the loss is no longer finite.
    """
    check(config)
    out = Path(config.out)
    last = out / "last.pt"
    if last.exists() and not (resume or overwrite):
        raise FileExistsError(
            f"{out} already holds a run; go on with --resume, discard it with --overwrite, or change --out"
        )
    return Run(config, show=show, datasets=datasets).run(resume=resume)


class Run:
    """One run: builds everything from the configuration; `run` does the steps."""

    def __init__(
        self, config: Config, *, show: bool = True, datasets: tuple[SegmentationSet, SegmentationSet] | None = None
    ):
        self.config, self.out = config, Path(config.out)
        precision = config.train.precision
        self.accelerator = Accelerator(cpu=config.train.device == "cpu", mixed_precision=precision)
        self.show = show and self.accelerator.is_main_process
        self.device = self.accelerator.device
        self.train_set, self.val_set = datasets or build_datasets(config.data)
        self.classes = list(self.train_set.classes)

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
        if config.train.channels_last:
            student = student.to(memory_format=torch.channels_last)
        optimizer = _optimizer(config, student)
        self.student, self.optimizer = self.accelerator.prepare(student, optimizer)
        self.step, self.best = 0, -1.0

    @property
    def network(self) -> SegmentationModel:
        return self.accelerator.unwrap_model(self.student, keep_fp32_wrapper=False).model

    def _teacher(self) -> tuple[SegmentationModel | None, str | None]:
        if self.config.teacher is None or self.config.method == "none":
            return None, None
        teacher, state = checkpoint.load_network(self.config.teacher)
        if list(state["classes"]) != self.classes:
            raise ValueError(
                f"teacher {self.config.teacher} was trained on the classes {list(state['classes'])}, the data has {self.classes}"
            )
        teacher = teacher.requires_grad_(False).to(self.device)
        if self.config.train.channels_last:
            teacher = teacher.to(memory_format=torch.channels_last)
        return teacher, checkpoint.digest(state["model"])

    def run(self, *, resume: bool) -> dict[str, Any]:
        config, steps = self.config, self.config.train.steps
        main = self.accelerator.is_main_process
        self.log = RunLog(self.out, enabled=main)
        seconds = self._restore() if resume and (self.out / "last.pt").exists() else 0.0
        self.log.open(keep_to=self.step)
        if main:
            write_yaml(config, self.out / "config.yaml")
        watch = Stopwatch(self.device, self.totals)
        started = time.perf_counter() - seconds
        batches = iter(
            train_loader(
                self.train_set,
                batch_size=config.train.batch_size,
                steps=range(self.step, steps),
                seed=config.seed,
                workers=config.data.workers,
                rank=self.accelerator.process_index,
                world=self.accelerator.num_processes,
                pin_memory=self.device.type == "cuda",
            )
        )
        bar = tqdm(
            total=steps, initial=self.step, desc=config.name or self.out.name, disable=not self.show, dynamic_ncols=True
        )
        result = None
        while self.step < steps:
            watch.begin()
            images, labels = next(batches)
            watch.data_ready()
            rate, terms = self._step(images, labels, watch)
            watch.end()
            self.step += 1
            bar.update()
            if self.step % config.train.log_every == 0 or self.step == steps:
                values = self._values(terms) | {"lr": rate} | watch.means()
                self.log.write(self.step, time.perf_counter() - started, "train", values)
                bar.set_postfix(loss=f"{values['loss']:.3f}")
            if self.step % config.eval.every == 0 or self.step == steps:
                result = self._evaluate()
                values = {"miou": result.miou, "pixel_accuracy": result.pixel_accuracy}
                self.log.write(self.step, time.perf_counter() - started, "val", values)
                if result.miou > self.best:
                    self.best = result.miou
                    self._save("best.pt")
            if self.step % config.train.checkpoint_every == 0 or self.step == steps:
                self._save("last.pt", watch=watch, seconds=time.perf_counter() - started)
        bar.close()
        if result is None:  # resumed after the last step
            result = self._evaluate()
        summary = self._result(result, watch, time.perf_counter() - started)
        self.log.close()
        if main:
            write_json(summary, self.out / "result.json")
        self.accelerator.wait_for_everyone()
        return summary

    def _step(self, images: Tensor, labels: Tensor, watch: Stopwatch) -> tuple[float, Terms]:
        """One optimiser step; returns its learning rate and losses."""
        optim = self.config.optim
        rate = learning_rate(self.config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(step_seed(self.config.seed, self.step, self.accelerator.process_index))
        images = images.to(self.device, non_blocking=True)
        labels = labels.to(self.device, non_blocking=True)
        if self.config.train.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        teacher = None
        if self.teacher is not None:
            with self.accelerator.autocast():
                teacher = teacher_forward(self.teacher, images)
        student = self.student(images)

        # The losses see leaves cut off from the network, so that their own forward and backward can be timed; the gradients
        # they leave there are then sent through the network. The result is that of one backward pass.
        leaves, pairs = cut(student)
        watch.loss_begins()
        terms = self.objective(leaves, teacher, labels, self.step)
        self.accelerator.backward(terms.total)
        watch.loss_ends()
        send_back(pairs)

        if optim.clip is not None:
            self.accelerator.clip_grad_norm_(self.student.parameters(), optim.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return rate, terms

    def _values(self, terms: Terms) -> dict[str, float]:
        values = {"loss": terms.total.item()}
        values |= {f"loss/{name}": part.item() for name, part in terms.parts.items()}
        values |= {name: value.item() for name, value in terms.info.items()}
        if not torch.isfinite(terms.total):
            raise FloatingPointError(
                f"the loss is {values['loss']} at step {self.step}: {values}; lower --optim.lr or set --optim.clip"
            )
        return values

    def _evaluate(self) -> Scores:
        return evaluate(
            self.network,
            self.val_set,
            self.config.eval,
            device=self.device,
            workers=self.config.data.workers,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            progress="validation" if self.show else None,
        )

    def _save(self, name: str, *, watch: Stopwatch | None = None, seconds: float = 0.0) -> None:
        """best.pt holds the network alone; last.pt (with `watch`) also what it takes to go on."""
        state: dict[str, Any] = {
            "config": to_dict(self.config),
            "classes": self.classes,
            "palette": torch.as_tensor(self.train_set.palette).tolist(),
            "step": self.step,
            "model": self.network.state_dict(),
        }
        if watch is not None:
            student = self.accelerator.unwrap_model(self.student, keep_fp32_wrapper=False)
            scaler = self.accelerator.scaler
            state |= {
                "adapters": student.adapters.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "best": self.best,
                "teacher_digest": self.teacher_digest,
                "totals": watch.totals(),
                "seconds": seconds,
            }
        checkpoint.save(state, self.out / name, self.accelerator.save)

    totals: dict[str, float] | None = None

    def _restore(self) -> float:
        path = self.out / "last.pt"
        state = checkpoint.load(path)
        if changed := differences(state["config"], to_dict(self.config)):
            raise checkpoint.CheckpointError(
                f"{path} belongs to another configuration: {', '.join(changed)} differ; "
                "restore them, or start again with --overwrite"
            )
        if state["teacher_digest"] != self.teacher_digest:
            raise checkpoint.CheckpointError(
                f"{path} was distilled from another teacher than {self.config.teacher} holds now; start again with --overwrite"
            )
        student = self.accelerator.unwrap_model(self.student, keep_fp32_wrapper=False)
        student.model.load_state_dict(state["model"])
        student.adapters.load_state_dict(state["adapters"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.best, self.totals = state["step"], state["best"], state["totals"]
        return state["seconds"]

    def _result(self, result: Scores, watch: Stopwatch, seconds: float) -> dict[str, Any]:
        totals = watch.totals()
        model = self.config.model
        return {
            "name": self.config.name or self.out.name,
            "method": self.config.method,
            "model": f"{model.arch} {model.encoder}" if model.library == "smp" else model.arch,
            "params": self.parameters,
            "steps": self.step,
            "miou": result.miou,
            "pixel_accuracy": result.pixel_accuracy,
            "class_iou": result.class_iou,
            "seconds_per_step": totals["step_s"] / max(totals["steps"], 1),
            "loss_share": totals["loss_s"] / totals["step_s"] if totals["step_s"] else 0.0,
            "seconds": seconds,
            "seed": self.config.seed,
            "versions": versions(),
        }


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
        build(data.name, root=data.root, split="val", transform=eval_transform(), **(data.options | data.val_options)),
    )


def learning_rate(config: Config, step: int) -> float:
    """Poly decay after a linear warm-up; a function of the step alone."""
    optim, steps = config.optim, config.train.steps
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    return optim.lr * (1 - step / steps) ** optim.power


def step_seed(seed: int, step: int, rank: int) -> int:
    return (seed * 1_000_003 + step * 1_009 + rank) % 2**63


def cut(student: Output) -> tuple[Output, list[tuple[Tensor, Tensor]]]:
    """The output as leaves of a new graph, and the pairs (original, leaf)."""
    pairs: list[tuple[Tensor, Tensor]] = []

    def leaf(x: Tensor) -> Tensor:
        pairs.append((x, x.detach().requires_grad_()))
        return pairs[-1][1]

    aux = None if student.aux is None else leaf(student.aux)
    leaves = Output(leaf(student.logits), {name: leaf(x) for name, x in student.features.items()}, aux)
    return leaves, pairs


def send_back(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Backpropagates the gradients that the losses left in the leaves of `cut`."""
    used = [(x, leaf.grad) for x, leaf in pairs if leaf.grad is not None]
    torch.autograd.backward([x for x, _ in used], [grad for _, grad in used])


def _optimizer(config: Config, student: nn.Module) -> torch.optim.Optimizer:
    optim = config.optim
    if optim.name == "sgd":
        return torch.optim.SGD(
            student.parameters(), lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay
        )
    return torch.optim.AdamW(student.parameters(), lr=optim.lr, weight_decay=optim.weight_decay)
