"""What a run needs before it starts: its config, its output folder and its log."""

import argparse
import contextlib
import errno
import fcntl
import logging
import os
import socket
import sys
from collections.abc import Iterator
from typing import TextIO

from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig
from torch import nn

from ..checkpoint import SafeCheckpointer
from ..config.building import resolve_detections
from ..config.device import keep_freed_memory, select_device
from ..config.main_process import in_main_process
from ..config.overrides import given_keys, load_config
from ..config.own_data import resolve_dataset
from ..config.preflight import check_dataset, check_options
from ..config.schedule import resolve_schedule
from ..errors import UserError

LOCK = "run.lock"  # in the output folder of a run
DETAILS = ("detectron2.data.", "detectron2.checkpoint.")  # loggers that write to log.txt only
LOGGER = logging.getLogger(f"detectron2.{__name__}")  # Detectron2 writes only its own to log.txt


def load_run_config(args: argparse.Namespace) -> tuple[DictConfig, str]:
    """Load and check the config and the data set.

    An evaluation and a trial run get a subfolder of the output folder, so that they do not disturb
    the run that is in it.

    Args:
        args: of the command line: ``config_file``, ``opts`` and ``eval_only``.

    Returns:
        the config, and remarks on the data set, empty if there are none.

    Raises:
        UserError: the config or something it names cannot be used.
    """
    cfg = load_config(args.config_file, args.opts)
    given = given_keys(args.opts)
    resolve_schedule(cfg, given)
    remarks = resolve_dataset(cfg, given, training=not args.eval_only)
    resolve_detections(cfg, given)
    cfg.train.device = select_device(cfg.train.device)
    keep_freed_memory()
    if args.eval_only:
        cfg.train.output_dir = os.path.join(cfg.train.output_dir, "eval")
    elif cfg.train.fast_dev_run.enabled:
        cfg.train.output_dir = os.path.join(cfg.train.output_dir, "fast_dev_run")
        cfg.train.update(epochs=None, max_iter=4, eval_period=2, log_period=1)
        cfg.train.checkpointer.period = 2
    check_options(cfg)
    for split in ("test",) if args.eval_only else ("train", "test"):
        check_dataset(cfg.dataloader[split].dataset)
    return cfg, remarks


@contextlib.contextmanager
def claim_folder(cfg: DictConfig, args: argparse.Namespace) -> Iterator[None]:
    """Lock the output folder, which must not hold a run that a new one would overwrite.

    To be called on all ranks.

    Raises:
        UserError: the folder holds a run, or another run, which is alive, writes to it.
    """
    folder = cfg.train.output_dir
    is_new_run = not (args.eval_only or args.resume or cfg.train.fast_dev_run.enabled)
    with contextlib.ExitStack() as held:

        def claim():
            lock(held.enter_context(open(os.path.join(folder, LOCK), "a+")))
            if is_new_run and SafeCheckpointer(nn.Module(), folder).has_checkpoint():
                raise UserError(
                    f"{folder} holds a run: continue it with --resume, or start another one with "
                    "train.output_dir=FOLDER"
                )

        in_main_process(claim)
        yield


def lock(file: TextIO):
    """Lock a file while it is open and this process lives, and write into it who holds it.

    POSIX locks of a file end with the process, are not inherited by processes that load data, and
    also hold on NFS.

    Raises:
        UserError: another process holds it.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            LOGGER.warning(
                f"{file.name} cannot be locked ({error.strerror}): do not start another run there"
            )
            return
        file.seek(0)
        raise UserError(
            f"{os.path.dirname(file.name)} is in use by another run, {file.read().strip()}: wait "
            "until it has ended, or choose another folder with train.output_dir=FOLDER"
        ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()


def start_log(cfg: DictConfig, args: argparse.Namespace):
    """Write log.txt and config.yaml to the output folder, and seed random numbers."""
    set_up_logging(cfg.train.output_dir)
    # Without the config file, whose source would be printed: config.yaml records all of it.
    default_setup(cfg, argparse.Namespace(**{**vars(args), "config_file": ""}))


def set_up_logging(output_dir: str):
    """Let Detectron2's loggers write everything to log.txt and a selection to the console.

    The console gets warnings, losses and results. The installation, the data and each part of a
    checkpoint are described in the file alone. The file is UTF-8 in every locale.
    """
    # Detectron2's default_setup makes the same calls, and then gets the same handlers.
    rank = comm.get_rank()
    for logger in (
        setup_logger(output_dir, distributed_rank=rank, name="fvcore"),
        setup_logger(output_dir, distributed_rank=rank),
    ):
        for handler in logger.handlers:
            stream = getattr(handler, "stream", None)
            if stream is sys.stdout:
                handler.addFilter(is_for_console)
            elif hasattr(stream, "reconfigure"):
                stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    # It warns of a CUDA without a GPU when Detectron2 lists the environment.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def is_for_console(record: logging.LogRecord) -> bool:
    """Whether a log record is of interest while a model trains."""
    if record.levelno >= logging.WARNING:
        return True
    if record.name.startswith("detectron2.evaluation"):  # our own table has the figures
        return record.getMessage().startswith("Inference done")
    is_detail = record.name == "detectron2" or record.name.startswith(DETAILS)
    return record.levelno == logging.INFO and not is_detail
