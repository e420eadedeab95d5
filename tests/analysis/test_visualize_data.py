"""Promises of tools/visualize.py data: it draws what the mapper of the config makes of images."""

import json
import random

import numpy as np
import pytest
import torch
import visualize
from detectron2.config import instantiate

from projects.stageinteractor.analysis import augmented_images as data
from projects.stageinteractor.analysis.augmented_images import draw_data
from projects.stageinteractor.config.building import load_resolved
from projects.stageinteractor.config.overrides import load_config
from projects.stageinteractor.data.randomness import (
    IMAGE,
    keep_random_states,
    seed_random,
)
from projects.stageinteractor.drawing.style import palette
from support.runs import CONFIG, ROOT, overrides
from support.shapes import make_shapes

CLASSES = ("rectangle", "circle", "triangle")
FLIP = "[{_target_:detectron2.data.transforms.RandomFlip}]"
TWICE = "[{_target_:detectron2.data.transforms.Resize,shape:[128,192]}]"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Six images, the first with a crowd, the last without objects."""
    root = tmp_path_factory.mktemp("shapes")
    return make_shapes(root, images=6, size=(64, 96), empty=True, crowd=True)


def config_for(shapes, split="train", **extra):
    options = overrides(shapes, shapes.parent / "run", **extra)
    return load_resolved(str(ROOT / CONFIG), options, training=split == "train")


def drawn(figure):
    """Images, boxes (x, y, w, h), labels and titles of the panels, a list a row."""
    panels = [
        (axes.images[0].get_array(),
         [[*p.get_xy(), p.get_width(), p.get_height()] for p in axes.patches],
         [text.get_text() for text in axes.texts], axes.get_title(loc="left"))
        for axes in figure.axes
    ]
    columns = figure.axes[0].get_gridspec().ncols
    return [panels[i:i + columns] for i in range(0, len(panels), columns)]


def test_the_model_sees_what_is_drawn(shapes):
    """The mapper of the config on its own, with the same seeds, gives pixels, boxes and classes."""
    cfg = config_for(shapes)
    rows = drawn(draw_data(cfg, "train", count=99, repeats=3, seed=7))
    dataset = instantiate(cfg.dataloader.train.dataset)
    mapper = instantiate(cfg.dataloader.train.mapper)
    assert [len(row) for row in rows] == [4] * len(dataset) == [4] * 5  # training drops the last
    different = 0
    for number, (record, row) in enumerate(zip(dataset, rows)):
        for repeat, (pixels, boxes, labels, title) in enumerate(row[1:]):
            with keep_random_states():
                seed_random(7, IMAGE, number, repeat)
                mapped = mapper(record)
            assert (pixels == mapped["image"].permute(1, 2, 0).numpy()).all()
            corners = mapped["instances"].gt_boxes.tensor.numpy()
            expected = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
            np.testing.assert_allclose(boxes, expected, atol=1e-4)
            assert labels == [CLASSES[i] for i in mapped["instances"].gt_classes]
            assert title == f"96 x 64, objects: {len(boxes)}"
            different += (pixels != row[0][0]).any()
    assert different >= 14


def test_the_file_is_drawn_first_with_its_crowds(shapes):
    row = drawn(draw_data(config_for(shapes), "train", count=99, repeats=1, seed=0))[0]
    (_, boxes, labels, title), (_, others, *_) = row
    truth = [a for a in json.loads(shapes.read_text())["annotations"] if a["image_id"] == 1]
    np.testing.assert_allclose(boxes, [a["bbox"] for a in truth])
    assert labels[-1] == "rectangle (crowd)" and len(others) == len(boxes) - 1
    assert title == f"0001.png\n96 x 64, boxes: {len(truth)}"


def test_colours_are_those_of_classes(shapes):
    figure = draw_data(config_for(shapes), "train", count=99, repeats=1, seed=0)
    seen = {}
    for axes in figure.axes:
        for patch, text in zip(axes.patches, axes.texts):
            seen.setdefault(text.get_text().split()[0], set()).add(patch.get_edgecolor())
    assert set(seen) == set(CLASSES) and all(len(colors) == 1 for colors in seen.values())
    assert len({*map(tuple, seen.values())}) == 3 == len(set(palette(3)))


def test_a_seed_gives_the_same_picture_and_leaves_no_trace(shapes):
    cfg = config_for(shapes)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    first, again, other = (drawn(draw_data(cfg, "train", 2, 2, seed)) for seed in (1, 1, 2))
    assert states == (
        random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    )
    pixels = [np.concatenate([panel[0] for row in rows for panel in row[1:]])
              for rows in (first, again, other)]
    assert (pixels[0] == pixels[1]).all() and (pixels[0] != pixels[2]).any()


def test_colours_are_right_in_either_order_of_channels(shapes):
    rows = []
    for order in ("RGB", "BGR"):
        cfg = config_for(shapes, **{
            "dataloader.train.mapper.augmentations": FLIP,
            "dataloader.train.mapper.image_format": order,
        })
        rows.append(drawn(draw_data(cfg, "train", 3, 3, seed=0)))
    for a, b in zip(*rows):
        for (one, *_), (other, *_) in zip(a, b):
            assert (one == other).all()


def test_the_test_set_has_its_own_augmentation(shapes):
    """Annotations are drawn, and images without objects."""
    cfg = config_for(shapes, "test", **{"dataloader.test.mapper.augmentations": TWICE})
    rows = drawn(draw_data(cfg, "test", count=99, repeats=1, seed=0))
    assert len(rows) == 6 and rows[-1][1][3] == "192 x 128, objects: 0"
    for (_, boxes, labels, _), (pixels, twice, *_) in rows:
        kept = [box for box, label in zip(boxes, labels) if "crowd" not in label]
        assert np.ravel(twice).tolist() == pytest.approx(2 * np.ravel(kept))
        assert pixels.shape == (128, 192, 3)
    bare = shapes.with_name("bare.json")
    coco = json.loads(shapes.read_text())
    bare.write_text(json.dumps({k: v for k, v in coco.items() if k != "annotations"}))
    cfg = config_for(shapes, "test", **{"dataloader.test.dataset.json_file": bare})
    rows = drawn(draw_data(cfg, "test", count=2, repeats=1, seed=0))
    assert [row[1][3] for row in rows] == ["96 x 64, objects: 0"] * 2


def run(shapes, output, *arguments, **extra):
    options = overrides(shapes, shapes.parent / "run", **extra)
    visualize.main(["data", "--config-file", str(ROOT / CONFIG), "--output", str(output),
                    *arguments, *options])


def test_no_model_is_built(shapes, tmp_path, capsys):
    """One that could not be built is no hindrance."""
    output = tmp_path / "new" / "data.png"
    run(shapes, output, "--count", "2", "--repeats", "1", **{"model.decoder.embed_dim": 33})
    assert output.stat().st_size > 10_000 and f"{output} written" in capsys.readouterr().out


def test_own_files_are_drawn(shapes, tmp_path):
    """Their number of classes is not that of the config."""
    assert load_config(str(ROOT / CONFIG), []).model.decoder.num_classes == 1
    options = [f"dataset.train={shapes}", f"dataset.images={shapes.parent / 'images'}"]
    output = tmp_path / "data.png"
    command = ["data", "--config-file", str(ROOT / CONFIG), "--output", str(output), "--count=1"]
    with pytest.raises(SystemExit, match="dataset.val is missing"):
        visualize.main([*command, *options])
    other = make_shapes(tmp_path, images=2, size=(64, 96), seed=1)
    options += [f"dataset.val={other}", f"dataset.val_images={tmp_path / 'images'}"]
    visualize.main([*command, *options])
    assert output.exists()


def test_mistakes_are_one_line(shapes, tmp_path):
    def error(*arguments, **extra):
        with pytest.raises(SystemExit) as caught:
            run(shapes, tmp_path / "data.png", *arguments, **extra)
        assert not (tmp_path / "data.png").exists()
        return str(caught.value)

    missing = {"dataloader.train.dataset.json_file": "nowhere.json"}
    assert "error: data set nowhere.json: no nowhere.json" in error(**missing)
    assert "error: unknown config key" in error(**{"model.decoder.embed_dimm": 3})
    broken = make_shapes(tmp_path / "broken", images=2, size=(64, 96))
    image = broken.parent / "images" / "0001.png"
    image.write_bytes(image.read_bytes()[:900])
    message = error(**{
        "dataloader.train.dataset.json_file": broken,
        "dataloader.train.dataset.image_root": image.parent,
    })
    assert message.startswith(f"error: cannot read {image}: ") and "\n" not in message


def test_a_mistake_in_a_mapper_is_not_blamed_on_the_image(shapes, monkeypatch):
    def mapper(record):
        raise ValueError("of the mapper")

    monkeypatch.setattr(data, "build_mapper", lambda cfg, split: mapper)
    with pytest.raises(ValueError, match="of the mapper"):
        draw_data(config_for(shapes), "train", 1, 1, 0)


def test_images_that_the_mapper_leaves_out_stay_empty(shapes, monkeypatch):
    monkeypatch.setattr(data, "build_mapper", lambda cfg, split: lambda record: None)
    figure = draw_data(config_for(shapes), "train", 2, 1, 0)
    assert [len(axes.images) for axes in figure.axes] == [1, 0, 1, 0]
