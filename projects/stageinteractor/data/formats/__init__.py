"""Other annotation formats: readers for tools/convert.py dataset, writers for tools/demo.py."""

from ..coco_file import to_coco
from .conversion import Dataset, Mistakes, counts
from .voc import read_voc
from .writers import FORMATS, write_dataset
from .yolo import read_yolo

__all__ = [
    "FORMATS", "Dataset", "Mistakes", "counts", "read_voc", "read_yolo", "to_coco", "write_dataset",
]
