"""Reading and writing files of weights. Nothing that a file contains is ever executed."""

import errno
import functools
import hashlib
import inspect
import io
import json
import os
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import safetensors.torch
import torch
from detectron2.utils.file_io import PathManager

from ..errors import UserError
from ..files import write_durably

# The end of a name in the manner of torch's model zoo: how the file's sha256 begins. No date.
HASH_IN_NAME = re.compile(r"-(?!20\d{6}\.)([0-9a-f]{8,64})\.\w+$")


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


# How torch.save names the type of a storage.
STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool, "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
COPIES = 4  # of the bytes of a file; tied weights need some
LEGACY = 0x1950A86A20F9469CFC6C, 1001  # with which files of torch before 1.6 begin


class DataUnpickler(pickle._Unpickler):
    """Reads containers, numbers, strings, arrays and tensors, and refuses everything else.

    What a pickle makes takes memory in proportion to its own size. This is based on Python's own
    reader, because the one in C reserves a list as long as any number in a file says.

    Args:
        file: a pickle, in memory: reading from it reserves no more than there is.
        size: of the whole file, bytes.
        find_storage: returns the values, 1-D, of one of torch's persistent ids.
        encoding: of the text that Python 2 has written.
    """

    def __init__(
        self,
        file: io.BytesIO,
        size: int,
        find_storage: Callable[..., torch.Tensor] | None = None,
        encoding: str = "utf-8",
    ):
        super().__init__(file, encoding=encoding)
        self.left = COPIES * size
        self.find_storage = find_storage

    def persistent_load(self, pid: tuple) -> torch.Tensor:
        kind, dtype, key, _, *rest = pid
        if self.find_storage is None or kind != "storage" or not isinstance(key, str):
            raise pickle.UnpicklingError("an object that is elsewhere")
        return self.find_storage(dtype, key, *rest)

    def find_class(self, module: str, name: str):
        if (module, name) not in PICKLE_GLOBALS:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        found = PICKLE_GLOBALS[module, name]
        return functools.partial(found, self) if inspect.isfunction(found) else found

    def charge(self, amount: int):
        """Count what could be made of the same bytes again and again.

        Raises:
            UnpicklingError: it is several times as much as the file has.
        """
        self.left -= amount
        if self.left < 0:
            raise pickle.UnpicklingError("it grows as it is read")

    def encode(self, text: str, _encoding: str) -> bytes:
        """``_codecs.encode``, through which old protocols write bytes."""
        self.charge(len(text))
        return text.encode("latin1")

    def ordered_dict(self, pairs: list = ()) -> OrderedDict:
        self.charge(len(pairs))
        check_keys(key for key, _ in pairs)
        return OrderedDict(pairs)

    def tensor(
        self, storage: torch.Tensor, offset: int, size: tuple, stride: tuple, *_
    ) -> torch.Tensor:
        """``torch._utils._rebuild_tensor_v2``, which would enlarge a storage that is too small."""
        tensor = storage.as_strided(size, stride, offset)
        last = offset + sum((length - 1) * step for length, step in zip(size, stride))
        if tensor.numel() and last >= len(storage):  # of "meta", torch does not check this
            raise pickle.UnpicklingError("a tensor beyond its storage")
        return tensor

    def as_it_is(self, value: Any, *_) -> Any:
        """In place of a class that adds nothing that is needed here."""
        return value

    def load_build(self):
        """Give a stand-in its state; whatever else a file wants to change stays as it is."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], Array):
            self.charge(len(state[-1]))
        if isinstance(self.stack[-1], (Array, NumberType)):
            self.stack[-1].__setstate__(state)

    def load_setitem(self):
        check_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self):
        check_keys(self.stack[::2])
        super().load_setitems()

    def load_dict(self):
        check_keys(self.stack[::2])
        super().load_dict()

    dispatch = {
        **pickle._Unpickler.dispatch,
        pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict,
    }
    # The first reserves what a file says. Members of sets are hashed, see `check_keys`.
    for code in (pickle.BYTEARRAY8, pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET):
        del dispatch[code[0]]


def check_keys(keys: Iterable[Any]):
    """Raise UnpicklingError for keys other than text and integers.

    The hash of a tuple that is nested deeply enough overflows the interpreter's stack.
    """
    if not all(isinstance(key, (str, int)) for key in keys):
        raise pickle.UnpicklingError("a key that is neither text nor an integer")


# All that a pickle may refer to. Functions get the reader, too.
PICKLE_GLOBALS = {
    ("_codecs", "encode"): DataUnpickler.encode,
    ("collections", "OrderedDict"): DataUnpickler.ordered_dict,
    ("collections", "Counter"): DataUnpickler.as_it_is,  # in the state of torch's schedulers
    ("numpy", "ndarray"): Array,
    ("numpy", "dtype"): NumberType,
    # numpy 2 moved it; a file names its place in the writer's numpy.
    ("numpy.core.multiarray", "_reconstruct"): Array,
    ("numpy._core.multiarray", "_reconstruct"): Array,
    ("torch", "Size"): DataUnpickler.as_it_is,
    ("torch", "device"): DataUnpickler.as_it_is,
    ("torch._utils", "_rebuild_tensor"): DataUnpickler.tensor,
    ("torch._utils", "_rebuild_tensor_v2"): DataUnpickler.tensor,
    ("torch._utils", "_rebuild_parameter"): DataUnpickler.as_it_is,
    ("torch._utils", "_rebuild_parameter_with_state"): DataUnpickler.as_it_is,
    **{("torch", name): dtype for name, dtype in STORAGES.items()},
}


def read_checkpoint(filename: str, device: str = "cpu") -> dict[str, Any]:
    """What a file of numpy arrays (.pkl), .safetensors or of ``torch.save`` holds.

    Args:
        device: "cpu", or "meta" for tensors without their numbers, which takes no time.

    Raises:
        UserError: the file is incomplete, no checkpoint, or holds more than data.
    """
    try:
        if filename.endswith(".pkl"):
            with PathManager.open(filename, "rb") as file:
                data = file.read()
            content = DataUnpickler(io.BytesIO(data), len(data), encoding="latin1").load()
        elif filename.endswith(".safetensors"):
            content = read_safetensors(filename, device)
        elif zipfile.is_zipfile(filename):
            content = read_archive(filename, device)
        else:
            content = read_legacy(filename, device)
    except Exception as error:  # a file that is no pickle can raise anything
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise  # the system's; some damaged archives ask for a place that no file has
        code = re.search(r"it refers to ([\w.]{1,99})", str(error))
        if code:
            raise UserError(
                f"cannot load {filename}: it refers to {code[1]}\n"
                "Only tensors and arrays are loaded, never code"
            ) from error
        raise UserError(f"cannot load {filename}: it is no checkpoint, or incomplete") from error
    if not isinstance(content, dict):
        raise UserError(f"{filename} holds no weights but a {type(content).__name__}")
    return dict(content)


def read_archive(filename: str, device: str) -> Any:
    """A file of ``torch.save``: a zip archive of a pickle and the numbers of its tensors."""
    stored, size = {}, os.path.getsize(filename)
    with zipfile.ZipFile(filename) as archive:
        parts = {part.filename.partition("/")[2]: part for part in archive.infolist()}
        if sum(part.file_size for part in archive.infolist()) > size:  # torch never packs any
            raise zipfile.BadZipFile("it grows as it is unpacked")
        if "byteorder" in parts and archive.read(parts["byteorder"]) != b"little":
            raise zipfile.BadZipFile("numbers in another order of bytes")

        def find_storage(dtype: torch.dtype, key: str, numel: int) -> torch.Tensor:
            if key not in stored:
                part = parts[f"data/{key}"]
                values = torch.empty(part.file_size, dtype=torch.uint8, device=device)
                if device == "cpu":
                    with archive.open(part) as file:
                        file.readinto(values.numpy())
                stored[key] = values
            values = stored[key].view(dtype)
            if len(values) != numel:
                raise EOFError(f"{len(values)} numbers in place of {numel}")
            return values

        data = io.BytesIO(archive.read(parts["data.pkl"]))
        return DataUnpickler(data, size, find_storage).load()


def read_legacy(filename: str, device: str) -> Any:
    """A file of ``torch.save`` before 1.6: pickles, then the numbers of the tensors in them."""
    with open(filename, "rb") as file:
        data = file.read()
    stored, file = {}, io.BytesIO(data)

    def find_storage(dtype: torch.dtype, key: str, numel: int, view: Any) -> torch.Tensor:
        if key not in stored:
            unpickler.charge(numel * dtype.itemsize)
            stored[key] = torch.empty(numel, dtype=dtype, device=device)
        if view is None:
            return stored[key]
        _, start, length = view
        return stored[key][start:start + length]

    begin = tuple(DataUnpickler(file, len(data)).load() for _ in range(3))
    if begin[:2] != LEGACY:
        raise pickle.UnpicklingError("no file of torch's")
    unpickler = DataUnpickler(file, len(data), find_storage)
    content = unpickler.load()
    keys = DataUnpickler(file, len(data)).load()
    for values in [stored[key] for key in keys] if device == "cpu" else []:
        (numel,) = struct.unpack("<q", file.read(8))
        if numel != len(values) or file.readinto(values.view(torch.uint8).numpy()) < values.nbytes:
            raise EOFError(f"{numel} numbers in place of {len(values)}")
    return content


def read_safetensors(filename: str, device: str) -> dict[str, Any]:
    """Weights, and names of classes and config where the metadata has them, as in our .pth."""
    with safetensors.safe_open(filename, "pt") as file:
        content = {"model": {name: file.get_tensor(name).to(device) for name in file.keys()}}
        metadata = file.metadata() or {}
    if "class_names" in metadata:
        content["class_names"] = json.loads(metadata["class_names"])
    if "config" in metadata:
        content["config"] = metadata["config"]
    return content


def zoo_checkpoint(content: dict[str, Any], filename: str) -> dict[str, Any]:
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


def weights_of(content: Any, filename: str) -> dict[str, torch.Tensor]:
    """A state dict, by the names that its owner gave it before several processes trained it.

    Raises:
        UserError: this is no dictionary of tensors by name.
    """
    items = dict.items(content) if isinstance(content, dict) else [(None, content)]
    weights = {k: v.tensor if isinstance(v, Array) else v for k, v in items}
    if not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in weights.items()):
        raise UserError(f"{filename} holds no weights by name")
    return {name.removeprefix("module."): value for name, value in weights.items()}


def class_names_of(checkpoint: dict[str, Any], filename: str) -> list[str]:
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

    class_names: list[str]  # empty if it does not
    config: str  # in the form of config/portable_config.py; empty if it has none


def about_checkpoint(filename: str) -> AboutCheckpoint:
    """What a checkpoint on this machine says of its model; of one elsewhere, nothing.

    Raises:
        UserError: the file cannot be read, see `read_checkpoint`.
    """
    if not os.path.isfile(filename):
        return AboutCheckpoint([], "")
    content = read_checkpoint(filename, "meta")
    return AboutCheckpoint(class_names_of(content, filename), config_of(content))


def config_of(checkpoint: dict[str, Any]) -> str:
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


def write_checkpoint(data: dict[str, Any], path: str):
    """Save ``data`` to ``path``, see `write_durably`."""

    def save(file: BinaryIO):
        try:
            torch.save(data, file)
        except RuntimeError as error:  # torch's writer stumbles over what it has not written
            raise error.__context__ if isinstance(error.__context__, OSError) else error

    write_durably(path, save)


def write_safetensors(
    weights: dict[str, torch.Tensor], class_names: Sequence[str], config: str, path: str
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
