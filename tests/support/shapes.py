"""A small data set of drawn shapes, made in a moment, for tests that need images to learn from."""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("rectangle", "circle", "triangle")  # category ids 1, 2, 3


def make_shapes(root, images=4, size=(96, 128), seed=0, empty=False, crowd=False):
    """Draw shapes of random class, size and bright colour on dark noise; describe them in COCO.

    Shapes of one image do not touch, and their boxes are exact. The same arguments give the same
    files on every machine.

    Args:
        root: folder to write `images/*.png` and `annotations.json` to; made if it is missing.
        images: number of images.
        size: (height, width) of all images in pixels, or a list of sizes taken in turn.
        empty: leave the last image without objects.
        crowd: add a crowd box over the right half of the first image.

    Returns:
        Path of `annotations.json`. Its file names start at `root/images`.
    """
    root = Path(root)
    (root / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    sizes = [size] if isinstance(size[0], int) else size
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)]
    coco = {"info": {}, "categories": categories, "images": [], "annotations": []}

    def annotate(image_id, category_id, box, iscrowd=0):
        x1, y1, x2, y2 = (int(v) for v in box)
        coco["annotations"].append(
            {
                "id": len(coco["annotations"]) + 1,
                "image_id": image_id,
                "category_id": category_id,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "iscrowd": iscrowd,
            }
        )

    for image_id in range(1, images + 1):
        height, width = sizes[(image_id - 1) % len(sizes)]
        image = Image.fromarray(rng.integers(0, 80, (height, width, 3), dtype=np.uint8))
        boxes = [] if empty and image_id == images else random_boxes(rng, height, width)
        for box in boxes:
            category_id = int(rng.integers(1, len(CLASSES) + 1))
            color = tuple(rng.integers(120, 256, 3).tolist())
            draw_shape(ImageDraw.Draw(image), CLASSES[category_id - 1], box, color)
            annotate(image_id, category_id, box)
        if crowd and image_id == 1:
            annotate(image_id, 1, (width // 2, 0, width, height), iscrowd=1)
        name = f"{image_id:04}.png"
        image.save(root / "images" / name)
        coco["images"].append({"id": image_id, "file_name": name, "height": height, "width": width})
    path = root / "annotations.json"
    path.write_text(json.dumps(coco))
    return path


def random_boxes(rng, height, width):
    """One to four boxes (x1, y1, x2, y2) in pixels that do not touch each other."""
    boxes = []
    for _ in range(4):
        w, h = rng.integers(min(height, width) // 6, min(height, width) // 2, 2).tolist()
        x, y = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
        if all(x > x2 or x + w < x1 or y > y2 or y + h < y1 for x1, y1, x2, y2 in boxes):
            boxes.append((x, y, x + w, y + h))
    return boxes


def draw_shape(draw, name, box, color):
    """Fill a shape that reaches all four sides of its box (x1, y1, x2, y2)."""
    x1, y1, x2, y2 = box
    right, bottom = x2 - 1, y2 - 1  # the last pixels inside
    if name == "rectangle":
        draw.rectangle((x1, y1, right, bottom), fill=color)
    elif name == "circle":
        draw.ellipse((x1, y1, right, bottom), fill=color)
    else:
        draw.polygon([(x1, bottom), (right, bottom), ((x1 + right) // 2, y1)], fill=color)
