"""Files that pictures are made of."""

from pathlib import Path

from .errors import UserError


def read_text(path: Path) -> str:
    """The text of a file. Raises UserError if the file is missing or empty."""
    if not path.is_file():
        raise UserError(f"no file {path}")
    text = path.read_text(encoding="utf-8", errors="replace")
    if not text.strip():
        raise UserError(f"{path} is empty: has the run got that far?")
    return text
