"""Readers of other annotation formats, for tools/convert.py dataset."""

from ..coco_file import to_coco
from .conversion import Dataset, Mistakes, counts
from .voc import read_voc
from .yolo import read_yolo

__all__ = ["Dataset", "Mistakes", "counts", "read_voc", "read_yolo", "to_coco"]
