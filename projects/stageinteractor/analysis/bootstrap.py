"""How much the AP of models depends on the choice of test images: a paired bootstrap.

Images are drawn with replacement, the same ones for all models. This does not cover how
results scatter between trainings, for which several seeds are needed.
"""

import contextlib
import copy
import io

import numpy as np
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate
from tqdm import trange

from ..data.numbered import NumberedCOCO

METRICS = ("AP", "AP50", "AP75")
INTERVAL = (2.5, 97.5)  # per cent


def match_detections(truth: NumberedCOCO, detections: list[dict], most: int = 100) -> COCOeval:
    """Let pycocotools match detections with the truth.

    Args:
        detections: in COCO's result format, at least one.
        most: of each image and class, this many with the highest scores count.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        evaluation = COCOeval(truth, truth.loadRes(detections), "bbox")
        evaluation.params.maxDets = [most]
        evaluation.evaluate()
    return evaluation


def metrics_of(evaluation: COCOeval, draw: np.ndarray) -> np.ndarray:
    """Compute AP, AP50 and AP75 in per cent of images that are drawn, any number of times.

    Args:
        draw: indices of images.
    """
    part = copy.copy(evaluation)
    count = len(evaluation.params.imgIds)
    # pycocotools lists the matches by class, then by size of the objects, then by image.
    starts = range(0, len(evaluation.evalImgs), count)
    part.evalImgs = [evaluation.evalImgs[start + index] for start in starts for index in draw]
    # An image that was drawn twice counts as two.
    part.params = part._paramsEval = copy.copy(evaluation.params)
    part.params.imgIds = list(range(len(draw)))
    with contextlib.redirect_stdout(io.StringIO()):
        part.accumulate()
    precision = part.eval["precision"][..., 0, -1]  # (IoU, recall, class), any area
    at = [slice(None), *(np.isclose(part.params.iouThrs, iou) for iou in (0.5, 0.75))]
    chosen = [precision[thresholds] for thresholds in at]
    return np.array([100 * p[p > -1].mean() if (p > -1).any() else np.nan for p in chosen])


def bootstrap(
    evaluations: list[COCOeval], resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the metrics of all images (models, 3) and of draws (resamples, models, 3)."""
    count = len(evaluations[0].params.imgIds)
    rng = np.random.default_rng(seed)
    full = np.array([metrics_of(e, np.arange(count)) for e in evaluations])
    drawn = []
    for _ in trange(resamples, unit=" resamples", disable=None):
        draw = rng.integers(0, count, count)
        drawn.append([metrics_of(e, draw) for e in evaluations])
    return full, np.array(drawn)


def describe_intervals(names: list[str], full: np.ndarray, drawn: np.ndarray) -> str:
    """Make tables of the metrics, and of their differences from the first model's, as text."""
    def table(title: str, values: np.ndarray, samples: np.ndarray, first: int) -> str:
        rows = []
        for name, value, sample in list(zip(names, values, samples.swapaxes(0, 1)))[first:]:
            low, high = np.nanpercentile(sample, INTERVAL, axis=0)
            cells = (f"{v:.1f} ({a:.1f} to {b:.1f})" for v, a, b in zip(value, low, high))
            rows.append([name, *cells])
        return tabulate(rows, [title, *METRICS])

    text = table("%, 95 % interval", full, drawn, 0)
    if len(names) > 1:
        text += "\n\n" + table(f"less {names[0]}", full - full[0], drawn - drawn[:, :1], 1)
    return text
