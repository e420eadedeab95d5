"""Stopping a run from outside, as a cluster does before it takes a machine away."""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator

# Of a run that is saved and goes on with --resume, whatever stopped it: EX_TEMPFAIL of sysexits.h.
EXIT_CODE = 75
NOT_SAVED = 128 + signal.SIGINT  # of what Ctrl-C ended at once, as in a shell
SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
]


class Interrupted(SystemExit):
    """Ends a process whose run has been saved."""

    def __init__(self):
        super().__init__(EXIT_CODE)


@contextlib.contextmanager
def on_signals(call: Callable[[int], None]) -> Iterator[None]:
    """Have SIGINT, SIGTERM and SIGUSR1 call a function with their number, and do nothing else.

    Those that are ignored stay ignored: a shell lets what it starts in the background ignore
    SIGINT.
    """
    before = {
        number: signal.signal(number, lambda n, _: call(n)) for number in SIGNALS
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def raise_on_ctrl_c():
    """Have SIGINT raise KeyboardInterrupt, as Python does by default, where it would end us."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def stop_at_once_next_time(number: int, speaks: bool):
    """Have a second Ctrl-C end this process wherever it is, and tell so.

    Args:
        number: of the signal that came; others than SIGINT change nothing.
        speaks: whether this process tells.
    """
    if number != signal.SIGINT:
        return
    signal.signal(number, signal.SIG_DFL)
    if speaks:  # past Python's buffers, which the signal may have interrupted
        os.write(2, b"\nstopping after this step; Ctrl-C again stops at once, without saving\n")


def forward_to_children(number: int):
    """Send a signal to the processes that this one has started."""
    for child in multiprocessing.active_children():
        os.kill(child.pid, number)


def is_restarted() -> bool:
    """Whether torchrun or Slurm have started this run again, after it failed or was stopped."""
    counts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return any(int(os.environ.get(name) or 0) > 0 for name in counts)
