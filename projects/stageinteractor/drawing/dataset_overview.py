"""What a data set holds: tables of its classes and sizes, and a contact sheet.

`splits` are the tables of COCO files by the name of the split.
"""

import math
import os
from collections import Counter

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from tabulate import tabulate

from ..data import read_picture
from ..data.coco_file import Tables
from ..data.object_checks import training_objects
from ..errors import UserError
from .labelled_boxes import draw_classes
from .style import make_grid, shown, spread

COLUMNS, ROWS = 4, 3  # of the contact sheet, for each split
PIXELS = 640  # of the longer side of an image on the contact sheet, at most
PERCENTILES = {"least": 0, "5 %": 5, "median": 50, "95 %": 95, "most": 100}


def count_boxes(splits: dict[str, Tables]) -> dict[str, dict[str, int]]:
    """The number of boxes by class and split, the most frequent class first."""
    counts = {}
    for split, tables in splits.items():
        boxes = Counter(item["category_id"] for item in tables.annotations)
        for category in tables.categories:
            row = counts.setdefault(shown(category["name"]), dict.fromkeys(splits, 0))
            row[split] += boxes[category["id"]]
    return dict(sorted(counts.items(), key=lambda item: -sum(item[1].values())))


def describe_splits(splits: dict[str, Tables], limit: int | None = None) -> str:
    """What the splits hold as text, with the boxes of at most `limit` classes."""
    lines = []
    for split, tables in splits.items():
        empty = len(tables.images) - len(training_objects(tables))
        lines.append(f"{split}: {len(tables.images)} images, {empty} of them without objects to "
                     f"learn from, {len(tables.annotations)} boxes")
    rows = [[name, *boxes.values()] for name, boxes in count_boxes(splits).items()]
    if rows:
        lines += ["", tabulate(rows[:limit], headers=["class", *splits], disable_numparse=[0])]
    if rows[:limit] != rows:
        lines.append(f"... and {len(rows) - limit} more classes")
    return "\n".join(lines)


def object_sizes(tables: Tables) -> list[float]:
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


def describe_sizes(splits: dict[str, Tables]) -> str:
    """Percentiles of object sizes, objects per image and image sizes, as text."""
    rows = []
    for split, tables in splits.items():
        objects = training_objects(tables)
        values = {
            "object size: sqrt(width x height), pixels": object_sizes(tables),
            "objects per image": [len(objects.get(image["id"], ())) for image in tables.images],
            "image width, pixels": [image["width"] for image in tables.images],
            "image height, pixels": [image["height"] for image in tables.images],
        }
        rows += [
            [split, name, *np.percentile(np.asarray(numbers, dtype=float), [*PERCENTILES.values()])]
            for name, numbers in values.items() if numbers
        ]
    return tabulate(rows, headers=["split", "", *PERCENTILES], floatfmt=".0f") if rows else ""


def draw_contact_sheet(splits: dict[str, Tables], roots: dict[str, str]) -> Figure | None:
    """Images from all over each split with their boxes, or None if none can be read.

    Args:
        roots: folder of the images of each split.
    """
    rows = []
    for split, tables in splits.items():
        files = [(os.path.join(roots[split], image["file_name"]), image) for image in tables.images]
        files = [(path, image) for path, image in files if os.path.isfile(path)]
        loaded = [(_thumbnail(path), image) for path, image in spread(files, COLUMNS * ROWS)]
        loaded = [(split, pixels, image) for pixels, image in loaded if pixels]
        rows += [loaded[start:start + COLUMNS] for start in range(0, len(loaded), COLUMNS)]
    if not rows:
        return None
    aspects = [max(pixels.height / pixels.width for _, pixels, _ in row) for row in rows]
    figure, grid = make_grid(aspects, COLUMNS, panel=3.6, dpi=120)
    for panels, row in zip(grid, rows):
        for axes, (split, pixels, image) in zip(panels, row):
            _draw_objects(axes, pixels, image, splits[split])
            title = f"{split}: image {image['id']}, boxes: {len(axes.patches)}"
            axes.set_title(f"{title}\n{shown(image['file_name'])}", fontsize=8, loc="left")
    return figure


def _thumbnail(path):
    """An image as training reads it, but smaller; None if it cannot be read."""
    try:
        image = Image.fromarray(read_picture(path, "RGB"))
    except UserError:
        return None
    image.thumbnail((PIXELS, PIXELS))
    return image


def _draw_objects(axes, pixels, image, tables):
    places = {category["id"]: place for place, category in enumerate(tables.categories)}
    boxes = [item for item in tables.annotations
             if item["image_id"] == image["id"] and item["category_id"] in places]
    scale = np.tile([pixels.width / image["width"], pixels.height / image["height"]], 2)
    names = [category["name"] for category in tables.categories]
    draw_classes(axes, pixels, [item["bbox"] * scale for item in boxes],
                 [places[item["category_id"]] for item in boxes], names)
