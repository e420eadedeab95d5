"""Promises of tools/benchmark.py: every command gives its figures, and memory is counted right."""

import math
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import benchmark
import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from pycocotools.cocoeval import COCOeval
from torch import nn

from projects.stageinteractor.analysis import benchmarks, random_input, timing
from projects.stageinteractor.analysis.timing import Work
from projects.stageinteractor.config.overrides import load_config
from projects.stageinteractor.errors import UserError
from projects.stageinteractor.inference import load_detector
from support.portable_files import save, small

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "projects/stageinteractor/configs"
LITE0 = str(CONFIGS / "stageinteractor_lite0_trees.py")
SMALL = [
    "--config-file", LITE0, "--size", "64", "96", "train.device=cpu",
    "model.query_generator.num_queries=5", "model.decoder.points_per_stage=[8,8]",
]
WORKS = ["forward", "train-step", "sample", "assign"]


@pytest.fixture(autouse=True)
def small_yardstick(monkeypatch):
    monkeypatch.setattr(timing, "YARDSTICK_SIZE", 64)


def result_of(*arguments):
    """What a command prints."""
    args = benchmark.make_parser().parse_args([arguments[0], "--runs", "2", *arguments[1:]])
    result = benchmark.measure(args)
    benchmark.report(result)
    return result


def check(result, *, has_memory):
    """A result whose figures fit each other."""
    assert result["torch"] == torch.__version__ and result["device"] and result["runs"] == 2
    assert result["threads"] == torch.get_num_threads() and result["yardstick_ms"] > 0
    rows = result["rows"]
    for row in rows.values():
        low, high = row["spread_ms"]
        assert 0 < low <= row["median_ms"] <= high
        ratio = row["median_ms"] / result["yardstick_ms"]
        assert row["ratio"] == pytest.approx(ratio)
        assert (row["peak_memory_bytes"] is not None) == has_memory


@pytest.mark.parametrize("command", WORKS)
def test_commands_that_need_a_config(command, capsys):
    compare = ["--compare"] * (command != "assign")
    result = result_of(command, *compare, *SMALL)
    check(result, has_memory=True)
    assert result["command"] == command and not result["compiled"]
    assert ("plain" in result["rows"]) == bool(compare)
    shown = capsys.readouterr().out
    assert f"{result['rows']['ours']['median_ms']:.2f}" in shown and torch.__version__ in shown


def test_loader():
    worker = "dataloader.train.num_workers=1"
    result = result_of("data", "--images", "4", "--config-file", LITE0, worker)
    check(result, has_memory=False)
    assert result["images_per_second"] == pytest.approx(1000 / result["rows"]["ours"]["median_ms"])
    assert result["num_workers"] == 1 and result["decode_ms"] > 0 and result["map_ms"] > 0


def test_evaluation():
    result = result_of("eval", "--images", "3", "--compare")
    check(result, has_memory=False)
    assert result["largest_difference"] < 1e-12


def test_a_difference_of_evaluations_shows(monkeypatch):
    class Wrong(COCOeval):
        def accumulate(self, p=None):
            super().accumulate(p)
            self.eval["recall"] -= 0.25

    monkeypatch.setattr(benchmarks, "COCOeval", Wrong)
    result = result_of("eval", "--images", "3", "--compare")
    assert result["largest_difference"] == pytest.approx(0.25)


def test_compiled_code_is_reported_where_it_runs(monkeypatch):
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_module(self, backend="eager"))
    arguments = "forward", "--compiled", *SMALL
    assert result_of(*arguments)["compiled"]
    torch.compiler.reset()
    with torch._dynamo.config.patch(disable=True):
        assert not result_of(*arguments)["compiled"]


def detections_of(monkeypatch):
    """What each row of ``deploy`` detects, by the name of the row, once it is measured."""
    found, measure_rows = {}, benchmarks.measure_rows

    def spy(works, runs, device):
        found.update({name: work.run()[0]["instances"] for name, work in works.items()})
        return measure_rows(works, runs, device)

    monkeypatch.setattr(benchmarks, "measure_rows", spy)
    return found


def check_deployed(result, detections):
    """Rows that were measured have figures that fit each other, and detect the same."""
    expected = detections["eager"]
    for name, found in detections.items():
        row = result["rows"][name]
        check({**result, "rows": {name: row}}, has_memory=name != "ONNX")
        assert len(found) == len(expected) > 0 and found.image_size == (50, 70)
        torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-4)
        torch.testing.assert_close(
            found.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=0, atol=0.05
        )


def test_a_deployed_detector_of_a_checkpoint(tmp_path, monkeypatch, capsys):
    """Without compiling and tracing, and where nothing can write ONNX."""
    def refuse(*_):
        raise UserError("ONNX needs onnx: pip install it")

    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    monkeypatch.setattr(benchmarks, "trace", lambda graph: SimpleNamespace(module=lambda: graph))
    monkeypatch.setattr(benchmarks, "onnx_files", refuse)
    detections, checkpoint = detections_of(monkeypatch), save(tmp_path, small())
    arguments = "--checkpoint", checkpoint, "--size", "50", "70", "train.device=cpu"
    result = result_of("deploy", *arguments)
    names = [type(module).__name__ for module in compiled]
    assert names == ["TimmBackbone", *["DecoderStage"] * 4]
    assert list(detections) == ["eager", "compiled", "program"]
    check_deployed(result, detections)
    torch.manual_seed(0)
    image = torch.randint(256, (3, 50, 70), dtype=torch.uint8)
    with torch.no_grad():
        found = load_detector(checkpoint, overrides=["train.device=cpu"]).model([{"image": image}])
    assert torch.equal(found[0]["instances"].scores, detections["eager"].scores)
    assert result["rows"]["ONNX"] == {"missing": "ONNX needs onnx: pip install it"}
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    (shown,) = [line for line in lines if line[:1] == ["program"]]
    row = result["rows"]["program"]
    speed = result["rows"]["eager"]["median_ms"] / row["median_ms"]
    assert shown[1] == f"{row['median_ms']:.2f}" and shown[-1] == f"{speed:.2f}"
    assert "ONNX - ONNX needs onnx: pip install it - - -".split() in lines


def test_a_missing_compiler_leaves_the_other_rows(monkeypatch):
    def broken(*_):
        raise torch._dynamo.exc.TorchDynamoException("no compiler")

    monkeypatch.setattr(nn.Module, "compile", lambda self: setattr(self, "forward", broken))
    monkeypatch.setattr(benchmarks, "DEPLOYED", {
        name: benchmarks.DEPLOYED[name] for name in ("eager", "compiled")
    })
    rows = result_of("deploy", *SMALL)["rows"]
    assert rows["compiled"] == {"missing": "no compiler"}
    assert rows["eager"]["median_ms"] > 0


@pytest.mark.slow
def test_all_ways_to_deploy_detect_the_same(monkeypatch):
    """With the real compiler, and random weights."""
    detections = detections_of(monkeypatch)
    options = [*SMALL[:2], "--size", "50", "70", *SMALL[5:]]
    result = result_of("deploy", *options)
    assert result["compiled"]
    assert list(detections) == list(result["rows"]) == ["eager", "compiled", "program", "ONNX"]
    check_deployed(result, detections)
    centres = detections["eager"].pred_boxes.get_centers()
    assert centres.std(0).min() > 0  # queries look at different places


def test_what_is_compared_is_the_same_decoder_with_other_sampling():
    cfg = load_config(LITE0, SMALL[5:])
    works = benchmarks.forward(cfg, batch=1, size=(64, 96), compiled=False, compare=True)
    ours, plain = works["ours"].run(), works["plain"].run()
    assert torch.equal(works["ours"].run().logits, ours.logits)
    for first, second in zip(ours, plain):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3)
    assert ours.xyzr.std(2).min() > 0  # queries look at different places


def test_a_train_step_gives_all_gradients():
    cfg = load_config(LITE0, SMALL[5:])
    work = benchmarks.train_step(
        cfg, batch=1, size=(64, 96), objects=20, compiled=False, compare=False
    )["ours"]
    work.run()
    assert [tuple(maps.shape[-2:]) for maps in work.leaves] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert len(work.weights) == len(list(instantiate(cfg.model.decoder).parameters()))
    gradients = [tensor.grad for tensor in (*work.leaves, *work.weights)]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    first = [gradient.clone() for gradient in gradients]
    work.reset()
    work.run()
    for tensor, gradient in zip((*work.leaves, *work.weights), first):
        torch.testing.assert_close(tensor.grad, gradient)


def test_peak_memory_of_known_allocations():
    def run():
        kept = torch.zeros(1000)
        for _ in range(3):
            gone = torch.zeros(250)
            del gone
        first = torch.zeros(500)
        del kept
        return first, torch.zeros(300)

    before = torch.zeros(10000)
    assert timing.peak_memory(Work(run), "cpu") == 4 * (1000 + 500)
    assert timing.peak_memory(Work(lambda: before.zero_()), "cpu") == 0
    assert timing.peak_memory(Work(run, uses_torch=False), "cpu") is None


def test_gradients_of_weights_are_no_activations():
    weights = [torch.ones(1000, requires_grad=True) for _ in range(8)]
    maps = torch.ones(1000, requires_grad=True)

    def run():
        total = maps
        for weight in weights:
            total = total + weight
        total.sum().backward()

    alone = timing.peak_memory(Work(run, [maps, *weights]), "cpu")
    without = timing.peak_memory(Work(run, [maps], weights), "cpu")
    assert alone - without == pytest.approx(4 * 1000 * 7, abs=4 * 1000)
    assert 4 * 1000 <= without <= 4 * 1000 * 4  # the gradient of the maps and of their sums


def test_times_exclude_warm_ups_and_take_turns():
    now, calls = [0.0], []

    def work(name, seconds):
        def run():
            calls.append(name)
            now[0] += seconds if calls.count(name) > timing.WARM_UPS else 100

        return Work(run)

    works = {"yardstick": work("yardstick", 0.5), "ours": work("ours", 2)}
    times = timing.measure_times(works, 3, lambda: now[0])
    assert times == {"yardstick": [500] * 3, "ours": [2000] * 3}
    assert calls == ["yardstick", "ours"] * (timing.WARM_UPS + 3)


def test_arithmetic_of_a_summary():
    summary = timing.summarize_times([10, 1, 2, 3, 4], [8, 2, 2])
    assert summary["median_ms"] == 3 and summary["spread_ms"] == [2, 4] and summary["ratio"] == 1.5


def test_random_input_is_that_of_the_seed_and_inside():
    boxes = random_input.random_boxes((50, 2), (300, 100))
    assert boxes.shape == (50, 2, 4) and boxes.min() >= 0
    assert boxes[..., 2].max() <= 100 and 100 < boxes[..., 3].max() <= 300
    assert (boxes[..., 2:] - boxes[..., :2]).min() > 0
    truths = [random_input.random_truth(20, np.random.default_rng(0)) for _ in range(2)]
    assert truths[0] == truths[1] and len(truths[0]["annotations"]) > 100
    for annotation in truths[0]["annotations"]:
        x, y, w, h = annotation["bbox"]
        assert 0 <= x <= x + w <= 640 and 0 <= y <= y + h <= 480
        assert math.isclose(annotation["area"], w * h)
    found = random_input.random_detections(truths[0], np.random.default_rng(0))
    assert len(found) == 20 * 100 and {box["image_id"] for box in found} == set(range(1, 21))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["forward", "--config-file", "no.py"], "no config file no.py"),
        (["forward", "model.decodr.num_classes=3"], "did you mean model.decoder"),
        (["forward", "model.decoder.num_heads=3"], "model: embed_dim=256"),
        (["forward", "train.device=cuda"], "train.device=cuda is not available"),
        (["forward", "--config-file", str(CONFIGS / "retinanet_lite0_bccd.py")], "no model.decod"),
        (["forward", "--size", "0", "64"], "--size must be 1 or more"),
        (["deploy", "--config-file", str(CONFIGS / "retinanet_lite0_bccd.py")], "no model.decod"),
        (["deploy", "--checkpoint", "no.pth"], "no checkpoint no.pth"),
        (["deploy", "model.decoder.num_heads=3"], "model: embed_dim=256"),
        (["eval", "--runs", "0"], "--runs must be 1 or more"),
    ],
)
def test_mistakes_end_with_one_line(arguments, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        benchmark.main(arguments)
    text = str(ended.value)
    assert message in text and text.startswith("error: ") and "\n" not in text


@pytest.mark.parametrize("arguments", [["fly"], [], ["assign", "--compare"]])
def test_an_unknown_command_or_option(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        benchmark.main(arguments)
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) <= 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc takes this advice")
@pytest.mark.parametrize("keep, expected", [(True, 28), (False, 0)])
def test_freed_memory_is_kept(keep, expected):
    """A buffer of 28 MiB that is gone still belongs to the process, or does not."""
    code = f"""
import os, torch
from pathlib import Path
from projects.stageinteractor.config.device import keep_freed_memory
if {keep}:
    keep_freed_memory()
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
before = resident()
buffer = torch.ones(7 * 2**20)
del buffer
print(resident() - before)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert float(run.stdout) == pytest.approx(expected, abs=8)
