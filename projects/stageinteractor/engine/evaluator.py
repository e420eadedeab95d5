"""COCO's metrics in a table, or a submission to COCO's server if the annotations are secret."""

import contextlib
import functools
import io
import json
import logging
import os
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2 import evaluation
from detectron2.evaluation import coco_evaluation
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate

from ..data.numbered import NumberedCOCO
from ..errors import UserError

try:
    import hotcoco
except ImportError:  # where no wheel is published; pycocotools gives the same figures more slowly
    hotcoco = None

# IoU threshold (None: the mean over all thresholds) and index of the range of areas.
METRICS = {
    "AP": (None, 0),
    "AP50": (0.5, 0),
    "AP75": (0.75, 0),
    "APs": (None, 1),
    "APm": (None, 2),
    "APl": (None, 3),
}
SERVER_DETECTIONS = 100  # maximum per image that the server counts
LOGGER = logging.getLogger(f"detectron2.{__name__}")  # Detectron2 writes only its own to log.txt


class Truth(NumberedCOCO):
    """Ground truth whose boxes hotcoco evaluates, if it is installed."""

    def loadRes(self, results: list[dict]) -> np.ndarray | COCO:  # noqa: N802, pycocotools' name
        """Prepare results for `begin_evaluation`: a table for hotcoco, or pycocotools' index."""
        has_shapes = any(result.keys() & {"segmentation", "keypoints"} for result in results)
        return super().loadRes(results) if has_shapes or not hotcoco else self.table(results)


def begin_evaluation(truth: Truth, results: np.ndarray | COCO, iou_type: str) -> Any:
    """Make an object with the interface of pycocotools' ``COCOeval``.

    Args:
        results: what `Truth.loadRes` returned.
        iou_type: "bbox" for a table.
    """
    if not isinstance(results, np.ndarray):
        return COCOeval(truth, results, iou_type)
    boxes = hotcoco.COCO(truth.boxes)
    return hotcoco.COCOeval(boxes, boxes.load_res(results), iou_type)


# Detectron2's own fast evaluation needs its compiled extension, and it uses a slow one for another
# number of detections. This replaces both.
coco_evaluation.COCOeval_opt = coco_evaluation.COCOevalMaxDets = begin_evaluation


class COCOEvaluator(evaluation.COCOEvaluator):
    """Detectron2's evaluator, with one table for all classes and each, and with ids of any type.

    It evaluates with the numbers of `NumberedCOCO` and writes detections with the data set's ids.

    It refuses to evaluate another data set than ``own_data``, which ``dataset.val`` asks for.

    For a data set without annotations it also writes a submission to the output folder:
    ``detections_SPLIT_stageinteractor_results.zip``. SPLIT is the name of the data set's JSON file,
    without ``image_info_``, with which the names of COCO's test sets begin.
    """

    @functools.wraps(evaluation.COCOEvaluator.__init__)  # overrides may name its arguments
    def __init__(self, dataset_name, *args, own_data=None, **kwargs):
        if own_data not in (None, dataset_name):
            raise UserError(
                f"dataset.val={own_data}: only this project's own tools/train_net.py reads that. "
                "With another one, set dataloader.test.dataset (and .evaluator.dataset_name)"
            )
        super().__init__(dataset_name, *args, **kwargs)
        if self._do_evaluation:
            self._coco_api = Truth(self._coco_api.dataset)
        most = self._max_dets_per_image[-1]  # no earlier limit may be larger, or it would count
        self._max_dets_per_image = [min(limit, most) for limit in self._max_dets_per_image]

    def _eval_predictions(self, predictions: list[dict], img_ids: list | None = None):
        if img_ids is not None and self._do_evaluation:
            img_ids = [self._coco_api.numbers["image_id"][i] for i in img_ids]
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            # COCO's summary, which is replaced by our table, assumes 100 detections.
            warnings.filterwarnings("ignore", "hotcoco: max_dets", UserWarning)
            super()._eval_predictions(predictions, img_ids)
        if self._do_evaluation or not self._output_dir:
            return
        split = Path(self._metadata.json_file).stem.removeprefix("image_info_")
        path = os.path.join(self._output_dir, f"detections_{split}_stageinteractor_results.zip")
        # Detectron2 has just replaced the class numbers in `predictions` by the data set's ids.
        write_submission(path, [prediction["instances"] for prediction in predictions])
        LOGGER.info(f"Submission: {path}. Upload it as cocodataset.org/#upload describes.")

    def _derive_coco_results(
        self,
        coco_eval: Any,
        iou_type: str,
        class_names: Sequence[str] | None = None,
    ) -> dict[str, float]:
        if coco_eval is None or iou_type == "keypoints":
            return super()._derive_coco_results(coco_eval, iou_type, class_names)
        rows = [("all", average_precisions(coco_eval, slice(None)))]
        if class_names is not None and len(class_names) > 1:
            rows += [(n, average_precisions(coco_eval, i)) for i, n in enumerate(class_names)]
        table = tabulate(
            [(name, *(None if np.isnan(ap) else ap for ap in aps.values())) for name, aps in rows],
            headers=(f"{iou_type}, %", *METRICS),
            floatfmt=".2f",
            missingval="-",
        )
        most = self._max_dets_per_image[-1]
        limit = "" if most == SERVER_DETECTIONS else f" (maxDets={most}, COCO has 100)"
        LOGGER.info(f"Average precision{limit}; - means no such object:\n{table}")
        return {**rows[0][1], **{f"AP-{name}": aps["AP"] for name, aps in rows[1:]}}


def average_precisions(coco_eval: Any, classes: int | slice) -> dict[str, float]:
    """``METRICS`` of one or several classes in percent, NaN if there are no objects.

    Args:
        coco_eval: of `begin_evaluation`, after ``accumulate()``.
        classes: index or slice of its classes.
    """
    # (IoU thresholds, recalls, areas, limits of detections), classes third if there are several
    precision = coco_eval.eval["precision"][:, :, classes]
    averages = {}
    for metric, (threshold, area) in METRICS.items():
        chosen = precision[..., area, -1]
        if threshold is not None:
            chosen = chosen[np.isclose(coco_eval.params.iouThrs, threshold)]
        chosen = chosen[chosen > -1]
        averages[metric] = float(chosen.mean() * 100) if chosen.size else float("nan")
    return averages


def write_submission(path: str, images: list[list[dict]]):
    """Write the best detections in COCO's result format to a JSON file in a zip file of its name.

    Args:
        path: the zip file.
        images: the detections of each image.
    """
    rows = [
        {
            "image_id": detection["image_id"],
            "category_id": detection["category_id"],
            "bbox": [round(value, 2) for value in detection["bbox"]],
            "score": round(detection["score"], 5),
        }
        for detections in images
        for detection in sorted(detections, key=lambda d: -d["score"])[:SERVER_DETECTIONS]
    ]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(f"{Path(path).stem}.json", json.dumps(rows, separators=(",", ":")))
