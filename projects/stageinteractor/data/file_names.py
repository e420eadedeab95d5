"""Finding files by names that are nearly right."""

import unicodedata
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Generic, TypeVar

from ..errors import UserError

File = TypeVar("File", str, Path)


def composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def folded(name: str) -> str:
    """The same text for names that differ only in case or Unicode form."""
    return composed(composed(name).casefold())


class NameIndex(Generic[File]):
    """Files by their names, which are paths relative to a folder, without a suffix if need be.

    Args:
        names: the name of each file.
    """

    def __init__(self, names: dict[File, str]):
        self.names = names
        self.levels: list[dict[str, list[File]]] = [defaultdict(list) for _ in range(4)]
        for file, name in names.items():
            for files, key in zip(self.levels, self._keys(name)):
                files[key].append(file)

    @staticmethod
    def _keys(name):
        last = name.rpartition("/")[2]
        return name, folded(name), last, folded(last)

    def find(
        self, name: str, taken: Container[File] = (), *, any_folder: bool = True
    ) -> list[File]:
        """The files of that name; if there are none, those of another spelling of it.

        Args:
            taken: files that are found by their exact name only.
            any_folder: whether to look in other folders if there is none in this one.
        """
        for files, key in zip(self.levels if any_folder else self.levels[:2], self._keys(name)):
            found = [
                file for file in files.get(key, ())
                if file not in taken or self.names[file] == name
            ]
            if found:
                return found
        return []


def is_hidden(path: Path) -> bool:
    return path.name.startswith(".")


def files_below(folder: Path, above: frozenset = frozenset()) -> Iterator[Path]:
    """Everything below a folder, links to folders followed, sorted.

    Hidden folders, and links to a folder that contains them, are not entered but count as files.
    Raises UserError if the folder is missing.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}")
    here = folder.resolve()
    above = above | {here, *here.parents}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not is_hidden(path) and path.resolve() not in above:
            yield from files_below(path, above)
        else:
            yield path


def with_suffix(paths: Iterable[Path], suffixes: set) -> list[Path]:
    return [path for path in paths if path.suffix.lower() in suffixes and not is_hidden(path)]
