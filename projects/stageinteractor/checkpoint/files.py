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
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        code = re.search(r"GLOBAL (\S+)", str(error))  # what torch calls it
        if code:
            reason = f"it refers to {code[1]}"
        raise UserError(
            f"cannot load {filename}: {reason}\n"
            "Only tensors and arrays are loaded, never code. Is the file complete?"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{filename} holds no weights but a {type(content).__name__}")
    return content


def write_checkpoint(data: Dict[str, Any], path: str):
    """Save ``data`` to ``path``, which is either whole or as it was before."""
    torch.save(data, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)
