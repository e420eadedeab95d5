"""Images of predictions for TensorBoard, drawn at every evaluation."""

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from detectron2.data.detection_utils import annotations_to_instances
from detectron2.engine import hooks
from detectron2.evaluation import inference_context
from detectron2.structures import Instances
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..data import read_image
from ..data.randomness import keep_random_states
from ..drawing import detections
from ..drawing.style import spread

THRESHOLD = 0.3  # minimum score of a prediction that is drawn


class PredictionPictures(hooks.EvalHook):
    """Draws predictions beside the ground truth into the storage when ``EvalHook`` evaluates.

    ``predictions/1``, ``predictions/2``, ... show the same images every time. Random states and the
    model's mode do not change. Register the hook in the main process only, after ``EvalHook`` and
    before the writers; in it, no process waits for another.

    Args:
        eval_period: that of ``EvalHook``.
        model: the model that is evaluated, with Detectron2's inputs and outputs.
        dataset: Detectron2's dictionaries of the test images.
        mapper: makes the model's input from such a dictionary.
        class_names: names of the classes.
        count: maximum number of images, spread over the data set.
    """

    def __init__(
        self,
        eval_period: int,
        model: nn.Module,
        dataset: Sequence[dict],
        mapper: Callable[[dict], dict],
        class_names: Sequence[str],
        count: int = 4,
    ):
        super().__init__(eval_period, None)
        # In one process alone, a wrapped model would wait for the others.
        self.model = model.module if isinstance(model, DistributedDataParallel) else model
        self.records, self.mapper, self.class_names = spread(dataset, count), mapper, class_names

    def _do_eval(self):
        with keep_random_states(), inference_context(self.model), torch.no_grad():
            for number, record in enumerate(self.records, start=1):
                outputs = self.model([self.mapper(copy.deepcopy(record))])
                picture = draw_predictions(record, outputs[0]["instances"], self.class_names)
                self.trainer.storage.put_image(f"predictions/{number}", picture)


def draw_predictions(record: dict, instances: Instances, class_names: Sequence[str]) -> np.ndarray:
    """An image with its ground truth beside the same image with its predictions.

    Args:
        record: Detectron2's dictionary of the image.
        instances: predictions, with boxes in pixels of the image file.
        class_names: names of the classes.

    Returns:
        (3, height, 2 * width), RGB, uint8; smaller if the image is very large.
    """
    image = read_image(record["file_name"], "RGB")
    size, metadata = image.shape[:2], detections.class_metadata(class_names)
    truth = annotations_to_instances(record.get("annotations", []), size)
    truth = Instances(size, pred_boxes=truth.gt_boxes, pred_classes=truth.gt_classes)
    found = instances[instances.scores >= THRESHOLD].to("cpu")
    # TensorBoard enlarges small pictures itself.
    is_small = max(size) < detections.LEAST_SIDE
    pictures = [
        detections.draw_detections(image, boxes, metadata, keep_size=is_small)
        for boxes in (truth, found)
    ]
    return np.concatenate(pictures, axis=1).transpose(2, 0, 1)
