"""Stopping a run from outside, as a cluster does before it takes a machine away."""

import contextlib
import multiprocessing
import os
import signal
from typing import Callable, Iterator

EXIT_CODE = 75  # of a run that was stopped and goes on with --resume: EX_TEMPFAIL of sysexits.h
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class Interrupted(SystemExit):
    """Ends a process whose run has been saved."""

    def __init__(self):
        super().__init__(EXIT_CODE)


@contextlib.contextmanager
def on_signals(call: Callable[[int], None]) -> Iterator[None]:
    """Have SIGTERM and SIGUSR1 call a function with their number, and do nothing else."""
    before = {number: signal.signal(number, lambda n, _: call(n)) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def forward_to_children(number: int):
    """Send a signal to the processes that this one has started."""
    for child in multiprocessing.active_children():
        os.kill(child.pid, number)


def is_restarted() -> bool:
    """Whether torchrun or Slurm have started this run again, after it failed or was stopped."""
    counts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return any(int(os.environ.get(name) or 0) > 0 for name in counts)
