"""COCO's metrics, or, where the annotations are secret, the file for COCO's server."""

import json
import os
import zipfile
from pathlib import Path
from typing import List, Optional

from detectron2 import evaluation

SERVER_DETECTIONS = 100  # an image, at most: what the server counts


class COCOEvaluator(evaluation.COCOEvaluator):
    """Detectron2's; for a data set without annotations it also writes a submission.

    That is `detections_SPLIT_stageinteractor_results.zip` in the output folder, where the data
    set's JSON file is called `image_info_SPLIT.json`, as COCO's test sets are.
    """

    def _eval_predictions(self, predictions: List[dict], img_ids: Optional[List[int]] = None):
        super()._eval_predictions(predictions, img_ids)
        if self._do_evaluation or not self._output_dir:
            return
        split = Path(self._metadata.json_file).stem.removeprefix("image_info_")
        path = os.path.join(self._output_dir, f"detections_{split}_stageinteractor_results.zip")
        # Detectron2 has just replaced the class numbers in `predictions` by the data set's ids.
        write_submission(path, [prediction["instances"] for prediction in predictions])
        self._logger.info(f"Submission: {path}. Upload it as cocodataset.org/#upload describes.")


def write_submission(path: str, images: List[List[dict]]):
    """Zip one JSON file, named like the zip file, of the best detections in COCO's result format.

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
