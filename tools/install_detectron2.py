"""Install Detectron2 into this Python, unless it is installed already.

    python tools/install_detectron2.py                 # a ready-made wheel: seconds
    python tools/install_detectron2.py --from-source   # the official source: minutes, C++ compiler

No package index has Detectron2 under its own name. The wheel's Python files are those of the
official commit below, except for the version, one added test helper and a fix for Python 3.11. Both
ways leave out Detectron2's package `tools`, which would shadow this project's folder of that name.
"""

import argparse
import base64
import csv
import hashlib
import importlib
import importlib.util
import io
import os
import re
import sys
import tempfile
import zipfile
from pathlib import Path

import _start

WHEEL = "sal-detectron2==0.7.2"
WHEEL_SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"
SOURCE = "https://github.com/facebookresearch/detectron2.git"
COMMIT = "a59f05630a8f205756064244bf5beb8661f96180"  # April 2024
PIP = [sys.executable, "-m", "pip"]


def find_installed():
    """Return (version, folder) of this Python's Detectron2, or None."""
    importlib.invalidate_caches()
    spec = importlib.util.find_spec("detectron2")
    if spec is None or spec.origin is None:  # without origin, it is a folder and not a package
        return None
    # The version is read from the file, because importing needs a torch that works.
    version = re.search(r'(?m)^__version__ = "(.+)"', Path(spec.origin).read_text())
    return version.group(1) if version else "(unknown version)", Path(spec.origin).parent


def download(folder):
    """Download the ready-made wheel into folder and return its path.

    Raises UserError if no index can be reached or the file's checksum is wrong.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
    # The wheel is tagged for Python 3.10; without its compiled part it suits any version.
    options = "--no-deps --only-binary=:all: --python-version 3.10 --require-hashes".split()
    _start.run(
        [*PIP, "download", "--dest", str(folder), *options, "-r", str(requirements)],
        f"{WHEEL} could not be downloaded: check the connection to the package index",
    )
    return next(folder.glob("*.whl"))


def build(folder):
    """Build the official source's wheel in folder and return its path.

    Raises UserError if git, the network, a compiler or torch is missing.
    """
    os.environ["GIT_TERMINAL_PROMPT"] = "0"  # a proxy that asks for a password must not hang this
    _start.run(
        ["git", "ls-remote", SOURCE, "HEAD"],
        "the source cannot be reached: leave out --from-source to install the ready-made wheel",
        timeout=20,
    )
    # Its setup.py imports the torch that it compiles against.
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    command = [*PIP, "wheel", *options, f"git+{SOURCE}@{COMMIT}"]
    _start.run(command, f"it needs torch and a C++ compiler; to see all: {' '.join(command)}")
    return next(folder.glob("*.whl"))


def repack(wheel, folder, pure):
    """Write the wheel without `tools/` into folder and return the new path.

    A pure wheel lacks the compiled extension too, and suits every Python and platform.
    """
    name, version = wheel.name.split("-")[:2]
    info = f"{name}-{version}.dist-info"
    slim = folder / (f"{name}-{version}-py3-none-any.whl" if pure else wheel.name)
    record = io.StringIO()
    rows = csv.writer(record, lineterminator="\n")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(slim, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.namelist():
            skipped = entry.startswith("tools/") or entry == f"{info}/RECORD"
            if skipped or pure and re.fullmatch(r"detectron2/_C\..*(so|pyd)", entry):
                continue
            data = old.read(entry)
            if entry == f"{info}/METADATA":
                # Detectron2 needs neither, but pip would complain about them every time.
                data = re.sub(rb"(?m)^Requires-Dist: (numpy<2|black).*\n", b"", data)
            elif entry == f"{info}/top_level.txt":
                data = b"detectron2\n"
            elif entry == f"{info}/WHEEL" and pure:
                data = b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            new.writestr(entry, data)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            rows.writerow([entry, f"sha256={digest}", len(data)])
        rows.writerow([f"{info}/RECORD", "", ""])
        new.writestr(f"{info}/RECORD", record.getvalue())
    return slim


def install(wheel):
    """Install the wheel with pip. Raises UserError if it may not write there."""
    name, version = wheel.name.split("-")[:2]
    options = ["--no-deps", "--no-index", "--find-links", str(wheel.parent)]
    _start.run(
        [*PIP, "install", *options, f"{name}=={version}"],
        "use a virtual environment that you may write to (make install makes one)",
    )


@_start.command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--from-source", action="store_true", help="build the official source")
    from_source = parser.parse_args(argv).from_source
    found = find_installed()
    if found:
        print(f"Detectron2 {found[0]} is installed in {found[1]}: left alone")
        return
    _start.run([*PIP, "--version"], f"run {sys.executable} -m ensurepip")
    if from_source:
        print(f"Detectron2 is missing: building {SOURCE} at {COMMIT[:8]}, about 10 minutes")
    else:
        print(f"Detectron2 is missing: installing {WHEEL}, the ready-made wheel, without its "
              "compiled extension, which nothing here needs")
    with tempfile.TemporaryDirectory() as folder:
        original, slim = Path(folder, "original"), Path(folder, "slim")
        original.mkdir()
        slim.mkdir()
        wheel = build(original) if from_source else download(original)
        install(repack(wheel, slim, pure=not from_source))
    print("Detectron2 {} is installed in {}".format(*find_installed()))


if __name__ == "__main__":
    main()
