"""Write a detector as an ONNX model or as a program of ``torch.export``."""

import io
import json
import logging
import re

import torch
from torch.export import Dim, ExportedProgram

from ...errors import UserError
from .graph import INPUTS, OUTPUTS, DetectionGraph

OLDEST = "2.11"  # 2.6 can neither save the program nor translate it; no version between was tried
OPSET = 20  # GridSample is there since 16, DeformConv since 19
MOST_IMAGES, MOST_PIXELS = 1024, 16384  # of a batch, of a side
LEAST_UNITS = 2  # of a side of a program's images: a single row has another memory layout
DESCRIPTION = "metadata.json"  # in a program's file


def trace(graph: DetectionGraph) -> ExportedProgram:
    """The graph as a program for any number of images, of any size from `LEAST_UNITS` on.

    Raises:
        UserError: torch is too old.
    """
    if torch.__version__ < OLDEST:
        raise UserError(f"torch {torch.__version__} cannot export a model: {OLDEST} or newer can")
    unit, device = graph.model.size_divisibility, graph.model.device
    batch = Dim("batch", min=1, max=MOST_IMAGES)
    height, width = (
        unit * Dim(f"{side}_units", min=LEAST_UNITS, max=MOST_PIXELS // unit)
        for side in ("height", "width")
    )
    sizes = torch.tensor([[15 * unit, 22 * unit]] * 2, device=device)
    images = torch.zeros(2, 3, *sizes[0].tolist(), dtype=torch.uint8, device=device)
    shapes = ({0: batch, 2: height, 3: width}, {0: batch}, {0: batch})
    graph.requires_grad_(False)  # else what a program returns has it, wherever that runs
    with torch.no_grad():
        # One tensor in two places would be one input of the program.
        examples = images, sizes, 2 * sizes
        return torch.export.export(graph, examples, dynamic_shapes=shapes, strict=False)


def onnx_bytes(program: ExportedProgram, description: dict[str, str]) -> bytes:
    """An ONNX model, with the description as its metadata.

    Raises:
        UserError: the libraries that write it are missing, or do not know an operation.
    """
    try:
        import onnx  # noqa: F401
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
    for key, value in description.items():
        model.metadata_props.add(key=key, value=value)
    return model.SerializeToString()


def program_bytes(program: ExportedProgram, description: dict[str, str]) -> bytes:
    """A file that ``torch.export.load`` reads, with the description as JSON in it."""
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={DESCRIPTION: json.dumps(description)})
    return file.getvalue()
