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


@pytest.mark.parametrize("classes, size", [([0, 1, 2], 1), ([2], 1), ([0, 2], 4)])
def test_features_are_those_of_the_queries_of_objects_in_the_last_stage(
    shapes, run_folder, monkeypatch, classes, size
):
    """Of all images in batches of a size."""
    outputs = predict(shapes)
    rounds = (DecoderOutput(*(torch.cat(parts, dim=1) for parts in zip(*outputs[i:i + size])))
              for i in range(0, 8, size))
    monkeypatch.setattr(StageInteractor, "decode", lambda self, images: next(rounds))
    cfg = load_config(str(run_folder / "config.yaml"), [])
    images = [image for image, in build_test_loader(cfg, load_dataset(cfg, "test"))]
    batches = [images[i:i + size] for i in range(0, 8, size)]
    found = tsne.extract(instantiate(cfg.model), batches, classes)
    expected = [(number, image, label) for number, (image, label, _) in
                enumerate(objects_of(shapes)) if label in classes]
    assert found.vectors.shape == (len(expected), DIM) and len(expected) > 3
    assert found.vectors[:, 0].tolist() == [number for number, *_ in expected]
    assert found.classes.tolist() == [label for *_, label in expected]
    assert [image for image, _ in found.objects] == [image for _, image, _ in expected]


def blobs(distance, sizes=(30, 12, 6), seed=0):
    """Points of classes whose centres are so far apart, and their classes."""
    rng = np.random.default_rng(seed)
    classes = np.repeat(np.arange(len(sizes)), sizes)
    return rng.normal(size=(len(classes), 8)) + distance * np.eye(8)[classes], classes


def slow_separation(vectors, classes):
    """Silhouette and neighbours, object by object, and the mean over classes."""
    directions = [v / sum(x * x for x in v) ** 0.5 for v in vectors]
    number = min(10, min(np.bincount(classes)) - 1)
    values = {label: [] for label in classes}
    for i, label in enumerate(classes):
        apart = [1 - float(a @ directions[i]) for a in directions]
        others = {k: [apart[j] for j in range(len(classes)) if classes[j] == k and j != i]
                  for k in values}
        inside = np.mean(others.pop(label))
        outside = min(np.mean(each) for each in others.values())
        near = sorted((j for j in range(len(classes)) if j != i), key=apart.__getitem__)[:number]
        votes = [sum(classes[j] == k for j in near) for k in values]
        hit = sum(classes[j] == label for j in near) == max(votes)
        values[label].append(((outside - inside) / max(inside, outside), hit))
    return np.mean([np.mean(each, axis=0) for each in values.values()], axis=0), number


@pytest.mark.parametrize("distance", [0, 1, 3, 30])
def test_numbers_are_those_of_a_slow_count(distance):
    vectors, classes = blobs(distance)
    (silhouette, accuracy), number = slow_separation(vectors, classes)
    found = tsne.separation(vectors, classes)
    assert found.silhouette == pytest.approx(silhouette) and found.neighbours == number == 5
    assert found.accuracy == pytest.approx(accuracy)


def test_numbers_tell_classes_apart_from_noise():
    apart, noise = (tsne.separation(*blobs(distance, (40, 40))) for distance in (30, 0))
    assert apart.silhouette > 0.9 and apart.accuracy == 1 and apart.neighbours == 10
    assert abs(noise.silhouette) < 0.1 and 0.3 < noise.accuracy < 0.8


def test_objects_are_thinned_class_by_class_alike_in_all_models():
    """Each model has vectors of its own; one object is not in all of them."""
    objects = [(i, 0) for i in range(40)]
    classes, common = np.array([0] * 30 + [1] * 10), set(objects) - {(0, 0)}
    models = [tsne.Features(objects, classes, np.arange(40)[:, None] * sign) for sign in (1, -1)]
    assert tsne.subsample(models[0], common, per_class=99).objects == objects[1:]
    one, other = (tsne.subsample(features, common, per_class=12) for features in models)
    assert one.objects == other.objects and len(one.objects) == 12 + 10
    assert [i for i, _ in one.objects] == one.vectors[:, 0].tolist()
    assert one.vectors.tolist() == (-other.vectors).tolist()
    assert max(i for i, _ in one.objects if i < 30) > 26  # spread, not the first ones


def test_the_same_seed_gives_the_same_points():
    vectors, _ = blobs(3)
    points = tsne.embed(vectors, seed=0)
    assert points.shape == (len(vectors), 2) and (points == tsne.embed(vectors, seed=0)).all()
    assert np.isfinite(tsne.embed(vectors[:4], seed=0)).all()  # as few as there may be


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
    printed = capsys.readouterr().out
    assert f"objects: {counts[0]} rectangle, {counts[1]} circle, {counts[2]} triangle" in printed
    rows = [line.rsplit(maxsplit=2) for line in printed.splitlines()[4:7]]
    assert [row[0].strip() for row in rows] == ["a $x^$", "b", "c"] and rows[0][1:] == rows[2][1:]
    for axes, (name, silhouette, _) in zip(figures[0].axes, rows):
        title = axes.get_title().split("\n")
        assert title[0] == name.strip() and "nearest neighbours" in title[1]
        assert f"silhouette {float(silhouette):.2f}, " in title[1]
    assert Image.open(output).size[0] == pytest.approx(3 * 4.2 * 150, abs=2)


def test_one_config_and_overrides_serve_all_checkpoints(run_folder, tmp_path, capsys):
    config = run_folder / "config.yaml"
    run(tmp_path / "tsne.png", "--checkpoint", run_folder / "1.pth", run_folder / "2.pth",
        "--config-file", config, "--classes", "triangle", "rectangle", "--count", "6",
        "--per-class", "4", "--seed", "1", "train.model_ema.enabled=false")
    printed = capsys.readouterr().out
    assert "objects: 4 rectangle, 4 triangle" in printed  # in the order of the data set
    assert printed.count(f"{run_folder.name}/") == 2  # the labels, for want of others


def test_the_most_frequent_classes_are_chosen_and_crowds_are_none(monkeypatch):
    monkeypatch.setattr(tsne, "CLASSES", 2)
    items = [{"category_id": i, "iscrowd": i == 3} for i in [0, 1, 1, 2, 2, 2, *[3] * 9]]
    names = ["a", "b", "c", "crowded"]
    assert tsne.choose_classes([{"annotations": items}], names, []) == [1, 2]
    assert tsne.choose_classes([{"annotations": items}], names, ["c", "a", "c"]) == [2, 0]
    monkeypatch.setattr(tsne, "CLASSES", 3)  # one object is too few
    assert tsne.choose_classes([{"annotations": items}], names, []) == [1, 2]


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
    assert "2 of --config-file, but 1" in error("--config-file", "a.py", "b.py")
    assert "no class circel: did you mean circle?" in error("--classes", "circel", "triangle")
    assert "no class 7: there is rectangle, circle" in error("--classes", "7")
    assert "only one class" in error("--classes", "circle")
    few = error("--count", "1", "--classes", "circle", "triangle", "rectangle")
    assert "too few objects: " in few and " 0 " in few and "\nTwo of each" in few
    assert "--per-class is 1" in error("--per-class", "1")
    bccd = "projects/stageinteractor/configs/retinanet_lite0_bccd.py"
    assert "RetinaNet has no decoder stages" in error(
        "--config-file", ROOT / bccd, "--seed", 0, f"dataset.val={shapes}",
        f"dataset.images={shapes.parent / 'images'}",
    )
    coco = json.loads(shapes.read_text())
    bare, other = tmp_path / "bare.json", tmp_path / "other.json"
    bare.write_text(json.dumps({**coco, "annotations": []}))
    other.write_text(json.dumps({**coco, "images": coco["images"][1:]}))
    data = "dataloader.test.dataset.json_file="
    assert "no objects in 8 test images" in error("--seed", 0, f"{data}{bare}")
    cfg = load_config(str(run_folder / "config.yaml"), [f"{data}{other}"])
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    assert "has other test images or classes" in error(checkpoint=[run_folder / "1.pth", copy])
    weights = torch.load(run_folder / "1.pth")
    for name, weight in weights["model"].items():
        if name.startswith("decoder") and weight.is_floating_point():
            weight.fill_(float("nan"))
    torch.save(weights, copy)
    config = ("--config-file", run_folder / "config.yaml")
    assert "not finite" in error(*config, checkpoint=[copy])
