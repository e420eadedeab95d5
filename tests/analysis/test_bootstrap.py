"""Differences between models come with the interval that the choice of test images leaves."""

import contextlib
import io
import json

import analyze
import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from projects.stageinteractor.analysis import bootstrap
from projects.stageinteractor.data.numbered import NumberedCOCO
from support.shapes import make_shapes


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Annotations of 12 images, one empty, and two models: one finds more, the other is closer."""
    root = tmp_path_factory.mktemp("compare")
    annotations = make_shapes(root, images=12, empty=True, crowd=True)
    truth = [a for a in json.loads(annotations.read_text())["annotations"] if not a["iscrowd"]]
    rng, paths = np.random.default_rng(0), []
    for name, found, noise in (("more", 0.95, 4), ("closer", 0.7, 1)):
        rows = [
            {**{key: a[key] for key in ("image_id", "category_id")},
             "bbox": (np.array(a["bbox"]) + rng.normal(0, noise, 4)).tolist(),
             "score": float(rng.uniform(0.3, 1))}
            for a in truth if rng.random() < found
        ]
        rows += [{**row, "bbox": [0, 0, 9, 9], "score": row["score"] / 3} for row in rows[::3]]
        paths.append(root / name / "coco_instances_results.json")
        paths[-1].parent.mkdir()
        paths[-1].write_text(json.dumps(rows))
    return annotations, paths


def match(annotations, path, most=100):
    truth, detections = (json.loads(file.read_text()) for file in (annotations, path))
    return bootstrap.match_detections(NumberedCOCO(truth), detections, most)


def evaluate(coco, rows):
    """AP, AP50 and AP75 by pycocotools itself."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = coco
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(rows), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return 100 * evaluation.stats[:3]


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_images_drawn_twice_count_twice(files, seed):
    """As where a data set holds copies of them under other ids."""
    annotations, paths = files
    coco = json.loads(annotations.read_text())
    count = len(coco["images"])
    rng = np.random.default_rng(seed or 0)
    draw = np.arange(count) if seed is None else rng.integers(0, count, count)
    copies = {"info": {}, "categories": coco["categories"], "images": [], "annotations": []}
    rows = []
    for new, index in enumerate(draw, start=1):
        old = sorted(image["id"] for image in coco["images"])[index]
        copies["images"].append({**coco["images"][old - 1], "id": new})
        for a in coco["annotations"]:
            if a["image_id"] == old:
                number = len(copies["annotations"]) + 1
                copies["annotations"].append({**a, "id": number, "image_id": new})
        rows += [{**row, "image_id": new} for row in json.loads(paths[0].read_text())
                 if row["image_id"] == old]
    found = bootstrap.metrics_of(match(annotations, paths[0]), draw)
    np.testing.assert_allclose(found, evaluate(copies, rows), atol=1e-9)
    assert 0 < found[0] < 100


def test_differences_are_of_the_same_draws(files):
    """A model differs from itself by nothing in every draw; intervals are percentiles."""
    annotations, paths = files
    evaluations = [match(annotations, path) for path in (paths[0], paths[1], paths[0])]
    full, drawn = bootstrap.bootstrap(evaluations, 40, seed=1)
    assert full.shape == (3, 3) and drawn.shape == (40, 3, 3)
    assert np.array_equal(drawn[:, 0], drawn[:, 2]) and not np.array_equal(full[0], full[1])
    assert len({*drawn[:, 0, 0]}) > 20
    text = bootstrap.describe_intervals(["a", "b", "c"], full, drawn)
    differences = text.split("less a")[1].splitlines()
    assert differences[-1].split()[1:5] == ["0.0", "(0.0", "to", "0.0)"]
    low, high = np.percentile(drawn[:, 1, 1] - drawn[:, 0, 1], [2.5, 97.5])
    assert f"{full[1, 1] - full[0, 1]:.1f} ({low:.1f} to {high:.1f})" in differences[2]


@pytest.mark.parametrize("rename", [lambda i: -i, lambda i: 2**64 + i, lambda i: f"image {i:03}"])
def test_ids_of_any_kind_give_the_same_figures(files, tmp_path, rename):
    annotations, paths = files
    content, rows = json.loads(annotations.read_text()), json.loads(paths[0].read_text())
    every = [*content["images"], *content["annotations"], *content["categories"], *rows]
    for entry in every:
        entry.update({key: rename(value) for key, value in entry.items() if key.endswith("id")})
    others = tmp_path / "annotations.json", tmp_path / "rows.json"
    for file, written in zip(others, (content, rows)):
        file.write_text(json.dumps(written))
    found = [
        bootstrap.metrics_of(match(truth, path, most), np.arange(12))
        for truth, path in (others, (annotations, paths[0])) for most in (100, 1)
    ]
    np.testing.assert_allclose(found[:2], found[2:], atol=1e-9)
    assert 0 < found[1][0] < found[0][0]


def test_the_command_prints_both_tables(files, capsys):
    annotations, paths = files
    analyze.main(["results", "--annotations", str(annotations), "--resamples", "3",
                  "--predictions", *map(str, paths)])
    text = capsys.readouterr().out
    assert text.count(str(paths[1])) == 2 and "less " in text


@pytest.mark.parametrize("annotations, predictions, message", [
    ("none.json", "closer", "none.json"),
    ("closer", "closer", "coco_instances_results.json"),
    ("bare.json", "closer", "bare.json has no annotations"),
    (None, "none.json", "none.json"),
    (None, "empty.json", "empty.json holds no detections"),
    (None, "foreign.json", "foreign.json: image_id 999"),
    (None, "truth", "is not a list of COCO results"),
])
def test_mistakes_are_named(files, tmp_path, annotations, predictions, message):
    truth, paths = files
    foreign = tmp_path / "foreign.json"
    foreign.write_text(json.dumps(
        [{"image_id": 999, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1}]
    ))
    bare, empty = tmp_path / "bare.json", tmp_path / "empty.json"
    bare.write_text(json.dumps({**json.loads(truth.read_text()), "annotations": []}))
    empty.write_text("[]")
    known = {"closer": paths[1], "foreign.json": foreign, "truth": truth, None: truth,
             "bare.json": bare, "empty.json": empty}
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        analyze.main(["results", "--annotations", str(known.get(annotations, annotations)),
                      "--predictions", str(known.get(predictions, predictions))])
