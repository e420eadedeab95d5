"""Whether this machine computes what the authors' code computed, in every mode it can run.

The model with golden weights runs the recorded cases: a small decoder with two images and two
optimizer steps, and the complete ResNet-50 model with one image. Each mode is compared with the
recordings in seven quantities.
"""

import copy
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from detectron2.config import instantiate
from torch import Tensor, nn

from ..checkpoint.released import project_name
from ..config.overrides import load_config
from ..modeling import StageInteractor
from ..modeling.boxes import xyzr_to_corners
from ..modeling.decoder import DecoderOutput
from ..modeling.fast_sampling.choice import working_kernel
from ..modeling.label_assigner import Assignment
from ..modeling.sampling import FeatureMaps
from ..modeling.targets import Targets, gather_targets
from . import benchmarks
from .recorded import (
    FULL_SIZE,
    SMALL_SIZES,
    full_image,
    load_figures,
    load_golden_weights,
    recorded_objects,
    small_pyramid,
)
from .timing import measure_rows

CONFIG = str(Path(__file__).parents[1] / "configs/stageinteractor_r50_12ep.py")
RECORDED_LOSSES = {"cls": "cls", "bbox": "bbox", "giou": "iou"}  # ours: recorded
FLOAT16_SCALE = 2.0**7  # of the loss, so that gradients stay inside the range
QUANTITIES = ("logits", "boxes", "matches", "targets", "losses", "gradients", "step")
# The largest difference of each quantity. In float32, both sides round the last digits differently,
# and nothing else may differ: matches and labels are the same. AdamW divides by the gradient's own
# size, so that a step shows the relative error of the smallest gradients. Lower precisions round
# inputs of every product to 11 bits (TF32, float16) or 8 (bfloat16); six stages in a row multiply
# that by about ten, and queries that are almost as good as each other swap objects. Losses and
# gradients are therefore those of the recorded matches and labels. Eight times fewer bits show in
# bfloat16 as eight times the difference. In the ResNet-50 case some sampling points lie where
# rounding decides into which cell they fall, and with it what their gradient is: the recordings
# themselves are up to 6e-4 from float64 there.
COARSE = (2e-2, 0.5, 12, 24, 5e-3, 0.4, 0.3)
TOLERANCES = {
    "float32": (1e-5, 1e-3, 0, 0, 1e-5, 1e-4, 1e-2),
    "ResNet-50, float32": (1e-5, 1e-3, 0, 0, 1e-5, 5e-3, 1e-2),
    "TF32": COARSE,
    "float16": COARSE,
    "bfloat16": (0.15, 4.0, 48, 96, 4e-2, 1.0, 0.6),
}


class Unavailable(Exception):
    """This device cannot run a mode; says why."""


class Row(NamedTuple):
    """What became of one case in one mode."""

    name: str
    precision: str  # which of `TOLERANCES` applies
    differences: dict[str, float]
    missing: str = ""  # why there are no differences

    @property
    def wrong(self) -> list[str]:
        """The quantities that differ by more than the tolerance, or are no numbers."""
        allowed = dict(zip(QUANTITIES, TOLERANCES[self.precision]))
        return [name for name, value in self.differences.items() if not value <= allowed[name]]

    @property
    def verdict(self) -> str:
        return self.missing or ("WRONG: " + ", ".join(self.wrong) if self.wrong else "ok")


class RecordedMaps(nn.Module):
    """Stands in for the backbone, and returns recorded feature maps."""

    maps: list[Tensor]

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
    cfg = load_config(CONFIG, []).model
    cfg.backbone = cfg.neck = None
    cfg.query_generator.update(num_queries=20, embed_dim=64)
    cfg.decoder.update(embed_dim=64, feature_dim=64, ffn_dim=96, out_points=32)
    model = instantiate(cfg)
    load_golden_weights(model)
    model.backbone, model.neck = RecordedMaps(), nn.Identity()
    model.backbone.maps = [maps.to(device).requires_grad_() for maps in small_pyramid()]
    figures, steps = load_figures(folder, "small"), load_figures(folder, "small_optimizer")
    for name, value in load_figures(folder, "small_train").items():
        figures[name.replace("case_a_train:", "train:")] = value
    return make_case(model, torch.zeros(2, 3, 256, 320), SMALL_SIZES, figures, device, 3, steps)


def full_case(folder: Path, device: str) -> Case:
    """The complete ResNet-50 model with 100 queries on one image."""
    model = instantiate(load_config(CONFIG, []).model)
    load_golden_weights(model)
    return make_case(model, full_image(), [FULL_SIZE], load_figures(folder, "full"), device, 5, {})


def make_case(model, images, sizes, figures, device, every, steps) -> Case:
    objects = recorded_objects(figures, "train:", sizes)
    targets = gather_targets(objects, sizes, torch.device(device))
    model = model.to(device).train()  # which tells the backbone's norms to keep their statistics
    return Case(model, images.to(device), sizes, targets, figures, steps, every)


def recorded_assignment(case: Case, logits: Tensor) -> Assignment:
    """Labels from the recorded boxes and matches, whatever the model predicts."""
    boxes, match = (
        torch.stack([case.recorded(name.format(i)) for i in range(len(logits))])
        for name in ("stage{}_boxes", "train:stage{}_matched_gt")
    )
    return case.model.criterion.label_assigner(
        logits, boxes.view(*logits.shape[:-1], 4), match.view(logits.shape[:-1]),
        case.targets.boxes, case.targets.labels,
    )


def run_case(case: Case, precision: str = "float32") -> dict[str, float]:
    """Run forward, losses, backward and the recorded optimizer steps; return the differences."""
    model, device = case.model, case.images.device
    cfg = load_config(CONFIG, [])
    cfg.optimizer.params.model = model
    optimizer, clip = instantiate(cfg.optimizer), cfg.train.clip_grad.params
    start = {name: value.clone() for name, value in model.state_dict().items() if case.steps}
    sizes = torch.tensor(case.sizes, device=device)
    dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(precision)
    scale = FLOAT16_SCALE if precision == "float16" else 1
    found: dict[str, float] = {}
    for _ in range(2 if case.steps else 1):
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            outputs = model.decode_padded(case.images, sizes)
        outputs_found = found or compare_outputs(case, outputs)
        if precision != "float32":
            model.criterion.assign = lambda logits, *_: recorded_assignment(case, logits)
        losses = model.criterion(outputs, case.targets)
        (scale * sum(losses.values())).backward()
        for leaf in (*model.parameters(), *getattr(model.backbone, "maps", ())):
            if leaf.grad is not None:
                leaf.grad /= scale
        found = found or {**outputs_found, **compare_gradients(case, losses)}
        nn.utils.clip_grad_norm_(model.parameters(), **clip)
        optimizer.step()
    if case.steps:
        found["step"] = compare_weights(case, start)
    return found


def compare_outputs(case: Case, outputs: DecoderOutput) -> dict[str, float]:
    """Largest differences of logits and boxes (pixels); queries with other matches or labels."""
    logits = outputs.logits.detach().float()
    boxes = xyzr_to_corners(outputs.xyzr.detach().float())
    assignment = case.model.criterion.assign(logits, boxes, case.targets)
    stages = []
    for i in range(len(logits)):
        classes = torch.zeros_like(assignment.classes[i]).flatten(0, 1)  # (B * N, C)
        classes[tuple(case.recorded(f"train:stage{i}_cls_target").long().T)] = 1
        labels = assignment.classes[i].flatten(0, 1)
        match = case.recorded(f"train:stage{i}_matched_gt").view_as(assignment.match[i])
        stages.append([
            largest(logits[i][:, :: case.every], case.recorded(f"stage{i}_cls_score")),
            largest(boxes[i], case.recorded(f"stage{i}_boxes")),
            (assignment.match[i] != match).sum().item(),
            (labels != classes).any(-1).sum().item(),
        ])
    found = np.array(stages)
    return dict(zip(QUANTITIES, [*found[:, :2].max(0).tolist(), *found[:, 2:].sum(0).tolist()]))


def largest(value: Tensor, expected: Tensor) -> float:
    """The largest absolute difference."""
    return (value.reshape(expected.shape) - expected).abs().max().item()


def relative(value: Tensor, expected: Tensor, floor: float = 1e-12) -> float:
    """How far a vector is from the expected one, as a share of that one's length."""
    difference = value.detach().reshape(expected.shape) - expected
    return (difference.norm() / expected.norm().clamp(min=floor)).item()


def compare_gradients(case: Case, losses: dict[str, Tensor]) -> dict[str, float]:
    """Largest relative differences of a loss, and of a gradient or its norm alone."""
    of_losses = [relative(sum(losses.values()), case.recorded("train:loss/total"))]
    for name, value in losses.items():
        stage, _, kind = name.split("_")
        expected = case.recorded(f"train:loss/{stage}_loss_{RECORDED_LOSSES[kind]}")
        of_losses.append(relative(value, expected))
    parameters, of_gradients = dict(case.model.named_parameters()), []
    norms = dict(zip(case.figures["train:grad_names"].tolist(), case.recorded("train:grad_norms")))
    floor = 1e-6 * max(norms.values()).item()  # smaller gradients are rounding errors
    for released, norm in norms.items():
        name = project_name(released)
        if name is not None:  # else it is without effect in the authors' code
            gradient = parameters[name].grad.float()
            of_gradients.append(relative(gradient.norm(), norm, floor))
            if (key := f"train:grad/{released}") in case.figures:
                of_gradients.append(relative(gradient, case.recorded(key), floor))
    for level, maps in enumerate(getattr(case.model.backbone, "maps", ())):
        norm = case.recorded(f"train:grad_feat{level}_norm")
        of_gradients.append(relative(maps.grad.norm(), norm))
    # numpy's maximum is NaN if one of them is.
    return {"losses": float(np.max(of_losses)), "gradients": float(np.max(of_gradients))}


def compare_weights(case: Case, start: dict[str, Tensor]) -> float:
    """The relative difference of how far two optimizer steps moved all recorded weights."""
    weights, moved, expected = case.model.state_dict(), [], []
    for key, value in case.steps.items():
        name = project_name(key.removeprefix("step1_after/"))
        if key.startswith("step1_after/") and name is not None:
            moved.append((weights[name] - start[name]).flatten())
            expected.append((torch.from_numpy(value).to(start[name]) - start[name]).flatten())
    return relative(torch.cat(moved), torch.cat(expected))


def plain_maps(model: StageInteractor):
    model.decoder.make_pyramid = FeatureMaps


def kernel(model: StageInteractor):
    table = working_kernel(model.device) if model.device.type == "cuda" else None
    if table is None:
        raise Unavailable("Triton's kernel does not run on this device")
    model.decoder.make_pyramid = table.from_maps


def channels_last(model: StageInteractor):
    model.backbone.maps = [
        maps.detach().to(memory_format=torch.channels_last).requires_grad_()
        for maps in model.backbone.maps
    ]


def checkpointed(model: StageInteractor):
    model.decoder.checkpoint_stages = True


def compiled(model: StageInteractor):
    model.decoder.stages[2].compile()  # the first that reuses filters


# What each mode changes. Its first word is the precision; "float32" is without TF32.
MODES: dict[str, Callable[[StageInteractor], object]] = {
    "float32": lambda _: None,
    "float32, plain grid_sample": plain_maps,
    "float32, Triton kernel": kernel,
    "float32, channels last": channels_last,
    "float32, stages computed twice": checkpointed,
    "float32, one stage compiled": compiled,
    "TF32": lambda _: None,
    "bfloat16": lambda _: None,
    "float16": lambda _: None,
}


def check_mode(case: Case, mode: str, prefix: str = "") -> Row:
    """Run a case in one of `MODES`, on a copy of its model."""
    precision, device = mode.partition(",")[0], case.images.device
    is_old = device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)
    found, missing = {}, ""
    try:
        if is_old and (precision == "TF32" or precision == "bfloat16" and device.type == "cuda"):
            raise Unavailable(f"{precision} needs an NVIDIA GPU of compute capability 8.0")
        case = case._replace(model=copy.deepcopy(case.model))
        MODES[mode](case.model)
        torch.set_float32_matmul_precision("high" if precision == "TF32" else "highest")
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=precision == "TF32"):
            found = run_case(case, precision)
    except (Unavailable, torch.OutOfMemoryError, torch._dynamo.exc.BackendCompilerFailed) as error:
        missing = f"skipped, because {str(error).splitlines()[0]}"
    except Exception as error:  # any fault of a device is a result, and the other modes go on
        traceback.print_exc()
        missing = f"FAILED: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    finally:
        torch.set_float32_matmul_precision("highest")
    key = prefix + precision
    return Row(prefix + mode, key if key in TOLERANCES else precision, found, missing)


def check_model(folder: Path, device: str) -> Iterator[Row]:
    """Check the small decoder in every mode, then the complete model in float32 and TF32."""
    small = small_case(folder, device)
    for mode in MODES:
        yield check_mode(small, mode)
    full = full_case(folder, device)
    for mode in ("float32", "TF32"):
        yield check_mode(full, mode, "ResNet-50, ")


def measure_speed(device: str) -> tuple[dict[str, dict], float]:
    """Time the decoder as tools/benchmark.py does; also return the yardstick's milliseconds."""
    cfg = load_config(CONFIG, [f"train.device={device}"])
    options = {"batch": 1, "size": (800, 1216), "compiled": False, "compare": False}
    works = {
        "forward": benchmarks.forward(cfg, **options)["ours"],
        "train-step": benchmarks.train_step(cfg, objects=20, **options)["ours"],
    }
    return measure_rows(works, 3, device)
