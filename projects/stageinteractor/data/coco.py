"""Data sets of COCO files, as configs name them and as Detectron2 loads them."""

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Sequence

from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.structures import BoxMode

from ..errors import UserError
from .coco_file import id_order, no_garbage_collection, require_tables

MIN_IMAGE_SIDE = 32  # pixels
# Why training does not learn from an annotation. In messages, a number comes before it.
SMALL_IMAGE = f"in an image with a side below {MIN_IMAGE_SIDE} pixels"
NO_AREA = "without width or height"
TINY = "below a pixel wide or high (boxes are [x, y, width, height] in pixels)"
OUTSIDE = "outside of their image"
CROWD = "with iscrowd=1 (crowds)"
LOGGER = logging.getLogger(f"detectron2.{__name__}")  # Detectron2 writes only its own to log.txt


@no_garbage_collection()
def coco_dataset(
    *,
    json_file: str,
    image_root: str,
    training: bool = False,
    filter_empty: bool = True,
    names: str | None = None,
) -> list[dict]:
    """Register COCO-format files and load their boxes as Detectron2's dataset dictionaries.

    The data set is registered under the path of its JSON file, by which evaluators and visualisers
    find its classes. Segmentations and keypoints are not loaded.

    Args:
        json_file: annotations in COCO's instance format.
        image_root: folder that the file names in the JSON are relative to.
        training: whether to leave out what cannot be trained on, see `training_dicts`.
        filter_empty: whether training leaves out images without objects, too.
        names: not used; detrex's tools look for the name of the data set there.

    Raises:
        UserError: the file cannot be loaded, or training would have no object to learn from.
    """
    if json_file not in DatasetCatalog:
        DatasetCatalog.register(json_file, lambda: _load_boxes(json_file, image_root))
        MetadataCatalog.get(json_file).set(
            json_file=json_file, image_root=image_root, evaluator_type="coco"
        )
    if training:
        return training_dicts(json_file, filter_empty=filter_empty)
    return get_detection_dataset_dicts(json_file, filter_empty=False)


def _load_boxes(json_file, image_root):
    """Unlike Detectron2's `load_coco_json`, keeps boxes whose polygons are broken.

    Evaluation counts such boxes, too.
    """
    tables = require_tables(json_file, keep=False, may_be_secret=True)
    images = {image["id"]: image for image in tables.images}
    categories = sorted(tables.categories, key=lambda category: id_order(category["id"]))
    places = {category["id"]: place for place, category in enumerate(categories)}
    if not (images and categories):
        raise UserError(f"{json_file}: no {'categories' if images else 'images'}")
    if len({item["id"] for item in tables.annotations}) < len(tables.annotations):
        raise UserError(f"{json_file}: annotation ids are not unique")
    objects = defaultdict(list)
    for item in tables.annotations:
        if item["category_id"] not in places:
            what = f"category_id {item['category_id']} is not among the categories"
            raise UserError(f"{json_file}: annotation {item['id']}: {what}")
        objects[item["image_id"]].append({
            "bbox": item["bbox"], "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": places[item["category_id"]], "iscrowd": item.get("iscrowd", 0),
        })
    lost = sum(len(items) for image_id, items in objects.items() if image_id not in images)
    if lost:
        LOGGER.warning(f"{json_file}: {lost} annotations refer to images that are not in the file")
    MetadataCatalog.get(json_file).set(
        thing_classes=[category["name"] for category in categories],
        thing_dataset_id_to_contiguous_id=places,
    )
    return [
        {
            "file_name": os.path.join(image_root, image["file_name"]), "image_id": image_id,
            "height": image["height"], "width": image["width"], "annotations": objects[image_id],
        }
        for image_id, image in sorted(images.items(), key=lambda item: id_order(item[0]))
    ]


def training_dicts(
    names: str | Sequence[str], *, filter_empty: bool = True
) -> list[dict]:
    """Dataset dictionaries of registered data sets, without what the release does not train on.

    It leaves out boxes that are less than a pixel wide or high or outside their image, and images
    with a side below 32 pixels or without an object. Crowds stay, but do not count as objects.

    Args:
        names: of the data sets, as registered with Detectron2.
        filter_empty: whether images without an object are left out.

    Raises:
        UserError: no object is left.
    """
    records = get_detection_dataset_dicts(names, filter_empty=False)
    kept, num_with_objects, reasons = [], 0, Counter()
    for record in records:
        found = [why_left_out(item, record) for item in record["annotations"]]
        reasons.update(found)
        has_object = "" in found
        is_large = min(record["height"], record["width"]) >= MIN_IMAGE_SIDE
        if is_large and (has_object or not filter_empty):
            annotations = [
                item for item, why in zip(record["annotations"], found) if why in ("", CROWD)
            ]
            kept.append({**record, "annotations": annotations})
            num_with_objects += has_object
    if not num_with_objects:
        raise UserError(f"data set {names}: {nothing_to_learn(reasons)}")
    LOGGER.info(
        f"Removed {len(records) - len(kept)} images that are too small"
        f"{' or without usable boxes' if filter_empty else ''}. "
        f"{len(kept)} images left, {len(kept) - num_with_objects} of them without objects."
    )
    return kept


def why_left_out(annotation: dict, image: dict) -> str:
    """Why training does not learn from an annotation; an empty text if it does.

    Args:
        annotation: its box is [x, y, width, height] unless it has another ``bbox_mode``.
        image: has ``width`` and ``height`` in pixels.
    """
    mode = annotation.get("bbox_mode", BoxMode.XYWH_ABS)
    x, y, w, h = BoxMode.convert(annotation["bbox"], mode, BoxMode.XYWH_ABS)
    if not (w > 0 and h > 0):
        return NO_AREA
    if not (x < image["width"] and y < image["height"] and x + w > 0 and y + h > 0):
        return OUTSIDE
    if w < 1 or h < 1:
        return TINY
    if annotation.get("iscrowd"):
        return CROWD
    return SMALL_IMAGE if min(image["width"], image["height"]) < MIN_IMAGE_SIDE else ""


def nothing_to_learn(reasons: Counter) -> str:
    """A sentence on why a data set has no object to learn from.

    Args:
        reasons: how many annotations training does not learn from, by `why_left_out`.
    """
    if not reasons:
        return "no annotations"
    counts = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    return f"none of the {reasons.total()} annotations is an object to learn from: {counts}"
