"""A run ends with its results, files that are there and commands that work, on one screen."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from detectron2.engine import HookBase
from hydra.core.override_parser.overrides_parser import OverridesParser

from projects.stageinteractor.data import coco_dataset
from projects.stageinteractor.engine import progress
from projects.stageinteractor.engine.hooks import BestCheckpointer
from projects.stageinteractor.engine.summary import RunSummary, summarize_evaluation
from projects.stageinteractor.engine.trainer import Trainer
from support.regression import Regression
from support.runs import CONFIG, ROOT, environment, metrics, overrides, run
from support.shapes import make_shapes
from support.tensorboard import read_pictures

NAN = float("nan")


@pytest.fixture
def said(monkeypatch):
    """What is logged."""
    messages = []
    monkeypatch.setattr(progress.LOGGER, "info", messages.append)
    return messages


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), images=6, size=(64, 96), empty=True)


class Evaluations(HookBase):
    """Figures instead of evaluations, one after every third step."""

    def __init__(self, *figures):
        self.figures = list(figures)

    def after_step(self):
        if (self.trainer.iter + 1) % 3 == 0 and self.trainer.iter + 1 < self.trainer.max_iter:
            self.trainer.storage.put_scalar("bbox/AP", self.figures.pop(0), smoothing_hint=False)

    def after_train(self):
        self.trainer.storage.put_scalar("bbox/AP", self.figures.pop(0), smoothing_hint=False)


def summarized(folder, figures, start=0, end=8, fail_at=None):
    """Train to ``end`` with a summary as the last hook."""
    model = Regression()

    def batches():
        for iteration in range(start, end):
            value = float("nan") if iteration == fail_at else 1.0
            yield [[value] * 4] * 2

    checkpointer = SimpleNamespace(save=lambda name, **_: (folder / f"{name}.pth").touch())
    best = BestCheckpointer(3, checkpointer, "bbox/AP")
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    one = Trainer(model, batches(), optimizer, max_skipped_steps=1)
    one.register_hooks([Evaluations(*figures), best, RunSummary(str(folder), best)])
    one.train(start, end)


def files_named(message):
    """Files that a summary names, in its list and in the commands (but not what they write)."""
    folder = Path(re.search(r"^Files in (.*):$", message, re.M)[1])
    listed = message[message.index("\nFiles in "):].split("\nNext:")[0].splitlines()[2:]
    named = [folder / line.strip().split(": ")[0] for line in listed]
    for line in message.partition("\nNext:")[2].splitlines():
        words = shlex.split(line)
        if "--output" in words:
            words = words[:words.index("--output")]
        values = [
            OverridesParser.create().parse_override(word).value() if "=" in word else word
            for word in words
        ]
        named += [Path(value) for value in values if "/" in value]
    return named


def test_the_summary(said, tmp_path):
    """Best and last figures, each at the iteration it was reached; files that are there."""
    folder = tmp_path / "ein Lauf"
    folder.mkdir()
    for name in ("config.yaml", "metrics.json", "events.out.tfevents.1.a", "other.txt"):
        (folder / name).touch()
    summarized(folder, [30.0, 38.126, 37.9])
    lines = said[0].splitlines()
    assert re.fullmatch(r"Finished: 8 iterations in 0:00:\d\d", lines[0])
    assert "  bbox/AP: best 38.13 after iteration 6, last 37.90" in lines
    assert re.search(r"^  speed: [\d.e+]+ img/s$", said[0], re.M)
    assert len(lines) <= 20 and "labels" not in said[0]
    named = files_named(said[0])
    assert all(path.exists() for path in named if path.parts[0] != "tools"), named
    listed = {path.name for path in named if path.parent == folder}
    assert listed == {"config.yaml", "metrics.json", "events.out.tfevents.1.a", "model_best.pth"}


def test_the_summary_of_the_last_and_of_a_resumed_iteration(said, tmp_path):
    summarized(tmp_path, [30.0, 38.0, 39.0])
    assert "bbox/AP: best 39.00 after iteration 8, last 39.00" in said[0]
    summarized(tmp_path, [1.0, 2.0], start=6)
    assert said[1].startswith("Finished: 8 iterations, 2 of them now, in 0:00:0")
    summarized(tmp_path, [1.0], start=8)  # a run that had been finished
    assert said[2].startswith("Finished: 8 iterations, 0 of them now, in 0:00:0")
    assert "speed" not in said[2]


@pytest.mark.parametrize("iteration", [0, 7])
def test_a_failed_run_has_no_summary(said, tmp_path, iteration):
    with pytest.raises(FloatingPointError):
        summarized(tmp_path, [1.0] * 3, fail_at=iteration)
    assert said == []


def test_without_a_checkpoint_no_evaluation_is_suggested(said, tmp_path):
    (tmp_path / "config.yaml").touch()
    summarized(tmp_path, [float("nan")] * 3)
    line = next(line for line in said[0].splitlines() if line.startswith("  bbox/AP: last nan"))
    assert "no model_best.pth" in line
    assert "--eval-only" not in said[0]


@pytest.mark.parametrize("figures", [[NAN, 30, 20], [30, NAN, 20], [20, 30, NAN]])
def test_an_evaluation_without_a_figure_does_not_hide_the_best(said, tmp_path, figures):
    (tmp_path / "config.yaml").touch()
    summarized(tmp_path, figures)
    assert "bbox/AP: best 30.00 after iteration " in said[0]
    assert f"train.init_checkpoint={tmp_path / 'model_best.pth'}" in said[0]


def test_labels_are_in_the_summary(said, tmp_path, monkeypatch):
    forward = Regression.forward

    def labelled(self, batch):
        progress.get_event_storage().put_scalar("labels/kept", 0.25)
        return forward(self, batch)

    monkeypatch.setattr(Regression, "forward", labelled)
    summarized(tmp_path, [1.0] * 3)
    assert "\n  labels: kept 25%" in said[0]


def test_an_evaluation_without_truth_names_no_command(said, tmp_path, shapes):
    """Pictures with ground truth cannot be drawn then; nor is a file named that is not there."""
    dataset = {"json_file": str(shapes), "image_root": str(shapes.parent / "images")}
    coco_dataset(**dataset)
    summarize_evaluation(str(tmp_path), dataset, True)
    assert said == ["Evaluated"]
    (tmp_path / "coco_instances_results.json").touch()
    for has_truth in (True, False):
        summarize_evaluation(str(tmp_path), dataset, has_truth)
        assert all(path.exists() for path in files_named(said[-1]) if path.parts[0] != "tools")
        assert ("visualize.py results" in said[-1]) == has_truth


@pytest.mark.slow
def test_a_run_of_two_processes_shows_everything(shapes, tmp_path):
    """The real command; then those it suggests. Shared buffers would make a lone process wait."""
    folder = tmp_path / "ein Lauf"
    options = overrides(shapes, folder, **{
        "train.max_iter": 4, "train.eval_period": 2, "train.log_period": 2,
        "train.ddp.broadcast_buffers": "true",
    })
    text = run("--num-gpus", 2, *options)
    log = (folder / "log.txt").read_text()
    line = re.compile(
        r"eta: 0:\d\d:\d\d  iter: 4/4  loss: \S+ \(stages \S+ \S+ \S+\)  labels: kept \d+% "
        r"dropped \d+% gained \d+%  grad: \S+  lr: \S+  speed: \S+ img/s  data: \d+%  mem: \d+ MiB"
    )
    for shown in (text, log):
        assert len(line.findall(shown)) == 1
        assert len(re.findall(r"^all  ", shown, re.M)) == 2  # a table an evaluation
        assert "Finished: 4 iterations in 0:0" in shown
    assert "Finished" not in (folder / "log.txt.rank1").read_text()
    recorded = metrics(folder)
    expected = {"grad_norm", "images_per_second", "memory", "data_time", "lr", "eta_seconds",
                "labels/kept", "labels/dropped", "labels/gained", "stage0_loss_cls", "time"}
    training = [row for row in recorded if "total_loss" in row]
    assert len(training) == 2 and expected <= training[-1].keys()
    assert expected - {"eta_seconds", "time"} <= training[0].keys()
    assert "bbox/AP-circle" in recorded[-1]
    pictures = {f"predictions/{i}": [(1, 1000, 540), (4, 1000, 540)] for i in range(1, 5)}
    assert read_pictures(folder) == pictures

    summary = log[log.index("Finished: "):]
    assert all(path.exists() for path in files_named(summary) if path.parts[0] != "tools")
    for tool in ("train_net.py", "visualize.py training"):
        suggested = next(part for part in summary.splitlines() if f"tools/{tool}" in part)
        done = subprocess.run(
            [sys.executable, *shlex.split(suggested)[1:]],
            cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        if "Evaluated" in done.stdout:
            evaluated = done.stdout[done.stdout.index("Evaluated"):]
            assert folder / "eval" / "coco_instances_results.json" in files_named(evaluated)
    assert (folder / "training.png").exists()
    assert CONFIG not in summary  # the run's own config has its overrides
