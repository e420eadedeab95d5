"""Images of predictions for TensorBoard, drawn at every evaluation."""

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from detectron2.engine import hooks
from detectron2.evaluation import inference_context
from detectron2.structures import BoxMode, Instances
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..data import read_image
from ..data.randomness import keep_random_states
from ..drawing.labelled_boxes import draw_classes, to_xywh
from ..drawing.style import shown, spread

THRESHOLD = 0.3  # minimum score of a prediction that is drawn
PANEL, DPI = 5, 100  # PANEL in inches


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
        class_names: names of the classes; a class without a name is shown as its number.
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
        self.records = spread(dataset, count)
        self.has_truth = any(record.get("annotations") for record in dataset)
        self.mapper, self.class_names = mapper, class_names

    def _do_eval(self):
        with keep_random_states(), inference_context(self.model), torch.no_grad():
            for number, record in enumerate(self.records, start=1):
                outputs = self.model([self.mapper(copy.deepcopy(record))])
                instances = outputs[0]["instances"].to("cpu")
                picture = draw_predictions(record, instances, self.class_names, self.has_truth)
                self.trainer.storage.put_image(f"predictions/{number}", picture)


def draw_predictions(
    record: dict, instances: Instances, class_names: Sequence[str], has_truth: bool
) -> np.ndarray:
    """An image with its ground truth, if ``has_truth``, beside the same image with its predictions.

    Args:
        record: Detectron2's dictionary of the image.
        instances: predictions, with boxes in pixels of the image file.
        class_names: names of the classes; a class without a name is shown as its number.
        has_truth: whether to draw the ground truth.

    Returns:
        (3, height, width), RGB, uint8.
    """
    image = read_image(record["file_name"], "RGB")
    panels = 2 if has_truth else 1
    figure = Figure(figsize=(panels * PANEL, PANEL + 0.4), dpi=DPI, layout="tight")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]

    def draw(panel: Axes, title: str, boxes: list, classes: list[int], notes: list[str]):
        draw_classes(panel, image, boxes, classes, class_names, notes)
        panel.set_title(title, fontsize=8, loc="left")

    if has_truth:
        truth = record.get("annotations", [])
        draw(
            axes[0],
            f"{shown(record['file_name'], 60)}\nground truth: {len(truth)}",
            [BoxMode.convert(t["bbox"], t["bbox_mode"], BoxMode.XYWH_ABS) for t in truth],
            [t["category_id"] for t in truth],
            ["(crowd)" if t.get("iscrowd") else "" for t in truth],
        )
    best = f", the best has {instances.scores.max():.2f}" if len(instances) else ""
    found = instances[instances.scores >= THRESHOLD]
    found = found[found.scores.argsort()]  # the best on top
    draw(
        axes[-1],
        f"predictions with score >= {THRESHOLD:g}: {len(found)}{best}",
        to_xywh(found.pred_boxes.tensor.numpy()).tolist(),
        found.pred_classes.tolist(),
        [f"{score:.2f}" for score in found.scores.tolist()],
    )
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].transpose(2, 0, 1)
