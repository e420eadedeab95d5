"""Exported files in place of a model: the same inputs and outputs, whatever runs them."""

import json
from collections.abc import Callable

import numpy as np
import torch
from detectron2.structures import Boxes, ImageList, Instances
from omegaconf import DictConfig
from torch import Tensor

from ...config.overrides import current_value
from ...config.portable_config import MOST_OF, parse_portable
from ...errors import UserError
from .graph import INPUTS, OUTPUTS
from .writers import DESCRIPTION, LEAST_UNITS

ONNX = ".onnx"
SUFFIXES = (ONNX, ".pt2")

Runner = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class ExportedModel:
    """Detectron2's inputs and outputs around a graph, see ``DetectionGraph.forward``.

    Args:
        run: the graph.
        size_divisibility: of the sides of its images, pixels.
        num_classes: of its detections, if that is known.
    """

    def __init__(self, run: Runner, size_divisibility: int, num_classes: int | None = None):
        self.run, self.size_divisibility = run, size_divisibility
        self.num_classes = num_classes

    def __call__(self, batched_inputs: list[dict]) -> list[dict[str, Instances]]:
        """Detect, see ``StageInteractor.forward``; images are uint8."""
        images = ImageList.from_tensors(
            [image["image"] for image in batched_inputs], self.size_divisibility
        )
        sizes = torch.tensor(images.image_sizes)
        wanted = [
            (image.get("height", height), image.get("width", width))
            for image, (height, width) in zip(batched_inputs, images.image_sizes)
        ]
        boxes, scores, classes = self.run(images.tensor, sizes, torch.tensor(wanted))
        known = self.num_classes and classes.numel()
        if known and not 0 <= classes.min() <= classes.max() < self.num_classes:
            raise UserError(
                f"the exported file finds class {classes.max()}, and has names of "
                f"{self.num_classes}: export it anew"
            )
        return [
            {"instances": Instances(
                size, pred_boxes=Boxes(image_boxes), scores=image_scores, pred_classes=image_classes
            )[image_scores > 0]}
            for size, image_boxes, image_scores, image_classes in zip(
                wanted, boxes, scores, classes
            )
        ]


def load_exported(filename: str, *, trusted: bool) -> tuple[ExportedModel, DictConfig, list[dict]]:
    """What ``tools/export.py`` has written: the model, its config and its classes.

    Raises:
        UserError: it cannot be read, is something else, or is a program that nobody trusts.
    """
    if filename.endswith(ONNX):
        run, description = load_onnx(filename)
    else:
        run, description = load_program(filename, trusted=trusted)
    try:
        cfg, categories = parse_portable(description["config"], filename)
        model = ExportedModel(run, int(description["size_divisibility"]), len(categories))
        about = [json.loads(description[key]) for key in ("class_names", "categories")]
    except (KeyError, ValueError) as error:
        raise UserError(f"{filename} was not written by tools/export.py") from error
    different = disagreement(model, cfg, categories, about) or wrong_outputs(model)
    if different:
        raise UserError(f"{filename} does not agree with itself: {different}\nExport it anew")
    return model, cfg, categories


def disagreement(
    model: ExportedModel, cfg: DictConfig, categories: list[dict], about: list[list]
) -> str:
    """What an exported file says of itself in two ways; nothing if both are the same."""
    if about != [[item["name"] for item in categories], categories]:
        return "its metadata and its config have other classes"
    if isinstance(cfg.model, DictConfig):
        unit, count = (current_value(cfg, f"model.{key}")
                       for key in ("size_divisibility", "decoder.num_classes"))
        if unit != model.size_divisibility:
            return f"size_divisibility is {model.size_divisibility} and {unit}"
        if count != len(categories):
            return f"{count} classes and the names of {len(categories)}"
    if not 1 <= model.size_divisibility <= MOST_OF["size_divisibility"]:
        return f"size_divisibility is {model.size_divisibility}"
    return ""


def wrong_outputs(model: ExportedModel) -> str:
    """How the outputs for a black image differ from `DetectionGraph`'s; nothing if they do not."""
    side = LEAST_UNITS * model.size_divisibility
    size = torch.tensor([[side, side]])
    outputs = model.run(torch.zeros(1, 3, side, side, dtype=torch.uint8), size, size.clone())
    found = [(value.dtype, tuple(value.shape)) for value in outputs]
    count = found[0][1][1] if found and len(found[0][1]) == 3 else 0
    expected = [
        (torch.float32, (1, count, 4)), (torch.float32, (1, count)), (torch.int64, (1, count)),
    ]
    if found != expected:
        return f"its outputs are not boxes, scores and classes but {found}"
    if count and not 0 <= outputs[2].min() <= outputs[2].max() < model.num_classes:
        return f"it finds class {outputs[2].max()} and has the names of {model.num_classes}"
    return ""


def load_onnx(filename: str) -> tuple[Runner, dict[str, str]]:
    """An ONNX model, run by onnxruntime, and its metadata. Raises UserError."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
    except ImportError as error:
        raise UserError(f"{filename} needs {error.name}: pip install -e '.[export]'") from error
    refuse_external_data(filename)
    available = onnxruntime.get_available_providers()
    providers = [p for p in ("CUDAExecutionProvider", "CPUExecutionProvider") if p in available]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    try:
        session = onnxruntime.InferenceSession(filename, options, providers)
    except Exception as error:  # its errors have no type of their own in common
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"onnxruntime cannot run {filename}: {reason}") from error

    names = tuple(tuple(port.name for port in ports) for ports in
                  (session.get_inputs(), session.get_outputs()))
    if names != (INPUTS, OUTPUTS):
        raise UserError(f"{filename} was not written by tools/export.py")

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        feeds = {name: np.asarray(value) for name, value in zip(INPUTS, inputs)}
        return tuple(map(torch.from_numpy, session.run(None, feeds)))

    return run, session.get_modelmeta().custom_metadata_map


def refuse_external_data(filename: str):
    """Raises UserError for a model whose numbers are in other files, which could be any."""
    import onnx
    from onnx.external_data_helper import _get_all_tensors, uses_external_data

    try:
        model = onnx.load(filename, load_external_data=False)
    except Exception as error:  # protobuf's own has no public name in common
        raise UserError(f"onnxruntime cannot run {filename}: it is no ONNX model") from error
    if any(map(uses_external_data, _get_all_tensors(model))):
        raise UserError(
            f"{filename} reads numbers from other files, as tools/export.py never writes it\n"
            "Export it anew"
        )


def load_program(filename: str, *, trusted: bool) -> tuple[Runner, dict[str, str]]:
    """A program of torch.export and its description. Raises UserError."""
    if not trusted:
        raise UserError(
            f"loading {filename} can run code that is hidden in it: if it is your own, "
            "load_detector(..., trusted=True) does; ONNX models and checkpoints are data"
        )
    extra = {DESCRIPTION: ""}
    try:
        program = torch.export.load(filename, extra_files=extra)
    except Exception as error:  # torch's readers raise all sorts
        raise UserError(f"torch cannot load {filename}: {str(error).splitlines()[0]}") from error
    description = json.loads(extra[DESCRIPTION] or "{}")
    device, module = description.get("device", "cpu"), program.module()
    least = LEAST_UNITS * int(description.get("size_divisibility", 1))

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        height, width = inputs[0].shape[2:]
        if min(height, width) < least:
            raise UserError(
                f"{filename} takes images from {least} x {least} pixels on, padded: this one has "
                f"{height} x {width}"
            )
        return module(*(value.to(device) for value in inputs))

    return run, description
