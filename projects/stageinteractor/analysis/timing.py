"""How long a piece of work takes, and how much memory, beside a yardstick of the machine's speed.

torch.utils.benchmark does not serve here: it warms up before each measurement, so the yardstick and
the work could not take turns, and its clock is not the CPU time of the process.
"""

import itertools
import platform
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

YARDSTICK_SIZE = 2048  # rows and columns of the matrices
WARM_UPS = 2


class Work(NamedTuple):
    """What is measured."""

    run: Callable[[], object]
    leaves: Sequence[Tensor] = ()  # tensors whose gradients each run computes anew
    weights: Sequence[Tensor] = ()  # the same, but these gradients do not count as memory
    uses_torch: bool = True  # if not, its memory is unknown

    def reset(self):
        """Remove the gradients of an earlier run."""
        for tensor in (*self.leaves, *self.weights):
            tensor.grad = None


def select_clock(device: str) -> Callable[[], float]:
    """Return a clock in seconds.

    On a CPU it counts the time that all threads of this process work; on other devices it reads
    the time once they have finished what they were given.
    """
    if device == "cpu":
        return time.process_time

    def synchronized() -> float:
        torch.accelerator.synchronize(device)
        return time.perf_counter()

    return synchronized


def matrix_product(device: str) -> Work:
    """The yardstick: a float32 product of two square matrices, written into existing memory."""
    shape = YARDSTICK_SIZE, YARDSTICK_SIZE
    first, second = torch.randn(shape, device=device), torch.randn(shape, device=device)
    out = torch.empty_like(first)
    return Work(lambda: torch.mm(first, second, out=out))


def measure_times(
    works: dict[str, Work], runs: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Return the milliseconds of every run of each work.

    The works take turns, so that all of them see the same machine. `WARM_UPS` runs of each come
    first and are not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(WARM_UPS + runs):
        for name, work in works.items():
            work.reset()
            start = clock()
            work.run()
            if turn >= WARM_UPS:
                times[name].append(1000 * (clock() - start))
    return times


def summarize_times(times: Sequence[float], yardstick: Sequence[float]) -> dict:
    """Return median and quartiles in milliseconds, and the ratio of the medians of both."""
    median = float(np.median(times))
    return {
        "median_ms": median,
        "spread_ms": np.percentile(times, [25, 75]).tolist(),
        "ratio": median / float(np.median(yardstick)),
        "peak_memory_bytes": None,
    }


def measure_rows(
    works: dict[str, Work], runs: int, device: str
) -> tuple[dict[str, dict], float]:
    """Measure time and memory of each work, and the milliseconds of the yardstick beside them."""
    yardstick = {"yardstick": matrix_product(device)}
    times = measure_times({**yardstick, **works}, runs, select_clock(device))
    rows = {name: summarize_times(times[name], times["yardstick"]) for name in works}
    for name, work in works.items():
        rows[name]["peak_memory_bytes"] = peak_memory(work, device)
    return rows, float(np.median(times["yardstick"]))


def peak_memory(work: Work, device: str) -> int | None:
    """Return the bytes that torch allocates at most during a run, or None if that is unknown.

    What is there before the run does not count, nor do the gradients of ``weights``.
    """
    is_cuda = torch.device(device).type == "cuda"
    if not work.uses_torch or not (is_cuda or device == "cpu"):
        return None
    work.reset()
    for weight in work.weights:
        weight.grad = torch.zeros_like(weight)
    if is_cuda:
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work.run()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work.run()
    # The profiler's own tables add these up operator by operator.
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))


def device_name(device: str) -> str:
    """Return the maker's name of the processor."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")  # on Linux, where Python does not know the name
    found = cpuinfo.exists() and re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.M)
    return found[1] if found else platform.processor() or device
