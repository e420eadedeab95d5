"""Starting the processes of a run, stopping them by a signal, and ending them together."""

import argparse
import atexit
import contextlib
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import SimpleTrainer, launch
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException

# A run that is saved and continues with --resume, whatever stopped it: EX_TEMPFAIL of sysexits.h.
EXIT_CODE = 75
NOT_SAVED = 128 + signal.SIGINT  # Ctrl-C ended the process at once; a shell uses the same code
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# Gloo raises plain errors; NCCL and the store have errors of their own.
CONTACT_LOST = re.compile(
    r"gloo|nccl|connection (was )?(closed|reset|refused)|timed out wait", re.I
)


class Interrupted(SystemExit):
    """Ends a process whose run has been saved."""

    def __init__(self):
        super().__init__(EXIT_CODE)


def start(main: Callable[[argparse.Namespace], None], args: argparse.Namespace):
    """Call ``main(args)`` in every process of a run.

    Under torchrun this process is one of them. Otherwise ``--num-gpus`` processes are started here
    if that is more than one, and signals are passed on to them.

    Args:
        main: a function of a module, so that other processes can import it.
        args: of the command line.
    """
    timeout = timedelta(seconds=args.timeout)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        join_torchrun(timeout)
        return run_in_group(main, args)
    if args.num_machines > 1 and args.dist_url == "auto":
        sys.exit("error: several machines need --dist-url tcp://ADDRESS:PORT of the first machine")
    if args.num_gpus * args.num_machines <= 1:
        return main(args)
    with on_signals(forward_to_children):
        try:
            launch(
                run_launched,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(main, args),
                timeout=timeout,
            )
        except ProcessExitedException as error:  # it has said why, unless a signal killed it
            if error.signal_name == "SIGINT":  # a second Ctrl-C
                sys.exit(NOT_SAVED)
            if error.signal_name:
                print(f"error: {error}", file=sys.stderr)
            sys.exit(error.exit_code if error.exit_code > 0 else 1)


def run_launched(main: Callable[[argparse.Namespace], None], args: argparse.Namespace):
    """Run ``main`` in a process that `start` has launched and that gets its signals from there."""
    os.setpgid(0, 0)  # otherwise a terminal would send Ctrl-C a second time
    run_in_group(main, args)


def run_in_group(main: Callable[[argparse.Namespace], None], args: argparse.Namespace):
    """Run ``main`` in one of several processes, which end together or with the first failure."""
    with exit_at_once():
        main(args)
        comm.synchronize()
        dist.destroy_process_group()


def join_torchrun(timeout: timedelta):
    """Join the processes that torchrun has started, on all machines.

    Args:
        timeout: a process that does not hear from the others for this long fails, now and later.
    """
    has_gpu = torch.cuda.is_available()
    try:
        backend = "nccl" if has_gpu else "gloo"
        dist.init_process_group(backend, timeout=timeout, **torchrun_store(timeout))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        sys.exit(f"error: the processes of the run cannot reach each other: {reason}")
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    if has_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def torchrun_store(timeout: timedelta) -> dict[str, Any]:
    """Arguments of ``init_process_group`` for this attempt, if torchrun's own store is used.

    The store outlives a restart. Without a prefix of its own, a new attempt would find addresses of
    processes that are gone.
    """
    env = os.environ
    if env["TORCHELASTIC_USE_AGENT_STORE"] != "True":
        return {}
    store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), timeout=timeout)
    return {
        "store": dist.PrefixStore(f"attempt {env['TORCHELASTIC_RESTART_COUNT']}", store),
        "rank": int(env["RANK"]),
        "world_size": int(env["WORLD_SIZE"]),
    }


@contextlib.contextmanager
def exit_at_once() -> Iterator[None]:
    """End this process after the body, without shutting Python's interpreter down.

    During a shutdown, a thread of Gloo that frees a tensor can abort the process, and a run that is
    complete or saved would count as failed. Functions registered with atexit are still called, and
    an unexpected error is raised with its traceback.
    """
    code = 0
    try:
        yield
    except SystemExit as ended:
        code = ended.code
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_restarted() -> bool:
    """Whether torchrun or Slurm have restarted this run after it failed or was stopped."""
    counts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return any(int(os.environ.get(name) or 0) > 0 for name in counts)


@contextlib.contextmanager
def on_signals(call: Callable[[int], None]) -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGUSR1 call a function with their number, and do nothing else.

    Ignored signals stay ignored: a shell makes its background processes ignore SIGINT.
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


def forward_to_children(number: int):
    """Send a signal to the processes that this process has started."""
    for child in multiprocessing.active_children():
        os.kill(child.pid, number)


def lost_contact(error: BaseException | None) -> bool:
    """Whether an error says that other processes cannot be reached."""
    if comm.get_world_size() == 1:
        return False
    is_plain = type(error) is RuntimeError and CONTACT_LOST.search(str(error)) is not None
    return is_plain or isinstance(error, dist.DistError)


@contextlib.contextmanager
def stop_on_signals(trainer: SimpleTrainer) -> Iterator[None]:
    """Let a signal request a stop of training, and a second Ctrl-C end this process at once.

    Args:
        trainer: its ``stop_requested`` is set.

    Raises:
        Interrupted: in place of the error that this process gets when the main process has been
            stopped, too, in an evaluation, and has gone after saving.
    """
    is_main = comm.is_main_process()

    def stop(number: int):
        trainer.stop_requested = True
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            if is_main:  # written past Python's buffers, which the signal may have interrupted
                os.write(2, b"\nstopping after this step; Ctrl-C again stops without saving\n")

    try:
        with on_signals(stop):
            yield
    except RuntimeError as error:
        if trainer.stop_requested and not is_main and lost_contact(error):
            raise Interrupted from error
        raise
