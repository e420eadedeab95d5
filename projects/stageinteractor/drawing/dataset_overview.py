"""What a data set holds: tables of its classes and sizes, and a contact sheet.

`splits` are the tables of COCO files by the name of the split.
"""

import contextlib
import os
from collections import Counter

import numpy as np
import torch
from detectron2.structures import Boxes, BoxMode
from matplotlib.figure import Figure
from tabulate import tabulate

from ..data.coco_file import Tables
from ..data.object_checks import training_objects
from ..errors import UserError
from .labelled_boxes import draw_record
from .style import make_grid, shown, spread

COLUMNS, ROWS = 4, 3  # COLUMNS x ROWS images of each split on the contact sheet
PERCENTILES = {"least": 0, "5 %": 5, "median": 50, "95 %": 95, "most": 100}


def describe_splits(splits: dict[str, Tables], limit: int | None = None) -> str:
    """What the splits hold as text, with the boxes of at most `limit` classes."""
    lines, counts = [], {}
    for split, tables in splits.items():
        empty = len(tables.images) - len(training_objects(tables))
        lines.append(f"{split}: {len(tables.images)} images, {empty} of them without objects to "
                     f"learn from, {len(tables.annotations)} boxes")
        boxes = Counter(item["category_id"] for item in tables.annotations)
        for category in tables.categories:
            row = counts.setdefault(shown(category["name"]), Counter())
            row[split] += boxes[category["id"]]
    rows = [[name, *(boxes[split] for split in splits)] for name, boxes in counts.items()]
    rows.sort(key=lambda row: -sum(row[1:]))
    if rows:
        lines += ["", tabulate(rows[:limit], headers=["class", *splits], disable_numparse=[0])]
    if rows[:limit] != rows:
        lines.append(f"... and {len(rows) - limit} more classes")
    return "\n".join(lines)


def object_sizes(tables: Tables) -> list[float]:
    """Square roots of the areas of objects to learn from, clipped to their images, in pixels."""
    images, sizes = {image["id"]: image for image in tables.images}, []
    for image_id, items in training_objects(tables).items():
        boxes = torch.tensor([item["bbox"] for item in items], dtype=torch.float64)
        boxes = Boxes(BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS))
        boxes.clip((images[image_id]["height"], images[image_id]["width"]))
        sizes += boxes.area().sqrt().tolist()
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
    """Images from all over each split with their boxes, or None if there are no image files.

    Panels of images that cannot be read stay empty.

    Args:
        roots: folder of the images of each split.
    """
    chosen = []
    for split, tables in splits.items():
        files = [(split, os.path.join(roots[split], image["file_name"]), image)
                 for image in tables.images]
        chosen += spread([file for file in files if os.path.isfile(file[1])], COLUMNS * ROWS)
    if not chosen:
        return None
    aspects = [image["height"] / image["width"] for *_, image in chosen]
    figure, grid = make_grid(aspects, COLUMNS, panel=3.6, dpi=120)
    for axes, (split, path, image) in zip(grid.flat, chosen):
        classes = {entry["id"]: entry["name"] for entry in splits[split].categories}
        places = {key: place for place, key in enumerate(classes)}
        items = [
            {**item, "category_id": places[item["category_id"]], "bbox_mode": BoxMode.XYWH_ABS}
            for item in splits[split].annotations
            if item["image_id"] == image["id"] and item["category_id"] in places
        ]
        record = {"file_name": path, "annotations": items}
        with contextlib.suppress(UserError):  # the checks report what cannot be read
            draw_record(axes, record, list(classes.values()), f"{split}: ")
    return figure
