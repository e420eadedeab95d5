"""A file of weights, read once: the weights, what the file says of them, and where it came from."""

import glob
import hashlib
import os
import re
from collections.abc import Sequence
from http.client import HTTPException
from itertools import zip_longest
from typing import Any, NamedTuple
from urllib.parse import urlparse

from detectron2.utils.file_io import PathManager
from iopath.common.file_io import get_cache_dir
from torch import Tensor

from ..errors import UserError
from .weight_files import read_checkpoint, weights_of

# What detectron2:// stands for, and other addresses that can be fetched.
MODEL_ZOO = "https://dl.fbaipublicfiles.com/detectron2/"
SCHEMES = ("https", "detectron2")
# The end of a name in the manner of torch's model zoo: how the file's sha256 begins. Not a date.
HASH_IN_NAME = re.compile(r"-(?!20\d{6}\.)([0-9a-f]{8,64})\.\w+$")
# Where the formats have their weights: mmdet, Detectron2 and this project, pycls, Caffe2.
WEIGHTS = ("state_dict", "model", "model_state", "blobs")


class ModelFile(NamedTuple):
    """What one file of weights holds.

    ``weights`` have the names of the file, without "module." in front of them. ``class_names`` is
    empty and ``config`` is "" where the file has none; ``config`` has the form of
    config/portable_config.py. ``rest`` is everything else in the file: ``model_ema``, the state of
    a run, and what Detectron2 uses to match names.
    """

    path: str  # as it was given
    local: str  # on this machine
    weights: dict[str, Tensor]
    class_names: list[str]
    config: str
    rest: dict[str, Any]

    @classmethod
    def read(cls, path: str) -> "ModelFile":
        """The content of a file on this machine or at an address, in any format that is known.

        Raises:
            UserError: the file is missing, cannot be fetched or read, or does not hold weights.
        """
        local = fetch(path)
        content = read_checkpoint(local)
        key = next((key for key in WEIGHTS if key in content), None)
        weights = weights_of(content if key is None else content[key], path)
        rest = {} if key is None else {k: v for k, v in content.items() if k != key}
        if local.endswith((".pkl", ".pyth")) and key != "model":
            weights = {k: v for k, v in weights.items() if not k.endswith("_momentum")}
            author = "pycls" if key == "model_state" else "Caffe2"
            rest |= {"__author__": author, "matching_heuristics": True}
        if "matching_heuristics=True" in urlparse(path).query:
            rest["matching_heuristics"] = True
        meta, config = rest.get("meta"), rest.get("config")
        names = meta.get("CLASSES") if isinstance(meta, dict) else rest.get("class_names")
        names = [names] if isinstance(names, str) else names or []
        if not (isinstance(names, (list, tuple)) and all(isinstance(n, str) for n in names)):
            raise UserError(f"{path}: its class names are not a list of names")
        config = config if isinstance(config, str) else ""
        return cls(path, local, weights, list(names), config, rest)

    @property
    def iteration(self) -> int | None:
        """The iteration after which a run saved this file; None if no run can continue from it."""
        return self.rest.get("iteration") if "trainer" in self.rest else None

    def categories(self, found: list[dict]) -> list[dict]:
        """``id`` and ``name`` of the classes, in the model's order; empty if nothing is known.

        Args:
            found: of a config; they are returned if the names in the file are the same, or if it
                has none. Else ids count from 1.
        """
        if not self.class_names or [item["name"] for item in found] == self.class_names:
            return found
        return [{"id": i + 1, "name": name} for i, name in enumerate(self.class_names)]

    def without_numbers(self) -> "ModelFile":
        """The same names and shapes, without memory for the numbers."""
        average = self.rest.get("model_ema", {})
        rest = {**self.rest, "model_ema": outlines(average)} if average else self.rest
        return self._replace(weights=outlines(self.weights), rest=rest)


def outlines(state: Any) -> Any:
    """A state dict whose tensors have no memory; anything else as it is."""
    if not isinstance(state, dict):
        return state
    return {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in state.items()}


def other_classes(theirs: Sequence[str], ours: Sequence[str]) -> str:
    """How the class names of a checkpoint differ from those of the data; "" if they do not.

    Names that are not known, an empty sequence, do not differ.
    """
    if not theirs or not ours or list(theirs) == list(ours):
        return ""
    pairs = zip_longest(theirs, ours)
    number, (old, new) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    return f"was trained for other classes: number {number} is {old} there and {new} in the data"


def fetch(path: str) -> str:
    """The file of a path or an address on this machine, downloaded if it is not there yet.

    Raises:
        UserError: there is no such file, it cannot be fetched, or its name promises another one.
    """
    if "://" not in path:
        local = path.split("?")[0]
        if not os.path.isfile(local):
            raise UserError(why_missing(local))
        return local
    scheme = path.partition("://")[0]
    if scheme == "http":
        raise UserError(
            f"cannot fetch {path}: with http, anybody on the way can change the file\n"
            "Use https, or download it yourself and set train.init_checkpoint=FILE"
        )
    if scheme not in SCHEMES:
        raise UserError(f"cannot fetch {path}: an address starts with {', '.join(SCHEMES)}")
    address = urlparse(path)._replace(query="").geturl()
    try:
        local = PathManager.get_local_path(address)
    except (OSError, HTTPException) as error:
        url = address.replace("detectron2://", MODEL_ZOO)
        place = os.path.join(get_cache_dir(), urlparse(url).path.lstrip("/"))
        known_as = path if path == url else f"{path} ({url})"
        reason = getattr(error, "reason", error) or type(error).__name__
        raise UserError(
            f"cannot fetch {known_as}: {reason}\n"
            f"Without a network, download the file elsewhere and save it as {place} "
            "or set train.init_checkpoint=FILE"
        ) from error
    verify_download(local)
    return local


def verify_download(filename: str):
    """Compare a file with the beginning of its sha256, if its name ends in one, as in torch's zoo.

    Raises:
        UserError: it is another file. It is removed, so that it can be fetched again.
    """
    expected = HASH_IN_NAME.search(filename)
    if not expected:
        return
    with open(filename, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    found = digest.hexdigest()[:len(expected[1])]
    if found != expected[1]:
        os.remove(filename)
        raise UserError(
            f"{filename} is not what was published: its sha256 begins with {found}, not "
            f"{expected[1]} as in its name\n"
            "It has been removed: try again, or get the file elsewhere and set "
            "train.init_checkpoint=FILE"
        )


def why_missing(path: str) -> str:
    """Why there is no checkpoint at a path that is not a file, and what to do about it.

    Of a folder with checkpoints, the best one is named.
    """
    if not os.path.isdir(path):
        hint = "overrides come after another option" if "=" in path else "check the path"
        return f"no checkpoint {path}: {hint}"
    names = sorted(map(os.path.basename, glob.glob(os.path.join(glob.escape(path), "*.pth"))))
    best = [name for name in ("model_best.pth", "model_final.pth", *names[-1:]) if name in names]
    if not best:
        return f"{path} is a folder without checkpoints: give the file of one"
    return f"{path} is a folder: give a file in it, such as {os.path.join(path, best[0])}"
