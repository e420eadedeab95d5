"""What a person is told of an error that ends a run."""

import errno
import logging

from ..errors import UserError
from .processes import lost_contact

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, a quota, a limit on files


def explain(error: Exception) -> str:
    """What a person is told instead of a traceback; nothing if it takes the traceback."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, FloatingPointError):
        return (
            f"{error}\nTry a lower optimizer.lr, train.clip_grad.enabled=true or "
            "train.amp.enabled=false; start from a checkpoint well before, or mend the images"
        )
    if isinstance(error, OSError) and error.errno in FULL:
        return (
            f"cannot write to the output folder: {error.strerror}\n"
            "Make room, then --resume goes on from the last checkpoint"
        )
    if lost_contact(error):
        return (
            "lost contact with another process, whose own error comes first if it had one, or a "
            f"step took longer than --timeout: {str(error).splitlines()[0]}\n"
            "--resume goes on from the last checkpoint"
        )
    return ""


def takes_traceback(record: logging.LogRecord) -> bool:
    """Filters what Detectron2 logs of an error that ends training."""
    return not (record.exc_info and explain(record.exc_info[1]))
