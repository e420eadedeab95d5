"""Promises of tools/visualize.py stages: what it writes for a picture, and what its errors say."""

import functools
import json
import re

import numpy as np
import pytest
import torch
import visualize as tool
from detectron2.config import instantiate
from detectron2.data import DatasetMapper
from PIL import Image

from projects.stageinteractor import inference
from projects.stageinteractor.analysis.stages.stage_record import record_stages
from projects.stageinteractor.config.overrides import load_config
from projects.stageinteractor.data import coco_dataset, read_picture
from projects.stageinteractor.inference import load_detector
from support.runs import CONFIG, ROOT, overrides
from support.shapes import make_shapes
from support.stage_models import save_model

SIZE = (61, 97)  # height and width of the picture
CLASSES = ["rectangle", "circle", "triangle"]
RETINANET = "projects/stageinteractor/configs/retinanet_lite0_bccd.py"


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Arguments that work, but for --output, and the overrides."""
    root = tmp_path_factory.mktemp("inspect")
    annotations = make_shapes(root, images=3, size=SIZE, empty=True, crowd=True)
    options = overrides(annotations, root, **{"model.decoder.num_classes": None})
    options = [option for option in options if not option.startswith("dataloader")]
    save_model(root / "tiny.pth", [*options, "model.decoder.num_classes=3"])
    checkpoint = torch.load(root / "tiny.pth")
    torch.save({**checkpoint, "class_names": CLASSES}, root / "tiny.pth")
    return {
        "config-file": ROOT / CONFIG,
        "checkpoint": root / "tiny.pth",
        "image": root / "images/0001.png",
        "annotations": annotations,
    }, options


@functools.cache
def load_once(checkpoint, config_file, overrides):
    return load_detector(checkpoint, config_file, overrides)


@pytest.fixture(autouse=True)
def loaded(monkeypatch):
    """The same model is loaded only once."""
    monkeypatch.setattr(
        inference, "load_detector", lambda *given: load_once(*given[:2], tuple(given[2]))
    )


def inspect(given, output, *options, **changes):
    arguments, overrides = given
    arguments = {**arguments, "output": output, **changes}
    words = [w for key, value in arguments.items() if value is not None
             for w in (f"--{key}", str(value))]
    tool.main(["stages", *words, *map(str, options), *overrides])


def page_data(output):
    """What the page knows."""
    page = (output / "stages.html").read_text()
    text = re.search(r'<script id="record" type="application/json">(.*?)</script>', page, re.S)[1]
    return json.loads(text)


def error_of(given, output, *options, **changes):
    with pytest.raises(SystemExit) as error:
        inspect(given, output, *options, **changes)
    message = str(error.value)
    assert message.startswith("error: ") and len(message.splitlines()) <= 2
    return message


@pytest.fixture(scope="module")
def written(given, tmp_path_factory):
    output = tmp_path_factory.mktemp("out") / "new"
    inspect(given, output, "--count", 3)
    return output


def test_the_page_tells_what_the_model_computes(given, written):
    arguments, options = given
    detector = load_detector(arguments["checkpoint"], str(arguments["config-file"]), options)
    picture = read_picture(str(arguments["image"]), "BGR")
    record = record_stages(detector.model, detector.prepare(picture))
    data = page_data(written)
    assert (data["height"], data["width"]) == SIZE and data["classes"] == CLASSES
    np.testing.assert_allclose(data["boxes"], record.boxes, atol=0.06)
    for query in data["queries"]:
        number = query["id"]
        for stage in range(3):
            scores = dict(zip(query["scores"][stage][::2], query["scores"][stage][1::2]))
            expected = dict(enumerate(record.scores[stage, number].tolist()))
            assert scores == {c: float(f"{score:.2f}") for c, score in expected.items()}
            points = record.points[stage][number].reshape(-1, 2)
            np.testing.assert_allclose(query["points"][stage], points, atol=0.06)
            for other, weight in query["partners"][stage]:
                assert weight == pytest.approx(record.attention[stage, number, other], abs=6e-4)


def test_objects_are_those_of_the_picture_without_crowds(given, written):
    coco = json.loads(given[0]["annotations"].read_text())
    objects = [a for a in coco["annotations"] if a["image_id"] == 1 and not a["iscrowd"]]
    boxes = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in objects)]
    labels = page_data(written)["labels"]
    assert labels["boxes"] == boxes and boxes
    assert labels["classes"] == [a["category_id"] - 1 for a in objects]


def test_a_picture_is_written_of_each_query(written):
    names = {f"query_{query['id']}.png" for query in page_data(written)["queries"]}
    assert {path.name for path in written.iterdir()} == names | {"stages.html"}
    for path in written.glob("*.png"):
        colors = Image.open(path).convert("RGB").getcolors(1 << 24)
        assert len(colors) > 100  # more than empty panels


def test_without_annotations_there_are_no_labels(given, tmp_path):
    inspect(given, tmp_path, "--count", 1, annotations=None)
    assert page_data(tmp_path)["labels"] is None


def test_a_picture_without_objects_has_no_labels_to_give(given, tmp_path):
    inspect(given, tmp_path, "--count", 1, image=given[0]["image"].with_name("0003.png"))
    assert page_data(tmp_path)["labels"]["offers"] == [{}] * 3


def test_named_queries_are_looked_at_in_their_order(given, tmp_path, capsys):
    inspect(given, tmp_path / "two", "--queries", "7,2", "train.seed=1")
    assert [query["id"] for query in page_data(tmp_path / "two")["queries"]] == [7, 2]
    assert "queries 7, 2 in 3 stages\n" in capsys.readouterr().out


def test_text_from_files_is_no_markup_in_the_page(given, tmp_path):
    names = ["</script><img src=x onerror=alert(1)>", "<!--", "$x^"]
    checkpoint = torch.load(given[0]["checkpoint"])
    torch.save({**checkpoint, "class_names": names}, tmp_path / "c.pth")
    inspect(given, tmp_path / "out", "--count", 1, annotations=None, checkpoint=tmp_path / "c.pth")
    page = (tmp_path / "out/stages.html").read_text()
    assert page_data(tmp_path / "out")["classes"] == names
    assert page.count("</script>") == 2 and "<img src=x" not in page and "<!--" not in page


def test_the_page_names_no_other_place(written):
    page = (written / "stages.html").read_text()
    assert set(re.findall(r"https?://[^\"' ]+", page)) == {"http://www.w3.org/2000/svg"}


@pytest.mark.parametrize("changes, message", [
    ({"image": "nowhere.jpg"}, "no picture nowhere.jpg"),
    ({"image": ROOT / "README.md"}, "README.md: not an image in one of the formats"),
    ({"checkpoint": "nowhere.pth"}, "no checkpoint nowhere.pth: check the path"),
    ({"annotations": ROOT / "README.md"}, "README.md: line 1 column 1: Expecting value"),
    ({"annotations": "nowhere.json"}, "nowhere.json: no such file"),
    ({"queries": "10"}, "there is no query 10: the model has 0 to 9"),
])
def test_mistakes_are_a_line(given, tmp_path, changes, message):
    assert message in error_of(given, tmp_path / "new", **changes)
    assert not list(tmp_path.iterdir())


def test_objects_are_those_that_training_would_have(given, tmp_path):
    """Boxes over the edge are clipped, those of less than a pixel left out, as the mapper does."""
    coco = json.loads(given[0]["annotations"].read_text())
    boxes = [[-80, -60, 160, 110], [10, 10, 0.5, 30], [90, 50, 40, 40], [200, 10, 5, 5]]
    coco["annotations"] = [
        {"id": i + 1, "image_id": 1, "category_id": 2, "bbox": box, "area": 9, "iscrowd": 0}
        for i, box in enumerate(boxes)
    ]
    file = tmp_path / "edges.json"
    file.write_text(json.dumps(coco))
    inspect(given, tmp_path / "out", "--count", 1, annotations=file)
    file = file.rename(tmp_path / "renamed.json")  # the first name is registered, without a folder
    records = coco_dataset(json_file=str(file), image_root=str(given[0]["image"].parent),
                           training=True)
    mapped = DatasetMapper(is_train=True, augmentations=[], image_format="RGB")(records[0])
    expected = mapped["instances"].gt_boxes.tensor.tolist()
    assert page_data(tmp_path / "out")["labels"]["boxes"] == expected == [
        [0, 0, 80, 50], [90, 50, 97, 61]
    ]


def test_a_category_that_the_file_lacks_is_refused(given, tmp_path):
    coco = json.loads(given[0]["annotations"].read_text())
    coco["annotations"][0]["category_id"] = 5
    file = tmp_path / "lacks.json"
    file.write_text(json.dumps(coco))
    message = error_of(given, tmp_path / "out", annotations=file)
    assert "annotation 1: category_id 5 is not among the categories" in message


def test_annotations_of_other_pictures_sizes_or_classes_are_refused(given, tmp_path):
    coco = json.loads(given[0]["annotations"].read_text())
    changes = {
        "has no picture 0001.png": [("images", 0, "file_name", "other.png")],
        "has 97 x 61 pixels, but 99 x 61": [("images", 0, "width", 99)],
        "has the class bird, which the model does not know": [("categories", 1, "name", "bird")],
    }
    for message, steps in changes.items():
        changed = json.loads(json.dumps(coco))
        for table, row, key, value in steps:
            changed[table][row][key] = value
        file = tmp_path / f"{message.split()[-1]}.json"
        file.write_text(json.dumps(changed))
        assert message in error_of(given, tmp_path / "out", annotations=file)


@pytest.mark.parametrize("name", ["stages.html", "query_3.png"])
def test_no_file_is_written_over(given, tmp_path, name):
    (tmp_path / name).write_text("mine")
    assert f"holds {name} already" in error_of(given, tmp_path, queries="2,3")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_a_model_without_stages_is_refused(given, tmp_path):
    checkpoint = tmp_path / "retinanet.pth"
    save_model_of(RETINANET, checkpoint)
    changes = {"config-file": ROOT / RETINANET, "checkpoint": checkpoint}
    message = error_of((given[0], []), tmp_path / "out", **changes)
    assert "RetinaNet has no decoder stages" in message


def save_model_of(config, path):
    cfg = load_config(str(ROOT / config), [])
    cfg.model.num_classes = 3
    torch.save({"model": instantiate(cfg.model).state_dict(), "class_names": CLASSES}, path)
