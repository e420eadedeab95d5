"""Whether this machine computes what the authors' code computed, in every mode it can run.

The model with golden weights runs the recorded cases: a small decoder with two images and two
optimizer steps, and the complete ResNet-50 model with one image. Each mode is compared with the
recordings in seven quantities.
"""

import contextlib
import copy
import platform
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from detectron2.config import instantiate
from torch import Tensor, nn

from ..checkpoint.released import project_name
from ..config.environment import installed_version
from ..config.overrides import load_config
from ..modeling import (
    CrossStageLabelAssigner,
    HungarianMatcher,
    QueryGenerator,
    SetCriterion,
    StageInteractor,
    StageInteractorDecoder,
)
from ..modeling.boxes import xyzr_to_corners
from ..modeling.decoder import DecoderOutput
from ..modeling.fast_sampling.choice import working_kernel
from ..modeling.label_assigner import Assignment
from ..modeling.sampling import FeatureMaps
from ..modeling.targets import Targets, gather_targets
from .recorded import (
    FULL_SIZE,
    SMALL_SIZES,
    full_image,
    load_figures,
    load_golden_weights,
    recorded_objects,
    small_pyramid,
)
from .timing import Work, device_name, measure_rows

CONFIG = str(Path(__file__).parents[1] / "configs/stageinteractor_r50_12ep.py")
RECORDED_LOSSES = {"cls": "cls", "bbox": "bbox", "giou": "iou"}  # ours: recorded
FLOAT16_SCALE = 2.0**7  # of the loss, so that gradients stay inside the range
TIMED_RUNS = 3

QUANTITIES = ("logits", "boxes", "matches", "targets", "losses", "gradients", "step")
# The largest difference of each quantity. In float32, both sides round the last digits differently,
# and nothing else may differ: matches and labels are the same. AdamW divides by the gradient's own
# size, so that a step shows the relative error of the smallest gradients. Lower precisions round
# inputs of every product to 11 bits (TF32, float16) or 8 (bfloat16); six stages in a row multiply
# that by about ten, and queries that are almost as good as each other swap objects. Losses and
# gradients are therefore those of the recorded matches and labels. Eight times fewer bits show in
# bfloat16 as eight times the difference.
COARSE = (2e-2, 0.5, 12, 24, 5e-3, 0.2, 1.0)
TOLERANCES = {
    "float32": (1e-5, 1e-3, 0, 0, 1e-5, 1e-4, 1e-2),
    "TF32": COARSE,
    "float16": COARSE,
    "bfloat16": (0.15, 4.0, 48, 96, 4e-2, 0.8, 1.5),
}


class Unavailable(Exception):
    """This device cannot run a mode; says why."""


class Row(NamedTuple):
    """What became of one case in one mode."""

    name: str
    precision: str  # which of `TOLERANCES` applies
    differences: dict[str, float]
    missing: str = ""  # why the device cannot run it, or the error that it ended with
    is_skipped: bool = False

    @property
    def wrong(self) -> list[str]:
        """The quantities that differ by more than the tolerance, or are no numbers."""
        allowed = dict(zip(QUANTITIES, TOLERANCES[self.precision]))
        return [name for name, value in self.differences.items() if not value <= allowed[name]]

    @property
    def verdict(self) -> str:
        if self.is_skipped:
            return f"skipped, because {self.missing}"
        if self.missing:
            return f"FAILED: {self.missing}"
        return "WRONG: " + ", ".join(self.wrong) if self.wrong else "ok"


class RecordedMaps(nn.Module):
    """Stands in for backbone and neck, and returns recorded feature maps."""

    def __init__(self, maps: list[Tensor]):
        super().__init__()
        self.maps = [features.requires_grad_() for features in maps]

    def forward(self, _: Tensor) -> list[Tensor]:
        return self.maps


class Case(NamedTuple):
    """A model with golden weights, its input, and what the authors' code computed from it."""

    model: StageInteractor
    images: Tensor  # normalised and padded
    sizes: list[tuple[int, int]]  # before padding
    targets: Targets
    figures: dict[str, np.ndarray]  # recorded: the forward pass, and "train:" a training step
    steps: dict[str, np.ndarray]  # recorded: two optimizer steps, if there are any
    every: int  # logits are recorded of every n-th query

    def recorded(self, name: str) -> Tensor:
        return torch.from_numpy(self.figures[name]).to(self.images.device)


def small_case(folder: Path, device: str) -> Case:
    """The decoder with 64 channels and 20 queries, on feature maps of two images."""
    model = StageInteractor(
        backbone=nn.Identity(),
        neck=nn.Identity(),
        query_generator=QueryGenerator(num_queries=20, embed_dim=64),
        decoder=StageInteractorDecoder(embed_dim=64, feature_dim=64, ffn_dim=96, out_points=32),
        criterion=SetCriterion(
            matcher=HungarianMatcher(), label_assigner=CrossStageLabelAssigner()
        ),
        pixel_mean=(0.0, 0.0, 0.0),
        pixel_std=(1.0, 1.0, 1.0),
    )
    load_golden_weights(model)
    model.backbone = RecordedMaps([features.to(device) for features in small_pyramid()])
    figures = load_figures(folder, "small")
    for name, value in load_figures(folder, "small_train").items():
        figures[name.replace("case_a_train:", "train:")] = value
    images = torch.zeros(2, 3, 256, 320, device=device)
    steps = load_figures(folder, "small_optimizer")
    return make_case(model, images, SMALL_SIZES, figures, steps, 3)


def full_case(folder: Path, device: str) -> Case:
    """The complete ResNet-50 model with 100 queries on one image."""
    model = instantiate(load_config(CONFIG, []).model)
    load_golden_weights(model)
    figures = load_figures(folder, "full")
    return make_case(model, full_image().to(device), [FULL_SIZE], figures, {}, 5)


def make_case(
    model: StageInteractor, images: Tensor, sizes: list[tuple[int, int]],
    figures: dict[str, np.ndarray], steps: dict[str, np.ndarray], every: int,
) -> Case:
    targets = gather_targets(recorded_objects(figures, "train:", sizes), sizes, images.device)
    return Case(model.to(images.device), images, sizes, targets, figures, steps, every)


def recorded_assignment(case: Case) -> Assignment:
    """Labels from the recorded boxes and matches, whatever the model predicts."""
    stages = range(len(case.model.decoder.stages))
    shape = len(stages), len(case.sizes), -1
    boxes = torch.stack([case.recorded(f"stage{i}_boxes") for i in stages]).view(*shape, 4)
    match = torch.stack([case.recorded(f"train:stage{i}_matched_gt") for i in stages]).view(shape)
    logits = boxes.new_zeros(*match.shape, case.model.decoder.stages[0].class_head[-1].out_features)
    assigner = case.model.criterion.label_assigner
    return assigner(logits, boxes, match, case.targets.boxes, case.targets.labels)


def run_case(case: Case, precision: str = "float32") -> dict[str, float]:
    """Run forward, losses, backward and the recorded optimizer steps; return the differences."""
    model, device = case.model, case.images.device
    cfg = load_config(CONFIG, [])
    cfg.optimizer.params.model = model
    optimizer, clip = instantiate(cfg.optimizer), cfg.train.clip_grad.params
    start = {name: value.clone() for name, value in model.state_dict().items() if case.steps}
    sizes = torch.tensor(case.sizes, device=device)
    dtype = getattr(torch, precision, None) if precision.endswith("16") else None
    scale = FLOAT16_SCALE if precision == "float16" else 1
    found: dict[str, float] = {}
    for _ in range(2 if case.steps else 1):
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            outputs = model.decode_padded(case.images, sizes)
        if not found:
            found = compare_outputs(case, outputs)
            if precision != "float32":
                model.criterion.assign = lambda *_: recorded_assignment(case)
        losses = model.criterion(outputs, case.targets)
        (scale * sum(losses.values())).backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= scale
        if "losses" not in found:
            found["losses"] = compare_losses(case, losses)
            found["gradients"] = compare_gradients(case)
        nn.utils.clip_grad_norm_(model.parameters(), **clip)
        optimizer.step()
    if case.steps:
        found["step"] = compare_weights(case, start)
    return found


def compare_outputs(case: Case, outputs: DecoderOutput) -> dict[str, float]:
    """Largest differences of logits and of boxes in pixels; queries with other matches or labels."""
    logits = outputs.logits.detach().float()
    boxes = xyzr_to_corners(outputs.xyzr.detach().float())
    assignment = case.model.criterion.assign(logits, boxes, case.targets)
    found = dict.fromkeys(QUANTITIES[:4], 0.0)
    for i, (stage_logits, stage_boxes) in enumerate(zip(logits, boxes)):
        classes = torch.zeros_like(assignment.classes[i]).flatten(0, 1)  # (B * N, C)
        classes[tuple(case.recorded(f"train:stage{i}_cls_target").long().T)] = 1
        match = case.recorded(f"train:stage{i}_matched_gt")
        stage = {
            "logits": difference(
                stage_logits[:, :: case.every], case.recorded(f"stage{i}_cls_score")
            ),
            "boxes": difference(stage_boxes, case.recorded(f"stage{i}_boxes")),
            "matches": (assignment.match[i].view_as(match) != match).sum().item(),
            "targets": (assignment.classes[i].view_as(classes) != classes).any(-1).sum().item(),
        }
        for name in ("logits", "boxes"):
            found[name] = worst([found[name], stage[name]])
        for name in ("matches", "targets"):
            found[name] += stage[name]
    return found


def difference(value: Tensor, expected: Tensor) -> float:
    return (value.reshape(expected.shape) - expected).abs().max().item()


def worst(differences: list[float]) -> float:
    """The largest, or NaN if there is one."""
    return float(np.max(differences))


def relative(value: Tensor, expected: Tensor, floor: float = 1e-12) -> float:
    """How far a vector is from the expected one, as a share of that one's length."""
    length = expected.norm().clamp(min=floor)
    return ((value.detach().reshape(expected.shape) - expected).norm() / length).item()


def compare_losses(case: Case, losses: dict[str, Tensor]) -> float:
    """The largest relative difference of a loss or of their sum."""
    found = [relative(sum(losses.values()), case.recorded("train:loss/total"))]
    for name, value in losses.items():
        stage, _, kind = name.split("_")
        expected = case.recorded(f"train:loss/{stage}_loss_{RECORDED_LOSSES[kind]}")
        found.append(relative(value, expected))
    return worst(found)


def compare_gradients(case: Case) -> float:
    """The largest relative difference of a parameter's gradient, or of its norm alone."""
    parameters, found = dict(case.model.named_parameters()), []
    norms = dict(zip(case.figures["train:grad_names"].tolist(), case.recorded("train:grad_norms")))
    floor = 1e-6 * max(norms.values()).item()  # smaller gradients are rounding errors
    for released, norm in norms.items():
        name = project_name(released)
        if name is None:  # without effect in the authors' code
            continue
        gradient = parameters[name].grad.float()
        found.append(relative(gradient.norm(), norm, floor))
        if f"train:grad/{released}" in case.figures:
            found.append(relative(gradient, case.recorded(f"train:grad/{released}"), floor))
    return worst(found)


def compare_weights(case: Case, start: dict[str, Tensor]) -> float:
    """The largest relative difference of how far two optimizer steps moved a parameter."""
    weights, found = case.model.state_dict(), []
    for key, value in case.steps.items():
        name = project_name(key.removeprefix("step1_after/"))
        if key.startswith("step1_after/") and name is not None:
            expected = torch.from_numpy(value).to(case.images.device) - start[name]
            found.append(relative(weights[name] - start[name], expected))
    return worst(found)


def plain_maps(model: StageInteractor):
    model.decoder.make_pyramid = FeatureMaps


def kernel(model: StageInteractor):
    if model.device.type != "cuda":
        raise Unavailable("Triton's kernel runs on CUDA")
    table = working_kernel(model.device)
    if table is None:
        raise Unavailable("Triton does not work here")
    model.decoder.make_pyramid = table.from_maps


def channels_last(model: StageInteractor):
    last = torch.channels_last
    model.backbone.maps = [
        features.detach().to(memory_format=last).requires_grad_()
        for features in model.backbone.maps
    ]


def checkpointed(model: StageInteractor):
    model.decoder.checkpoint_stages = True


def compiled(model: StageInteractor):
    model.decoder.stages[2].compile()  # the first that reuses filters


def as_configured(_: StageInteractor):
    """Nothing is changed."""


MODES: dict[str, tuple[str, Callable[[StageInteractor], None]]] = {
    "float32": ("float32", as_configured),
    "plain grid_sample": ("float32", plain_maps),
    "Triton kernel": ("float32", kernel),
    "channels last": ("float32", channels_last),
    "stages computed twice": ("float32", checkpointed),
    "one stage compiled": ("float32", compiled),
    "TF32": ("TF32", as_configured),
    "bfloat16": ("bfloat16", as_configured),
    "float16": ("float16", as_configured),
}


def require_precision(precision: str, device: torch.device):
    """Raises Unavailable if the device does not compute in this precision."""
    is_cuda = device.type == "cuda"
    recent = is_cuda and torch.cuda.get_device_capability(device) >= (8, 0)
    if precision == "TF32" and not recent:
        raise Unavailable("only NVIDIA GPUs since compute capability 8.0 have TF32")
    if precision == "bfloat16" and is_cuda and not recent:
        raise Unavailable("this GPU is older than bfloat16")


@contextlib.contextmanager
def tf32(enabled: bool) -> Iterator[None]:
    """Allow TF32 in products and convolutions, or forbid it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if enabled else "highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=enabled):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def check_mode(case: Case, mode: str, prefix: str = "") -> Row:
    """Run a case in one of `MODES`, on a copy of its model."""
    (precision, prepare), name = MODES[mode], prefix + mode
    try:
        require_precision(precision, case.images.device)
        case = case._replace(model=copy.deepcopy(case.model))
        prepare(case.model)
        with tf32(precision == "TF32"):
            return Row(name, precision, run_case(case, precision))
    except (Unavailable, torch.OutOfMemoryError) as error:
        return Row(name, precision, {}, str(error).splitlines()[0], is_skipped=True)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        reason = f"torch.compile does not work here: {str(error).splitlines()[0]}"
        return Row(name, precision, {}, reason, is_skipped=True)
    except Exception as error:  # what a device cannot do is not known beforehand: a row of its own
        traceback.print_exc()
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return Row(name, precision, {}, f"{type(error).__name__}: {reason}")


def check_model(folder: Path, device: str) -> Iterator[Row]:
    """Check the small decoder in every mode, then the complete model in float32 and TF32."""
    small = small_case(folder, device)
    for mode in MODES:
        yield check_mode(small, mode)
    full = full_case(folder, device)
    for mode in ("float32", "TF32"):
        yield check_mode(full, mode, "ResNet-50, ")


def measure_speed(folder: Path, device: str) -> tuple[dict[str, dict], float]:
    """Time inference and training of the complete model; also return the yardstick's time."""
    case = full_case(folder, device)
    model, sizes = case.model, torch.tensor(case.sizes, device=device)

    def train():
        outputs = model.decode_padded(case.images, sizes)
        sum(model.criterion(outputs, case.targets).values()).backward()

    works = {
        "inference": Work(torch.no_grad()(lambda: model.decode_padded(case.images, sizes))),
        "training step": Work(train, weights=list(model.parameters())),
    }
    return measure_rows(works, TIMED_RUNS, device)


def versions(device: str) -> dict[str, str | None]:
    """What a report of a fault has to name."""
    is_cuda = torch.device(device).type == "cuda"
    found = {
        "device": f"{device}, {device_name(device)}",
        "system": platform.platform(),
        "Python": platform.python_version(),
        "CUDA": torch.version.cuda if is_cuda else None,
        "cuDNN": str(torch.backends.cudnn.version()) if is_cuda else None,
        "compute capability": str(torch.cuda.get_device_capability(device)) if is_cuda else None,
    }
    for name in ("torch", "torchvision", "triton", "detectron2", "numpy"):
        found[name] = installed_version(name)
    return {name: version for name, version in found.items() if version}
