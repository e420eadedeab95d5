"""What a person sees while a model trains: one line every log period."""

import datetime
import logging
import math
import os
import re
import sys

import torch
from detectron2.utils import comm
from detectron2.utils import logger as detectron2_logger
from detectron2.utils.events import (
    EventStorage,
    EventWriter,
    JSONWriter,
    TensorboardXWriter,
    get_event_storage,
)
from detectron2.utils.logger import setup_logger

WINDOW = 20  # iterations of a median, as in what Detectron2 writes to metrics.json
RECENT = 200  # iterations whose mean time gives the rest of a run
STAGE_LOSS = re.compile(r"stage(\d+)_loss_")
METRICS_FILE = "metrics.json"
FOR_THE_FILE = ("detectron2.data.", "detectron2.checkpoint.")  # loggers of details
LABELS = ("kept", "dropped", "gained")
# Detectron2 writes only its own loggers to log.txt; this one leaves room for the line.
LOGGER = logging.getLogger("detectron2.train")
OPEN_LOG = detectron2_logger._cached_log_stream


def log_in_utf8():
    """Make log.txt UTF-8 whatever the locale is: a class may be named in any alphabet."""
    def open_log(filename: str):
        stream = OPEN_LOG(filename)
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")
        return stream

    detectron2_logger._cached_log_stream = open_log


def set_up_logging(output_dir: str):
    """Detectron2's loggers, which write everything to log.txt and to the console what people read.

    For the console that is warnings, losses and results. How the installation and the data are made
    up, and what came of each part of a checkpoint, is for the file alone.
    """
    log_in_utf8()
    # Detectron2's default_setup makes the same calls, and then gets the same handlers.
    rank = comm.get_rank()
    loggers = (
        setup_logger(output_dir, distributed_rank=rank, name="fvcore"),
        setup_logger(output_dir, distributed_rank=rank),
    )
    for handler in {handler for logger in loggers for handler in logger.handlers}:
        if getattr(handler, "stream", None) is sys.stdout:
            handler.addFilter(is_for_console)
    # It warns of a CUDA without a GPU when Detectron2 lists the environment.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def is_for_console(record: logging.LogRecord) -> bool:
    """Whether a person wants to read it while training."""
    if record.levelno >= logging.WARNING:
        return True
    if record.name.startswith("detectron2.evaluation"):  # our own table has the figures
        return record.getMessage().startswith("Inference done")
    is_detail = record.name == "detectron2" or record.name.startswith(FOR_THE_FILE)
    return record.levelno == logging.INFO and not is_detail


def default_writers(
    output_dir: str, max_iter: int, eval_period: int = 0, first: int = 0
) -> list[EventWriter]:
    """Detectron2's writers of metrics.json and for TensorBoard, after a ``ProgressPrinter``.

    Args:
        output_dir: folder of the run.
        max_iter, eval_period: see ``ProgressPrinter``.
        first: iteration from which on TensorBoard forgets what an earlier run wrote.
    """
    return [
        ProgressPrinter(max_iter, eval_period),
        JSONWriter(os.path.join(output_dir, METRICS_FILE), WINDOW),
        TensorboardXWriter(output_dir, WINDOW, purge_step=max(first, 0)),
    ]


class ProgressPrinter(EventWriter):
    """Logs a line with medians over the last 20 iterations, and leaves out what nobody recorded.

    It adds ``eta_seconds`` and ``memory`` (MiB, see ``peak_memory``) to the storage, so that
    writers after it have them too. Iterations count from one, those of the storage from zero.

    Args:
        max_iter: at which training ends.
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
        if "time" not in storage.histories():  # which starts with the third iteration
            return ""
        # A mean, since a median would leave out the iterations that wait for data.
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
    """The total loss and its parts: summed over each stage where there are stages, else by name."""
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
    """What the cross-stage assigner did to the one-to-one matches; empty without one."""
    shares = [
        f"{name} {median(storage, f'labels/{name}'):.0%}"
        for name in LABELS if f"labels/{name}" in storage.histories()
    ]
    return f"labels: {' '.join(shares)}" if shares else ""


def describe_data_time(storage: EventStorage) -> str:
    """Share of the time that was spent on waiting for data.

    Means instead of medians: a slow loader may make one iteration wait for many.
    """
    samples = storage.count_samples("time", WINDOW) if "time" in storage.histories() else 0
    if not samples or "data_time" not in storage.histories():
        return ""
    share = storage.history("data_time").avg(samples) / storage.history("time").avg(samples)
    return f"data: {share:.0%}"


def median(storage: EventStorage, name: str) -> float:
    """Median of what was recorded in the last ``WINDOW`` iterations."""
    return storage.history(name).median(storage.count_samples(name, WINDOW))


def short(value: float) -> str:
    """Three digits, or all before the decimal point."""
    return f"{value:.0f}" if 100 <= abs(value) < 1e6 else f"{value:.3g}"


def peak_memory() -> float | None:
    """Most memory in use so far, in MiB: on the GPU, or without one resident in this process.

    Of the GPU it is what torch allocated. Processes that load data are not counted. None where the
    system does not say, which is Windows.
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
