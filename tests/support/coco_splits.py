"""A small data set in COCO format whose entries a test spoils, one fault at a time."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from projects.stageinteractor.data.dataset_checks import Split, check_splits

SIZE = 64, 48  # width and height of all images


def save_image(path, size=SIZE, **options):
    """An image like no other: its pixels depend on its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(list(path.name.encode()))
    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


class Dataset:
    """Two splits of three images with two objects each, without a fault until one is made."""

    def __init__(self, root):
        self.root, self.coco = root, {}
        for split in ("train", "val"):
            images = [
                {"id": i, "file_name": f"{split} ä{i}.png", "width": SIZE[0], "height": SIZE[1]}
                for i in (1, 2, 3)
            ]
            for image in images:
                save_image(root / "images" / image["file_name"])
            annotations = [
                {
                    "id": i + 1, "image_id": i // 2 + 1, "category_id": i % 2 + 1,
                    "bbox": [5 + i, 6.5, 20, 10 + i], "area": 20 * (10 + i), "iscrowd": 0,
                }
                for i in range(6)
            ]
            categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
            self.coco[split] = {
                "images": images, "annotations": annotations, "categories": categories
            }

    def path(self, split):
        return str(self.root / f"{split}.json")

    def check(self, text=None):
        """Findings after both splits are written, or `text` in place of the first one."""
        for split, coco in self.coco.items():
            Path(self.path(split)).write_text(json.dumps(coco))
        if text is not None:
            Path(self.path("train")).write_bytes(text)
        images = str(self.root / "images")
        return check_splits({split: Split(self.path(split), images) for split in self.coco})

    def edit(self, table, index, *, split="train", **values):
        """Set keys of an entry, or remove those that are set to `...`."""
        entry = self.coco[split][table][index]
        entry.update(values)
        for key in [key for key, value in values.items() if value is ...]:
            del entry[key]
