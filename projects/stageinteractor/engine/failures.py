"""What a person is told of an error that ends a run."""

import errno
import logging
import os
import re
import shutil

from ..errors import TO_RESUME, UserError
from .processes import lost_contact

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, a quota, a limit on files

SHARED_MEMORY = "/dev/shm"  # where processes that load data leave images
# What torch and NCCL say when it is full.
NO_SHARED_MEMORY = re.compile(
    r"shared memory.*no space|creating shared memory|killed by signal: bus error", re.I
)


def explain(error: Exception) -> str:
    """What a person is told instead of a traceback; nothing if it takes the traceback."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, FloatingPointError):
        return (
            f"{error}\nTry a lower optimizer.lr, train.clip_grad.enabled=true or "
            "train.amp.enabled=false; start from a checkpoint well before, or mend the images"
        )
    if is_shared_memory_full(error):
        return (
            f"{SHARED_MEMORY} is full, through which other processes hand over images: in Docker, "
            "give it more with docker run --shm-size=8g\n"
            "Or load images in this process: dataloader.train.num_workers=0 "
            f"dataloader.test.num_workers=0; {TO_RESUME} goes on from the last checkpoint"
        )
    if isinstance(error, OSError) and error.errno in FULL:
        return (
            f"cannot write to the output folder: {error.strerror}\n"
            f"Make room, then {TO_RESUME} goes on from the last checkpoint"
        )
    if lost_contact(error):
        return (
            "lost contact with another process, whose own error comes first if it had one, or a "
            f"step took longer than --timeout: {str(error).splitlines()[0]}\n"
            f"{TO_RESUME} goes on from the last checkpoint"
        )
    return ""


def is_shared_memory_full(error: Exception) -> bool:
    """Whether an error says that processes of a machine have no room to share memory."""
    if isinstance(error, RuntimeError):
        return NO_SHARED_MEMORY.search(str(error)) is not None
    # A semaphore is a file there, too.
    is_full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    return (
        is_full and os.path.isdir(SHARED_MEMORY) and shutil.disk_usage(SHARED_MEMORY).free < 4096
    )


def may_be_of_one(error: Exception) -> bool:
    """Whether an error that is explained may have come up in one process of a run alone."""
    return is_shared_memory_full(error) or lost_contact(error)


def takes_traceback(record: logging.LogRecord) -> bool:
    """Filters what Detectron2 logs of an error that ends training."""
    return not (record.exc_info and explain(record.exc_info[1]))
