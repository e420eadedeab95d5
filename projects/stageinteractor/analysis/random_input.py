"""Random input for benchmarks: boxes, feature maps, and data sets in COCO's formats."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import torch
from detectron2.config import instantiate
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from ..modeling.targets import Targets

PHOTOGRAPH = 480, 640  # height and width of random photographs, pixels
NUM_CLASSES = 80  # of their objects
DETECTIONS = 100  # per image


def random_boxes(shape: tuple[int, ...], size: tuple[int, int]) -> Tensor:
    """Make corners (*shape, 4) in an image of ``size``, height and width in pixels."""
    extent = torch.tensor(size[::-1])
    sides = extent * (0.02 + 0.4 * torch.rand(*shape, 2))
    low = torch.rand(*shape, 2) * (extent - sides)
    return torch.cat([low, low + sides], dim=-1)


def random_maps(cfg: DictConfig, batch: int, size: tuple[int, int]) -> list[Tensor]:
    """Make the neck's feature maps for images padded to a multiple of the largest stride."""
    options = cfg.model.decoder
    pad = max(options.strides)
    height, width = (math.ceil(side / pad) * pad for side in size)
    return [
        torch.randn(batch, options.feature_dim, height // stride, width // stride,
                    device=cfg.train.device)
        for stride in options.strides
    ]


def random_targets(cfg: DictConfig, batch: int, size: tuple[int, int], objects: int) -> Targets:
    """Make targets with the same number of objects in every image."""
    shape, (height, width), device = (batch, objects), size, cfg.train.device
    scale = torch.tensor([width, height] * 2, dtype=torch.float32, device=device)
    return Targets(
        random_boxes(shape, size).to(device),
        torch.randint(cfg.model.decoder.num_classes, shape, device=device),
        scale.expand(batch, 1, 4),
        (objects,) * batch,
    )


def initial_queries(cfg: DictConfig, batch: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Make the content and positional vectors before the first stage."""
    generator = instantiate(cfg.model.query_generator).to(cfg.train.device)
    content, xyzr = generator(torch.tensor([size] * batch, device=cfg.train.device))
    return content.detach(), xyzr


def random_truth(count: int, rng: np.random.Generator) -> dict:
    """Make a data set in COCO's format with about 7 objects per image."""
    height, width = PHOTOGRAPH
    images = [
        {"id": index, "file_name": f"{index}.jpg", "height": height, "width": width}
        for index in range(1, count + 1)
    ]
    owners = np.repeat(np.arange(count) + 1, 1 + rng.poisson(6, count))
    classes = rng.integers(1, NUM_CLASSES + 1, len(owners))
    sides = 2 ** rng.uniform(3, 8.5, (len(owners), 2))
    boxes = np.hstack([rng.uniform(0, (width, height) - sides), sides])
    annotations = [
        {"id": number, "image_id": owner, "category_id": category, "bbox": box,
         "area": box[2] * box[3], "iscrowd": int(rng.random() < 0.01)}
        for number, (owner, category, box) in enumerate(
            zip(owners.tolist(), classes.tolist(), boxes.tolist()), start=1
        )
    ]
    categories = [{"id": c, "name": f"class {c}"} for c in range(1, NUM_CLASSES + 1)]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def random_detections(truth: dict, rng: np.random.Generator) -> list[dict]:
    """Make detections in COCO's result format: true boxes, moved; one in five of any class."""
    detections = []
    for image, group in itertools.groupby(truth["annotations"], lambda item: item["image_id"]):
        objects = list(group)
        for item in itertools.islice(itertools.cycle(objects), DETECTIONS):
            box, category = item["bbox"], item["category_id"]
            moved = np.array(box) + np.array(box[2:] * 2) * rng.normal(0, 0.15, 4)
            if rng.random() < 0.2:
                category = int(rng.integers(1, NUM_CLASSES + 1))
            detections.append({
                "image_id": image,
                "category_id": category,
                "bbox": [*moved[:2].tolist(), *moved[2:].clip(1).tolist()],
                "score": rng.random(),
            })
    return detections


def make_photographs(folder: str, count: int) -> str:
    """Write smooth random JPEG images with a little noise; return the path of their COCO file."""
    rng = np.random.default_rng(0)
    truth, (height, width) = random_truth(count, rng), PHOTOGRAPH
    for image in truth["images"]:
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
        noisy = (smooth + rng.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(Path(folder, image["file_name"]), quality=90)
    path = Path(folder, "truth.json")
    path.write_text(json.dumps(truth))
    return str(path)
