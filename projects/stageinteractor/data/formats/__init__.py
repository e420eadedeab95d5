"""Annotation formats that become COCO files: tools/convert.py dataset."""

from .dataset import Dataset, Mistakes, counts, to_coco
from .voc import read_voc
from .yolo import read_yolo

__all__ = ["Dataset", "Mistakes", "counts", "read_voc", "read_yolo", "to_coco"]
