"""A data set named by its files, for configs and the command line."""

from typing import List

from detectron2.data import DatasetCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import register_coco_instances


def coco_dataset(*, json_file: str, image_root: str, filter_empty: bool = False) -> List[dict]:
    """Register COCO-format files and load them as Detectron2's dataset dictionaries.

    The data set is registered under the path of its JSON file, so evaluators and visualisers find
    its classes by that name.

    Args:
        json_file: annotations in COCO's instance format.
        image_root: folder that the file names in the JSON are relative to.
        filter_empty: leave out images without objects.
    """
    if json_file not in DatasetCatalog:
        register_coco_instances(json_file, {}, json_file, image_root)
    return get_detection_dataset_dicts(json_file, filter_empty=filter_empty)
