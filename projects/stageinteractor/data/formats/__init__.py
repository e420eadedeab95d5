"""Annotation formats that become COCO files: tools/convert_dataset.py."""

from .dataset import Dataset, Mistakes, to_coco
from .voc import read_voc
from .yolo import read_yolo

__all__ = ["Dataset", "Mistakes", "read_voc", "read_yolo", "to_coco"]
