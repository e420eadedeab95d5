#!/usr/bin/env python
"""Check a data set in COCO format before training on it, and draw what is in it.

    python tools/check_dataset.py --train mine/train.json --val mine/val.json \\
        --images mine/images --output mine/check [--config-file CONFIG [key=value ...]]

Prints what the data set holds and all that is wrong or remarkable, as training does before it
starts. --output writes report.txt (the same, in full), contact_sheet.png (images with their boxes),
classes.png and sizes.png. With --config-file, it also remarks on images with more objects than the
config has queries, and on objects that are too small at its input size. The exit code is 1 if there
is a mistake that training refuses, else 0.
"""

import argparse
import math
import os
import shlex
import sys
from collections import Counter
from pathlib import Path

import _start
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from PIL import Image
from tabulate import tabulate

from projects.stageinteractor.data import read_image
from projects.stageinteractor.data.checks import Split, check_splits, describe
from projects.stageinteractor.data.coco_file import read_tables
from projects.stageinteractor.data.object_checks import training_objects
from projects.stageinteractor.config.overrides import load_config, path_override
from projects.stageinteractor.config.own_data import check_capacity
from projects.stageinteractor.errors import UserError
from projects.stageinteractor.drawing.labelled_boxes import draw_boxes
from projects.stageinteractor.drawing.style import COLORS, palette, shown, spread

CONFIG = "projects/stageinteractor/configs/stageinteractor_r50_12ep.py"
CONFIG_FOR_CPU = "projects/stageinteractor/configs/stageinteractor_lite0_bccd.py"
SPLIT_COLORS = {"train": "#0072B2", "val": "#E69F00"}
COLUMNS, ROWS = 4, 3  # of the contact sheet, for each split
PIXELS = 640  # longer side of an image on the contact sheet, at most
SMALL, MEDIUM = 32, 96  # COCO's limits of object sizes, in pixels
CLASSES_SHOWN, CLASSES_DRAWN = 20, 100
BINS = 40


def names_by_id(tables):
    return {category["id"]: shown(category["name"]) for category in tables.categories}


def count_boxes(splits):
    """Boxes of each class and split, {class: {split: number}}, most frequent class first."""
    counts = {}
    for split, tables in splits.items():
        names = names_by_id(tables)
        boxes = Counter(names.get(item["category_id"]) for item in tables.annotations)
        for name in names.values():
            counts.setdefault(name, dict.fromkeys(splits, 0))[split] = boxes[name]
    return dict(sorted(counts.items(), key=lambda item: -sum(item[1].values())))


def overview(splits, limit):
    """What the splits hold as text, with the boxes of at most `limit` classes."""
    lines = []
    for split, tables in splits.items():
        empty = len(tables.images) - len(training_objects(tables))
        lines.append(f"{split}: {len(tables.images)} images, {empty} of them without objects to "
                     f"learn from, {len(tables.annotations)} boxes")
    counts = count_boxes(splits)
    rows = [[name, *boxes.values()] for name, boxes in counts.items()][:limit]
    if rows:
        lines += ["", tabulate(rows, headers=["class", *splits], disable_numparse=[0])]
    if len(counts) > limit:
        lines.append(f"... and {len(counts) - limit} more classes")
    return "\n".join(lines)


def load_image(path):
    """An image as training reads it, but smaller, or None if it cannot be read."""
    try:
        image = Image.fromarray(read_image(path, "RGB"))
    except Exception:  # Pillow's readers raise all sorts
        return None
    image.thumbnail((PIXELS, PIXELS))
    return image


def draw_contact_sheet(splits, roots):
    """Images spread over each split with their boxes, or None if there is no image to show."""
    panels = []
    for split, tables in splits.items():
        files = [(os.path.join(roots[split], image["file_name"]), image) for image in tables.images]
        files = [(path, image) for path, image in files if os.path.isfile(path)]
        loaded = [(load_image(path), i) for path, i in spread(files, COLUMNS * ROWS)]
        panels.append([(split, pixels, image) for pixels, image in loaded if pixels])
    rows = sum(math.ceil(len(images) / COLUMNS) for images in panels)
    if not rows:
        return None
    classes = list(count_boxes(splits))
    colors = dict(zip(classes, palette(len(classes))))
    has_legend = 0 < len(classes) <= len(COLORS)
    figure = Figure(figsize=(3.6 * COLUMNS, 3 * rows + 0.4), dpi=120, layout="constrained")
    grid = figure.subplots(rows, COLUMNS, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    if has_legend:
        patches = [Patch(fc=colors[name], ec="black", label=name) for name in classes]
        figure.legend(handles=patches, loc="outside upper left", ncols=len(classes))
    row = 0
    for images in panels:
        for axes, (split, pixels, image) in zip(grid[row:].flat, images):
            names = names_by_id(splits[split])
            scale = np.tile([pixels.width / image["width"], pixels.height / image["height"]], 2)
            boxes = [
                item for item in splits[split].annotations
                if item["image_id"] == image["id"] and item["category_id"] in names
            ]
            labels = [names[item["category_id"]] for item in boxes]
            draw_boxes(
                axes, pixels, [item["bbox"] * scale for item in boxes],
                [""] * len(boxes) if has_legend else labels, [colors[label] for label in labels],
            )
            axes.set_anchor("NW")
            title = f"{split}: image {image['id']}, boxes: {len(boxes)}\n"
            title += shown(image["file_name"])
            axes.set_title(title, fontsize=8, loc="left")
        row += math.ceil(len(images) / COLUMNS)
    return figure


def draw_classes(splits):
    """Boxes per class and split, or None without boxes."""
    counts = count_boxes(splits)
    drawn = {name: boxes for name, boxes in counts.items() if any(boxes.values())}
    drawn = dict(list(drawn.items())[:CLASSES_DRAWN])
    if not drawn:
        return None
    thickness = 0.8 / len(splits)
    height = 1.2 + max(0.2 * len(splits), 0.3) * len(drawn)
    figure = Figure(figsize=(9, height), dpi=100, layout="constrained")
    axes = figure.subplots()
    for index, split in enumerate(splits):
        place = np.arange(len(drawn)) + (index - (len(splits) - 1) / 2) * thickness
        numbers = [boxes[split] for boxes in drawn.values()]
        bars = axes.barh(place, numbers, thickness, color=SPLIT_COLORS[split], label=split)
        axes.bar_label(bars, padding=3, fontsize=8)
    axes.set_yticks(range(len(drawn)), list(drawn))
    axes.set_ylim(len(drawn) - 0.4, -0.6)
    axes.margins(x=0.1)
    axes.set_title(f"boxes per class, {len(drawn)} of {len(counts)} classes")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend()
    return figure


def object_sizes(tables):
    """Square roots of the areas of objects to learn from, clipped to their images, in pixels."""
    images = {image["id"]: image for image in tables.images}
    sizes = []
    for image_id, items in training_objects(tables).items():
        limits = images[image_id]["width"], images[image_id]["height"]
        for item in items:
            x, y, w, h = map(float, item["bbox"])
            visible = [min(a + b, limit) - max(a, 0) for a, b, limit in zip((x, y), (w, h), limits)]
            sizes.append(math.sqrt(math.prod(visible)))
    return sizes


def draw_histograms(axes, values, title, log=False):
    """Histograms {split: values} over the same bins, each as shares of its split."""
    axes.set_title(title)
    everything = np.concatenate([np.asarray(v, dtype=float) for v in values.values()])
    if not len(everything):
        axes.text(0.5, 0.5, "nothing", ha="center", va="center", transform=axes.transAxes)
        return
    low, high = everything.min(), everything.max()
    if log:
        edges = np.geomspace(max(low * 0.9, 0.5), high * 1.1, BINS + 1)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    else:  # each bin holds as many whole numbers
        step = max(math.ceil((high - low + 1) / BINS), 1)
        edges = np.arange(low - 0.5, high + step + 0.5, step)
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.set_xlim(edges[0] - 2 * step, edges[-1] + 2 * step)
    for split, numbers in values.items():
        if len(numbers):
            share = np.full(len(numbers), 100 / len(numbers))
            color = SPLIT_COLORS[split]
            axes.hist(numbers, edges, weights=share, histtype="stepfilled", fc=color + "40",
                      ec=color, lw=1.3)
    axes.set_ylabel("per cent")
    axes.grid(alpha=0.3)


def draw_sizes(splits):
    """Histograms of object sizes, objects per image and image sizes."""
    figure = Figure(figsize=(11, 8), dpi=100, layout="constrained")
    panels = figure.subplots(2, 2)
    sizes = {split: object_sizes(tables) for split, tables in splits.items()}
    axes = panels[0, 0]
    draw_histograms(axes, sizes, "object size: sqrt(width x height), pixels", log=True)
    if any(sizes.values()):
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, SMALL / 2), max(high, MEDIUM * 2))
        axes.set_ylim(top=axes.get_ylim()[1] * 1.1)
        for limit in (SMALL, MEDIUM):
            axes.axvline(limit, c="black", lw=1, ls="--")
        low, high = axes.get_xlim()
        ends = zip(("small", "medium", "large"), (low, SMALL, MEDIUM), (SMALL, MEDIUM, high))
        for name, a, b in ends:
            axes.text(math.sqrt(a * b), axes.get_ylim()[1] * 0.99, name, ha="center", va="top")
    numbers = {}
    for split, tables in splits.items():
        objects = training_objects(tables)
        numbers[split] = [len(objects.get(image["id"], ())) for image in tables.images]
    draw_histograms(panels[0, 1], numbers, "objects per image")
    for axes, side in zip(panels[1], ("width", "height")):
        values = {s: [image[side] for image in tables.images] for s, tables in splits.items()}
        draw_histograms(axes, values, f"image {side}, pixels")
    patches = [Patch(color=SPLIT_COLORS[split], label=split) for split in splits]
    figure.legend(handles=patches, loc="outside upper right", ncols=len(splits))
    return figure


def training_command(args):
    """How to train on the data set, for a shell."""
    keys = {"train": args.train, "val": args.val, "images": args.images,
            "val_images": args.val_images}
    given = [path_override(f"dataset.{key}", path) for key, path in keys.items() if path]
    config = CONFIG if torch.cuda.is_available() else CONFIG_FOR_CPU
    if args.config_file:
        config, given = shlex.quote(args.config_file), [*given, *map(shlex.quote, args.overrides)]
    return " ".join(
        ["python tools/train_net.py --config-file", config, *given, "train.output_dir=output/mine"]
    )


@_start.command
def main(argv=None):
    """Return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", metavar="FILE", help="COCO file to train on")
    parser.add_argument("--val", metavar="FILE", help="COCO file to evaluate on")
    parser.add_argument("--images", metavar="DIR", help="images; default: the COCO file's folder")
    parser.add_argument("--val-images", metavar="DIR", help="images of --val; default: --images")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="report and pictures; replaces those in it"
    )
    parser.add_argument(
        "--config-file", metavar="CONFIG",
        help="config to train: also remark on what its model cannot find"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the config")
    args = parser.parse_args(argv)
    if args.overrides and not args.config_file:
        parser.error(f"{args.overrides[0]} needs --config-file CONFIG")
    if not (args.train or args.val):
        parser.error("give --train FILE, --val FILE or both")
    if args.output:
        try:
            args.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--output {args.output}: {error.strerror}")

    splits = {}
    for name, file, root in (
        ("train", args.train, args.images), ("val", args.val, args.val_images or args.images)
    ):
        if file:
            splits[name] = Split(file, root or os.path.dirname(file) or ".")
    findings = check_splits(splits)
    if args.config_file:
        try:
            findings += check_capacity(load_config(args.config_file, args.overrides), splits)
        except UserError as error:
            sys.exit(f"error: {error}")
    tables = {name: read_tables(split.json_file) for name, split in splits.items()}
    mistakes = sum(finding.is_mistake for finding in findings)
    count = f"{mistakes or 'no'} mistake{'s' * (mistakes != 1)}, {len(findings) - mistakes} remarks"
    parts = [overview(tables, CLASSES_SHOWN), describe(findings), count]
    print("\n\n".join(filter(None, parts)))

    if args.output:
        parts = [overview(tables, sys.maxsize), describe(findings, limit=len(findings)), count]
        text = "\n\n".join(filter(None, parts)) + "\n"
        path = args.output / "report.txt"
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
        print(f"\n{path} written")
        roots = {name: split.image_root for name, split in splits.items()}
        for name, figure in (
            ("contact_sheet.png", draw_contact_sheet(tables, roots)),
            ("classes.png", draw_classes(tables)),
            ("sizes.png", draw_sizes(tables)),
        ):
            path = args.output / name
            if figure:
                figure.savefig(path)
            print(f"{path} written" if figure else f"{path} left out: nothing to draw")
    if args.train and args.val and not mistakes:
        if not torch.cuda.is_available():
            print("\nFetch the weights that training starts from:\npython tools/prepare_trees.py")
        print(f"\nTrain with:\n{training_command(args)}")
    return 1 if mistakes else 0


if __name__ == "__main__":
    sys.exit(main())
