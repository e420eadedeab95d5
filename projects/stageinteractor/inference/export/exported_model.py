"""Exported files in place of a model: the same inputs and outputs, whatever runs them."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec

import numpy as np
import torch
from detectron2.structures import Boxes, ImageList, Instances
from google.protobuf.message import DecodeError
from omegaconf import DictConfig
from torch import Tensor

from ...checkpoint.model_file import why_missing
from ...config.overrides import current_value
from ...config.portable_config import MOST_OF, parse_portable
from ...errors import UserError
from .graph import INPUTS, OUTPUTS
from .writers import DESCRIPTION, INFO, LEAST_UNITS, explain_openvino, openvino_core

ONNX, OPENVINO = ".onnx", ".xml"
SUFFIXES = (ONNX, OPENVINO, ".pt2")
PROVIDERS = {  # of onnxruntime, by the name of what computes
    "onnxruntime on the CPU": "CPUExecutionProvider",
    "onnxruntime on CUDA": "CUDAExecutionProvider",
    "TensorRT": "TensorrtExecutionProvider",
    "DirectML": "DmlExecutionProvider",
}

Runner = Callable[..., tuple[Tensor, ...]]  # of the inputs and outputs of `DetectionGraph`


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
        """Detect, see ``StageInteractor.forward``; images are uint8.

        Raises:
            UserError: the model detects a class for which the file has no name.
        """
        images = ImageList.from_tensors(
            [image["image"] for image in batched_inputs], self.size_divisibility
        )
        wanted = [
            (image.get("height", height), image.get("width", width))
            for image, (height, width) in zip(batched_inputs, images.image_sizes)
        ]
        outputs = self.run(images.tensor, torch.tensor(images.image_sizes), torch.tensor(wanted))
        if unknown := self.unknown_class(outputs[2]):
            raise UserError(f"the exported file {unknown}: export it anew")
        return [
            {"instances": Instances(
                size, pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes
            )[scores > 0]}
            for size, boxes, scores, classes in zip(wanted, *outputs)
        ]

    def unknown_class(self, classes: Tensor) -> str:
        """What is wrong with the classes of detections; "" if each of them has a name."""
        if self.num_classes is None or not classes.numel():
            return ""
        if 0 <= classes.min() <= classes.max() < self.num_classes:
            return ""
        return f"finds class {classes.max()} and has the names of {self.num_classes}"


def load_exported(filename: str, *, trusted: bool) -> tuple[ExportedModel, DictConfig, list[dict]]:
    """What ``tools/export.py`` has written: the model, its config and its classes.

    Raises:
        UserError: the file is missing, cannot be read, is something else, or is a program that is
            not trusted.
    """
    if not os.path.isfile(filename):
        raise UserError(why_missing(filename))
    if filename.endswith(ONNX):
        run, description = load_onnx(filename)
    elif filename.endswith(OPENVINO):
        run, description = load_openvino(filename)
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
    """Where an exported file contradicts itself; "" if nowhere."""
    unit = model.size_divisibility
    if about != [[item["name"] for item in categories], categories]:
        return "its metadata and its config have other classes"
    if isinstance(cfg.model, DictConfig):
        theirs, count = (current_value(cfg, f"model.{key}", is_new=False)
                         for key in ("size_divisibility", "decoder.num_classes"))
        if theirs != unit:
            return f"size_divisibility is {unit} and {theirs}"
        if count != len(categories):
            return f"{count} classes and the names of {len(categories)}"
    return "" if 1 <= unit <= MOST_OF["size_divisibility"] else f"size_divisibility is {unit}"


def wrong_outputs(model: ExportedModel) -> str:
    """How the outputs for a black image differ from `DetectionGraph`'s; "" if they do not."""
    side = LEAST_UNITS * model.size_divisibility
    size = torch.tensor([[side, side]])
    outputs = model.run(torch.zeros(1, 3, side, side, dtype=torch.uint8), size, size.clone())
    found = [(value.dtype, tuple(value.shape)) for value in outputs]
    shape = found[0][1][:2] if found else ()
    if found != [(torch.float32, (*shape, 4)), (torch.float32, shape), (torch.int64, shape)]:
        return f"its outputs are not boxes, scores and classes but {found}"
    return model.unknown_class(outputs[2])


def load_onnx(
    filename: str, providers: Sequence[str] = ("CUDAExecutionProvider", "CPUExecutionProvider")
) -> tuple[Runner, dict[str, str]]:
    """An ONNX model, run by those of onnxruntime's providers that are here, and its metadata.

    Raises:
        UserError: libraries are missing, or the model cannot be run or was not written here.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime
    except ImportError as error:
        raise UserError(f"{filename} needs {error.name}: pip install -e '.[export]'") from error
    refuse_external_data(filename)
    available = onnxruntime.get_available_providers()
    providers = [provider for provider in providers if provider in available]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    try:
        session = onnxruntime.InferenceSession(filename, options, providers)
    except Exception as error:  # the types of its errors have nothing in common
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"onnxruntime cannot run {filename}: {reason}") from error

    check_ports(filename, [port.name for port in session.get_inputs() + session.get_outputs()])

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        feeds = {name: np.asarray(value) for name, value in zip(INPUTS, inputs)}
        return tuple(map(torch.from_numpy, session.run(None, feeds)))

    return run, session.get_modelmeta().custom_metadata_map


def check_ports(filename: str, names: list[str]) -> None:
    """Raises UserError unless inputs and outputs are those of `DetectionGraph`."""
    if tuple(names) != INPUTS + OUTPUTS:
        raise UserError(f"{filename} was not written by tools/export.py")


def load_openvino(filename: str) -> tuple[Runner, dict[str, str]]:
    """A model that OpenVINO reads, run by it on the CPU, and its metadata, none of ONNX's.

    Raises:
        UserError: OpenVINO is missing, or the model cannot be run or was not written here.
    """
    with explain_openvino(filename):
        model = openvino_core().read_model(filename)
        check_ports(filename, [port.any_name for port in model.inputs + model.outputs])
        # Processors that have bfloat16 would use it otherwise.
        options = {"INFERENCE_PRECISION_HINT": "f32",
                   "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        compiled = openvino_core().compile_model(model, "CPU", options)

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        found = compiled.infer_new_request(dict(zip(INPUTS, map(np.asarray, inputs))))
        return tuple(torch.from_numpy(found[name]) for name in OUTPUTS)

    has_info = model.has_rt_info(INFO)
    info = model.get_rt_info(INFO).astype(dict) if has_info else {}
    return run, {key: value.astype(str) for key, value in info.items()}


def each_runtime(filename: str) -> Iterator[tuple[str, Runner | None]]:
    """What could run an ONNX model, by name; None where it is not installed.

    Raises:
        UserError: one that is installed cannot run it.
    """
    import onnxruntime

    for name, provider in PROVIDERS.items():
        is_here = provider in onnxruntime.get_available_providers()
        yield name, load_onnx(filename, [provider])[0] if is_here else None
    yield "OpenVINO", load_openvino(filename)[0] if find_spec("openvino") else None


def refuse_external_data(filename: str) -> None:
    """Raises UserError for a model whose numbers are in other files, which could be any."""
    import onnx
    from onnx.external_data_helper import _get_all_tensors, uses_external_data

    try:
        model = onnx.load(filename, load_external_data=False)
    except DecodeError as error:
        raise UserError(f"onnxruntime cannot run {filename}: it is not an ONNX model") from error
    if any(map(uses_external_data, _get_all_tensors(model))):
        raise UserError(
            f"{filename} keeps weights in other files, which tools/export.py never does\n"
            "Export it anew"
        )


def load_program(filename: str, *, trusted: bool) -> tuple[Runner, dict[str, str]]:
    """A program of torch.export and its description. Raises UserError."""
    if not trusted:
        raise UserError(
            f"loading {filename} can run code that is hidden in it: if it is your own, use "
            "load_detector(..., trusted=True) or, with train_net.py, train.trust_program=true\n"
            "ONNX models and checkpoints are data"
        )
    extra = {DESCRIPTION: ""}
    try:
        program = torch.export.load(filename, extra_files=extra)
    except Exception as error:  # torch's readers raise errors of any type
        raise UserError(f"torch cannot load {filename}: {str(error).splitlines()[0]}") from error
    description = json.loads(extra[DESCRIPTION] or "{}")
    device, module = description.get("device", "cpu"), program.module()
    unit = int(description.get("size_divisibility", 1))
    least = LEAST_UNITS * unit

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        height, width = inputs[0].shape[2:]
        if min(height, width) <= least - unit:
            raise UserError(
                f"{filename} takes images from {least} x {least} pixels on, padded: this one has "
                f"{height} x {width}"
            )
        return module(*(value.to(device) for value in inputs))

    return run, description
