"""Promises of tools/visualize.py tsne: which features it takes, and what its numbers mean."""

import json

import numpy as np
import pytest
import torch
import visualize
from detectron2.config import LazyConfig, instantiate
from PIL import Image

from projects.stageinteractor.analysis import query_features as tsne
from projects.stageinteractor.config.building import build_test_loader, load_dataset
from projects.stageinteractor.config.overrides import load_config
from projects.stageinteractor.errors import UserError
from projects.stageinteractor.modeling import StageInteractor
from projects.stageinteractor.modeling.boxes import corners_to_xyzr
from projects.stageinteractor.modeling.decoder import DecoderOutput
from support.runs import CONFIG, ROOT, overrides
from support.shapes import make_shapes

NUM_STAGES, NUM_QUERIES, NUM_CLASSES, DIM = 3, 10, 3, 32


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), images=8, size=(64, 96), crowd=True)


@pytest.fixture(scope="module")
def run_folder(shapes, tmp_path_factory):
    """Two checkpoints of random weights, and the config of both beside them."""
    folder = tmp_path_factory.mktemp("run")
    cfg = load_config(str(ROOT / CONFIG), overrides(shapes, folder))
    for seed in (1, 2):
        torch.manual_seed(seed)
        torch.save({"model": instantiate(cfg.model).state_dict()}, folder / f"{seed}.pth")
    LazyConfig.save(cfg, str(folder / "config.yaml"))
    return folder


def objects_of(shapes):
    """Image, class and box of all objects but crowds, in order."""
    coco = json.loads(shapes.read_text())
    return [(item["image_id"] - 1, item["category_id"] - 1, item["bbox"])
            for item in coco["annotations"] if not item["iscrowd"]]


def predict(shapes):
    """Outputs whose last stage has a query on each object, and whose earlier ones have others.

    Content is the number of the object of the whole data set, or -1.
    """
    generator = torch.Generator().manual_seed(0)
    outputs, items = [], list(enumerate(objects_of(shapes)))
    for image in range(8):
        corners = torch.rand(NUM_STAGES, NUM_QUERIES, 4, generator=generator) * 5
        corners[..., 2:] += 90  # nowhere near
        logits = torch.full((NUM_STAGES, NUM_QUERIES, NUM_CLASSES), -5.0)
        content = torch.full((NUM_STAGES, NUM_QUERIES, DIM), -1.0)
        mine = [(number, entry) for number, entry in items if entry[0] == image]
        order = torch.randperm(NUM_QUERIES, generator=generator).tolist()
        for (number, (_, label, (x, y, w, h))), last, early in zip(mine, order, order[::-1]):
            for stage, query in ((slice(2, 3), last), (slice(0, 2), early)):
                corners[stage, query] = torch.tensor([x, y, x + w, y + h], dtype=torch.float)
                logits[stage, query, label] = 5
            content[2, last] = number
        outputs.append(DecoderOutput(
            logits[:, None], corners_to_xyzr(corners)[:, None], content[:, None]
        ))
    return outputs


@pytest.mark.parametrize("size", [1, 4])
def test_features_are_those_of_the_queries_of_objects_in_the_last_stage(
    shapes, run_folder, monkeypatch, size
):
    """Of all images in batches of a size."""
    outputs = predict(shapes)
    rounds = (DecoderOutput(*(torch.cat(parts, dim=1) for parts in zip(*outputs[i:i + size])))
              for i in range(0, 8, size))
    monkeypatch.setattr(StageInteractor, "decode", lambda self, images: next(rounds))
    cfg = load_config(str(run_folder / "config.yaml"), [])
    images = [image for image, in build_test_loader(cfg, load_dataset(cfg, "test"))]
    batches = [images[i:i + size] for i in range(0, 8, size)]
    classes, vectors = tsne.extract(instantiate(cfg.model), batches)
    expected = [label for _, label, _ in objects_of(shapes)]
    assert vectors.shape == (len(expected), DIM) and len(expected) > 3
    assert vectors[:, 0].tolist() == list(range(len(expected)))
    assert classes.tolist() == expected


def blobs(distance, sizes=(30, 12, 6), seed=0):
    """Points of classes whose centres are so far apart, and their classes."""
    rng = np.random.default_rng(seed)
    classes = np.repeat(np.arange(len(sizes)), sizes)
    return rng.normal(size=(len(classes), 8)) + distance * np.eye(8)[classes], classes


def slow_separation(vectors, classes):
    """The silhouette, object by object, and its mean over classes."""
    directions = [v / sum(x * x for x in v) ** 0.5 for v in vectors]
    values = {label: [] for label in classes}
    for i, label in enumerate(classes):
        apart = [1 - float(a @ directions[i]) for a in directions]
        others = {k: [apart[j] for j in range(len(classes)) if classes[j] == k and j != i]
                  for k in values}
        inside = np.mean(others.pop(label))
        outside = min(np.mean(each) for each in others.values())
        values[label].append((outside - inside) / max(inside, outside))
    return np.mean([np.mean(each) for each in values.values()])


@pytest.mark.parametrize("distance", [0, 1, 3, 30])
def test_the_silhouette_is_that_of_a_slow_count(distance):
    vectors, classes = blobs(distance)
    assert tsne.separation(vectors, classes) == pytest.approx(slow_separation(vectors, classes))


def test_classes_are_thinned_and_rare_ones_left_out(monkeypatch):
    monkeypatch.setattr(tsne, "CLASSES", 2)
    monkeypatch.setattr(tsne, "PER_CLASS", 12)
    given = np.array([0] * 30 + [1] * 10 + [2] + [3] * 5)
    classes, vectors = tsne.choose(given, np.arange(46)[:, None])
    assert np.bincount(classes).tolist() == [12, 10] and (given[vectors[:, 0]] == classes).all()
    assert (np.diff(vectors[:, 0]) > 0).all()
    assert vectors[:12].max() > 26  # spread, not the first ones
    for few in ([0, 0, 1], [0, 0], []):
        with pytest.raises(UserError, match="fewer than two classes"):
            tsne.choose(np.array(few, dtype=int), np.zeros((len(few), 2)))


def test_the_points_are_the_same_every_time():
    vectors, _ = blobs(3)
    points = tsne.embed(vectors)
    assert points.shape == (len(vectors), 2) and (points == tsne.embed(vectors)).all()
    assert np.isfinite(tsne.embed(vectors[:4])).all()  # as few as there may be


def run(output, *arguments):
    visualize.main(["tsne", "--output", str(output), *map(str, arguments)])


def test_checkpoints_are_drawn_side_by_side(run_folder, shapes, tmp_path, capsys, monkeypatch):
    """With config.yaml beside them; the numbers are printed and in the titles."""
    figures, draw = [], tsne.draw_features
    monkeypatch.setattr(tsne, "draw_features", lambda *a: figures.append(draw(*a)) or figures[0])
    output = tmp_path / "new" / "tsne.png"
    run(output, "--checkpoint", run_folder / "1.pth", run_folder / "2.pth", run_folder / "1.pth",
        "--labels", "a $x^$", "b", "c")
    first, second, third = figures[0].axes
    counts = np.bincount([label for _, label, _ in objects_of(shapes)])
    for axes in (first, second, third):
        assert [len(points.get_offsets()) for points in axes.collections] == counts.tolist()
        assert len({tuple(points.get_facecolor()[0]) for points in axes.collections}) == 3
        assert len({len(points.get_paths()[0]) for points in axes.collections}) == 3  # their shape
    places = [np.concatenate([p.get_offsets() for p in axes.collections])
              for axes in (first, second, third)]
    assert (places[0] == places[2]).all() and (places[0] != places[1]).any()
    rows = [line.split(": silhouette ") for line in capsys.readouterr().out.splitlines()[:3]]
    assert [name for name, _ in rows] == ["a $x^$", "b", "c"] and rows[0][1] == rows[2][1]
    for axes, (name, numbers) in zip(figures[0].axes, rows):
        silhouette, objects = numbers.removesuffix(" objects").split(", ")
        assert axes.get_title() == f"{name}\nsilhouette {float(silhouette):.2f}"
        assert int(objects) == counts.sum()
    assert Image.open(output).size[0] == pytest.approx(3 * 4.2 * 150, abs=2)


def test_mistakes_are_one_line(run_folder, shapes, tmp_path, monkeypatch):
    def error(*arguments, checkpoint=(run_folder / "1.pth",)):
        with pytest.raises(SystemExit) as caught:
            run(tmp_path / "tsne.png", "--checkpoint", *checkpoint, *arguments)
        assert not (tmp_path / "tsne.png").exists()
        return str(caught.value)

    assert "no checkpoint nowhere.pth" in error(checkpoint=["nowhere.pth"])
    copy = tmp_path / "alone.pth"
    copy.write_bytes((run_folder / "1.pth").read_bytes())
    assert f"no config file {tmp_path / 'config.yaml'}" in error(checkpoint=[copy])
    assert error("--labels", "a", "b") == "error: 2 of --labels, but 1 of --checkpoint"
    bccd = "projects/stageinteractor/configs/retinanet_lite0_bccd.py"
    assert "RetinaNet has no decoder stages" in error(
        "--config-file", ROOT / bccd, f"dataset.val={shapes}",
        f"dataset.images={shapes.parent / 'images'}",
    )
    coco = json.loads(shapes.read_text())
    bare, other = tmp_path / "bare.json", tmp_path / "other.json"
    bare.write_text(json.dumps({**coco, "annotations": []}))
    other.write_text(json.dumps({**coco, "images": coco["images"][1:]}))
    data = "dataloader.test.dataset.json_file="
    config = ("--config-file", run_folder / "config.yaml")
    assert "fewer than two classes" in error(*config, f"{data}{bare}")
    cfg = load_config(str(run_folder / "config.yaml"), [f"{data}{other}"])
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    assert "has other test images or classes" in error(checkpoint=[run_folder / "1.pth", copy])
    weights = torch.load(run_folder / "1.pth")
    for name, weight in weights["model"].items():
        if name.startswith("decoder") and weight.is_floating_point():
            weight.fill_(float("nan"))
    torch.save(weights, copy)
    assert "not finite" in error(*config, checkpoint=[copy])
