"""Joining the processes of a run, leaving them, and telling when one of them is gone."""

import atexit
import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from detectron2.utils import comm

from ..errors import UserError

# Gloo raises plain errors, NCCL and the store errors of their own.
CONTACT_LOST = re.compile(r"gloo|connection (was )?(closed|reset|refused)|timed out|nccl", re.I)


def in_main_process(call: Callable[[], Any]) -> Any:
    """What a function returns in the main process, in all of them.

    Raises:
        UserError: the function has raised one; all processes raise the same.
    """
    result, problem = None, ""
    if comm.is_main_process():
        try:
            result = call()
        except UserError as error:
            problem = str(error)
    result, problem = comm.all_gather((result, problem))[0]
    if problem:
        raise UserError(problem)
    return result


def lost_contact(error: Exception) -> bool:
    """Whether an error says that other processes cannot be reached."""
    if not (isinstance(error, RuntimeError) and comm.get_world_size() > 1):
        return False
    return isinstance(error, dist.DistError) or CONTACT_LOST.search(str(error)) is not None


def join_torchrun(backend: str, timeout: timedelta):
    """Join the processes that torchrun has started, on all machines.

    Args:
        backend: nccl or gloo.
        timeout: after which what hears nothing of the others fails, now and later.
    """
    env = os.environ
    if env["TORCHELASTIC_USE_AGENT_STORE"] != "True":
        return dist.init_process_group(backend, timeout=timeout)
    # The store outlives a restart. Without a prefix of its own, the new attempt would find there
    # the addresses of processes that are gone.
    store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), timeout=timeout)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(f"attempt {env['TORCHELASTIC_RESTART_COUNT']}", store),
        rank=int(env["RANK"]),
        world_size=int(env["WORLD_SIZE"]),
        timeout=timeout,
    )


@contextlib.contextmanager
def exit_at_once() -> Iterator[None]:
    """End this process when what runs inside ends, without the shutdown of Python's interpreter.

    A thread of Gloo that frees a tensor meanwhile would abort the process, and so make a failure of
    a run that is done or saved. What other modules want done at the end is done.

    Raises:
        Exception: an unexpected one, which takes its traceback.
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
