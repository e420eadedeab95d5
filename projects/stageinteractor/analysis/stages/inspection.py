"""Show what every decoder stage does with one picture: as a page, and query by query."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.structures import Boxes, BoxMode, Instances

from ...data import read_picture
from ...data.coco import SMALL_IMAGE, why_left_out
from ...data.coco_file import require_tables
from ...errors import UserError
from ...files import prepare_output
from ...inference import Detector
from .stage_page import render_page
from .stage_panels import draw_query
from .stage_record import check_queries, choose_queries, record_stages

MOST = 12  # queries of each kind; the colours of more than 24 could not be told apart


def inspect_picture(
    detector: Detector,
    image: str,
    output: str,
    *,
    annotations: str | None,
    queries: Sequence[int],
    count: int,
    title: str,
) -> list[int]:
    """Write ``stages.html`` and ``query_N.png`` of each query that is shown.

    Args:
        detector: its model has stages.
        image: file of the picture.
        output: folder, made if it does not exist.
        annotations: COCO file that lists the picture; None shows no labels.
        queries: those to show; if empty, they are chosen by `choose_queries`.
        count: how many of each kind to choose.
        title: of the page.

    Returns:
        the queries that are shown.

    Raises:
        UserError: an input does not fit, or the folder already holds one of the files.
        OSError: a file cannot be written.
    """
    picture, objects = read_picture(image, "BGR"), None
    if annotations:
        objects = read_objects(annotations, image, picture.shape[:2], detector.class_names)
    record = record_stages(detector.model, detector.prepare(picture), objects)
    queries = check_queries(queries, record) or choose_queries(record, count)
    for name in ("stages.html", *(f"query_{query}.png" for query in queries)):
        folder = prepare_output(output, name)
    rgb, names = np.ascontiguousarray(picture[:, :, ::-1]), detector.class_names
    page = render_page(record, rgb, queries, names, title)
    Path(folder, "stages.html").write_text(page, encoding="utf-8")
    for query in queries:
        draw_query(record, rgb, query, names).savefig(folder / f"query_{query}.png")
    return queries


def check_number(queries: Sequence[int], count: int):
    """Raise UserError if more queries are asked for, by name or by count, than can be shown."""
    if not 1 <= count <= MOST:
        raise UserError(f"--count is {count}: show 1 to {MOST} queries of each kind")
    if len(queries) > 2 * MOST:
        raise UserError(f"--queries names {len(queries)}: show {2 * MOST} at most")


def read_objects(
    annotations: str, image: str, size: tuple[int, int], class_names: Sequence[str]
) -> Instances:
    """Read the objects of a picture as training sees them.

    Crowds and boxes of less than a pixel are omitted; other boxes are clipped to the picture.

    Args:
        annotations: a COCO file that lists the picture.
        image: file of the picture, whose path ends as the ``file_name`` in the COCO file does.
        size: height and width of the picture, pixels.
        class_names: the model's; the file's categories are identified by name.

    Returns:
        ``gt_boxes`` in pixels of the picture, and ``gt_classes``.

    Raises:
        UserError: the file cannot be read, does not list the picture, or has another size for it,
            or classes that the model does not have.
    """
    coco = require_tables(annotations)
    parts, (height, width) = Path(image).resolve().parts, size
    entry = next((entry for entry in coco.images
                  if (names := Path(entry["file_name"]).parts) == parts[-len(names):]), None)
    if entry is None:
        raise UserError(
            f"{annotations} has no picture {Path(image).name}: give the file that describes it"
        )
    if (entry["width"], entry["height"]) != (width, height):
        raise UserError(
            f"{image} has {width} x {height} pixels, but {entry['width']} x {entry['height']} in "
            f"{annotations}"
        )
    names = {category["id"]: category["name"] for category in coco.categories}
    if unknown := sorted(set(names.values()) - set(class_names)):
        raise UserError(
            f"{annotations} has the class {unknown[0]}, which the model does not know: "
            f"{', '.join(class_names[:5])}{', ...' if len(class_names) > 5 else ''}"
        )
    objects = [
        item for item in coco.annotations
        if item["image_id"] == entry["id"] and why_left_out(item, entry) in ("", SMALL_IMAGE)
    ]
    for item in objects:
        if item["category_id"] not in names:
            raise UserError(
                f"{annotations}: annotation {item['id']} has the category {item['category_id']}, "
                "which is not in the file"
            )
    corners = [BoxMode.convert(o["bbox"], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS) for o in objects]
    boxes = Boxes(torch.tensor(corners, dtype=torch.float32).view(-1, 4))
    boxes.clip(size)
    classes = [class_names.index(names[o["category_id"]]) for o in objects]
    return Instances(size, gt_boxes=boxes, gt_classes=torch.tensor(classes).long())
