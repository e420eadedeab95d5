"""Promises of tools/visualize.py results: its pictures and its errors."""

import itertools
import json

import numpy as np
import pytest
import visualize
from matplotlib.backends.backend_agg import FigureCanvasAgg

from projects.stageinteractor.analysis.mistakes import judge
from projects.stageinteractor.analysis.result_files import read_detections, read_truth
from projects.stageinteractor.analysis.result_pictures import (
    OUTCOMES,
    choose,
    describe_results,
    draw_results,
)
from projects.stageinteractor.drawing.style import spread
from support.curves import has_color, run
from support.shapes import make_shapes


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


def without(results, *tables):
    """Leaves no `annotations` or no `predictions` in the files."""
    if "predictions" in tables:
        results["predictions"].write_text("[]")
    if "annotations" in tables:
        coco = json.loads(results["annotations"].read_text())
        results["annotations"].write_text(json.dumps(coco | {"annotations": []}))


def count_pixels(picture, outcome):
    """How many pixels of both halves have the colour of an outcome."""
    found = has_color(picture, OUTCOMES[outcome][0])
    half = picture.shape[1] // 2
    return found[:, :half].sum(), found[:, half:].sum()


@pytest.mark.parametrize("left_out, outcome, is_left, is_right", [
    ((), "found", True, True),
    (["predictions"], "missed", True, False),
    (["annotations"], "background", False, True),
])
def test_truth_is_left_and_predictions_are_right(results, left_out, outcome, is_left, is_right):
    """In the colour of what has become of them."""
    without(results, *left_out)
    picture = run("results", **results, count=1)
    height, width, _ = picture.shape
    assert 400 < height < width < 1200
    legend = 40 * 20  # pixels of its patch, in the middle
    for number, is_drawn in zip(count_pixels(picture[:-60], outcome), (is_left, is_right)):
        assert number > 300 if is_drawn else number < 30
    assert sum(count_pixels(picture[-60:], outcome)) < legend
    others = {"found", "missed", "background", "confused"} - {outcome}
    assert all(sum(count_pixels(picture, other)) < 30 for other in others)


def test_a_box_is_drawn_where_it_is(results):
    """Against the sides of its panel, which is dark noise on white."""
    without(results, "predictions")
    coco = json.loads(results["annotations"].read_text())
    image = spread(coco["images"], 1)[0]
    box = dict(next(a for a in coco["annotations"] if a["image_id"] == image["id"]))
    coco |= {"categories": [{"id": 1, "name": "shape"}], "annotations": [box | {"category_id": 1}]}
    results["annotations"].write_text(json.dumps(coco))
    drawn = run("results", **results, count=1, order="spread")[:-60]  # without the legend
    dark = (drawn < 90).all(axis=-1)
    dark[:, drawn.shape[1] // 2:] = False
    rows = np.flatnonzero(dark.mean(axis=1) > 0.2)
    columns = np.flatnonzero(dark.mean(axis=0) > 0.2)
    scale = (columns[-1] + 1 - columns[0]) / image["width"]
    y, x = has_color(drawn, OUTCOMES["missed"][0]).nonzero()
    found = np.array([x.min() - columns[0], y.min() - rows[0], np.ptp(x) + 1, np.ptp(y) + 1])
    assert abs(found / scale - box["bbox"]).max() < 1


def test_only_predictions_above_the_threshold_are_drawn(results):
    above, below = (
        count_pixels(run("results", **results, count=1, threshold=t), "found")[1]
        for t in (0.5, 0.6)
    )
    assert above > 300 and below == 0


def test_images_are_spread_over_the_data_set(results):
    assert spread(list(range(10)), 5) == [1, 3, 5, 7, 9]
    assert spread(list(range(3)), 6) == [0, 1, 2]
    coco = json.loads(results["annotations"].read_text())
    judged = judge(coco, [], 0.5)
    for count, chosen in ((2, [2, 5]), (99, [1, 2, 3, 4, 5, 6])):
        assert choose(judged, count, "spread") == chosen
    figure = draw_results(coco, judged, [2, 5, 6], results["images"], 0.3)
    titles = [axes.get_title(loc="left").split("\n")[0] for axes in figure.axes[::2]]
    assert titles == ["0002.png", "0005.png", "0006.png", ""]
    assert sum(len(axes.images) for axes in figure.axes) == 6


def test_ids_of_any_kind_have_the_same_outcomes(results):
    """Texts and numbers in one file, some too large for pycocotools."""
    def renamed(value):
        return {"2": 0, "3": -2**70}.get(str(value), f"{value}")

    def with_ids(entries):
        keys = "id", "image_id", "category_id"
        return [{k: renamed(v) if k in keys else v for k, v in e.items()} for e in entries]

    coco = json.loads(results["annotations"].read_text())
    found = json.loads(results["predictions"].read_text())[1:]
    found[0]["category_id"] = found[0]["category_id"] % 3 + 1
    judged = judge(coco, found, 0.5)
    tables = {key: with_ids(coco[key]) for key in ("images", "annotations", "categories")}
    results["annotations"].write_text(json.dumps({**coco, **tables}))
    results["predictions"].write_text(json.dumps(with_ids(found)))
    other = read_truth(results["annotations"])
    detections = read_detections(results["predictions"], other, results["annotations"])
    again = judge(other, detections, 0.5)
    assert {renamed(key) for key in judged} == again.keys()
    for key, image in judged.items():
        same = again[renamed(key)]
        assert [o for _, o in same.objects] == [o for _, o in image.objects]
        assert [o for _, o in same.detections] == [o for _, o in image.detections]
    assert sum(image.num_errors for image in again.values()) == 2
    assert describe_results(other, again, 0.5).count("\n") > 3
    assert set(choose(again, 6, "errors")) == set(choose(again, 6, "spread")) == again.keys()


def test_a_figure_of_images_of_one_size_has_no_gaps(tmp_path):
    annotations = make_shapes(tmp_path, images=3, size=(40, 160))
    coco = json.loads(annotations.read_text())
    figure = draw_results(coco, judge(coco, [], 0.5), [1, 2, 3], tmp_path / "images", 0.3)
    FigureCanvasAgg(figure).draw()
    panels = [axes.get_window_extent() for axes in figure.axes if axes.images]
    assert len(panels) == 6 and all(p.width == pytest.approx(4 * p.height) for p in panels)
    drawn = sum(panel.width * panel.height for panel in panels)
    assert drawn > 0.35 * figure.bbox.width * figure.bbox.height  # titles take the rest


def test_images_with_most_errors_come_first(results):
    coco = json.loads(results["annotations"].read_text())
    detections = json.loads(results["predictions"].read_text())
    wrong = {3: 3, 5: 1, 2: 2}
    for key, number in wrong.items():
        false = {"image_id": key, "category_id": 1, "bbox": [0, 0, 3, 3], "score": 1}
        detections += [false] * number
    judged = judge(coco, detections, 0.5)
    assert choose(judged, 4, "error") == [3, 2, 5, 1]
    results["predictions"].write_text(json.dumps(detections))
    worst, spread_out = (run("results", **results, count=1, **order)
                         for order in ({}, {"order": "spread"}))
    assert count_pixels(worst, "background")[1] > 100 > count_pixels(spread_out, "background")[1]


def test_names_are_drawn_and_printed_as_they_are(results, capsys):
    """Eighty classes, whose names are formulas, of other alphabets, or very long."""
    names = ["$x^$", "\u6728 \u00e4", "_" * 90, *(f"class {i}" for i in range(77))]
    coco = json.loads(results["annotations"].read_text())
    coco["categories"] = [{"id": i, "name": name} for i, name in enumerate(names, start=1)]
    results["annotations"].write_text(json.dumps(coco))
    run("results", **results, count=1)
    assert "$x^$" in capsys.readouterr().out
    detections = json.loads(results["predictions"].read_text())
    judged = judge(coco, detections, 0.5)
    figure = draw_results(coco, judged, [1, 2], results["images"], 0.3)
    texts = {text.get_text() for axes in figure.axes for text in axes.texts}
    assert {"$x^$", "$x^$ 0.50"} <= texts
    assert not any(text.get_parse_math() for axes in figure.axes for text in axes.texts)
    assert max(map(len, texts)) <= 45


def test_nothing_at_all_is_drawn(results, capsys):
    without(results, "annotations", "predictions")
    picture = run("results", **results, count=1)
    assert (picture.std(axis=(0, 1)) > 20).all()
    assert "confused" in capsys.readouterr().out


def test_labels_of_near_duplicates_can_be_read(results):
    coco = json.loads(results["annotations"].read_text())
    found = [{"image_id": 1, "category_id": 1, "bbox": [40 + i, 20 + i, 50, 60], "score": i / 10}
             for i in range(5)]
    figure = draw_results(coco, judge(coco, found, 0.5), [1], results["images"], 0)
    FigureCanvasAgg(figure).draw()
    places = [text.get_window_extent() for text in figure.axes[1].texts]
    assert len(places) == 5
    assert not any(a.overlaps(b) for a, b in itertools.combinations(places, 2))


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
    assert error(annotations=missing) == f"error: {missing}: no such file"
    assert "a list: detections?" in error(annotations=results["predictions"])
    assert "not a list of COCO results" in error(predictions=results["annotations"])
    assert f"no picture {tmp_path}" in error(images=tmp_path)
    box = {"image_id": 77, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1}
    foreign.write_text(json.dumps([box]))
    assert "image_id 77 is not in" in error(predictions=foreign)
    foreign.write_text(json.dumps([box | {"image_id": 1, "category_id": 9}]))
    assert "category_id 9 is not in" in error(predictions=foreign)
    foreign.write_text("{")
    assert "is not JSON" in error(predictions=foreign)
    for broken in ({"bbox": [0, 0, 1]}, {"bbox": None}, {"score": "high"}, {"score": float("nan")},
                   {"image_id": [1]}, {"bbox": [0, 0, 1, float("inf")]}):
        foreign.write_text(json.dumps([box | {"image_id": 1} | broken]))
        assert "not a list of COCO results" in error(predictions=foreign)
    coco = json.loads(results["annotations"].read_text())
    coco["annotations"][0]["bbox"] = [1, 2, 3]
    foreign.write_text(json.dumps(coco))
    assert "bbox is [1, 2, 3], not four finite numbers" in error(annotations=foreign)
    (results["images"] / "0001.png").write_bytes(b"nonsense")
    assert "0001.png: not an image in one of the formats" in error()


@pytest.mark.parametrize("command, option, value", [
    ("results", "--count", "0"), ("results", "--iou", "0"), ("results", "--iou", "1.1"),
    ("results", "--iou", "nan"), ("results", "--threshold", "2"), ("data", "--count", "x"),
    ("results", "--threshold", "nan"), ("data", "--repeats", "0"), ("data", "--seed", "-1"),
    ("stages", "--count", "0"), ("stages", "--count", "13"), ("stages", "--queries", "3,x"),
])
def test_impossible_numbers_are_refused(command, option, value, capsys):
    with pytest.raises(SystemExit) as ended:
        visualize.make_parser().parse_args([command, option, value])
    assert ended.value.code == 2 and f"argument {option}: " in capsys.readouterr().err


def test_commands_share_their_arguments():
    parser = visualize.make_parser()
    for command in ("data", "training", "results", "tsne", "stages"):
        with pytest.raises(SystemExit):
            parser.parse_args([command])
    given = ["--config-file", "c.py", "--output", "o.png", "a=1", "b=2"]
    for arguments in (["data", *given], ["tsne", "--checkpoint", "m.pth", *given]):
        args = parser.parse_args(arguments)
        assert args.overrides == ["a=1", "b=2"] and args.output == "o.png"
