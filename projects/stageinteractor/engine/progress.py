"""What a run logs while it trains, and when it has finished."""

import datetime
import logging
import math
import re
import resource
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from detectron2.utils.events import EventStorage, EventWriter, get_event_storage
from omegaconf import DictConfig

from ..config.overrides import path_override
from ..errors import UserError

WINDOW = 20  # iterations of a median, as in Detectron2's metrics.json
RECENT = 200  # iterations whose mean time predicts the remaining time
STAGE_LOSS = re.compile(r"stage(\d+)_loss_")
LABELS = ("kept", "dropped", "gained")
FIGURES = {
    "grad_norm": "grad: {:.3g}",
    "lr": "lr: {:.2e}",
    "images_per_second": "speed: {:.3g} img/s",
}
# Detectron2 writes only its own loggers to log.txt; this one leaves room for the line.
LOGGER = logging.getLogger("detectron2.train")


class ProgressPrinter(EventWriter):
    """Logs a line as Detectron2's printer does, with one loss for each stage and with the labels.

    It adds ``eta_seconds`` and ``memory`` (MiB, see `peak_memory`) to the storage, for the writers
    after it. Iterations count from one in the line, from zero in the storage.

    Args:
        max_iter: number of iterations of the run.
        eval_period: iterations between evaluations; 0 evaluates once, at the end.
    """

    def __init__(self, max_iter: int, eval_period: int = 0):
        self.max_iter, self.eval_period = max_iter, eval_period
        self.last_iter = -1

    def write(self):
        storage = get_event_storage()
        iteration = storage.latest().get("total_loss", (None, -1))[1]
        if iteration <= self.last_iter:  # only an evaluation is new
            return
        self.last_iter = iteration
        latest = storage.latest_with_smoothing_hint(WINDOW)
        figures = {name: value for name, (value, _) in latest.items()}
        memory = peak_memory()
        parts = [self._eta(storage, iteration + 1)] if "time" in figures else []
        parts += [f"iter: {iteration + 1}/{self.max_iter}", describe_losses(figures)]
        if "labels/kept" in figures:
            parts.append(describe_labels(figures))
        parts += [text.format(figures[name]) for name, text in FIGURES.items() if name in figures]
        if "time" in figures:
            # Means, not medians: with a slow loader, one iteration may wait for many.
            samples = storage.count_samples("time", WINDOW)
            waited, total = (storage.history(name).avg(samples) for name in ("data_time", "time"))
            parts.append(f"data: {waited / total:.0%}")
        storage.put_scalar("memory", memory, smoothing_hint=False)
        LOGGER.info("  ".join([*parts, f"mem: {memory:.0f} MiB"]))

    def _eta(self, storage: EventStorage, done: int) -> str:
        # Detectron2 takes a median, which ignores iterations that wait for data, and no evaluation.
        samples = storage.count_samples("time", RECENT)
        seconds = storage.history("time").avg(samples) * (self.max_iter - done)
        evaluations = 0
        if done < self.max_iter:
            period = self.eval_period or self.max_iter
            evaluations = math.ceil(self.max_iter / period) - done // period
        unknown = ""
        if "eval_seconds" in storage.histories():
            seconds += storage.history("eval_seconds").latest() * evaluations
        elif evaluations:
            unknown = f" + {evaluations} evaluation{'s' * (evaluations > 1)}"
        storage.put_scalar("eta_seconds", seconds, smoothing_hint=False)
        return f"eta: {datetime.timedelta(seconds=int(seconds))}{unknown}"


def describe_losses(figures: Mapping[str, float]) -> str:
    """The total loss and its parts: a sum for each stage, if there are stages, or each by name."""
    stages: dict[int, float] = {}
    others = []
    for name, value in figures.items():
        if stage := STAGE_LOSS.match(name):
            stages[int(stage[1])] = stages.get(int(stage[1]), 0) + value
        elif "loss" in name and name != "total_loss":
            others.append(f"{name} {value:.3g}")
    sums = " ".join(f"{loss:.3g}" for _, loss in sorted(stages.items()))
    parts = ", ".join([f"stages {sums}"] * bool(sums) + others)
    return f"loss: {figures['total_loss']:.4g}" + (f" ({parts})" if parts else "")


def describe_labels(figures: Mapping[str, float]) -> str:
    """How the cross-stage assigner changed the one-to-one matches."""
    return "labels: " + " ".join(f"{name} {figures[f'labels/{name}']:.0%}" for name in LABELS)


def peak_memory() -> float:
    """Peak memory in MiB: allocated by torch on the GPU, or resident in this process without one.

    Processes that load data are not counted.
    """
    if allocated := torch.cuda.max_memory_allocated():
        return allocated / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def log_next_commands(output_dir: str):
    """Log the commands that evaluate a finished run and show how it went."""
    folder = Path(output_dir)
    best = folder / "model_best.pth"
    checkpoint = best if best.exists() else folder / "model_final.pth"
    config, metrics, curves = (
        shlex.quote(str(folder / name)) for name in ("config.yaml", "metrics.json", "training.png")
    )
    LOGGER.info("\n  ".join([
        f"Finished: the results are in {folder}. The next commands:",
        f"python tools/train_net.py --config-file {config} --eval-only "
        + path_override("train.init_checkpoint", checkpoint),
        f"python tools/visualize.py training --metrics {metrics} --output {curves}",
        f"tensorboard --logdir {shlex.quote(str(folder))}",
    ]))


def start_wandb(options: DictConfig):
    """Send everything that goes to TensorBoard to Weights & Biases as well, if it is switched on.

    Args:
        options: ``train.wandb`` of the config.

    Raises:
        UserError: the package is not installed.
    """
    if not options.enabled:
        return
    try:
        import wandb
    except ImportError:
        raise UserError("train.wandb.enabled needs wandb: pip install wandb") from None
    wandb.init(sync_tensorboard=True, **options.params)
