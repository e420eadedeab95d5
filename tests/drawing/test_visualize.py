"""Promises of tools/visualize.py training: what its curves show, and what its errors say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

from projects.stageinteractor.drawing import curves
from projects.stageinteractor.drawing.curves import draw_training
from projects.stageinteractor.drawing.style import INKS
from support.curves import has_color, run

ROOT = Path(__file__).resolve().parents[2]


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
    return {axes.get_title(): axes for axes in draw_training(metrics).axes}


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
    assert [text.get_text() for text in drawn["AP (%)"].texts] == ["no value yet"]
    picture = run("training", metrics=runs, output=tmp_path / "curves.png")
    assert picture.shape == (800, 1500, 3)
    assert has_color(picture[:400, 500:1000], INKS[1]).sum() > 300


def test_many_runs_have_a_colour_each(tmp_path):
    runs = [write_run(tmp_path / name) for name in "abcdefghijk"]
    lines = panels(runs)["total loss"].lines
    assert len({line.get_color() for line in lines}) == len(runs)


def test_mistakes_in_training_are_named(tmp_path):
    path = tmp_path / "metrics.json"
    for content, message in (
        (None, "no file"),
        (b"", "is empty"),
        (b"[1]\n{}", "holds no metrics"),
        (b"\xff", "holds no metrics"),
    ):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            run("training", metrics=path, output=tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_curves_are_drawn_without_torch(tmp_path):
    path, output = write_run(tmp_path / "a $x^$"), tmp_path / "curves.png"
    code = (
        "import sys; sys.path.insert(1, 'tools'); import visualize; visualize.main(sys.argv[1:])\n"
        "print(*{'torch', 'cv2', 'sklearn', 'detectron2'} & set(sys.modules))"
    )
    arguments = ["training", "--metrics", str(path), "--output", str(output)]
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, check=True,
                          capture_output=True, text=True)
    assert done.stdout == f"{output} written\n\n" and done.stderr == ""
    assert output.exists()


def test_a_picture_takes_the_place_of_an_earlier_one_and_of_no_other_file(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(curves, "draw_training", lambda metrics: Figure(figsize=(1, 1)))
    metrics, output = write_run(tmp_path / "run"), tmp_path / "curves.png"
    run("training", metrics=metrics, output=output)
    run("training", metrics=metrics, output=output)
    assert capsys.readouterr().out == f"{output} written\n" * 2
    for content in (b"mine", None):
        if content is None:
            Image.new("RGB", (3, 3)).save(output)
        else:
            output.write_bytes(content)
        before = output.read_bytes()
        with pytest.raises(SystemExit, match="curves.png is not a picture of this tool: choose"):
            run("training", metrics=metrics, output=output)
        assert output.read_bytes() == before
    with pytest.raises(SystemExit, match=r"end in \.png"):
        run("training", metrics=metrics, output=tmp_path / "curves.jpg")
    with pytest.raises(SystemExit, match="not a picture|File exists|Not a directory"):
        run("training", metrics=metrics, output=metrics / "curves.png")
