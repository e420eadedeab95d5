"""Reading and writing files of weights. Nothing that a file contains is ever executed."""

import errno
import hashlib
import json
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from typing import Any, BinaryIO, Callable, Dict, List, NamedTuple, Sequence

import numpy as np
import safetensors.torch
import torch
from detectron2.utils.file_io import PathManager

from ..errors import UserError

UNFINISHED = ".tmp"  # ends the name of a file until it is whole
# The end of a name in the manner of torch's model zoo: how the file's sha256 begins. No date.
HASH_IN_NAME = re.compile(r"-(?!20\d{6}\.)([0-9a-f]{8,64})\.\w+$")


def encode_bytes(text: str, _encoding: str) -> bytes:
    """Stands in for ``_codecs.encode``, through which old protocols write bytes."""
    return text.encode("latin1")


class NumberType:
    """Stands in for numpy's dtype, whose state could make bytes of a file addresses of objects."""

    def __init__(self, code: str, *_):
        if not re.fullmatch(r"[biufc]\d+", code):
            raise pickle.UnpicklingError("an array of something else than numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple):
        self.dtype = self.dtype.newbyteorder(state[1])


class Array:
    """Stands in for a numpy array, which would reserve as much memory as a file asks for."""

    tensor = None

    def __init__(self, *_):
        pass

    def __setstate__(self, state: tuple):
        _, shape, number_type, by_columns, data = state
        data = data.encode("latin1") if isinstance(data, str) else data
        order = "F" if by_columns else "C"
        array = np.ndarray(shape, number_type.dtype, data, order=order)  # never beyond the data
        self.tensor = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))


# All that a model-zoo pickle, a dictionary of numpy arrays, may refer to.
PICKLE_GLOBALS = {
    ("_codecs", "encode"): encode_bytes,
    ("collections", "OrderedDict"): OrderedDict,
    ("numpy", "ndarray"): Array,
    ("numpy", "dtype"): NumberType,
    # numpy 2 moved it; a file names its place in the writer's numpy.
    ("numpy.core.multiarray", "_reconstruct"): Array,
    ("numpy._core.multiarray", "_reconstruct"): Array,
}


class ArrayUnpickler(pickle._Unpickler):
    """Reads containers, numbers, strings and numpy arrays, and refuses everything else.

    Based on the reader in Python: that in C reserves a list as long as any number in a file says.
    """

    def find_class(self, module: str, name: str):
        if (module, name) not in PICKLE_GLOBALS:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return PICKLE_GLOBALS[module, name]

    def load_build(self):
        """Give a stand-in its state; whatever else a file wants to change stays as it is."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], (Array, NumberType)):
            self.stack[-1].__setstate__(state)

    dispatch = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}


def read_checkpoint(filename: str) -> Dict[str, Any]:
    """What a file of numpy arrays (.pkl), .safetensors or of ``torch.save`` holds, on the CPU.

    Raises:
        UserError: the file is incomplete, no checkpoint, or holds more than data.
    """
    try:
        if filename.endswith(".pkl"):
            with PathManager.open(filename, "rb") as file:
                content = ArrayUnpickler(file, encoding="latin1").load()
        elif filename.endswith(".safetensors"):
            content = read_safetensors(filename)
        else:
            refuse_bomb(filename)
            content = torch.load(filename, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that is no pickle can raise anything
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise  # the system's; torch seeks to an invalid place in some files that are cut off
        code = re.search(r"GLOBAL ([\w.]{1,99})|it refers to ([\w.]{1,99})", str(error))
        if code:
            raise UserError(
                f"cannot load {filename}: it refers to {code[1] or code[2]}\n"
                "Only tensors and arrays are loaded, never code"
            ) from error
        raise UserError(f"cannot load {filename}: it is no checkpoint, or incomplete") from error
    if not isinstance(content, dict):
        raise UserError(f"{filename} holds no weights but a {type(content).__name__}")
    return dict(dict.items(content))  # a file can put something else in place of its own methods


def refuse_bomb(filename: str):
    """Raise BadZipFile for an archive that grows as it is unpacked, which torch never writes."""
    if zipfile.is_zipfile(filename):
        with zipfile.ZipFile(filename) as archive:
            size = sum(part.file_size for part in archive.infolist())
        if size > os.path.getsize(filename):
            raise zipfile.BadZipFile(f"{size} bytes in it")


def read_safetensors(filename: str) -> Dict[str, Any]:
    """Weights, and names of classes and config where the metadata has them, as in our .pth."""
    with safetensors.safe_open(filename, "pt") as file:
        content = {"model": {name: file.get_tensor(name) for name in file.keys()}}
        metadata = file.metadata() or {}
    if "class_names" in metadata:
        content["class_names"] = json.loads(metadata["class_names"])
    if "config" in metadata:
        content["config"] = metadata["config"]
    return content


def zoo_checkpoint(content: Dict[str, Any], filename: str) -> Dict[str, Any]:
    """The formats that Detectron2 itself would unpickle: its own, pycls's and Caffe2's.

    Raises:
        UserError: this is none of them.
    """
    if "model" in content:
        return content
    weights = weights_of(content.get("model_state", content.get("blobs", content)), filename)
    weights = {k: v for k, v in weights.items() if not k.endswith("_momentum")}
    author = "pycls" if "model_state" in content else "Caffe2"
    return {"model": weights, "__author__": author, "matching_heuristics": True}


def weights_of(content: Any, filename: str) -> Dict[str, torch.Tensor]:
    """A state dict, by the names that its owner gave it before several processes trained it.

    Raises:
        UserError: this is no dictionary of tensors by name.
    """
    items = dict.items(content) if isinstance(content, dict) else [(None, content)]
    weights = {k: v.tensor if isinstance(v, Array) else v for k, v in items}
    if not all(isinstance(k, str) and is_plain_tensor(v) for k, v in weights.items()):
        raise UserError(f"{filename} holds no weights by name")
    return {name.removeprefix("module."): value for name, value in weights.items()}


def is_plain_tensor(value: Any) -> bool:
    """Whether it is a tensor that has all of its numbers in memory, one after the other."""
    return isinstance(value, torch.Tensor) and value.layout is torch.strided and not (
        value.is_meta or value.is_quantized or value.is_nested
    )


def class_names_of(checkpoint: Dict[str, Any], filename: str) -> List[str]:
    """Names of classes that a checkpoint, of this project or a released one, has, if any.

    Raises:
        UserError: what it has is no list of names.
    """
    meta = checkpoint.get("meta")
    names = meta.get("CLASSES") if isinstance(meta, dict) else checkpoint.get("class_names")
    names = [names] if isinstance(names, str) else names or []
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{filename}: its class names are no list of names")
    return list(names)


class AboutCheckpoint(NamedTuple):
    """What a checkpoint says of its model."""

    class_names: List[str]  # empty if it does not
    config: str  # in the form of engine/portable_config.py; empty if it has none


def about_checkpoint(filename: str) -> AboutCheckpoint:
    """What a checkpoint on this machine says of its model; of one elsewhere, nothing.

    Raises:
        UserError: the file cannot be read, see `read_checkpoint`.
    """
    if not os.path.isfile(filename):
        return AboutCheckpoint([], "")
    content = read_checkpoint(filename)
    return AboutCheckpoint(class_names_of(content, filename), config_of(content))


def config_of(checkpoint: Dict[str, Any]) -> str:
    """The config that a checkpoint carries, if it does."""
    config = checkpoint.get("config", "")
    return config if isinstance(config, str) else ""


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
            "It is removed: try again, or get the file elsewhere and set train.init_checkpoint=FILE"
        )


def write_checkpoint(data: Dict[str, Any], path: str):
    """Save ``data`` to ``path``, see `write_durably`."""

    def save(file: BinaryIO):
        try:
            torch.save(data, file)
        except RuntimeError as error:  # torch's writer stumbles over what it has not written
            raise error.__context__ if isinstance(error.__context__, OSError) else error

    write_durably(path, save)


def write_safetensors(
    weights: Dict[str, torch.Tensor], class_names: Sequence[str], config: str, path: str
):
    """Save weights, the names of their classes and their config as .safetensors.

    See `write_durably`; an empty config is left out.

    Raises:
        OSError: it cannot be written.
        ValueError: a tensor is of a type that the format lacks.
    """
    # The format has no tensors that share memory, as tied weights do.
    apart = {
        name: value.detach().clone(memory_format=torch.contiguous_format)
        for name, value in weights.items()
    }
    metadata = {"format": "pt", "class_names": json.dumps(list(class_names))}
    if config:
        metadata["config"] = config
    try:
        content = safetensors.torch.save(apart, metadata)
    except (KeyError, safetensors.SafetensorError) as error:
        raise ValueError(str(error)) from error
    write_durably(path, lambda file: file.write(content))


def write_durably(path: str, write: Callable[[BinaryIO], Any]):
    """Write a file that is either whole or as it was before, whenever the machine stops.

    Args:
        path: of the file.
        write: puts the content into a file that is open.

    Raises:
        OSError: it cannot be written.
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
    if os.name == "posix":  # elsewhere folders cannot be opened
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
        try:
            os.fsync(folder)  # else a loss of power may undo the new name
        finally:
            os.close(folder)
