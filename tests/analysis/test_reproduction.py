"""Promises of tools/check.py model: what is right passes, and what is wrong is named."""

import json

import check
import numpy as np
import pytest
import torch
from torch import nn

from projects.stageinteractor.analysis import reproduction
from projects.stageinteractor.analysis.reproduction import QUANTITIES, TOLERANCES, Row
from projects.stageinteractor.modeling import criterion, label_assigner, mixing, sampling
from projects.stageinteractor.modeling.matcher import HungarianMatcher
from support.golden_figures import GOLDEN


@pytest.fixture(scope="module")
def small():
    return reproduction.small_case(GOLDEN, "cpu")


def test_the_small_decoder_is_right_in_float32(small):
    row = reproduction.check_mode(small, "float32")
    assert row.verdict == "ok" and tuple(row.differences) == QUANTITIES
    assert row.differences["matches"] == row.differences["targets"] == 0
    assert 0 < row.differences["logits"] < 1e-5


def other_temperature(monkeypatch):
    monkeypatch.setattr(sampling, "LEVEL_TEMPERATURE", 2.1)
    return {"logits", "boxes"}


def without_norm(monkeypatch):
    monkeypatch.setattr(mixing, "normalize_and_activate", nn.functional.relu)
    return {"logits", "boxes"}


def other_cost(monkeypatch):
    original = HungarianMatcher.cost
    monkeypatch.setattr(
        HungarianMatcher, "cost", lambda self, *args: original(self, *args).transpose(2, 3).cumsum(
            2).transpose(2, 3)
    )
    return {"matches"}


def no_labels_of_other_stages(monkeypatch):
    original = label_assigner.CrossStageLabelAssigner.in_scope
    monkeypatch.setattr(
        label_assigner.CrossStageLabelAssigner, "in_scope",
        lambda self, *args: original(self, *args) & torch.eye(6, dtype=torch.bool),
    )
    return {"targets", "losses"}


def other_focal_loss(monkeypatch):
    original = criterion.sigmoid_focal_loss
    monkeypatch.setattr(
        criterion, "sigmoid_focal_loss",
        lambda logits, classes, alpha, gamma: original(logits, classes, alpha, gamma + 0.01),
    )
    return {"losses", "gradients"}


@pytest.mark.parametrize("plant", [
    other_temperature, without_norm, other_cost, no_labels_of_other_stages, other_focal_loss,
])
def test_a_planted_mistake_is_wrong_where_it_shows(small, plant, monkeypatch):
    wrong = plant(monkeypatch)
    row = reproduction.check_mode(small, "float32")
    assert row.verdict.startswith("WRONG") and wrong <= set(row.wrong)
    if "logits" not in wrong:
        assert not {"logits", "boxes"} & set(row.wrong)


@pytest.mark.parametrize("mode, reason", [("float32, Triton kernel", "device"), ("TF32", "8.0")])
def test_what_a_cpu_lacks_is_skipped_with_the_reason(small, mode, reason):
    row = reproduction.check_mode(small, mode)
    assert row.verdict.startswith("skipped, because")
    assert reason in row.verdict and not row.differences


def test_an_error_is_a_row_and_the_copy_alone_is_changed(small, monkeypatch, capsys):
    def broken(model):
        model.decoder.make_pyramid = None
        raise RuntimeError("an illegal memory access\nand more")

    monkeypatch.setitem(reproduction.MODES, "float32, broken", broken)
    row = reproduction.check_mode(small, "float32, broken")
    assert row.verdict == "FAILED: RuntimeError: an illegal memory access"
    assert "Traceback" in capsys.readouterr().err
    assert small.model.decoder.make_pyramid is not None


def test_a_figure_that_is_no_number_is_wrong():
    fine = dict.fromkeys(QUANTITIES, 0.0)
    assert Row("a", "float16", fine).wrong == []
    assert Row("a", "float16", {**fine, "losses": float("nan")}).wrong == ["losses"]
    assert all(len(tolerances) == len(QUANTITIES) for tolerances in TOLERANCES.values())
    strict = np.array(TOLERANCES["float32"])
    assert all((strict < np.array(TOLERANCES[name])).all() for name in ("TF32", "float16"))


ROWS = [
    Row("float32", "float32", dict.fromkeys(QUANTITIES, 0.0)),
    Row("TF32", "TF32", {}, "skipped, because there is none"),
]
BAD = Row("float16", "float16", {**ROWS[0].differences, "losses": 7.0})


@pytest.mark.parametrize("rows, code", [(ROWS, 0), ([*ROWS, BAD], 1)])
def test_the_tool_prints_tables_or_json(rows, code, monkeypatch, capsys):
    speed = {"inference": {"median_ms": 5.0, "ratio": 2.5}}
    monkeypatch.setattr(reproduction, "check_model", lambda folder, device: iter(rows))
    monkeypatch.setattr(reproduction, "measure_speed", lambda device: (speed, 2.0))
    assert check.main(["model", "--device", "cpu"]) == code
    printed = capsys.readouterr().out
    assert "skipped, because there is none" in printed and "2.5" in printed
    assert torch.__version__ in printed
    assert ("WRONG: losses" in printed) == bool(code)
    assert check.main(["model", "--device", "cpu", "--json"]) == code
    report = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in report["rows"]] == [row.name for row in rows]
    assert report["tolerances"]["float32"][2] == 0 and torch.__version__ in report["versions"]


def test_without_recordings_one_line_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(check, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="complete checkout"):
        check.main(["model", "--device", "cpu"])


@pytest.mark.slow
def test_the_whole_card_on_this_device(capsys):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert check.main(["model", "--device", device]) == 0, capsys.readouterr().out
    printed = capsys.readouterr().out
    for mode in reproduction.MODES:
        assert mode in printed
    assert "yardstick" in printed
