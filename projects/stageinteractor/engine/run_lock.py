"""A lock on a run's output folder, which a process that has ended does not hold."""

import contextlib
import errno
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from ..errors import UserError
from .processes import in_main_process

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

LOCK = "run.lock"  # in the output folder of a run
LOGGER = logging.getLogger(f"detectron2.{__name__}")


@contextlib.contextmanager
def sole_use(folder: str) -> Iterator[None]:
    """Have no other run write to an output folder meanwhile. For all processes of a run.

    Raises:
        UserError: another run, which is alive, writes there.
    """
    with contextlib.ExitStack() as held:
        in_main_process(lambda: lock(held.enter_context(open(Path(folder) / LOCK, "a+"))))
        yield


def lock(file: TextIO):
    """Lock a file as long as it is open and this process lives, and write who we are into it.

    POSIX locks of a file are released with the process, are not inherited by those that load data,
    and hold on NFS, too.

    Raises:
        UserError: another process holds it.
    """
    if fcntl is None:
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            LOGGER.warning(
                f"{file.name} cannot be locked ({error.strerror}): start no other run there"
            )
            return
        file.seek(0)
        raise UserError(
            f"{os.path.dirname(file.name)} is in use by another run, "
            f"{file.read().strip() or 'which has just begun'}: wait until it has ended, or choose "
            "another folder with train.output_dir=FOLDER"
        ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
