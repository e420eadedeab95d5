"""Data sets for configs and the command line: one named by its files, one to train on."""

import json
import logging
import tempfile
from pathlib import Path
from typing import List, Sequence, Union

from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import load_coco_json
from detectron2.structures import BoxMode

from ..errors import UserError
from .coco_file import read_coco, sift
from .numbered import NumberedCOCO

MIN_IMAGE_SIDE = 32  # pixels


def coco_dataset(
    *, json_file: str, image_root: str, training: bool = False, filter_empty: bool = True
) -> List[dict]:
    """Register COCO-format files and load them as Detectron2's dataset dictionaries.

    The data set is registered under the path of its JSON file, so evaluators and visualisers find
    its classes by that name.

    Args:
        json_file: annotations in COCO's instance format.
        image_root: folder that the file names in the JSON are relative to.
        training: leave out what cannot be trained on, see `training_dicts`.
        filter_empty: in training, leave out images without objects too.

    Raises:
        UserError: the file cannot be loaded, or has nothing to train on.
    """
    if json_file not in DatasetCatalog:
        DatasetCatalog.register(json_file, lambda: load_coco(json_file, image_root))
        MetadataCatalog.get(json_file).set(
            json_file=json_file, image_root=image_root, evaluator_type="coco"
        )
    try:
        if training:
            return training_dicts(json_file, filter_empty=filter_empty)
        return get_detection_dataset_dicts(json_file, filter_empty=False)
    except UserError:
        raise
    except Exception as error:  # Detectron2's loader raises all sorts
        _explain(json_file, error)
        raise


def load_coco(json_file: str, image_root: str) -> List[dict]:
    """Detectron2's dictionaries of a COCO file, which note its classes under the file's name.

    Detectron2's loader sorts ids. Where numbers are mixed with texts it reads a numbered copy.
    """
    try:
        return load_coco_json(json_file, image_root, json_file)
    except TypeError:
        coco, _ = read_coco(json_file)
        if not coco:
            raise
    numbered = NumberedCOCO(coco)
    images, classes = ({n: i for i, n in ids.items()} for ids in numbered.numbers.values())
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "numbered.json"
        copy.write_text(json.dumps(numbered.dataset))
        records = load_coco_json(str(copy), image_root, str(copy))
    MetadataCatalog.get(json_file).set(
        thing_classes=MetadataCatalog.pop(str(copy)).thing_classes,
        thing_dataset_id_to_contiguous_id={i: n - 1 for n, i in classes.items()},
    )
    return [{**record, "image_id": images[record["image_id"]]} for record in records]


def _explain(json_file, error):
    """Raises UserError if it is the file's fault that Detectron2 does not load it."""
    coco, findings = read_coco(json_file)
    if coco:
        _, findings = sift(json_file, coco)
    if findings:
        raise UserError(f"{findings[0].where}: {findings[0].what}") from error
    if isinstance(error, (AssertionError, KeyError)):  # its own checks of what is there
        raise UserError(f"{json_file}: {error}") from error


def training_dicts(
    names: Union[str, Sequence[str]], *, filter_empty: bool = True
) -> List[dict]:
    """Dataset dictionaries of registered data sets, without what the release does not train on.

    That is boxes less than a pixel wide or high or outside their image, and images with a side
    below 32 pixels or without an object. Crowds stay, but are no objects.

    Args:
        names: of the data sets, as registered with Detectron2.
        filter_empty: whether images without an object are left out.

    Raises:
        UserError: no object is left.
    """
    records = get_detection_dataset_dicts(names, filter_empty=filter_empty)
    kept, num_with_objects = [], 0
    for record in records:
        annotations = [item for item in record["annotations"] if is_usable(item, record)]
        has_object = any(not item.get("iscrowd", 0) for item in annotations)
        is_large = min(record["height"], record["width"]) >= MIN_IMAGE_SIDE
        if is_large and (has_object or not filter_empty):
            kept.append({**record, "annotations": annotations})
            num_with_objects += has_object
    if not num_with_objects:
        raise UserError(
            f"data set {names}: no image of {MIN_IMAGE_SIDE} pixels or more has a box of a pixel "
            "or more; COCO's boxes are [x, y, width, height] in pixels"
        )
    # Detectron2 writes only its own loggers to log.txt.
    logging.getLogger(f"detectron2.{__name__}").info(
        f"Removed {len(records) - len(kept)} images that are too small"
        f"{' or without usable boxes' if filter_empty else ''}. "
        f"{len(kept)} images left, {len(kept) - num_with_objects} of them without objects."
    )
    return kept


def is_usable(annotation: dict, record: dict) -> bool:
    """Whether a box is at least a pixel wide and high and overlaps its image."""
    x, y, w, h = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYWH_ABS)
    inside = x < record["width"] and y < record["height"] and x + w > 0 and y + h > 0
    return w >= 1 and h >= 1 and inside
