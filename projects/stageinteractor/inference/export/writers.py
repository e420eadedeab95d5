"""Write a detector as an ONNX model, in OpenVINO's format or as a program of ``torch.export``."""

import contextlib
import functools
import io
import json
import logging
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from ...errors import UserError
from .graph import INPUTS, OUTPUTS, DetectionGraph

OLDEST = "2.11"  # 2.6 can neither save the program nor translate it; no version between was tried
# DeformConv is there since 19. From 20 on, GridSample has the mode "linear" instead of "bilinear",
# which TensorRT reads as "nearest" (NVIDIA/TensorRT#4646, onnx/onnx-tensorrt#1060).
OPSET = 19
MOST_IMAGES, MOST_PIXELS = 1024, 16384  # of a batch, of a side
LEAST_UNITS = 2  # of a side of a program's images: a single row has another memory layout
DESCRIPTION = "metadata.json"  # in a program's file
INFO = "stageinteractor"  # where OpenVINO's format has the description


def trace(graph: DetectionGraph) -> ExportedProgram:
    """The graph as a program for any number of images, of any size from `LEAST_UNITS` on.

    Raises:
        UserError: torch is too old.
    """
    if torch.__version__ < OLDEST:
        raise UserError(f"torch {torch.__version__} cannot export a model: {OLDEST} or newer can")
    unit, device = graph.model.size_divisibility, graph.model.device
    batch = Dim("batch", min=1, max=MOST_IMAGES)
    least = (LEAST_UNITS - 1) * unit + 1  # before padding
    height, width = (Dim(side, min=least, max=MOST_PIXELS) for side in ("height", "width"))
    sizes = torch.tensor([[15 * unit - 3, 22 * unit - 5]] * 2, device=device)
    images = torch.zeros(2, 3, *sizes[0].tolist(), dtype=torch.uint8, device=device)
    shapes = ({0: batch, 2: height, 3: width}, {0: batch}, {0: batch})
    graph.requires_grad_(False)  # else what a program returns has it, wherever that runs
    with torch.no_grad():
        # One tensor in two places would be one input of the program.
        examples = images, sizes, 2 * sizes
        return torch.export.export(
            graph, examples, dynamic_shapes=shapes, strict=False,
            # It cannot prove of every size that the padded one divides.
            prefer_deferred_runtime_asserts_over_guards=True,
        )


def onnx_files(program: ExportedProgram, description: dict[str, str]) -> dict[str, bytes]:
    """An ONNX model, with the description as its metadata, whose ``precision`` may be int8.

    Raises:
        UserError: the libraries that write it are missing, or do not know an operation.
    """
    try:
        import onnxruntime  # noqa: F401
        import onnxscript
    except ImportError as error:
        raise UserError(f"ONNX needs {error.name}: pip install -e '.[export]'") from error
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    try:
        written = torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, input_names=INPUTS, output_names=OUTPUTS,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        missing = re.search(r"torchvision\S*deform_conv2d", str(error))
        if not missing:
            raise
        raise UserError(
            f"the model cannot be written as ONNX: torch {torch.__version__} with onnxscript "
            f"{onnxscript.__version__} has no deformable convolution\n"
            "pip install -U onnxscript, or --format torch"
        ) from error
    assert written is not None  # which it is for another exporter alone
    model = written.model_proto
    nodes = model.graph.node
    first = next(node for node in nodes if node.op_type == "Cast" and node.input[0] == INPUTS[0])
    for node in nodes:
        node.ClearField("metadata_props")  # where in this machine's files it comes from
        if node.op_type == "Shape" and node.input[0] == INPUTS[0]:
            node.input[0] = first.output[0]  # in TensorRT, only casts take bytes
    nodes.remove(first)
    nodes.insert(0, first)
    for key, value in description.items():
        model.metadata_props.add(key=key, value=value)
    content = model.SerializeToString()
    return {"model.onnx": quantize(content) if description.get("precision") == "int8" else content}


def quantize(content: bytes) -> bytes:
    """The ONNX model whose linear layers compute in int8; everything else stays in float32.

    Each output channel's weights have a scale of their own. The inputs get theirs, one for all, as
    the model runs.
    """
    from onnxruntime.quantization import quantize_dynamic

    logging.disable(logging.WARNING)  # it advises to fuse operators, which other runtimes lack then
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.onnx")
            path.write_bytes(content)
            quantize_dynamic(path, path, ["MatMul", "Gemm"], per_channel=True)
            return path.read_bytes()
    finally:
        logging.disable(logging.NOTSET)


def openvino_files(program: ExportedProgram, description: dict[str, str]) -> dict[str, bytes]:
    """OpenVINO's own format, the graph and its weights, with the description in ``rt_info``.

    Raises:
        UserError: the libraries that write it are missing, or do not know an operation.
    """
    with explain_openvino("the model"), tempfile.TemporaryDirectory() as folder:
        import openvino

        (content,) = onnx_files(program, {}).values()
        model = openvino_core().read_model(content)
        for key, value in description.items():
            model.set_rt_info(value, [INFO, key])
        openvino.serialize(model, f"{folder}/model.xml")
        return {name: Path(folder, name).read_bytes() for name in ("model.xml", "model.bin")}


@functools.cache
def openvino_core() -> Any:
    """OpenVINO's entrance, one for the process.

    The CPU plugin of each of several would give the thread another stack for signal handlers, and
    return to that of an earlier one, whose memory may be free by then (seen in 2026.4.1).
    """
    import openvino

    return openvino.Core()


@contextlib.contextmanager
def explain_openvino(what: str) -> Iterator[None]:
    """Raises UserError where OpenVINO is missing or cannot use a model."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"{what} needs {error.name}: pip install -e '.[export]'") from error
    except RuntimeError as error:  # all of its errors
        reason = str(error).strip().splitlines()[-1]  # after where in its source
        raise UserError(f"OpenVINO cannot use {what}: {reason}") from error


def program_files(program: ExportedProgram, description: dict[str, str]) -> dict[str, bytes]:
    """A file that ``torch.export.load`` reads, with the description as JSON in it."""
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={DESCRIPTION: json.dumps(description)})
    return {"model.pt2": file.getvalue()}
