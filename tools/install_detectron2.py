"""Install Detectron2, and on request detrex, into this Python, unless they are installed already.

    python tools/install_detectron2.py            # Detectron2
    python tools/install_detectron2.py --detrex   # detrex too

Neither is on a package index under its own name. The Python files and configs of an official commit
are read from GitHub's archive of it; nothing is built or executed, and the compiled extensions and
the top-level folder `tools`, which would hide this project's own, are left out. Where GitHub cannot
be reached, Detectron2 comes from a wheel on the package index. Its files are those of the commit,
except for the version, one added test helper and a fix for Python 3.11.
"""

import argparse
import hashlib
import http.client
import json
import os
import shutil
import sys
import sysconfig
import tarfile
import tempfile
import urllib.request
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import _start
from projects.stageinteractor.errors import UserError

GITHUB = "https://github.com"
WHEEL = "sal-detectron2==0.7.2"
WHEEL_SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"
KEPT = (".py", ".yaml")


class Package(NamedTuple):
    """What is installed of a commit.

    GitHub makes its archives on request and does not promise that their bytes stay the same. The
    checksum is therefore that of git's list of the files and their hashes, as printed by
    `git ls-tree -r --format='%(objectname) %(path)' COMMIT FOLDERS | grep -E '[.](py|yaml)$'`.
    """

    release: str  # name and version in the commit's setup.py
    repository: str
    commit: str
    checksum: str  # SHA-256
    folders: dict[str, str]  # in the archive, and where setup.py places them


DETECTRON2 = Package(
    "detectron2==0.6", "facebookresearch/detectron2",
    "a59f05630a8f205756064244bf5beb8661f96180",  # April 2024
    "cb28746b455124b600670bdc88b27ba157aae27bd32daa8ff77d49d2286a65da",
    {
        "detectron2/": "detectron2/",
        "configs/": "detectron2/model_zoo/configs/",
        "projects/PointRend/point_rend/": "detectron2/projects/point_rend/",
        "projects/DeepLab/deeplab/": "detectron2/projects/deeplab/",
        "projects/Panoptic-DeepLab/panoptic_deeplab/": "detectron2/projects/panoptic_deeplab/",
    },
)
DETREX = Package(
    "detrex==0.3.0", "IDEA-Research/detrex",
    "e244e6c3da3e84566728c52c21fb061d23ce0e2f",  # September 2025
    "47d236123a02f3f79c02f35cfeca26d9960c7bd8e3afcddea909ae820013e222",
    {"detrex/": "detrex/", "configs/": "detrex/config/configs/"},
)


def read_archive(package, address):
    """Return the package's files, {path in site-packages: bytes}, from GitHub's archive.

    Raises UserError if it cannot be read, or does not hold exactly the commit's files. Their paths
    are part of the checksum, so that none can lead elsewhere.
    """
    files, folders = {}, tuple(package.folders)
    try:
        with urllib.request.urlopen(address, timeout=20) as response:
            archive = tarfile.open(fileobj=response, mode="r|gz")
            for member in archive:
                path = member.name.partition("/")[2]  # below the folder REPOSITORY-COMMIT
                if member.isfile() and path.startswith(folders) and path.endswith(KEPT):
                    files[path] = archive.extractfile(member).read()
    except (OSError, http.client.HTTPException, tarfile.TarError) as error:
        raise UserError(f"{address} cannot be read: {error}") from None
    blobs = {path: hashlib.sha1(b"blob %d\0" % len(data) + data) for path, data in files.items()}
    listing = "".join(f"{blobs[path].hexdigest()} {path}\n" for path in sorted(blobs))
    if hashlib.sha256(listing.encode()).hexdigest() != package.checksum:
        raise UserError(f"{address} does not hold the files of commit {package.commit[:8]}")
    return {
        target + path.removeprefix(folder): data
        for folder, target in package.folders.items()
        for path, data in files.items() if path.startswith(folder)
    }


def read_wheel():
    """Return Detectron2's files, {path in site-packages: bytes}, from the wheel.

    Raises UserError if no index can be reached or the wheel's checksum is wrong.
    """
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder, "requirements.txt")
        requirements.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
        # The wheel is tagged for Python 3.10; without its compiled part it suits any version.
        options = "--no-deps --only-binary=:all: --python-version 3.10 --require-hashes".split()
        command = [sys.executable, "-m", "pip", "download", *options, "--dest", folder]
        cure = "check the connection to the package index, and pip"
        _start.run([*command, "-r", str(requirements)], f"{WHEEL} could not be downloaded: {cure}")
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            return {
                path: wheel.read(path) for path in wheel.namelist()
                if path.startswith("detectron2/") and path.endswith(KEPT)
            }


def place(package, files, release, address):
    """Write a package into site-packages, in full or not at all, and return its folder.

    pip knows it as release, DISTRIBUTION==VERSION, from address, or from an index if that is None.
    Raises UserError if it cannot be written.
    """
    distribution, version = release.split("==")
    site = Path(sysconfig.get_path("purelib"))
    if (site / package).exists():
        raise UserError(f"{site / package} is in the way and is not a package: delete it")
    info = f"{distribution.replace('-', '_')}-{version}.dist-info"
    texts = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n",
        f"{info}/top_level.txt": f"{package}\n",
    }
    if address:  # where it came from, for `pip freeze` and tools/check.py env
        texts[f"{info}/direct_url.json"] = json.dumps({"url": address, "archive_info": {}})
    record = f"{info}/RECORD"  # what `pip uninstall` removes
    texts[record] = "".join(f"{path},,\n" for path in [*files, *texts, record])
    files = files | {path: text.encode() for path, text in texts.items()}
    try:
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=site) as folder:
            for path, data in files.items():
                Path(folder, path).parent.mkdir(parents=True, exist_ok=True)
                Path(folder, path).write_bytes(data)
            # The package is moved last. An installation that is interrupted before is none, and
            # the next one replaces what it left.
            shutil.rmtree(site / info, ignore_errors=True)
            os.rename(Path(folder, info), site / info)
            os.rename(Path(folder, package), site / package)
    except OSError as error:
        raise UserError(f"{error}; use an environment that you may write to") from None
    return site / package


def install(package):
    """Install a package unless this Python has it. Raises UserError if that is not possible."""
    name = package.release.partition("==")[0]
    spec = find_spec(name)
    if spec and spec.origin:  # without origin, it is a folder and not a package
        print(f"{name} is installed in {Path(spec.origin).parent}: left alone")
        return
    release = package.release
    address = f"{GITHUB}/{package.repository}/archive/{package.commit}.tar.gz"
    print(f"{name} is missing: reading {address}", flush=True)
    try:
        files = read_archive(package, address)
    except UserError as error:
        if name != "detectron2":
            raise UserError(f"{error}; {name} is available nowhere else") from None
        print(f"{error}; installing {WHEEL} from the package index instead", flush=True)
        files, release, address = read_wheel(), WHEEL, None
    print(f"{name} is installed in {place(name, files, release, address)}")


@_start.command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--detrex", action="store_true", help="install detrex too")
    packages = [DETECTRON2, DETREX] if parser.parse_args(argv).detrex else [DETECTRON2]
    for package in packages:
        install(package)


if __name__ == "__main__":
    main()
