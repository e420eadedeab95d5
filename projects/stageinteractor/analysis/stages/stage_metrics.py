"""Measure each decoder stage of a trained model: its detections, its boxes and its labels.

The supplement (section D) gives two reasons why detections need no non-maximum suppression: most
boxes change little in the last stages, and labels are selected adaptively. It has figures for
suppression only; this module computes figures for all three.
"""

import contextlib
import copy
import io
from collections.abc import Iterable, Sequence

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

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
LEAST_SCORE = 0.3  # from which a query counts as detected
NMS_THRESHOLDS = (0.5, 0.75, 0.9)  # supplement, table 5


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


def suppress(detections: Sequence[Instances], threshold: float) -> list[Instances]:
    """Suppress, class by class, detections whose IoU with a better one exceeds a threshold."""
    return [
        found[batched_nms(found.pred_boxes.tensor, found.scores, found.pred_classes, threshold)]
        for found in detections
    ]


def summarize(values: np.ndarray) -> dict:
    """Return the mean and `QUANTILES` of the finite values; NaN if there are none."""
    values = values[np.isfinite(values)]
    if not len(values):
        return {"mean": float("nan"), "quantiles": [float("nan")] * len(QUANTILES)}
    return {"mean": float(values.mean()), "quantiles": np.quantile(values, QUANTILES).tolist()}


class StageAnalysis:
    """Collects the predictions of a model's stages batch by batch, and summarises them.

    Args:
        model: in evaluation mode.
        evaluator: for the data set; copies of it evaluate the stages.
    """

    def __init__(self, model: StageInteractor, evaluator: StageEvaluator):
        self.model = model
        self.num_stages = len(model.decoder.stages)
        # Of each stage, then of the last stage after suppression.
        number = self.num_stages + len(NMS_THRESHOLDS)
        self.evaluators = [copy.copy(evaluator) for _ in range(number)]
        for each in self.evaluators:
            each.reset()
        self.num_images = 0
        self.xyzr: list[Tensor] = []  # per batch (L, B * N, 4)
        self.detected: list[Tensor] = []  # per batch (B * N,), whether a query is detected
        self.labels = torch.zeros(self.num_stages, 3, dtype=torch.float64)

    @torch.no_grad()
    def add(self, batch: list[dict]):
        """Run the model on a batch whose images have ``instances``, as in training."""
        images = self.model.preprocess(batch)
        outputs = self.model.decode(images)
        logits, xyzr = outputs.logits.float(), outputs.xyzr.float()
        found = [
            self.model.detect(*of_stage, images.image_sizes)
            for of_stage in zip(outputs.logits, outputs.xyzr)
        ]
        found += [suppress(found[-1], threshold) for threshold in NMS_THRESHOLDS]
        for evaluator, detections in zip(self.evaluators, found):
            evaluator.process(batch, self.model.postprocess(detections, batch))
        self.num_images += len(batch)
        self.xyzr.append(xyzr.flatten(1, 2).cpu())
        self.detected.append((logits[-1].sigmoid().amax(-1) >= LEAST_SCORE).flatten().cpu())
        instances = [image["instances"] for image in batch]
        targets = gather_targets(instances, images.image_sizes, self.model.device)
        assignment = self.model.criterion.assign(logits, xyzr_to_corners(xyzr), targets)
        self.labels += count_labels(assignment).cpu()

    def result(self) -> dict:
        """Compute the figures of all images so far.

        Returns:
            ``images``: the number of images.
            ``stages``: a dictionary per stage. ``metrics`` are the evaluator's. ``labels`` are the
            labels that training would keep, drop and gain, as shares of the stage's one-to-one
            matches. ``to_next`` tells how boxes change to the next stage, for ``all`` queries and
            for those ``detected``, which score at least `LEAST_SCORE` in the last stage: the
            number of ``boxes``, and the mean and `QUANTILES` of each result of `box_changes`. It
            is None in the last stage.
            ``nms``: the metrics of the last stage after suppression, by threshold.
            Figures without a value are NaN.
        """
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
            metrics = [dict(evaluator.evaluate()["bbox"]) for evaluator in self.evaluators]
        shares = (self.labels / self.labels[:, :2].sum(1, keepdim=True)).tolist()
        detected = torch.cat(self.detected)
        groups = {"all": torch.ones_like(detected), "detected": detected}
        changes = box_changes(torch.cat(self.xyzr, dim=1))
        to_next = [
            {
                group: {
                    "boxes": int(chosen.sum()),
                    **{name: summarize(value[stage, chosen].numpy())
                       for name, value in changes.items()},
                }
                for group, chosen in groups.items()
            }
            for stage in range(self.num_stages - 1)
        ]
        stages = [
            {"metrics": own, "labels": dict(zip(("kept", "dropped", "gained"), labels)),
             "to_next": change}
            for own, labels, change in zip(metrics, shares, [*to_next, None])
        ]
        nms = dict(zip(NMS_THRESHOLDS, metrics[self.num_stages:]))
        return {"images": self.num_images, "stages": stages, "nms": nms}


def analyze_stages(
    model: StageInteractor, batches: Iterable[list[dict]], evaluator: StageEvaluator
) -> dict:
    """Run a model once over batches of images with ``instances``; see `StageAnalysis.result`."""
    with inference_context(model):
        analysis = StageAnalysis(model, evaluator)
        for batch in batches:
            analysis.add(batch)
    return analysis.result()
