"""The line that is logged every log period while a model trains, and the figures in it."""

import datetime
import logging
import math
import re
import sys

import torch
from detectron2.utils.events import EventStorage, EventWriter, get_event_storage
from omegaconf import DictConfig

from ..errors import UserError

WINDOW = 20  # iterations of a median, as in Detectron2's metrics.json
RECENT = 200  # iterations whose mean time predicts the remaining time
STAGE_LOSS = re.compile(r"stage(\d+)_loss_")
LABELS = ("kept", "dropped", "gained")
# Detectron2 writes only its own loggers to log.txt; this one leaves room for the line.
LOGGER = logging.getLogger("detectron2.train")


class ProgressPrinter(EventWriter):
    """Logs a line with medians over the last 20 iterations, without figures that nobody recorded.

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
        parts = [
            self._eta(storage, iteration),
            f"iter: {iteration + 1}/{self.max_iter}",
            describe_losses(storage),
            describe_labels(storage),
        ]
        if "grad_norm" in storage.histories():
            parts.append(f"grad: {short(median(storage, 'grad_norm'))}")
        if "lr" in storage.histories():
            parts.append(f"lr: {storage.history('lr').latest():.2e}")
        if "images_per_second" in storage.histories():
            parts.append(f"speed: {short(median(storage, 'images_per_second'))} img/s")
        parts += [describe_data_time(storage), self._memory(storage)]
        LOGGER.info("  ".join(filter(None, parts)))

    def _eta(self, storage: EventStorage, iteration: int) -> str:
        if "time" not in storage.histories():  # it starts with the third iteration
            return ""
        # A mean, because a median would ignore the iterations that wait for data.
        samples = storage.count_samples("time", RECENT)
        done = iteration + 1
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

    @staticmethod
    def _memory(storage: EventStorage) -> str:
        memory = peak_memory()
        if memory is None:
            return ""
        storage.put_scalar("memory", memory, smoothing_hint=False)
        return f"mem: {memory:.0f} MiB"


def describe_losses(storage: EventStorage) -> str:
    """The total loss and its parts: a sum for each stage, if there are stages, or each by name."""
    stages, others = {}, []
    for name in storage.histories():
        stage = STAGE_LOSS.match(name)
        if stage:
            stages.setdefault(int(stage[1]), []).append(median(storage, name))
        elif "loss" in name and name != "total_loss":
            others.append(f"{name} {short(median(storage, name))}")
    sums = [short(sum(losses)) for _, losses in sorted(stages.items())]
    parts = ", ".join([f"stages {' '.join(sums)}"] * bool(sums) + others)
    return f"loss: {median(storage, 'total_loss'):.4g}" + (f" ({parts})" if parts else "")


def describe_labels(storage: EventStorage) -> str:
    """How the cross-stage assigner changed the one-to-one matches; empty without an assigner."""
    shares = [
        f"{name} {median(storage, f'labels/{name}'):.0%}"
        for name in LABELS if f"labels/{name}" in storage.histories()
    ]
    return f"labels: {' '.join(shares)}" if shares else ""


def describe_data_time(storage: EventStorage) -> str:
    """The share of the time that was spent waiting for data.

    It is a ratio of means, not of medians: with a slow loader, one iteration may wait for many.
    """
    samples = storage.count_samples("time", WINDOW) if "time" in storage.histories() else 0
    if not samples or "data_time" not in storage.histories():
        return ""
    share = storage.history("data_time").avg(samples) / storage.history("time").avg(samples)
    return f"data: {share:.0%}"


def median(storage: EventStorage, name: str) -> float:
    """Median of the values of the last ``WINDOW`` iterations."""
    return storage.history(name).median(storage.count_samples(name, WINDOW))


def short(value: float) -> str:
    """A number with three significant digits, or with all digits before the decimal point."""
    return f"{value:.0f}" if 100 <= abs(value) < 1e6 else f"{value:.3g}"


def peak_memory() -> float | None:
    """Peak memory in MiB: allocated by torch on the GPU, or resident in this process without one.

    Processes that load data are not counted. None on Windows, which does not report it.
    """
    allocated = torch.cuda.max_memory_allocated()
    if allocated:
        return allocated / 2**20
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


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
