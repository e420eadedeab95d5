"""What can be wrong with an installation. Imports nothing that could be missing from it."""

import importlib.metadata
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

INSTALL = "python -m pip install -e ."  # installs all that setup.cfg requires
REASONS = {"setuptools": " (detectron2.model_zoo imports pkg_resources, which 82 removed)"}


class Problem(NamedTuple):
    """What is wrong, and what a person can do about it."""

    what: str
    cure: str


def python_problem(version: Sequence[int]) -> Problem | None:
    """Check a version of Python."""
    if not (3, 10) <= tuple(version[:2]) < (3, 14):
        return Problem(
            "Python {}.{} is outside 3.10 to 3.13".format(*version[:2]),
            "make install PYTHON=python3.11 VENV=.venv311",
        )
    return None


def requirement_problems(
    requirements: Sequence[str], version_of: Callable[[str], str | None]
) -> list[Problem]:
    """A problem for all missing packages together, and one for each unsuitable version.

    Args:
        requirements: as pip reads them.
        version_of: returns the installed version of a package, or None.
    """
    names = [re.match(r"[\w.-]+", line).group() for line in requirements]
    missing = [name for name in names if version_of(name) is None]
    problems = [Problem("not installed: " + ", ".join(missing), INSTALL)] if missing else []
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return problems  # packaging is itself one of the requirements
    for line, name in zip(requirements, names):
        version = version_of(name)
        if version and not Requirement(line).specifier.contains(version, prereleases=True):
            what = f"{name} {version} is installed, {line} is needed{REASONS.get(name, '')}"
            problems.append(Problem(what, INSTALL))
    return problems


def import_problem(name: str, error: Exception | None) -> Problem | None:
    """Explain the error, if any, that importing a package raised."""
    absent = isinstance(error, ModuleNotFoundError)
    if error is None or absent and error.name == name and name != "detectron2":
        return None  # requirement_problems names missing packages
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if absent and name == "detrex":
        cure = "python -m pip install -e '.[detrex]'"
    elif absent:
        cure = "python tools/install_detectron2.py" if error.name == name else INSTALL
    elif name == "detectron2":
        cure = ("python -m pip uninstall detectron2 sal-detectron2, delete what is left of its "
                "folder, then python tools/install_detectron2.py")
    else:  # pip then also installs a torchvision that was compiled against the torch that remains
        cure = f"python -m pip uninstall {name}, then {INSTALL}"
    return Problem(f"{name} cannot be imported: {reason}", cure)


def shadow_problem(folders: Iterable[str | Path]) -> Problem | None:
    """Look in site-packages folders for a package that hides this project's tools."""
    for folder in folders:
        if Path(folder, "tools", "__init__.py").exists():
            return Problem(
                f"{folder}/tools hides this project's folder tools",
                f"rm -r {folder}/tools (some Detectron2 packages bring it; nothing needs it)",
            )
    return None


def output_problem(folder: Path) -> Problem | None:
    """Check that a folder can be made and written to."""
    existing = next(path for path in [folder, *folder.parents] if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return Problem(
            f"{folder} cannot be written to, because of {existing}",
            "choose another folder: train.output_dir=FOLDER, or make demo OUTPUT=FOLDER",
        )
    return None


def describe_device(torch: ModuleType) -> str:
    """Name the device that is used unless a config names another."""
    if torch.cuda.is_available():
        return f"cuda ({torch.cuda.get_device_name()})"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def origin(package: str) -> str:
    """Name the distribution that brought a package, its version, and where it came from."""
    for name in importlib.metadata.packages_distributions().get(package, []):
        found = importlib.metadata.distribution(name)
        source = json.loads(found.read_text("direct_url.json") or '{"url": "a package index"}')
        return f"{name} {found.version}, from {source['url']}"
    return "a folder that pip did not install"


def installed_version(name: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
