"""Promises of tools/demo.py: its pictures and its JSON file; videos are in another file."""

import errno
import itertools
import os

import demo
import numpy as np
import pytest
import torch
from detectron2.data.detection_utils import read_image
from detectron2.utils.visualizer import VisImage
from matplotlib.colors import to_rgb
from PIL import Image
from pycocotools.coco import COCO

from projects.stageinteractor.analysis import detect_files
from projects.stageinteractor.drawing import detections
from projects.stageinteractor.drawing.style import COLORS
from projects.stageinteractor.inference import load_detector
from support.demos import CATEGORIES, Finder, detect, fail, file_names, run, save
from support.runs import CONFIG, ROOT, overrides
from support.saved_models import save_model
from support.shapes import make_shapes


@pytest.fixture
def finder(monkeypatch):
    finder = Finder()
    monkeypatch.setattr(demo, "load_detector", lambda *arguments, **options: finder)
    return finder


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small pictures are not enlarged."""
    monkeypatch.setattr(detections, "LEAST_SIDE", 1)


# ---- The JSON file


@pytest.mark.parametrize("tiles", [{}, {"tile": 48, "overlap": 0.5}], ids=["whole", "tiles"])
def test_its_boxes_are_those_of_the_model(tmp_path, tiles):
    """Of a real one, from its config and its checkpoint."""
    shapes = make_shapes(tmp_path / "data", images=3, size=[(64, 96), (90, 70)])
    options = overrides(shapes, tmp_path)
    checkpoint = save_model(tmp_path / "model.pth", CONFIG, options, ["x", "y", "z"])
    detector = load_detector(checkpoint, str(ROOT / CONFIG), options, **tiles)
    paths = [str(shapes.parent / f"images/{number:04}.png") for number in (1, 2, 3)]
    outputs = [detector(read_image(path, "BGR")) for path in paths]
    threshold = torch.cat([output.scores for output in outputs]).median().item()
    number = sum(map(len, outputs))
    if tiles:  # what is below the threshold is left out before tiles are put together
        outputs = [detector(path, threshold=threshold) for path in paths]
    arguments = [
        "--config-file", ROOT / CONFIG, "--checkpoint", checkpoint, "--input", *paths,
        "--threshold", threshold, "--output", tmp_path / "out",
        *(word for name, value in tiles.items() for word in (f"--{name}", value)),
    ]
    demo.main([*map(str, arguments), *options])
    coco = COCO(tmp_path / "out" / "detections.json")
    assert [category["name"] for category in coco.dataset["categories"]] == ["x", "y", "z"]
    assert file_names(coco.dataset) == paths
    for image, output in zip(coco.dataset["images"], outputs):
        assert (image["height"], image["width"]) == output.image_size
        output = output[output.scores >= threshold]
        found = coco.imgToAnns[image["id"]]
        assert len(found) == len(output)
        for item, box, score, index in zip(
            found, output.pred_boxes.tensor.tolist(), output.scores, output.pred_classes
        ):
            x, y, w, h = item["bbox"]
            assert [x, y, x + w, y + h] == pytest.approx(box, abs=0.02)
            assert item["area"] == pytest.approx(w * h, rel=0.01, abs=0.5)
            assert item["score"] == pytest.approx(score.item(), abs=1e-6)
            assert item["category_id"] == detector.categories[index]["id"]
    assert 5 < len(coco.dataset["annotations"]) < number


def test_pycocotools_takes_it_as_ground_truth_and_as_results(finder, tmp_path):
    result = run(tmp_path / "out", save(tmp_path / "a.png"), save(tmp_path / "b.png", (50, 60)))
    coco = COCO(tmp_path / "out" / "detections.json")
    results = coco.loadRes(result["annotations"])
    assert sorted(results.getAnnIds()) == [1, 2, 3, 4]
    assert [item["category_id"] for item in result["annotations"]] == [7, 3, 7, 3]
    assert [item["bbox"] for item in result["annotations"]][2:] == [[0, 0, 25, 60], [25, 0, 25, 60]]
    assert result["categories"] == CATEGORIES
    assert result["info"] == {"config_file": "c", "checkpoint": "f", "threshold": 0.3}


@pytest.mark.parametrize("number", [0, 150])
def test_any_number_of_detections(tmp_path, number):
    """150 are more than pycocotools evaluates."""
    record = detections.DetectionFile(CATEGORIES, {})
    record.add(detect([[1, 2, 4, 8]] * number, [0.5] * number, [1] * number, (10, 20)), "a")
    record.write(tmp_path / "file.json")
    coco = COCO(tmp_path / "file.json")
    assert len(coco.anns) == len(record.annotations) == number
    assert coco.dataset["images"] == [{"id": 1, "file_name": "a", "height": 10, "width": 20}]


@pytest.mark.parametrize("threshold, expected", [("0", 3), ("0.2", 3), ("0.5", 2), ("1", 0)])
def test_scores_from_the_threshold_on(finder, tmp_path, capsys, threshold, expected):
    result = run(tmp_path / "out", save(tmp_path / "a.png"), more=["--threshold", threshold])
    assert len(result["annotations"]) == expected
    line = capsys.readouterr().out.splitlines()[-1]
    plural = "" if expected == 1 else "s"
    assert line == (
        f"1 image, {expected} detection{plural} with score >= {threshold} -> {tmp_path / 'out'}"
    )


def test_an_earlier_result_stays(finder, tmp_path):
    path = save(tmp_path / "a.png")
    run(tmp_path / "out", path)
    before = {file: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert "choose another with --output" in fail(tmp_path / "out", path)
    assert before == {file: file.read_bytes() for file in (tmp_path / "out").iterdir()}


# ---- Pictures


@pytest.mark.parametrize("ground", [0, 255])
def test_classes_keep_their_colours(ground):
    """Those that colour-blind readers tell apart, in every picture; a dark rim is around them."""
    metadata = detections.class_metadata(["a", "b"])
    boxes = [[20, 20, 90, 90], [120, 20, 190, 90], [20, 120, 90, 190]]
    found = detect(boxes, [0.9] * 3, [0, 1, 0], (200, 200))
    for _ in range(2):
        image = np.full((200, 200, 3), ground, np.uint8)
        drawn = detections.draw_detections(image, found, metadata)
        for (x, _, right, bottom), index in zip(boxes, (0, 1, 0)):
            assert drawn[bottom, (x + right) // 2] == pytest.approx(
                255 * np.array(to_rgb(COLORS[index])), abs=8
            )
            for side in (slice(bottom - 5, bottom), slice(bottom + 1, bottom + 6)):
                assert drawn[side, (x + right) // 2].max(-1).min() < 60


def test_labels_do_not_hide_each_other(monkeypatch):
    """Of 30 detections of the same object, and of one beside it."""
    monkeypatch.setattr(VisImage, "get_image", lambda drawn: drawn.ax.texts)
    boxes = [[20 + i / 9, 20, 90, 90 + i / 9] for i in range(30)] + [[60, 200, 90, 290]]
    texts = detections.draw_detections(
        np.zeros((900, 900, 3), np.uint8), detect(boxes, [0.5] * 31, [0] * 31, (900, 900)),
        detections.class_metadata(["a"]),
    )
    places = [text.get_window_extent() for text in texts]
    assert len(places) == 31
    assert not any(a.overlaps(b) for a, b in itertools.combinations(places, 2))


def test_a_label_that_has_room_stays_at_its_box(monkeypatch):
    monkeypatch.setattr(VisImage, "get_image", lambda drawn: drawn.ax.texts)
    boxes = [[20, 20, 90, 90], [200, 20, 290, 90]]
    texts = detections.draw_detections(
        np.zeros((300, 300, 3), np.uint8), detect(boxes, [0.5] * 2, [0] * 2, (300, 300)),
        detections.class_metadata(["a"]),
    )
    assert {text.get_position() for text in texts} == {(20, 20), (200, 20)}


def test_a_picture_without_detections_is_the_image(finder, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (33, 47, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    run(tmp_path / "out", tmp_path / "a.png", more=["--threshold", "1"])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "a.png")), noise)
    run(tmp_path / "other", tmp_path / "a.png")
    assert not np.array_equal(np.asarray(Image.open(tmp_path / "other" / "a.png")), noise)


def test_names_of_classes_may_be_anything():
    metadata = detections.class_metadata(["$a_ä", "b\n", "", "x" * 99])
    assert metadata.thing_classes[:3] == ["$a_ä", "b\\n", ""] and len(metadata.thing_colors) == 4
    found = detect([[5, 5, 50, 50]] * 4, [0.5] * 4, [0, 1, 2, 3], (60, 60))
    drawn = detections.draw_detections(np.zeros((60, 60, 3), np.uint8), found, metadata)
    assert drawn.any()


def test_names_of_files_may_be_anything(finder, tmp_path):
    names = ["$a$ 1.png", "äöü 日本.png", "a.b.png", "50%.png"]
    result = run(tmp_path / "out", *(save(tmp_path / name) for name in names))
    assert sorted(os.listdir(tmp_path / "out")) == sorted([*names, "detections.json"])
    assert file_names(result) == [str(tmp_path / name) for name in names]


def test_no_file_is_overwritten(finder, tmp_path):
    """Neither the input, in the folder that is written to, nor one of the same name elsewhere."""
    colors = {"a.png": (0, 0, 90), "one/a.png": (0, 90, 0), "two/a.png": (90, 0, 0)}
    paths = [save(tmp_path / name, color=color) for name, color in colors.items()]
    before = [path.read_bytes() for path in paths]
    run(tmp_path, *paths, more=["--threshold", "1"])
    assert [path.read_bytes() for path in paths] == before
    for number, color in zip((2, 3, 4), colors.values()):
        assert Image.open(tmp_path / f"a_{number}.png").getpixel((0, 0)) == color


@pytest.mark.parametrize("name, mode, expected", [
    ("a.jpg", "L", "JPEG"), ("a.JPEG", "CMYK", "JPEG"), ("a.webp", "RGBA", "WEBP"),
    ("a.png", "P", "PNG"), ("a.png", "1", "PNG"), ("a.tif", "RGBA", "TIFF"), ("a.bmp", "L", "BMP"),
    ("a.gif", "P", "PNG"), ("a.ppm", "RGB", "PNG"), ("a.tiff", "I;16", "TIFF"),
])
def test_formats_and_modes(finder, tmp_path, name, mode, expected):
    """What is no common format becomes PNG; of 16 bits, the upper 8 are read."""
    pixels = np.full((30, 40), 100, np.uint8)
    image = Image.fromarray(pixels.astype(np.uint16) * 257 if mode == "I;16" else pixels)
    (image if mode == "I;16" else image.convert(mode)).save(tmp_path / name)
    run(tmp_path / "out", tmp_path / name, more=["--threshold", "1"])
    picture, = (path for path in (tmp_path / "out").iterdir() if path.suffix != ".json")
    assert picture.name == (name if expected != "PNG" else "a.png")
    drawn = Image.open(picture)
    assert (drawn.format, drawn.size) == (expected, (40, 30))
    if mode != "1":
        assert np.asarray(drawn, int) == pytest.approx(100, abs=3)


def test_an_image_needs_no_suffix_and_is_turned_by_its_tag(finder, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    result = run(tmp_path / "out", save(tmp_path / "a", (40, 30), format="JPEG", exif=exif))
    assert (result["images"][0]["height"], result["images"][0]["width"]) == (40, 30)
    assert Image.open(tmp_path / "out" / "a.png").size == (30, 40)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1)])
def test_the_smallest_images(finder, tmp_path, size):
    run(tmp_path / "out", save(tmp_path / "a.png", size))
    assert Image.open(tmp_path / "out" / "a.png").size == size


@pytest.mark.parametrize("size, limits, expected", [
    ((400, 200), {"MAX_PIXELS": 100 * 200}, (200, 100)),
    ((100, 50), {"LEAST_SIDE": 200}, (200, 100)),
    ((100, 50), {"LEAST_SIDE": 400, "MAX_PIXELS": 20000}, (200, 100)),
    ((200, 100), {"LEAST_SIDE": 200, "MAX_PIXELS": 20000}, (200, 100)),
    ((600, 1), {"MAX_PIXELS": 200}, (346, 1)),
])
def test_small_images_are_drawn_larger_and_large_ones_smaller(
    finder, tmp_path, monkeypatch, size, limits, expected
):
    """Boxes stay where they are, in the file in pixels of the image itself."""
    for name, value in limits.items():
        monkeypatch.setattr(detections, name, value)
    result = run(tmp_path / "out", save(tmp_path / "a.png", size, (0, 0, 0)))
    width, height = size
    assert (result["images"][0]["width"], result["images"][0]["height"]) == size
    assert result["annotations"][1]["bbox"] == [width / 2, 0, width / 2, height]
    drawn = np.asarray(Image.open(tmp_path / "out" / "a.png"))
    assert drawn.shape[1::-1] == expected
    if height > 2:
        edges = np.flatnonzero(drawn[50].max(1) > 60)
        assert {0, 100, 199} <= {*edges} <= {0, 1, 98, 99, 100, 101, 198, 199}


# ---- Inputs


def test_folders_patterns_and_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("f/b.png", "f/a.JPG", "f/.hidden.png", "f/more/c.png", "g/c[1].png"):
        save(tmp_path / name)
    (tmp_path / "f" / "clip.mp4").touch()
    assert detect_files.find_inputs(["f"]) == ["f/a.JPG", "f/b.png"]
    assert capsys.readouterr().err.startswith("warning: f: 1 other file")
    assert detect_files.find_inputs(["f/**/*.png"]) == ["f/b.png", "f/more/c.png"]
    assert detect_files.find_inputs(["g/c[1].png", "g", "./f/a.JPG"]) == ["g/c[1].png", "./f/a.JPG"]
    assert detect_files.find_inputs(["g/../f/b.png", "f/b*"]) == ["g/../f/b.png", "f/b.png"]
    assert capsys.readouterr().err == ""


def test_an_unreadable_image_among_others_is_named(finder, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(save(tmp_path / "a.png").read_bytes()[:60])
    (tmp_path / "text").write_text("no image")
    paths = [tmp_path / name for name in ("broken.png", "a.png", "text")]
    assert file_names(run(tmp_path / "out", *paths)) == [str(tmp_path / "a.png")]
    output = capsys.readouterr()
    assert f"warning: cannot read {paths[0]}: " in output.err
    assert f"warning: cannot read {paths[2]}: neither an image nor a video" in output.err
    assert output.out.endswith("(2 inputs could not be read)\n")
    assert f"cannot read {paths[0]}: " in fail(tmp_path / "alone", paths[0])
    assert "none of the inputs can be read" in fail(tmp_path / "both", paths[0], paths[2])
    assert not (tmp_path / "both" / "detections.json").exists()


def test_a_decompression_bomb_is_no_traceback(finder, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    assert "decompression bomb" in fail(tmp_path / "out", save(tmp_path / "a.png"))


@pytest.mark.parametrize("inputs, more, message", [
    (["no.png"], [], "no file no.png"),
    (["no/*.png"], [], "no file no/*.png"),
    (["empty"], [], "no images in empty"),
    (["a.png", "train.device=cpu"], [], "overrides come after --output"),
    (["a.png"], ["--threshold", "1.5"], "--threshold 1.5: scores are between 0 and 1"),
    (["a.png"], ["--threshold", "nan"], "--threshold nan"),
    (["a.png"], ["--output", "a.png/out"], "cannot write to a.png/out"),
])
def test_mistakes_end_with_one_line(finder, tmp_path, monkeypatch, inputs, more, message):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    line = fail(tmp_path / "out", *inputs, more=more)
    assert message in line and "\n" not in line
    assert finder.calls == 0


def test_the_files_of_the_model_are_named_in_a_line(tmp_path):
    line = fail(tmp_path / "out", save(tmp_path / "a.png"))
    assert line == "error: no checkpoint f: check the path"
    assert not (tmp_path / "out").exists()


# ---- Endings


@pytest.mark.parametrize("error, status", [
    (KeyboardInterrupt(), 130), (OSError(errno.ENOSPC, "No space left on device"), None),
], ids=["Ctrl-C", "full disk"])
def test_what_was_done_until_then_is_kept(finder, tmp_path, monkeypatch, capsys, error, status):
    def fail_at_third(picture, path):
        if path.name == "2.png":
            raise error
        detections.save_picture(picture, path)

    monkeypatch.setattr(detect_files, "save_picture", fail_at_third)
    paths = [save(tmp_path / f"{number}.png") for number in range(4)]
    with pytest.raises(SystemExit) as ended:
        run(tmp_path / "out", *paths)
    assert len(COCO(tmp_path / "out" / "detections.json").imgs) == 2
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"0.png", "1.png"}
    if status:
        assert ended.value.code == status
        assert capsys.readouterr().err.startswith("interrupted: 2 images, 4 detections")
    else:
        line = f"error: cannot write to {tmp_path / 'out'}: No space left on device"
        assert ended.value.code == line


def test_an_interruption_before_the_model_is_there(tmp_path, monkeypatch, capsys):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "load_detector", interrupt)
    with pytest.raises(SystemExit) as ended:
        run(tmp_path / "out", save(tmp_path / "a.png"))
    assert ended.value.code == 130 and capsys.readouterr().err == "interrupted\n"
