"""Promises of tools/check.py data: it shows all faults, draws the data set, and says by its exit
code whether training would start.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import check
import numpy as np
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from matplotlib.colors import to_hex
from PIL import Image

from projects.stageinteractor.data.coco_file import read_tables
from projects.stageinteractor.drawing.dataset_overview import (
    describe_sizes,
    draw_contact_sheet,
    object_sizes,
)
from projects.stageinteractor.drawing.style import palette
from support.coco_splits import Dataset

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def dataset(tmp_path):
    return Dataset(tmp_path)


def run_tool(*arguments):
    command = [sys.executable, str(ROOT / "tools" / "check.py"), "data", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def run(arguments):
    return check.main(["data", *arguments])


def is_drawn(path):
    return len(np.unique(np.asarray(Image.open(path).convert("L")))) > 20


def test_the_tool_passes_a_clean_data_set_and_draws_it(dataset):
    dataset.check()
    output = dataset.root / "new" / "check"
    done = run_tool("--train", dataset.path("train"), "--val", dataset.path("val"),
                    "--images", dataset.root / "images", "--output", output)
    assert done.returncode == 0 and done.stderr == ""
    assert "train: 3 images, 0 of them without objects to learn from, 6 boxes" in done.stdout
    assert re.search(r"cat +3 +3\ndog +3 +3\n", done.stdout)
    assert "no mistakes, 0 remarks" in done.stdout
    command = done.stdout.strip().splitlines()[-1]
    assert command.startswith("python tools/train_net.py --config-file projects/")
    for word in ("train", "val"):
        assert f"dataset.{word}={dataset.path(word)}" in command
    assert sorted(path.name for path in output.iterdir()) == ["contact_sheet.png", "report.txt"]
    assert is_drawn(output / "contact_sheet.png")


def test_the_tool_fails_on_mistakes_and_draws_what_it_can(dataset):
    for index, name in enumerate(("a.png", "b.png")):
        dataset.edit("images", index, file_name=name)
    for item in dataset.coco["train"]["annotations"]:
        item["bbox"] = [90, 90, 5, 5]
    dataset.coco["train"]["annotations"] *= 3
    dataset.coco["train"]["categories"].append({"id": 3, "name": "\ud800 $x^$"})
    dataset.check()
    output = dataset.root / "check"
    done = run_tool("--train", dataset.path("train"), "--images", dataset.root / "images",
                    "--output", output)
    assert done.returncode == 1 and done.stderr == ""
    assert "mistake: box outside (18)" in done.stdout and "... and 8 more" in done.stdout
    assert "train_net.py" not in done.stdout
    report = (output / "report.txt").read_text(encoding="utf-8")
    assert report.count("is outside") == 18 and "a.png" in report and "b.png" in report
    assert is_drawn(output / "contact_sheet.png")


def test_the_tool_says_what_it_cannot_draw(dataset, capsys):
    Path(dataset.path("train")).write_text("{")
    output = dataset.root / "check"
    arguments = ["--train", dataset.path("train"), "--output", str(output)]
    assert run(arguments) == 1
    printed = capsys.readouterr().out
    assert "line 1 column 2" in printed and "contact_sheet.png left out" in printed


def test_a_mistyped_command_line_is_said(dataset, capsys):
    Path(dataset.path("train")).write_text("")
    for arguments, words in (
        ([], "give --train"),
        (["--test", "a.json"], "--test"),
        (["--train", "a.json", "model.x=1"], "model.x=1 needs --config-file"),
    ):
        with pytest.raises(SystemExit) as caught:
            run(arguments)
        assert caught.value.code == 2 and words in capsys.readouterr().err
    file = dataset.path("train")
    with pytest.raises(SystemExit, match=f"error: .*{file}"):
        run(["--train", "a.json", "--output", file])


def test_a_config_tells_what_its_model_cannot_find(dataset, capsys):
    dataset.check()
    config = "projects/stageinteractor/configs/stageinteractor_lite0_bccd.py"
    override = "model.query_generator.num_queries=1"
    arguments = [f"--train={dataset.path('train')}", f"--val={dataset.path('val')}",
                 f"--images={dataset.root / 'images'}", f"--config-file={ROOT / config}", override]
    assert run(arguments) == 0
    printed = capsys.readouterr().out
    assert "3 images have more than 1 objects" in printed and "2 remarks" in printed
    command = shlex.split(printed.strip().splitlines()[-1])
    assert command[2:4] == ["--config-file", str(ROOT / config)] and override in command
    arguments[-1] = "model.query_generator.num_querie=1"
    with pytest.raises(SystemExit, match="error: .*num_querie"):
        run(arguments)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_alone_and_images_beside_its_file(dataset, capsys, split):
    dataset.check()
    path = dataset.root / "images" / f"{split}.json"
    Path(dataset.path(split)).rename(path)
    assert run([f"--{split}", str(path)]) == 0
    printed = capsys.readouterr().out
    assert f"{split}: 3 images" in printed and "no mistakes" in printed
    assert "Train with" not in printed


def test_images_of_validation_have_the_folder_of_training_or_their_own(dataset, capsys):
    dataset.check()
    arguments = [f"--{split}={dataset.path(split)}" for split in ("train", "val")]
    arguments.append(f"--images={dataset.root / 'images'}")
    assert run(arguments) == 0
    (dataset.root / "images").rename(dataset.root / "both")
    (dataset.root / "images").mkdir()
    for path in (dataset.root / "both").glob("train*"):
        path.rename(dataset.root / "images" / path.name)
    capsys.readouterr()
    assert run(arguments) == 1
    assert "any other of the 3 images" in capsys.readouterr().out
    assert run([*arguments, f"--val-images={dataset.root / 'both'}"]) == 0
    assert f"dataset.val_images={dataset.root / 'both'}" in capsys.readouterr().out


def test_pictures_show_the_boxes_in_the_colour_of_their_class(dataset):
    dataset.check()
    tables = {"train": read_tables(dataset.path("train"))}
    figure = draw_contact_sheet(tables, {"train": str(dataset.root / "images")})
    panels = [axes for axes in figure.axes if axes.images]
    names = [image["file_name"] for image in tables["train"].images]
    titles = [axes.get_title(loc="left").split("\n") for axes in panels]
    assert [first for first, _ in titles] == [f"train: {name}" for name in names]
    assert all(second.endswith("boxes: 2") for _, second in titles)
    boxes = [patch for axes in panels for patch in axes.patches]
    found = [[*patch.get_xy(), patch.get_width(), patch.get_height()] for patch in boxes]
    np.testing.assert_allclose(found, [a["bbox"] for a in tables["train"].annotations])
    assert [to_hex(patch.get_edgecolor()).upper() for patch in boxes] == palette(2) * 3
    labels = [text.get_text() for axes in panels for text in axes.texts]
    assert labels == ["cat", "dog"] * 3


def test_sizes_are_those_of_objects_clipped_to_their_image(dataset):
    boxes = [[0, 0, 16, 9], [-8, -8, 16, 16], [60, 0, 16, 4], [64, 0, 9, 9], [0, 0, 0.5, 9]]
    for index, box in enumerate(boxes):
        dataset.edit("annotations", index, bbox=box)
    dataset.edit("annotations", 5, iscrowd=1)
    dataset.check()
    tables = read_tables(dataset.path("train"))
    assert object_sizes(tables) == [12, 8, 4]
    table = describe_sizes({"train": tables})
    assert re.search(r"train +object size.* +4 +4 +8 +12 +12\n", table)
    assert re.search(r"train +image width, pixels +64 +64 +64 +64 +64\n", table)


def test_the_command_to_train_survives_odd_paths():
    """Hydra reads the path that was given, after a shell has split the line."""
    for path in ("mine/train.json", "my data/ä (1),=[x]'s\\.json"):
        arguments = {"train": path, "val": path, "images": None, "val_images": None,
                     "config_file": None}
        command = check.training_command(type("Arguments", (), arguments), False)
        for override in OverridesParser.create().parse_overrides(shlex.split(command)[4:-1]):
            assert override.value() == path


@pytest.mark.parametrize("has_gpu, config", [(True, "r50_12ep"), (False, "lite0_bccd")])
def test_the_command_to_train_suits_the_machine(has_gpu, config):
    given = {"train": "t.json", "val": "v.json", "images": None, "val_images": None,
             "config_file": None}
    words = shlex.split(check.training_command(type("Arguments", (), given), has_gpu))
    assert words[3].endswith(f"stageinteractor_{config}.py")
    assert words[-1] == "train.output_dir=output/mine"
