"""Ground truth and detections in COCO's formats, read from files that belong together."""

import json
from pathlib import Path

from ..data.coco_file import brief, id_order, is_id, is_number, require_tables
from ..errors import UserError
from ..files import read_text


def read_truth(annotations: Path) -> dict:
    """Read a COCO file with at least one image.

    Raises:
        UserError: it cannot be read, has mistakes, or has no images.
    """
    tables = require_tables(annotations)
    if not tables.images:
        raise UserError(f"{annotations} holds no images")
    return tables._asdict()


def read_detections(predictions: Path, truth: dict, annotations: Path) -> list[dict]:
    """Read detections in COCO's result format.

    Args:
        truth: of the images that the detections were made on.
        annotations: file of the truth, for messages.

    Raises:
        UserError: it is not such a file, or names images or categories that the truth lacks.
    """
    try:
        detections = json.loads(read_text(predictions))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{predictions} is not JSON ({error})") from error
    if not isinstance(detections, list) or not all(map(is_detection, detections)):
        raise UserError(
            f"{predictions} is not a list of COCO results.\n"
            "Give the coco_instances_results.json of an evaluation"
        )
    for key, table in (("image_id", "images"), ("category_id", "categories")):
        unknown = {found[key] for found in detections} - {entry["id"] for entry in truth[table]}
        if unknown:
            first = brief.repr(min(unknown, key=id_order))
            raise UserError(
                f"{predictions}: {key} {first} is not in {annotations}.\n"
                "Give the annotations of the data set that the predictions were made on"
            )
    return detections


def is_detection(found) -> bool:
    """Return whether something is a detection in COCO's result format, with a box."""
    match found:
        case {"image_id": image, "category_id": category, "bbox": [_, _, _, _] as box,
              "score": score}:
            return is_id(image) and is_id(category) and all(map(is_number, [*box, score]))
    return False
