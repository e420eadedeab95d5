"""Show what every decoder stage does with one picture: as a page, and query by query."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import annotations_to_instances
from detectron2.structures import Instances

from ...data import coco_dataset, read_picture
from ...data.coco import SMALL_IMAGE, why_left_out
from ...errors import UserError
from ...files import prepare_output
from ...inference import Detector
from .stage_page import render_page
from .stage_panels import draw_query
from .stage_record import check_queries, choose_queries, record_stages


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
    records = coco_dataset(json_file=annotations, image_root="")
    parts = Path(image).resolve().parts
    record = next((record for record in records
                   if (names := Path(record["file_name"]).parts) == parts[-len(names):]), None)
    if record is None:
        raise UserError(
            f"{annotations} has no picture {Path(image).name}: give the file that describes it"
        )
    if (record["height"], record["width"]) != size:
        raise UserError(
            f"{image} has {size[1]} x {size[0]} pixels, but {record['width']} x "
            f"{record['height']} in {annotations}"
        )
    names = MetadataCatalog.get(annotations).thing_classes
    if unknown := sorted(set(names) - set(class_names)):
        raise UserError(f"{annotations} has the class {unknown[0]}, which the model does not know")
    objects = [
        {**item, "category_id": class_names.index(names[item["category_id"]])}
        for item in record["annotations"] if why_left_out(item, record) in ("", SMALL_IMAGE)
    ]
    instances = annotations_to_instances(objects, size)
    instances.gt_boxes.clip(size)
    return instances
