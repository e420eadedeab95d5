"""Reading and writing files of weights. Nothing that a file contains is ever executed."""

import errno
import functools
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
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
import torch

from ..config.device import is_out_of_memory
from ..errors import UserError
from ..files import write_durably


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


def read_checkpoint(filename: str) -> dict[str, Any]:
    """The content of a pickle of numpy arrays (.pkl), a .safetensors or a ``torch.save`` file.

    Raises:
        UserError: the file is incomplete, is not a checkpoint, or holds more than data.
    """
    try:
        if filename.endswith(".safetensors"):
            content = read_safetensors(filename)
        elif zipfile.is_zipfile(filename) and not filename.endswith(".pkl"):
            content = read_archive(filename)
        else:
            with open(filename, "rb") as file:
                data = file.read()
            if filename.endswith(".pkl"):
                content = DataUnpickler(io.BytesIO(data), len(data), encoding="latin1").load()
            else:
                content = read_legacy(data)
    except Exception as error:  # unpickling a damaged file can raise anything
        # EINVAL: a damaged archive names a position that the file does not have.
        if isinstance(error, OSError) and error.errno != errno.EINVAL or is_out_of_memory(error):
            raise
        code = re.search(r"it refers to ([\w.]{1,99})", str(error))
        if code:
            raise UserError(
                f"cannot load {filename}: it refers to {code[1]}\n"
                "Only tensors and arrays are loaded, never code"
            ) from error
        raise UserError(f"cannot load {filename}: it is not a whole checkpoint") from error
    if not isinstance(content, dict):
        raise UserError(f"{filename} holds a {type(content).__name__} instead of weights")
    return dict(content)


def read_archive(filename: str) -> Any:
    """A file of ``torch.save``: a zip archive of a pickle and the numbers of its tensors."""
    stored, size = {}, os.path.getsize(filename)
    with zipfile.ZipFile(filename) as archive:
        parts = {part.filename.partition("/")[2]: part for part in archive.infolist()}
        if sum(part.file_size for part in archive.infolist()) > size:  # torch never compresses
            raise zipfile.BadZipFile("it grows as it is unpacked")
        if "byteorder" in parts and archive.read(parts["byteorder"]) != b"little":
            raise zipfile.BadZipFile("its numbers have another byte order")

        def find_storage(dtype: torch.dtype, key: str, numel: int) -> torch.Tensor:
            if key not in stored:
                part = parts[f"data/{key}"]
                stored[key] = torch.empty(part.file_size, dtype=torch.uint8)
                with archive.open(part) as file:
                    file.readinto(stored[key].numpy())
            values = stored[key].view(dtype)
            if len(values) != numel:
                raise EOFError(f"{len(values)} numbers instead of {numel}")
            return values

        data = io.BytesIO(archive.read(parts["data.pkl"]))
        return DataUnpickler(data, size, find_storage).load()


def read_legacy(data: bytes) -> Any:
    """A file of ``torch.save`` before 1.6: pickles, then the numbers of the tensors in them."""
    stored, file = {}, io.BytesIO(data)

    def find_storage(dtype: torch.dtype, key: str, numel: int, view: Any) -> torch.Tensor:
        if key not in stored:
            unpickler.charge(numel * dtype.itemsize)
            stored[key] = torch.empty(numel, dtype=dtype)
        if view is None:
            return stored[key]
        _, start, length = view
        return stored[key][start:start + length]

    begin = tuple(DataUnpickler(file, len(data)).load() for _ in range(3))
    if begin[:2] != LEGACY:
        raise pickle.UnpicklingError("torch did not write it")
    unpickler = DataUnpickler(file, len(data), find_storage)
    content = unpickler.load()
    for values in [stored[key] for key in DataUnpickler(file, len(data)).load()]:
        (numel,) = struct.unpack("<q", file.read(8))
        if numel != len(values) or file.readinto(values.view(torch.uint8).numpy()) < values.nbytes:
            raise EOFError(f"{numel} numbers instead of {len(values)}")
    return content


def read_safetensors(filename: str) -> dict[str, Any]:
    """Weights, and from the metadata class names and config, under the keys of our .pth files."""
    with safetensors.safe_open(filename, "pt") as file:
        content = {"model": {name: file.get_tensor(name) for name in file.keys()}}
        metadata = file.metadata() or {}
    if "class_names" in metadata:
        content["class_names"] = json.loads(metadata["class_names"])
    if "config" in metadata:
        content["config"] = metadata["config"]
    return content


def weights_of(content: Any, filename: str) -> dict[str, torch.Tensor]:
    """A state dict by name, without the prefix that training on several processes adds.

    Raises:
        UserError: this is not a dictionary of tensors by name.
    """
    items = dict.items(content) if isinstance(content, dict) else [(None, content)]
    weights = {k: v.tensor if isinstance(v, Array) else v for k, v in items}
    if not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in weights.items()):
        raise UserError(f"{filename} does not hold weights by name")
    return {name.removeprefix("module."): value for name, value in weights.items()}


def write_checkpoint(data: dict[str, Any], path: str):
    """Save ``data`` to ``path``, see `write_durably`."""

    def save(file: BinaryIO):
        try:
            torch.save(data, file)
        except RuntimeError as error:  # torch's writer fails over what it could not write
            cause = error.__context__
            raise (cause if isinstance(cause, OSError) else error) from None

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
