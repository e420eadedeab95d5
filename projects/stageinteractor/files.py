"""Files that are written whole or not at all, and folders for results."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from .errors import UserError

UNFINISHED = ".tmp"  # ends the name of a file until it is whole


def write_durably(path: str, write: Callable[[BinaryIO], Any]):
    """Write a file so that it is whole or as it was before, even if the machine stops.

    Args:
        path: of the file.
        write: puts the content into an open file.

    Raises:
        OSError: the file cannot be written.
    """
    unfinished = f"{path}{UNFINISHED}"
    try:
        with open(unfinished, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        if os.path.exists(unfinished):
            os.remove(unfinished)
    if os.name == "posix":  # Windows cannot open folders
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
        try:
            os.fsync(folder)  # otherwise a loss of power may undo the new name
        finally:
            os.close(folder)


def read_text(path: Path) -> str:
    """The text of a file. Raises UserError if the file is missing or empty."""
    if not path.is_file():
        raise UserError(f"no file {path}")
    text = path.read_text(encoding="utf-8", errors="replace")
    if not text.strip():
        raise UserError(f"{path} is empty: has the run got that far?")
    return text


def make_folder(folder: str | Path) -> bool:
    """Make a folder, if it is not there. Returns whether files can be written to it."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def prepare_output(folder: str, result: str) -> Path:
    """Make the folder for results.

    Args:
        result: name of the file that the folder contains once it has results; these are kept.

    Raises:
        UserError: the folder cannot be made or written to, or has results.
    """
    path = Path(folder)
    if not make_folder(path):
        raise UserError(f"cannot write to {path}: choose another with --output FOLDER")
    if (path / result).exists():
        raise UserError(f"{path} holds {result} already: choose another with --output FOLDER")
    return path
