"""Which message takes the place of the traceback when an error ends a run, and who prints it."""

import contextlib
import errno
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Iterator

from detectron2.utils import comm

from ..config.device import is_out_of_memory
from ..errors import TO_RESUME, UserError
from .processes import EXIT_CODE, NOT_SAVED, Interrupted, lost_contact

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, a quota, a limit on file sizes
# What torch and NCCL say when /dev/shm is full, where processes that load data leave images.
NO_SHARED_MEMORY = re.compile(
    r"shared memory.*no space|creating shared memory|killed by signal: bus error", re.I
)
LOGGER = logging.getLogger(f"detectron2.{__name__}")


@contextlib.contextmanager
def report_failures() -> Iterator[None]:
    """Around one process of a run: turn an explained error into a message and an exit code.

    Any other error keeps its traceback. STAGEINTERACTOR_TRACEBACK=1 shows that of every error, and
    log.txt has it unless the error is a UserError or about a file.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # raises KeyboardInterrupt
    logging.getLogger("detectron2.engine.train_loop").addFilter(has_no_message)
    try:
        yield
    except Interrupted:
        if comm.is_main_process():
            how = f"{TO_RESUME} continues the run (exit code {EXIT_CODE})"
            print(f"stopped and saved: {how}", file=sys.stderr)
        raise
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        leave("interrupted: nothing was saved", NOT_SAVED)
    except (UserError, FloatingPointError, OSError, RuntimeError) as error:
        message = explain(error)
        if not message:
            raise
        if not isinstance(error, (UserError, OSError)):
            LOGGER.debug("This error ended the run:", exc_info=True)
        leave(message)


def leave(message: str, code: int = 1):
    """End this process with an error.

    If all processes of a machine have the same error, the first one ends, and a launcher then ends
    the others before they repeat its message.
    """
    if comm.get_local_rank() > 0:
        time.sleep(5)
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


def explain(error: BaseException | None) -> str:
    """What to print instead of the traceback; empty if the traceback has to be shown."""
    if os.environ.get("STAGEINTERACTOR_TRACEBACK"):
        return ""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, FloatingPointError):
        return (
            f"{error}\nTry a lower optimizer.lr, train.clip_grad.enabled=true or "
            "train.amp.enabled=false; start from a much earlier checkpoint, or repair the images"
        )
    if isinstance(error, RuntimeError) and NO_SHARED_MEMORY.search(str(error)):
        return (
            "/dev/shm, where processes that load data leave images, is full: in Docker, enlarge it "
            "with docker run --shm-size=8g\n"
            "Or load images in this process: dataloader.train.num_workers=0 "
            f"dataloader.test.num_workers=0; {TO_RESUME} continues from the last checkpoint"
        )
    if isinstance(error, OSError) and error.errno in FULL:
        return (
            f"cannot write to {error.filename or 'the output folder or /dev/shm'}: "
            f"{error.strerror}\nMake room, then {TO_RESUME} continues from the last checkpoint"
        )
    if lost_contact(error):
        return (
            "lost contact with another process. If that process printed an error, it is the "
            f"cause; otherwise a step took longer than --timeout: {str(error).splitlines()[0]}\n"
            f"{TO_RESUME} continues from the last checkpoint"
        )
    return ""


def has_no_message(record: logging.LogRecord) -> bool:
    """A filter that drops the traceback that Detectron2 logs of an error that `explain` explains.
    """
    return not (record.exc_info and explain(record.exc_info[1]))


@contextlib.contextmanager
def explain_out_of_memory(batch: list[dict], is_training: bool) -> Iterator[None]:
    """Explain an allocator's error.

    Args:
        batch: what the model is given, a dictionary for each image.
        is_training: whether there is a backward pass.

    Raises:
        UserError: in place of the allocator's error.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        shapes = [tuple(image["image"].shape[-2:]) for image in batch if "image" in image]
        height, width = (max(sides) for sides in zip(*shapes)) if shapes else (0, 0)
        advice = "Take fewer images at once (dataloader.test.batch_size), or smaller images"
        if is_training:
            advice = (
                "Take fewer images at once (a smaller dataloader.train.total_batch_size, with "
                "train.accumulation_steps for the same step), model.decoder.checkpoint_stages=true,"
                " train.amp.enabled=true, or smaller images"
            )
        split = "train" if is_training else "test"
        raise UserError(
            f"out of memory with {len(batch)} images a process, padded to {height} x {width} "
            f"pixels: {str(error).splitlines()[0]}\n"
            f"{advice} (short_edge_length and max_size in dataloader.{split}.mapper)"
        ) from error
