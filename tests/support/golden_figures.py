"""Recorded figures of the reference, and how they are compared with ours."""

from pathlib import Path

import pytest
import torch

from projects.stageinteractor.analysis.recorded import load_figures
from projects.stageinteractor.checkpoint.released import project_name

GOLDEN = Path(__file__).parent / "golden"
CONFIGS = Path(__file__).resolve().parents[2] / "projects/stageinteractor/configs"
RECIPE = CONFIGS / "stageinteractor_r50_12ep.py"
STAGES = range(6)
LOSSES = {"cls": "cls", "bbox": "bbox", "giou": "iou"}  # ours: recorded


def load(name):
    return load_figures(GOLDEN, name)


def assert_close(actual, expected, atol):
    expected = torch.as_tensor(expected)
    torch.testing.assert_close(
        actual.detach().reshape(expected.shape), expected, atol=atol, rtol=0, check_dtype=False
    )


def assert_same_detections(found, boxes_and_scores, classes, atol):
    """In any order: rounding swaps neighbours of the same score."""
    expected = torch.from_numpy(boxes_and_scores)
    assert_close(found.scores, expected[:, 4], 5e-5)
    distance = (found.pred_boxes.tensor[:, None] - expected[None, :, :4]).abs().amax(-1)
    same = (distance <= atol) & (found.pred_classes[:, None] == torch.from_numpy(classes))
    assert same.any(0).all() and same.any(1).all()


def assert_losses(losses, figures, prefix):
    for stage in STAGES:
        for ours, recorded in LOSSES.items():
            expected = float(figures[f"{prefix}loss/stage{stage}_loss_{recorded}"])
            assert losses[f"stage{stage}_loss_{ours}"].item() == pytest.approx(expected, rel=1e-5)
    total = float(figures[f"{prefix}loss/total"])
    assert sum(losses.values()).item() == pytest.approx(total, rel=1e-5)


def assert_gradients(model, figures, prefix, rel, rel_of_points):
    """Norms of every gradient, and the small gradients entry by entry."""
    parameters = dict(model.named_parameters())
    norms = dict(zip(figures[f"{prefix}grad_names"].tolist(), figures[f"{prefix}grad_norms"]))
    largest, compared = max(norms.values()), set()
    for released, norm in norms.items():
        name = project_name(released)
        if name is None:  # dead in the reference: its gradient is exactly zero
            assert norm == 0, released
            continue
        gradient = parameters[name].grad.float()  # norms in float32, as recorded
        is_head = "_head." in name  # behind all sampling of its own stage
        jumps = ".points." in name or "iof_tau" in name
        tolerance = rel_of_points if jumps else min(rel, 1e-4) if is_head else rel
        # Gradients that vanish in exact arithmetic are rounding errors on both sides.
        floor = 1e-9 * largest
        assert gradient.norm().item() == pytest.approx(norm, rel=tolerance, abs=floor), name
        if f"{prefix}grad/{released}" in figures:
            expected = torch.from_numpy(figures[f"{prefix}grad/{released}"])
            error = (gradient - expected).norm().item()
            assert error <= tolerance * norm + floor, name
        compared.add(name)
    trained = {name for name, p in parameters.items() if p.requires_grad}
    assert compared == trained
