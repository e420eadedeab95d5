"""Pictures of a run: detections beside the ground truth, and training curves.

    python tools/visualize.py results --annotations datasets/trees/val.json \\
        --images datasets/trees/images --output grid.png \\
        --predictions RUN/eval/coco_instances_results.json
    python tools/visualize.py training --metrics RUN/metrics.json --output curves.png

Drawn with matplotlib alone: Detectron2's Visualizer needs OpenCV.
"""

import argparse
import json
import math
import re
import sys
from collections import defaultdict
from itertools import repeat
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator
from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from projects.stageinteractor.drawing import draw_boxes, palette, spread
from projects.stageinteractor.errors import UserError

# Okabe and Ito's palette, which colour-blind readers can tell apart.
TRUTH, PREDICTION = "#56B4E9", "#F0E442"  # the two that stand out from photographs
RUNS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000", "#56B4E9")
PAIRS_IN_ROW, PANEL, DPI = 2, 3.2, 150  # PANEL in inches
STYLES = ("-", "--", ":")
LOSS_RANGE = 300  # between the ends of a logarithmic axis, at most

COCO_KEYS = {"images", "annotations", "categories"}
RESULT_KEYS = {"image_id", "category_id", "bbox", "score"}


def read_text(path):
    """The text of a file. Raises UserError if the file is missing or empty."""
    if not path.is_file():
        raise UserError(f"no file {path}")
    text = path.read_text()
    if not text.strip():
        raise UserError(f"{path} is empty: has the run got that far?")
    return text


def read_results(annotations, predictions):
    """A COCO file and the detections made on its images.

    Raises UserError if either is not what it should be or the two do not belong together.
    """
    try:
        coco, detections = (json.loads(read_text(path)) for path in (annotations, predictions))
    except json.JSONDecodeError as e:
        raise UserError(f"{annotations} or {predictions} is not JSON ({e})")
    if not isinstance(coco, dict) or not COCO_KEYS <= coco.keys() or not coco["images"]:
        raise UserError(f"{annotations} holds no images: --annotations takes a COCO file")
    if not isinstance(detections, list) or not all(RESULT_KEYS <= set(d) for d in detections):
        raise UserError(f"{predictions} holds no detections: --predictions takes COCO results")
    for key, table in (("image_id", "images"), ("category_id", "categories")):
        unknown = {found[key] for found in detections} - {entry["id"] for entry in coco[table]}
        if unknown:
            raise UserError(
                f"{predictions}: {key} {min(unknown)} is not in {annotations}.\n"
                "Give the annotations of the data set that the predictions were made on"
            )
    return coco, detections


def draw_results(args):
    """Ground truth on the left, predictions on the right, for images spread over the data set."""
    coco, detections = read_results(args.annotations, args.predictions)
    names = {category["id"]: category["name"] for category in coco["categories"]}
    truth, found = defaultdict(list), defaultdict(list)
    for box in coco["annotations"]:
        truth[box["image_id"]].append(box)
    for box in detections:
        if box["score"] >= args.threshold:
            found[box["image_id"]].append(box)

    def name(box):
        return names[box["category_id"]] if len(names) > 1 else ""

    if args.count < 1:
        raise UserError(f"--count is {args.count}: draw at least one image")
    images = spread(sorted(coco["images"], key=lambda image: image["id"]), args.count)
    rows = math.ceil(len(images) / PAIRS_IN_ROW)
    columns = 2 * min(PAIRS_IN_ROW, len(images))
    figure = Figure(figsize=(columns * PANEL, rows * (PANEL + 0.35)), dpi=DPI, layout="tight")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for (left, right), image in zip(grid.reshape(-1, 2), images):
        path = args.images / image["file_name"]
        if not path.is_file():
            raise UserError(f"no image {path}: file names in the annotations start at --images")
        pixels = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        boxes = truth[image["id"]]
        draw_boxes(left, pixels, [b["bbox"] for b in boxes], map(name, boxes), repeat(TRUTH))
        title = f"{path.name[-70:]}\nground truth: {len(boxes)}"
        left.set_title(title, fontsize=8, loc="left")
        boxes = sorted(found[image["id"]], key=lambda box: box["score"])  # best ones on top
        labels = [f"{name(b)} {b['score']:.2f}".strip() for b in boxes]
        draw_boxes(right, pixels, [b["bbox"] for b in boxes], labels, repeat(PREDICTION))
        title = f"predictions with score >= {args.threshold:g}: {len(boxes)}"
        right.set_title(title, fontsize=8, loc="left")
    return figure


def read_metrics(path):
    """Detectron2's metrics.json as {iteration: {metric: number}}, in order of iterations.

    Raises UserError if there is no metric in it.
    """
    history = defaultdict(dict)
    for line in read_text(path).splitlines():
        try:
            metrics = json.loads(line)
        except json.JSONDecodeError:  # a run killed while writing, perhaps resumed since
            continue
        if isinstance(metrics, dict) and "iteration" in metrics:
            # What a resumed run repeats replaces what was written before.
            history[metrics["iteration"]].update(metrics)
    if not history:
        raise UserError(f"{path} holds no metrics: it should have one JSON object a line")
    return dict(sorted(history.items()))


def draw_curve(axes, history, metric, **style):
    """Draw one metric against the iteration, where it is a finite number."""
    points = [(i, row[metric]) for i, row in history.items() if metric in row]
    points = [(i, value) for i, value in points if math.isfinite(value)]
    if points:
        axes.plot(*zip(*points), marker="." if len(points) < 30 else "", **style)


def draw_training(args):
    """Curves of one or several runs: a run is a colour, a metric of a panel a style of line."""
    figure = Figure(figsize=(15, 8), dpi=100, layout="constrained")
    panels = figure.subplots(2, 3)
    titles = ("total loss", "losses of the last stage", "AP (%)",
              "labels, as a share of the matches", "norm of the gradient", "learning rate")
    colors = palette(len(args.metrics), RUNS)
    for color, path in zip(colors, args.metrics):
        history = read_metrics(path)
        metrics = sorted(set().union(*history.values()))
        stages = [int(stage) for stage in re.findall(r"\bstage(\d+)_loss_", " ".join(metrics))]
        last = f"stage{max(stages, default=0)}_loss_"
        parts = [last + part for part in ("cls", "bbox", "giou")]
        aps = [metric for metric in metrics if metric.endswith(("bbox/AP", "bbox/AP50"))]
        labels = [f"labels/{part}" for part in ("kept", "dropped", "gained")]
        curves = (["total_loss"], parts, aps, labels, ["grad_norm"], ["lr"])
        for axes, shown in zip(panels.flat, curves):
            for style, metric in zip(STYLES, shown):
                draw_curve(axes, history, metric, c=color, ls=style, label=metric)
    for axes, title in zip(panels.flat, titles):
        axes.set_title(title)
        axes.set_xlabel("iteration")
        axes.grid(alpha=0.3)
        styles = {line.get_linestyle(): line.get_label() for line in axes.lines}
        if len(styles) > 1:
            handles = [Line2D([], [], c="black", ls=style) for style in styles]
            axes.legend(handles, styles.values(), fontsize=8)
        elif not styles:
            message = "no evaluation yet" if title == "AP (%)" else "not recorded"
            axes.text(0.5, 0.5, message, ha="center", va="center", transform=axes.transAxes)
    for axes in panels[0, :2]:  # losses fall by orders of magnitude, and some start near zero
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        bottom, top = axes.get_ylim()
        axes.set_ylim(bottom=max(bottom, top / LOSS_RANGE))
    runs = [Line2D([], [], c=color, lw=3) for color in colors]
    names = [str(path.parent) for path in args.metrics]
    figure.legend(runs, names, loc="outside lower center", ncols=4, fontsize=9)
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="{results,training}")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--output", type=Path, required=True, help="the PNG file to write")
    results = commands.add_parser("results", parents=[shared], help=draw_results.__doc__)
    results.add_argument("--annotations", type=Path, required=True, help="COCO file")
    results.add_argument("--images", type=Path, required=True, help="folder of its images")
    results.add_argument("--predictions", type=Path, required=True, help="COCO results")
    results.add_argument("--threshold", type=float, default=0.3, help="least score (%(default)s)")
    results.add_argument("--count", type=int, default=6, help="images to draw (%(default)s)")
    results.set_defaults(draw=draw_results)
    training = commands.add_parser("training", parents=[shared], help=draw_training.__doc__)
    training.add_argument("--metrics", type=Path, nargs="+", required=True, help="metrics.json")
    training.set_defaults(draw=draw_training)
    args = parser.parse_args(argv)
    try:
        figure = args.draw(args)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(args.output, format="png")
    except (UserError, OSError) as e:
        raise SystemExit(f"error: {e}")
    print(f"{args.output} written")


if __name__ == "__main__":
    main()
