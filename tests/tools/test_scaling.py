"""Promises of tools/plot_scaling.py and tools/reckon_gpus.py."""

import json
import math
from pathlib import Path

import plot_scaling
import pytest
import reckon_gpus
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "projects/stageinteractor/configs/stageinteractor_lite0_trees.py")


def ring_bytes(members, size):
    """Bytes that one member of a ring sends until all have the sum, counted piece by piece."""
    sent = 0
    for _ in ("sum the pieces", "hand the sums round"):
        for _ in range(members - 1):
            sent += size / members
    return sent


@pytest.mark.parametrize("gpus", reckon_gpus.GPUS)
def test_exchange_takes_as_long_as_counted_piece_by_piece(gpus):
    cluster = reckon_gpus.Cluster(8, node_bandwidth=100.0, network_bandwidth=10.0)
    inside = ring_bytes(min(gpus, 8), 560) / 100
    outside = ring_bytes(max(1, gpus // 8), 560) / 10
    assert cluster.exchange_seconds(gpus, 560) == pytest.approx(inside + outside)


def reckon(gpus, **given):
    values = dict(batch=2, step=0.2, size=5e8, image=0.02, workers=4)
    cluster = reckon_gpus.Cluster(8, 2e11, given.pop("network", 1.25e10))
    return reckon_gpus.reckon(gpus, **{**values, **given}, cluster=cluster)


def test_what_limits_throughput():
    """One GPU exchanges nothing; a slow network makes GPUs wait; so do few workers."""
    alone = reckon(1)
    assert alone.exchange == alone.waiting == 0 and alone.images_per_second == pytest.approx(10)
    assert alone.efficiency == 1 and alone.limit == "computing"
    assert reckon(64).limit == "computing" and reckon(64).images_per_second < 640
    slow = reckon(64, network=1e9)
    # 2 * 7/8 * 0.5 GB at 1 GB/s and the ring in the node, of which two thirds of a step are hidden
    assert slow.waiting == pytest.approx(2 * 7 / 8 * 0.5 * (1 + 1 / 200) - 0.4 / 3)
    assert slow.limit == "communication"
    assert slow.images_per_second == pytest.approx(64 * 2 / (0.2 + slow.waiting))
    loader = reckon(64, image=0.5)
    assert loader.limit == "loader" and loader.images_per_second == pytest.approx(64 * 4 / 0.5)


@pytest.mark.slow
def test_reckoning_measures_what_is_not_given(capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # else of all later tests
    reckon_gpus.main([
        "--config-file", CONFIG, "--batch", "1", "train.device=cpu",
        "dataloader.train.num_workers=0",
        "model.query_generator.num_queries=5", "model.decoder.points_per_stage=[8,8]",
    ])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("gradients ") and "a step of 1 images" in lines[0]
    assert [int(line.split()[0]) for line in lines[-7:]] == list(reckon_gpus.GPUS)


@pytest.mark.parametrize("arguments, message", [
    (["--batch", "0"], "--batch must be more than 0"),
    (["--network-gb-per-s", "-1"], "--network-gb-per-s must be more than 0"),
    (["--config-file", "nowhere.py"], "nowhere.py"),
])
def test_reckoning_refuses_what_it_cannot_use(arguments, message):
    with pytest.raises(SystemExit, match=message):
        reckon_gpus.main(arguments)


def test_scaling_measures_every_point_once_and_draws_it(tmp_path, monkeypatch, capsys):
    points = []

    def measured(args):
        points.append((args.command, args.batch, *args.size, getattr(args, "objects", None),
                       *args.overrides))
        return {"ratio_to_sgemm2048": float(len(points))}

    monkeypatch.setattr(plot_scaling.benchmark, "benchmark", measured)
    picture, costs = tmp_path / "scaling.png", tmp_path / "scaling.json"
    plot_scaling.main(["--output", str(picture), "--json", str(costs), "train.seed=1"])
    assert len(set(points)) == len(points)
    assert ("train-step", 1, 800, 1216, 500, "model.query_generator.num_queries=100",
            "train.seed=1") in points
    sizes = {point[2:4] for point in points}
    assert all(side % 32 == 0 for size in sizes for side in size)
    areas = sorted(math.prod(size) / (800 * 1216) for size in sizes)
    assert areas == pytest.approx([0.25, 0.5, 1, 1.5, 2], rel=0.05)
    found = json.loads(costs.read_text())["costs"]
    for sweep, commands in found.items():
        for command in commands.values():
            assert len(command) == len(plot_scaling.SWEEPS[sweep])
    with Image.open(picture) as image:
        assert image.width > 1000


def test_scaling_says_where_it_cannot_write(tmp_path):
    with pytest.raises(SystemExit, match="cannot write"):
        plot_scaling.main(["--output", str(tmp_path / "no" / "scaling.png")])
