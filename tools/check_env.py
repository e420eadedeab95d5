"""Show on one screen what is installed, and for each problem its cure.

    python tools/check_env.py

Ends with "no problems", or with exit code 1 after the problems. It works where torch, Detectron2
or anything else is missing or broken: explaining that is what it is for.
"""

import argparse
import configparser
import importlib
import importlib.metadata
import os
import re
import site
import sys
from pathlib import Path
from typing import NamedTuple

import _start

ROOT = Path(__file__).resolve().parent.parent
SHOWN = ["numpy", "torch", "torchvision", "timm", "detectron2", "projects.stageinteractor"]
INSTALL = "python -m pip install -e ."  # installs and mends all that setup.cfg requires
REASONS = {"setuptools": " (detectron2.model_zoo imports pkg_resources, which 82 removed)"}


class Problem(NamedTuple):
    what: str
    cure: str


def python_problem(version):
    """Take sys.version_info; return a Problem or None, as the next functions do."""
    if not (3, 10) <= tuple(version[:2]) < (3, 14):
        return Problem(
            "Python {}.{} is outside 3.10 to 3.13".format(*version[:2]),
            "make install PYTHON=python3.11 VENV=.venv311",
        )


def requirement_problems(requirements, version_of):
    """Return a list: a Problem for all missing packages, and one for each unsuitable version.

    version_of(name) returns the installed version, or None.
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


def import_problem(name, error):
    """Take what importing a package raised, or None."""
    absent = isinstance(error, ModuleNotFoundError)
    if error is None or absent and error.name == name and name != "detectron2":
        return None  # requirement_problems tells which are missing
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if absent:
        cure = "python tools/install_detectron2.py" if error.name == name else INSTALL
    elif name == "detectron2":
        cure = ("python -m pip uninstall detectron2 sal-detectron2, delete what is left of its "
                "folder, then python tools/install_detectron2.py")
    else:  # torchvision too: pip then installs one that was compiled against the torch it leaves
        cure = f"python -m pip uninstall {name}, then {INSTALL}"
    return Problem(f"{name} cannot be imported: {reason}", cure)


def shadow_problem(folders):
    """Look in site-packages folders for a package that hides this project's tools."""
    for folder in folders:
        if Path(folder, "tools", "__init__.py").exists():
            return Problem(
                f"{folder}/tools hides this project's folder tools",
                f"rm -r {folder}/tools (some Detectron2 packages bring it; nothing needs it)",
            )


def output_problem(folder):
    """Check that folder can be made and written to."""
    existing = next(path for path in [folder, *folder.parents] if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return Problem(
            f"{folder} cannot be written to, because of {existing}",
            "choose another folder: train.output_dir=FOLDER, or make demo OUTPUT=FOLDER",
        )


def describe_device(torch):
    """Name the device that is used unless a config says otherwise."""
    if torch.cuda.is_available():
        return f"cuda ({torch.cuda.get_device_name()})"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def describe_detectron2(folder):
    """Say which kind of Detectron2 lies in folder and whether it has its compiled extension."""
    kinds = {"detectron2": "official", "sal-detectron2": "ready-made wheel"}
    kind = next((kinds[name] for name in kinds if installed_version(name)), "copied by hand")
    compiled = "with" if list(folder.glob("_C.*")) else "without"
    return f"{kind}, {compiled} its compiled extension (not needed)\n{'':<16}in {folder}"


def installed_version(name):
    """Return a distribution's version, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@_start.command
def main(argv=None):
    """Print facts, then problems; return the exit code."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(argv)
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    requirements = re.findall(r"(?m)^\w.*", setup["options"]["install_requires"])
    problems = [python_problem(sys.version_info)]
    problems += requirement_problems(requirements, installed_version)

    print(f"{'Python':<16}{sys.version.split()[0]}, {sys.executable}")
    for name in SHOWN:
        try:
            module, error = importlib.import_module(name), None
        except Exception as caught:  # a broken package may raise anything
            module, error = None, caught
        problems.append(import_problem(name, error))
        fact = getattr(module, "__version__", "-")
        if name == "detectron2" and module:
            fact += ", " + describe_detectron2(Path(module.__file__).parent)
        print(f"{name.split('.')[-1]:<16}{fact}")
        if name == "torch" and module:
            print(f"{'  device':<16}{describe_device(module)}")
            print(f"{'  threads':<16}{module.get_num_threads()} of {os.cpu_count()} cores")

    problems.append(shadow_problem([*site.getsitepackages(), site.getusersitepackages()]))
    problems.append(output_problem(Path("output").resolve()))
    problems = list(filter(None, problems))
    for problem in problems:
        print(f"\nproblem: {problem.what}\n   cure: {problem.cure}")
    print(f"\n{len(problems) or 'no'} problem{'s' * (len(problems) != 1)}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
