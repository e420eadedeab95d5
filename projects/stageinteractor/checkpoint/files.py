"""Reading and writing files of weights. Nothing that a file contains is ever executed."""

import os
import pickle
import re
from collections import OrderedDict
from typing import Any, Dict

import numpy as np
import torch
from detectron2.utils.file_io import PathManager

from ..errors import UserError

# numpy 2 moved the function that rebuilds arrays; a file names its place in the writer's numpy.
REBUILD_ARRAY = np.zeros(1).__reduce__()[0]


def encode_bytes(text: str, _encoding: str) -> bytes:
    """Stands in for ``_codecs.encode``, through which old protocols write bytes."""
    return text.encode("latin1")


# All that a model-zoo pickle, a dictionary of numpy arrays, may refer to.
PICKLE_GLOBALS = {
    ("_codecs", "encode"): encode_bytes,
    ("collections", "OrderedDict"): OrderedDict,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): REBUILD_ARRAY,
    ("numpy._core.multiarray", "_reconstruct"): REBUILD_ARRAY,
}


class ArrayUnpickler(pickle.Unpickler):
    """Reads containers, numbers, strings and numpy arrays, and refuses everything else."""

    def find_class(self, module: str, name: str):
        if (module, name) not in PICKLE_GLOBALS:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return PICKLE_GLOBALS[module, name]


def read_checkpoint(filename: str) -> Dict[str, Any]:
    """What a file of numpy arrays (.pkl) or of ``torch.save`` holds, tensors on the CPU.

    Raises:
        UserError: the file is incomplete, no checkpoint, or holds more than data.
    """
    try:
        if filename.endswith(".pkl"):
            with PathManager.open(filename, "rb") as file:
                content = ArrayUnpickler(file, encoding="latin1").load()
        else:
            content = torch.load(filename, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a file that is no pickle can raise anything
        code = re.search(r"GLOBAL (\S+)|it refers to (\S+)", str(error))
        if code:
            raise UserError(
                f"cannot load {filename}: it refers to {code[1] or code[2]}\n"
                "Only tensors and arrays are loaded, never code"
            ) from error
        raise UserError(f"cannot load {filename}: it is no checkpoint, or incomplete") from error
    if not isinstance(content, dict):
        raise UserError(f"{filename} holds no weights but a {type(content).__name__}")
    return content


def weights_of(content: Any, filename: str) -> Dict[str, torch.Tensor]:
    """A state dict, by the names that its owner gave it before several processes trained it.

    Raises:
        UserError: this is no dictionary of tensors by name.
    """
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, (torch.Tensor, np.ndarray))
        for name, value in content.items()
    ):
        raise UserError(f"{filename} holds no weights by name")
    return {name.removeprefix("module."): value for name, value in content.items()}


def write_checkpoint(data: Dict[str, Any], path: str):
    """Save ``data`` to ``path``, which is either whole or as it was before."""
    try:
        torch.save(data, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)
    finally:
        if os.path.exists(f"{path}.tmp"):
            os.remove(f"{path}.tmp")
