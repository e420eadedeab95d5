"""Promises of the detector's input: any kind of picture, one or many, and batches do not show."""

import io
import json
import threading

import detectron2.data.transforms as T
import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, Instances
from PIL import Image

from projects.stageinteractor.errors import UserError
from projects.stageinteractor.inference import Detector
from projects.stageinteractor.inference.detector import BATCH_SIZE
from projects.stageinteractor.modeling.backbones import SwinTransformer
from support.models import tiny_config, wake

CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 9, "name": "dög"}]
UNIT = 32


class Recorder:
    """In place of a model: finds one box in each picture, and its mean colours as three scores."""

    def __init__(self):
        self.batches = []

    def __call__(self, batch):
        self.batches.append([tuple(item["image"].shape[1:]) for item in batch])
        return [{"instances": self.find(item)} for item in batch]

    @staticmethod
    def find(item):
        size = item["height"], item["width"]
        height, width = size
        box = torch.tensor([[0.0, 0.0, width, height]]).expand(3, 4)
        scores = item["image"].float().mean((1, 2)) / 255
        return Instances(
            size, pred_boxes=Boxes(box), scores=scores, pred_classes=torch.tensor([0, 1, 0])
        )


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
def detector(recorder):
    return Detector(recorder, [], "RGB", CATEGORIES, UNIT)


@pytest.fixture
def picture():
    """RGB, larger where a channel is: no two channels, rows or columns are the same."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 50, (40, 60, 3), np.uint8)
    noise[:, :, 0] += 150
    noise[:20, :, 1] += 100
    noise[:, :15, 2] += 50
    return noise


def kinds_of(picture, folder):
    """One picture in all the forms in which people have it."""
    image = Image.fromarray(picture)
    image.save(folder / "a.png")
    turned = image.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    turned.save(folder / "turned.png", exif=exif)
    with Image.open(folder / "turned.png") as opened:
        opened.load()
    tensor = torch.from_numpy(picture.transpose(2, 0, 1).copy())
    return {
        "path": str(folder / "a.png"),
        "Path": folder / "a.png",
        "file with EXIF": folder / "turned.png",
        "array": picture[:, :, ::-1],
        "contiguous array": np.ascontiguousarray(picture[:, :, ::-1]),
        "Pillow": image,
        "Pillow with EXIF": opened,
        "Pillow, alpha": image.convert("RGBA"),
        "tensor": tensor,
        "tensor, channels last": tensor[None].to(memory_format=torch.channels_last)[0],
        "float tensor": tensor.float() / 255,
        "half tensor": (tensor.float() / 255).half(),
        "double tensor": tensor.double().requires_grad_() / 255,
    }


def test_every_kind_of_picture_is_seen_alike(detector, picture, tmp_path):
    expected = picture.astype(float).mean((0, 1)) / 255
    for kind, given in kinds_of(picture, tmp_path).items():
        prepared = detector.prepare(given)
        assert torch.equal(prepared["image"], torch.from_numpy(picture).permute(2, 0, 1)), kind
        found = detector(given)
        assert found.image_size == (40, 60), kind
        assert found.scores.tolist() == pytest.approx(expected, abs=1e-6), kind


def test_a_grey_picture_of_pillows_is_grey(detector):
    prepared = detector.prepare(Image.new("L", (5, 4), 99))
    assert prepared["image"].shape == (3, 4, 5) and (prepared["image"] == 99).all()


@pytest.mark.parametrize("as_what", ["content", "memory", "file"])
def test_what_has_the_content_of_a_file_is_one_picture(detector, picture, tmp_path, as_what):
    """In a list it is one of many; the file stays open, wherever it was read up to."""
    Image.fromarray(picture).save(tmp_path / "a.png")
    with open(tmp_path / "a.png", "rb") as file:
        data = file.read()
        given = {"content": data, "memory": io.BytesIO(data), "file": file}[as_what]
        for _ in range(2):
            prepared = detector.prepare(given)
            assert torch.equal(prepared["image"], torch.from_numpy(picture).permute(2, 0, 1))
        assert detector(given).image_size == (40, 60)
        assert [found.image_size for found in detector([given, given])] == [(40, 60)] * 2
        assert not file.closed


def test_content_that_cannot_be_read_is_told(detector, tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(UserError, match="cannot read a picture of 3 bytes: not an image in"):
        detector(b"abc")
    with open(tmp_path / "text.jpg", "rb") as file:
        with pytest.raises(UserError, match="cannot read .*text.jpg: not an image in"):
            detector(file)
    with open(tmp_path / "text.jpg") as file, pytest.raises(TypeError, match='"rb"'):
        detector(file)


@pytest.mark.parametrize("threshold, hint", [
    (30, ": 0.3 is 30 %"), (1.01, ": 0.0101 is 1.01 %"), (-0.1, ""), (float("nan"), ""), (255, ""),
])
def test_a_threshold_is_a_share(detector, picture, threshold, hint):
    with pytest.raises(ValueError, match=f"threshold={threshold:g} .* between 0 and 1{hint}$"):
        detector(picture, threshold=threshold)


@pytest.mark.parametrize("given, message", [
    (torch.full((3, 4, 5), 1.5), "between 0 and 1"),
    (torch.full((3, 4, 5), float("nan")), "between 0 and 1"),
    (torch.full((3, 4, 5), -0.1), "between 0 and 1"),
    (torch.zeros(4, 5, 3), r"\(4, 5, 3\)"),
    (torch.zeros(3, 4, 5, dtype=torch.int64), "torch.int64"),
    (torch.zeros(3, 0, 5), r"\(3, 0, 5\)"),
    (np.zeros((4, 5)), r"\(4, 5\), float64"),
], ids=str)
def test_what_is_no_picture_is_refused(detector, given, message):
    for pictures in (given, [grey(8, 8, 1), given]):
        with pytest.raises(ValueError, match=message):
            detector(pictures)


def test_what_is_something_else_is_refused(detector):
    with pytest.raises(TypeError, match="not list"):
        detector([["a.jpg"]])
    with pytest.raises(TypeError, match="not None"):
        detector([None])
    with pytest.raises(TypeError, match="a picture is a path.* not None"):
        detector(None)
    with pytest.raises(TypeError, match="not dict"):
        detector({"image": "a.jpg"})
    with pytest.raises(ValueError, match="empty"):
        detector(Image.new("RGB", (0, 5)))


def test_a_file_that_cannot_be_read_is_named(detector, tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    for name, message in (("none.jpg", "no picture"), ("text.jpg", "cannot read")):
        with pytest.raises(UserError, match=f"{message} .*{name}"):
            detector(tmp_path / name)
        with pytest.raises(UserError, match=name):
            detector([np.zeros((4, 4, 3), np.uint8), str(tmp_path / name)])


def test_a_file_that_pillow_reads_late_is_named(detector, picture, tmp_path):
    Image.fromarray(picture).save(tmp_path / "whole.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-200])
    with pytest.raises(UserError, match="cannot read .*half.jpg"):
        detector(Image.open(tmp_path / "half.jpg"))


# ---- many


def grey(height, width, value):
    return np.full((height, width, 3), value, np.uint8)


def test_many_keep_their_order_in_batches_of_one_padded_size(detector, recorder):
    sizes = [(30, 60), (90, 90), (32, 33), (1, 64), (96, 70), (20, 65)] * 7
    pictures = [grey(*size, index) for index, size in enumerate(sizes)]
    found = detector(iter(pictures))
    assert [instances.image_size for instances in found] == sizes
    values = [round(float(instances.scores[0]) * 255) for instances in found]
    assert values == list(range(len(sizes)))

    def padded(size):
        return tuple(-(-side // UNIT) for side in size)

    assert all(len({*map(padded, batch)}) == 1 for batch in recorder.batches)
    assert max(map(len, recorder.batches)) == BATCH_SIZE
    # Of 21, 14 and 7 pictures of a size.
    assert sorted(map(len, recorder.batches)) == [5, 6, 7, 8, 8, 8]


def test_pictures_do_not_wait_in_memory(detector, recorder):
    """A generator is asked for the next picture once the batch before has been run."""
    taken = []

    def pictures():
        for index in range(3 * BATCH_SIZE):
            taken.append(len(recorder.batches))
            yield grey(8, 8, index)

    detector(pictures())
    assert taken == [index // BATCH_SIZE for index in range(3 * BATCH_SIZE)]


@pytest.mark.parametrize("many", [
    np.stack([grey(8, 9, 1), grey(8, 9, 2)]),
    torch.stack([torch.full((3, 8, 9), value, dtype=torch.uint8) for value in (1, 2)]),
    (grey(8, 9, 1), Image.new("RGB", (9, 8), (2, 2, 2))),
], ids=["array", "tensor", "mixed"])
def test_many_in_one_thing(detector, many):
    found = detector(many)
    assert [round(float(instances.scores[0]) * 255) for instances in found] == [1, 2]


def test_none_and_one_in_a_list(detector):
    assert detector([]) == [] and detector([], as_dicts=True) == []
    assert [len(found) for found in detector([grey(8, 8, 1)])] == [3]


# ---- results


def test_dictionaries_are_what_json_can_hold(detector, picture):
    found = detector(picture[:, :, ::-1], as_dicts=True)
    assert json.loads(json.dumps(found)) == found
    assert found["names"] == ["cat", "dög", "cat"] and found["classes"] == [0, 1, 0]
    assert (found["height"], found["width"]) == (40, 60)
    assert found["boxes"] == [[0, 0, 60, 40]] * 3
    instances = detector(picture[:, :, ::-1])
    assert found["scores"] == instances.scores.tolist()
    (same,) = detector([picture[:, :, ::-1]], as_dicts=True)
    assert same == found


@pytest.mark.parametrize("threshold", ["0.5", None, True])
def test_a_threshold_is_a_number(detector, picture, threshold):
    with pytest.raises(TypeError, match="is not a number between 0 and 1"):
        detector(picture, threshold=threshold)


def test_a_threshold_leaves_out_lower_scores(detector, picture):
    scores = sorted(detector(picture[:, :, ::-1]).scores.tolist())
    found = detector(picture[:, :, ::-1], threshold=scores[1])
    assert sorted(found.scores.tolist()) == scores[1:]  # itself included
    assert len(detector(picture[:, :, ::-1], threshold=scores[1], as_dicts=True)["boxes"]) == 2


# ---- a model


def small_swin():
    """A tiny model whose backbone is a Swin."""
    cfg = tiny_config()
    cfg.backbone = L(SwinTransformer)(
        embed_dim=8, depths=[2, 2, 2, 2], num_heads=[1, 2, 2, 4], drop_path_rate=0.0
    )
    cfg.neck.in_features = ["p0", "p1", "p2", "p3"]
    cfg.neck.input_shapes = {f"p{i}": ShapeSpec(channels=8 << i) for i in range(4)}
    return wake(instantiate(cfg))


def test_batches_and_threads_change_nothing():
    """A Swin of Detectron2's would note the size of one thread's picture for all of them."""
    model = small_swin()
    detector = Detector(
        model.eval(), [T.ResizeShortestEdge(64, 128)], "RGB", CATEGORIES, UNIT
    )
    rng = np.random.default_rng(0)
    sizes = [(64, 80), (90, 70), (64, 128), (50, 50)] * 6
    pictures = [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
    alone = [detector(picture) for picture in pictures]
    together = detector(pictures)
    results = [None] * len(pictures)

    def work(places):
        for place in places:
            results[place] = detector(pictures[place])

    threads = [threading.Thread(target=work, args=(range(n, len(sizes), 6),)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for expected, *others in zip(alone, together, results):
        for found in others:
            assert len(found) == len(expected) > 0
            assert torch.allclose(found.scores, expected.scores, atol=1e-4)
        assert torch.equal(others[1].scores, expected.scores)  # the same one by one
