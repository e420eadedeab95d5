"""Measure each decoder stage of a trained model: its detections, its boxes and its labels.

The supplement (section D) gives two reasons why detections need no non-maximum suppression: most
boxes change little in the last stages, and labels are selected adaptively. It has figures for
suppression only; this module computes figures for all three.
"""

import contextlib
import copy
import functools
import io
from collections.abc import Iterable

import numpy as np
import torch
from detectron2.evaluation import inference_context
from detectron2.layers import batched_nms
from detectron2.structures import Instances
from torch import Tensor

from ...engine.evaluator import COCOEvaluator
from ...errors import UserError
from ...modeling import StageInteractor
from ...modeling.boxes import box_iou, xyzr_to_corners
from ...modeling.label_assigner import Assignment
from ...modeling.targets import gather_targets
from ..timing import Work, measure_times, select_clock, summarize_times

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
LEAST_SCORE = 0.3  # from which a query counts as detected
NMS_THRESHOLDS = (0.5, 0.75, 0.9)  # supplement, table 5
TIMED_RUNS = 9


class StageEvaluator(COCOEvaluator):
    """Training's evaluator, which also computes ``AR``, the average recall of all detections.

    Raises:
        UserError: if the data set has no annotations.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if not self._do_evaluation:
            raise UserError(f"{self._metadata.json_file} has no annotations to compare with")

    def _derive_coco_results(self, coco_eval, *args, **kwargs):
        results = super()._derive_coco_results(coco_eval, *args, **kwargs)
        recalls = coco_eval.eval["recall"][:, :, 0, -1] if coco_eval else np.empty(0)  # any area
        recalls = recalls[recalls >= 0]  # pycocotools has -1 for classes without objects
        return {**results, "AR": float(recalls.mean() * 100) if len(recalls) else float("nan")}


def box_changes(xyzr: Tensor) -> dict[str, Tensor]:
    """Measure how much the box of each query changes from one stage to the next.

    Args:
        xyzr: positional vectors (L, ..., 4) of all stages, pixels.

    Returns:
        (L - 1, ...) each: ``iou``, the IoU of the two boxes; ``shift``, the distance between their
        centres in units of sqrt(w h) of the earlier box; ``scale`` and ``ratio``, the absolute
        changes of log2 sqrt(w h) and of log2(h / w).
    """
    corners = xyzr_to_corners(xyzr)
    change = xyzr[1:] - xyzr[:-1]
    return {
        "iou": box_iou(corners[:-1], corners[1:]),
        "shift": change[..., :2].norm(dim=-1) / 2 ** xyzr[:-1, ..., 2],
        "scale": change[..., 2].abs(),
        "ratio": change[..., 3].abs(),
    }


def count_labels(assignment: Assignment) -> Tensor:
    """Count the labels kept, dropped and gained in each stage: (L, 3).

    The three are defined as in `log_assignment`, which counts all stages together.
    """
    matched = assignment.matched.sum((1, 2))
    kept = assignment.keep.diagonal().sum((0, 1))
    gained = assignment.classes.sum((1, 2, 3)) - kept
    return torch.stack([kept, matched - kept, gained], dim=-1)


def summarize(values: np.ndarray) -> dict:
    """Return the mean and `QUANTILES` of the finite values; NaN if there are none."""
    values = values[np.isfinite(values)]
    if not len(values):
        return {"mean": float("nan"), "quantiles": [float("nan")] * len(QUANTILES)}
    return {"mean": float(values.mean()), "quantiles": np.quantile(values, QUANTILES).tolist()}


@torch.no_grad()
def analyze_stages(
    model: StageInteractor, batches: Iterable[list[dict]], evaluator: StageEvaluator
) -> dict:
    """Run a model once over batches of images, and compute the figures of each stage.

    Args:
        batches: images with their ``instances``, as in training.
        evaluator: for the data set; copies of it evaluate the stages.

    Returns:
        ``images``: the number of images.
        ``stages``: a dictionary per stage. ``metrics`` are the evaluator's. ``labels`` are the
        labels that training would keep, drop and gain, as shares of the stage's one-to-one matches.
        ``time`` is that of the detector that ends with the stage, relative to the whole one, see
        `time_stages`. ``to_next`` tells how boxes change to the next stage, for ``all`` queries and
        for those ``detected``, which score at least `LEAST_SCORE` in the last stage: the number of
        ``boxes``, and the mean and `QUANTILES` of each result of `box_changes`. It is None in the
        last stage.
        ``nms``: the metrics of the last stage after non-maximum suppression, by threshold.
        Figures without a value are NaN.
    """
    num_stages, num_images = len(model.decoder.stages), 0
    # Of each stage, then of the last stage after suppression.
    evaluators = [copy.copy(evaluator) for _ in range(num_stages + len(NMS_THRESHOLDS))]
    for each in evaluators:
        each.reset()
    counts, of_batches = torch.zeros(num_stages, 3, dtype=torch.float64), []
    with inference_context(model):
        for batch in batches:
            images = model.preprocess(batch)
            outputs = model.decode(images)
            logits, xyzr = outputs.logits.float(), outputs.xyzr.float()
            found = [model.detect(*of_stage, images.image_sizes)
                     for of_stage in zip(outputs.logits, outputs.xyzr)]
            found += [[suppress(one, threshold) for one in found[-1]]
                      for threshold in NMS_THRESHOLDS]
            for each, detections in zip(evaluators, found):
                each.process(batch, model.postprocess(detections, batch))
            num_images += len(batch)
            best = logits[-1].sigmoid().amax(-1)
            of_batches.append((xyzr.flatten(1, 2).cpu(), (best >= LEAST_SCORE).flatten().cpu()))
            instances = [image["instances"] for image in batch]
            targets = gather_targets(instances, images.image_sizes, model.device)
            assignment = model.criterion.assign(logits, xyzr_to_corners(xyzr), targets)
            counts += count_labels(assignment).cpu()
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        metrics = [dict(each.evaluate()["bbox"]) for each in evaluators]
    xyzr, detected = zip(*of_batches)  # (L, B * N, 4), (B * N,)
    to_next = summarize_changes(torch.cat(xyzr, dim=1), torch.cat(detected))
    shares = (counts / counts[:, :2].sum(1, keepdim=True)).tolist()
    stages = [
        {"metrics": own, "labels": dict(zip(("kept", "dropped", "gained"), labels)),
         "time": time, "to_next": change}
        for own, labels, time, change in zip(
            metrics, shares, time_stages(model, batch), [*to_next, None]
        )
    ]
    nms = dict(zip(NMS_THRESHOLDS, metrics[num_stages:]))
    return {"images": num_images, "stages": stages, "nms": nms}


def time_stages(model: StageInteractor, batch: list[dict]) -> list[float]:
    """The median time of the first 1, 2, ... stages, relative to that of all.

    They take turns with the batch, `TIMED_RUNS` each, and include backbone and post-processing.
    """
    stages = model.decoder.stages

    def run(num_stages: int):
        model.decoder.stages = stages[:num_stages]
        model(batch)

    works = {str(k): Work(functools.partial(run, k)) for k in range(1, len(stages) + 1)}
    with inference_context(model):
        times = [*measure_times(works, TIMED_RUNS, select_clock(str(model.device))).values()]
    model.decoder.stages = stages
    return [summarize_times(of_stages, times[-1])["ratio"] for of_stages in times]


def suppress(found: Instances, threshold: float) -> Instances:
    """Suppress, class by class, detections whose IoU with a better one exceeds a threshold."""
    boxes = found.pred_boxes.tensor
    return found[batched_nms(boxes, found.scores, found.pred_classes, threshold)]


def summarize_changes(xyzr: Tensor, detected: Tensor) -> list[dict[str, dict]]:
    """Summarise `box_changes` from each stage but the last; see `analyze_stages`.

    Args:
        xyzr: positional vectors (L, M, 4) of the queries of all images.
        detected: whether a query counts as detected, (M,).
    """
    changes = box_changes(xyzr)
    groups = {"all": torch.ones_like(detected), "detected": detected}
    return [
        {
            group: {
                "boxes": int(chosen.sum()),
                **{name: summarize(value[stage, chosen].numpy())
                   for name, value in changes.items()},
            }
            for group, chosen in groups.items()
        }
        for stage in range(len(xyzr) - 1)
    ]
