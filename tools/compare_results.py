"""Compare detections of several models on the same images: would other test images say the same?

    python tools/compare_results.py --annotations datasets/bccd/test.json \\
        --predictions A/coco_instances_results.json B/coco_instances_results.json ...

Prints AP, AP50 and AP75 of each, and how they differ from the first's, with 95 % intervals: images
are drawn again with replacement, the same for all models (paired bootstrap). That covers the
choice of the test images, not how training scatters; several seeds are for that.
"""

import argparse
import contextlib
import copy
import io
import json
from pathlib import Path

import _start
import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate
from tqdm import trange

from projects.stageinteractor.data.numbered import NumberedCOCO
from projects.stageinteractor.errors import UserError

METRICS = ("AP", "AP50", "AP75")
INTERVAL = (2.5, 97.5)  # per cent


def read_coco(path: Path) -> NumberedCOCO:
    """A COCO file. Raises UserError if it is missing or none."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO(str(path))
        if not (coco.getImgIds() and coco.getAnnIds()):
            raise UserError(f"{path} has no images or no annotations: --annotations takes COCO's")
        if not all({"area", "iscrowd"} <= set(entry) for entry in coco.anns.values()):
            raise UserError(f"{path}: pycocotools needs `area` and `iscrowd` in every annotation")
        return NumberedCOCO(coco.dataset)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(f"cannot read {path} as a COCO file: {error}") from error


def match_detections(truth: NumberedCOCO, path: Path, most: int = 100) -> COCOeval:
    """pycocotools' matches of the detections in a results file with the truth.

    Of each image and class the `most` with the highest scores count.
    Raises UserError if the file is missing, or holds other things than detections on these images.
    """
    try:
        detections = json.loads(path.read_text())
        if detections == []:
            raise UserError(f"{path} holds no detections")
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(truth, truth.loadRes(detections), "bbox")
            evaluation.params.maxDets = [most]
            evaluation.evaluate()
    except (OSError, ValueError, KeyError, TypeError, IndexError, AssertionError) as error:
        raise UserError(
            f"cannot read {path} as COCO results of these images: {error or 'other images'}"
        ) from error
    return evaluation


def metrics_of(evaluation: COCOeval, draw: np.ndarray) -> np.ndarray:
    """AP, AP50 and AP75 in per cent, of images drawn by their index, repeatedly or not at all."""
    part = copy.copy(evaluation)
    images = evaluation.params.imgIds
    matches = np.empty(len(evaluation.evalImgs), dtype=object)
    matches[:] = evaluation.evalImgs
    part.evalImgs = list(matches.reshape(-1, len(images))[:, draw].ravel())
    # All images that were drawn count, those drawn twice as two.
    part.params = copy.copy(evaluation.params)
    part._paramsEval = copy.copy(evaluation._paramsEval)
    part.params.imgIds = part._paramsEval.imgIds = list(range(len(draw)))
    with contextlib.redirect_stdout(io.StringIO()):
        part.accumulate()
    precision = part.eval["precision"][..., 0, -1]  # (IoU, recall, class), any area
    at = [slice(None), *(np.isclose(part.params.iouThrs, iou) for iou in (0.5, 0.75))]
    chosen = [precision[thresholds] for thresholds in at]
    return np.array([100 * p[p > -1].mean() if (p > -1).any() else np.nan for p in chosen])


def bootstrap(evaluations: list[COCOeval], resamples: int, seed: int) -> tuple:
    """Metrics of all images (models, 3), and of resampled ones (resamples, models, 3)."""
    count = len(evaluations[0].params.imgIds)
    rng = np.random.default_rng(seed)
    full = np.array([metrics_of(e, np.arange(count)) for e in evaluations])
    drawn = []
    for _ in trange(resamples, unit=" resamples", disable=None):
        draw = rng.integers(0, count, count)
        drawn.append([metrics_of(e, draw) for e in evaluations])
    return full, np.array(drawn)


def tables(names: list[str], full: np.ndarray, drawn: np.ndarray) -> str:
    """Metrics and differences from the first model as text."""
    def cells(values, samples):
        low, high = np.nanpercentile(samples, INTERVAL, axis=0)
        return [f"{v:.1f} ({a:.1f} to {b:.1f})" for v, a, b in zip(values, low, high)]

    rows = [[name, *cells(full[i], drawn[:, i])] for i, name in enumerate(names)]
    parts = [tabulate(rows, ["%, 95 % interval", *METRICS])]
    if len(names) > 1:
        rows = [
            [name, *cells(full[i] - full[0], drawn[:, i] - drawn[:, 0])]
            for i, name in enumerate(names) if i
        ]
        parts.append(tabulate(rows, [f"less {names[0]}", *METRICS]))
    return "\n\n".join(parts)


@_start.command
def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--annotations", type=Path, required=True, help="COCO file")
    parser.add_argument("--predictions", type=Path, required=True, nargs="+", help="COCO results")
    parser.add_argument("--resamples", type=int, default=1000, help="%(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing (%(default)s)")
    parser.add_argument("--max-dets", type=int, default=100, metavar="N",
                        help="detections of an image and class that count (%(default)s, as COCO)")
    args = parser.parse_args(argv)
    if args.resamples < 2:
        raise UserError(f"--resamples is {args.resamples}: draw at least twice")
    truth = read_coco(args.annotations)
    evaluations = [match_detections(truth, path, args.max_dets) for path in args.predictions]
    full, drawn = bootstrap(evaluations, args.resamples, args.seed)
    print(tables([str(path) for path in args.predictions], full, drawn))


if __name__ == "__main__":
    main()
