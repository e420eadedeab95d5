"""Promises of tools/visualize.py: what its pictures show, and what its errors say."""

import json

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image
from shapes import make_shapes

from tools import visualize


@pytest.fixture
def results(tmp_path):
    """Arguments of `results`, with the ground truth of six drawn images as predictions."""
    annotations = make_shapes(tmp_path, images=6, size=[(96, 128), (120, 80)])
    truth = json.loads(annotations.read_text())["annotations"]
    keys = ("image_id", "category_id", "bbox")
    predictions = tmp_path / "coco_instances_results.json"
    predictions.write_text(json.dumps([{"score": 0.5} | {k: a[k] for k in keys} for a in truth]))
    return {
        "annotations": annotations,
        "images": tmp_path / "images",
        "predictions": predictions,
        "output": tmp_path / "new" / "grid.png",
    }


def run(command, **options):
    arguments = [command]
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        arguments += [f"--{name}", *map(str, values)]
    visualize.main(arguments)
    return np.asarray(Image.open(options["output"]).convert("RGB")).astype(int)


def has_color(picture, color):
    """Which pixels of a picture (H, W, 3) have a matplotlib colour, nearly: (H, W)."""
    return (abs(picture - np.array(to_rgb(color)) * 255) < 12).all(axis=-1)


def test_truth_is_drawn_on_the_left_and_predictions_on_the_right(results):
    picture = run("results", **results, count=1)
    height, width, _ = picture.shape
    assert 400 < height < width < 1200
    truth, found = (has_color(picture, c) for c in (visualize.TRUTH, visualize.PREDICTION))
    assert truth[:, :width // 2].sum() > 300 and truth[:, width // 2:].sum() < 30
    assert found[:, width // 2:].sum() > 300 and found[:, :width // 2].sum() < 30


def test_a_box_is_drawn_where_it_is(results):
    """Against the same picture with one box less, all that changes is that box and the counts."""
    results["predictions"].write_text("[]")
    coco = json.loads(results["annotations"].read_text())
    image = visualize.spread(coco["images"], 1)[0]
    with_box = dict(next(a for a in coco["annotations"] if a["image_id"] == image["id"]))
    pictures = []
    for annotations in ([], [with_box]):
        results["annotations"].write_text(json.dumps(coco | {"annotations": annotations}))
        pictures.append(run("results", **results, count=1))
    # White around the panels, dark noise in them: the left panel is what is not white there.
    empty, drawn = pictures
    dark = (empty < 90).all(axis=-1)
    dark[:, empty.shape[1] // 2:] = False
    rows = np.flatnonzero(dark.mean(axis=1) > 0.2)
    columns = np.flatnonzero(dark.mean(axis=0) > 0.2)
    scale = (columns[-1] + 1 - columns[0]) / image["width"]
    changed = has_color(drawn, visualize.TRUTH)
    y, x = changed.nonzero()
    x1, y1, w, h = with_box["bbox"]
    found = np.array([x.min() - columns[0], y.min() - rows[0], np.ptp(x) + 1, np.ptp(y) + 1])
    assert abs(found / scale - [x1, y1, w, h]).max() < 1.5
    outside = (drawn != empty).any(axis=-1)
    outside[:rows[0]] = False  # the titles
    outside[y.min() - 4:y.max() + 5, x.min() - 4:x.max() + 5] = False
    assert not outside.any()


def test_only_predictions_above_the_threshold_are_drawn(results):
    above, below = (
        has_color(run("results", **results, count=1, threshold=t), visualize.PREDICTION).sum()
        for t in (0.4, 0.6)
    )
    assert above > 300 and below == 0


def test_images_are_spread_over_the_data_set(results):
    assert visualize.spread(list(range(10)), 5) == [1, 3, 5, 7, 9]
    assert visualize.spread(list(range(3)), 6) == [0, 1, 2]
    one_row, three_rows = (run("results", **results, count=c).shape for c in (2, 99))
    assert abs(three_rows[0] - 3 * one_row[0]) < 5 and three_rows[1] == one_row[1]


def test_mistakes_in_results_are_named(results, tmp_path):
    def error(**changed):
        with pytest.raises(SystemExit) as caught:
            run("results", **(results | changed))
        assert not results["output"].exists()
        return str(caught.value)

    missing, empty, foreign = (tmp_path / name for name in ("missing", "empty", "foreign"))
    empty.write_text("")
    assert error(predictions=missing) == f"error: no file {missing}"
    assert f"{empty} is empty" in error(predictions=empty)
    assert "takes a COCO file" in error(annotations=results["predictions"])
    assert "takes COCO results" in error(predictions=results["annotations"])
    assert "no image" in error(images=tmp_path)
    assert "at least one" in error(count=0)
    box = {"image_id": 77, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1}
    foreign.write_text(json.dumps([box]))
    assert "image_id 77 is not in" in error(predictions=foreign)
    foreign.write_text(json.dumps([box | {"image_id": 1, "category_id": 9}]))
    assert "category_id 9 is not in" in error(predictions=foreign)
    foreign.write_text("{")
    assert "is not JSON" in error(predictions=foreign)


def write_run(folder, evaluated=True):
    """A metrics.json of 40 lines, the last one cut off as by a killed run."""
    lines = []
    for i in range(40):
        row = {"iteration": 20 * i + 19, "total_loss": 9 - i / 10, "lr": 1e-4, "grad_norm": i}
        row |= {"labels/kept": 0.6, "labels/dropped": 0.4, "labels/gained": i / 100}
        row |= {f"stage{s}_loss_{p}": s + 1 for s in (0, 5) for p in ("cls", "bbox", "giou")}
        if evaluated and i % 10 == 9:
            row |= {"bbox/AP": float("nan") if i < 10 else i, "bbox/AP50": 2 * i}
        lines.append(json.dumps(row))
    folder.mkdir()
    path = folder / "metrics.json"
    path.write_text("\n".join(lines)[:-9])
    return path


def panels(metrics):
    """The six panels that `training` draws, by title."""
    figure = visualize.draw_training(type("Arguments", (), {"metrics": metrics}))
    return {axes.get_title(): axes for axes in figure.axes}


def test_curves_show_what_was_recorded(tmp_path):
    path = write_run(tmp_path / "a")
    drawn = panels([path])
    loss = drawn["total loss"].lines[0]
    assert list(loss.get_xdata()) == list(range(19, 780, 20))  # the broken line is left out
    assert loss.get_ydata()[10] == 8
    parts = drawn["losses of the last stage"].lines
    assert [line.get_label() for line in parts] == [
        "stage5_loss_cls", "stage5_loss_bbox", "stage5_loss_giou"
    ]
    assert {line.get_ydata()[0] for line in parts} == {6}
    kept, dropped, gained = drawn["labels, as a share of the matches"].lines
    assert dropped.get_ydata()[5] == 0.4 and list(gained.get_ydata()[:3]) == [0, 0.01, 0.02]
    assert drawn["norm of the gradient"].lines[0].get_ydata()[7] == 7
    ap, ap50 = drawn["AP (%)"].lines
    assert list(ap.get_xdata()) == [399, 599] and list(ap50.get_ydata()) == [18, 38, 58]


def test_a_resumed_run_replaces_what_it_repeats(tmp_path):
    path = write_run(tmp_path / "a")
    with path.open("a") as file:  # the first new line lands behind the one that was cut off
        for iteration in (379, 399, 409):
            file.write(json.dumps({"iteration": iteration, "total_loss": 1.5}) + "\n")
    loss = panels([path])["total loss"].lines[0]
    assert list(loss.get_xdata()[18:23]) == [379, 399, 409, 419, 439]
    assert list(loss.get_ydata()[18:23]) == [7.2, 1.5, 1.5, 7.0, 6.9]


def test_runs_differ_in_colour_and_missing_evaluations_are_said(tmp_path):
    runs = [write_run(tmp_path / name, evaluated=False) for name in "ab"]
    drawn = panels(runs)
    assert len({line.get_color() for line in drawn["total loss"].lines}) == 2
    assert [text.get_text() for text in drawn["AP (%)"].texts] == ["no evaluation yet"]
    picture = run("training", metrics=runs, output=tmp_path / "curves.png")
    assert picture.shape == (800, 1500, 3)
    assert has_color(picture[:400, 500:1000], visualize.RUNS[1]).sum() > 300


def test_many_runs_have_a_colour_each(tmp_path):
    runs = [write_run(tmp_path / name) for name in "abcdefghijk"]
    lines = panels(runs)["total loss"].lines
    assert len({line.get_color() for line in lines}) == len(runs)


def test_mistakes_in_training_are_named(tmp_path):
    path = tmp_path / "metrics.json"
    for text, message in ((None, "no file"), ("", "is empty"), ("[1]\n{}", "holds no metrics")):
        if text is not None:
            path.write_text(text)
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            run("training", metrics=path, output=tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()
