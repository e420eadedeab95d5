"""Promises of tools/analyze.py model: its counts, the paper's own figures, the list of configs."""

import functools
import re
from pathlib import Path

import analyze
import pytest
import torch
from detectron2.config import instantiate
from fvcore.nn import FlopCountAnalysis

from projects.stageinteractor.analysis import counting
from projects.stageinteractor.config.overrides import load_config
from projects.stageinteractor.modeling.backbones.resnext_dcn import DeformableConv2d

CONFIGS = Path(__file__).resolve().parents[2] / "projects/stageinteractor/configs"
SIZE = 64, 60  # padded to 64 x 64
# What the tool may leave without a count.
ELEMENTWISE = set(
    "add add_ ceil clone cos div fill_ flip ge gelu hardtanh_ lerp log log2 lt max_pool2d "
    "maximum minimum movedim mul ne neg numel pad pow rsub sigmoid sin softmax sub unflatten "
    "view_as where".split()
)


@functools.cache
def analysis_of(config, *overrides):
    """The counts of a model, whose weights are gone by then, and its parts."""
    model = instantiate(load_config(str(CONFIGS / f"{config}.py"), list(overrides)).model)
    counts = counting.count(model, SIZE)
    return counts, {row[0]: row[1:] for row in counting.part_table(model, counts)}


def decoder_by_hand(queries, num_classes=80):
    """Multiply-adds of the six stages in the paper's dimensions, layer by layer."""
    dim, hidden, groups, channels, sub, rows, levels = 256, 2048, 4, 64, 8, 128, 4
    total = 0
    for stage, points in enumerate([64, 32, 32, 32, 32, 32]):
        reused = max(stage - 1, 0)
        generated_rows = rows // 2 if reused else rows
        first = points // sub
        linear = 3 * dim * dim + dim * dim  # attention
        linear += dim * 3 * (groups * first + sub)  # sampling points
        linear += dim * groups * (channels**2 + generated_rows * points)  # filters
        linear += dim * groups * (channels + rows)  # biases
        linear += dim * groups * reused * (2 * channels + channels)  # gates and biases of old ones
        linear += dim * groups * (rows // 2 + points) if reused else 0  # gates of the spatial one
        linear += groups * rows * channels * dim  # output projection
        linear += 2 * dim * hidden  # feed-forward network
        linear += 2 * dim * dim + dim * (num_classes + 4)  # heads
        products = 2 * queries * dim  # attention: logits, then values
        products += groups * (1 + reused) * points * channels**2  # channel mixing
        products += groups * rows * points * channels  # spatial mixing
        static = groups * reused * (sub * (first * channels)**2 + first * (sub * channels)**2)
        samples = groups * points * channels * levels * 4
        total += queries * (linear + products + static + samples)
    return total


def resnet50_by_hand(height, width):
    """Multiply-adds of a ResNet-50 whose 3x3 convolutions have the stride."""
    height, width = height // 2, width // 2
    total, channels = 7 * 7 * 3 * 64 * height * width, 64
    for index, blocks in enumerate([3, 4, 6, 3]):
        inner, outer = 64 << index, 256 << index
        cells = height * width // 4 >> 2 * index
        before = cells * 4 if index else cells
        for block in range(blocks):
            total += channels * inner * (cells if block else before)
            total += 9 * inner * inner * cells + inner * outer * cells
            total += 0 if block else channels * outer * cells
            channels = outer
    return total


@pytest.mark.parametrize("queries", [100, 7])
def test_multiply_adds_equal_those_counted_by_hand(queries):
    overrides = [f"model.query_generator.num_queries={queries}"] * (queries != 100)
    _, parts = analysis_of("stageinteractor_r50_12ep", *overrides)
    cells = 16 * 16, 8 * 8, 4 * 4, 2 * 2
    expected = {
        "backbone": resnet50_by_hand(64, 64),
        "neck": sum(256 * c * n for c, n in zip((256, 512, 1024, 2048), cells)),
        "decoder": decoder_by_hand(queries),
    }
    expected["total"] = sum(expected.values())
    assert {name: round(parts[name][-1] * 1e9) for name in expected} == expected


def test_totals_of_a_whole_image():
    """About 110 G multiply-adds with 100 queries, 148 G with 300, 102.8 G published of AdaMixer."""
    _, parts = analysis_of("stageinteractor_r50_12ep")
    _, adamixer = analysis_of("adamixer_r50_12ep")
    # Convolutions cost the same everywhere, the decoder the same for every image.
    shared = (parts["backbone"][-1] + parts["neck"][-1]) * (800 * 1280) / (64 * 64)
    assert shared + parts["decoder"][-1] == pytest.approx(110, abs=0.5)
    assert shared + decoder_by_hand(300) / 1e9 == pytest.approx(148, abs=0.5)
    assert shared + adamixer["decoder"][-1] == pytest.approx(102.8, rel=0.01)


@pytest.mark.parametrize(
    "config, released, trained",
    [
        ("stageinteractor_r50_12ep", 137_277_256, 137_051_912),
        ("stageinteractor_x101_dcn_300q_36ep", 158_520_932, 158_305_572),
        ("stageinteractor_swin_s_300q_36ep", 162_044_626, 162_044_626),
        ("adamixer_r50_12ep", 134_790_904, 134_565_560),
    ],
)
def test_parameters_are_the_released_ones_without_the_dead(config, released, trained):
    _, parts = analysis_of(config)
    dead = 400 if "adamixer" in config else sum(range(5)) * (256 + 1) * 4 * 32
    assert parts["dead in the authors' code"] == [dead]
    assert parts["total in the authors' code"] == [released]
    total, here_trained, frozen, _ = parts["total"]
    assert (total, here_trained, frozen) == (released - dead, trained - dead, released - trained)


@pytest.mark.parametrize(
    "config",
    ["stageinteractor_r50_12ep", "adamixer_r50_12ep", "stageinteractor_lite0_trees",
     "stageinteractor_swin_s_300q_36ep", "stageinteractor_x101_dcn_300q_36ep"],
)
def test_the_parts_are_the_whole_and_only_elementwise_work_is_not_counted(config):
    analysis, parts = analysis_of(config)
    assert {name.split("::")[1] for name in analysis.not_counted} <= ELEMENTWISE
    stages = sum(f"decoder.stages.{i}" in analysis.parameters for i in range(10))
    for counts, column, unit in (
        (analysis.parameters, 0, 1), (analysis.multiply_adds, -1, 1e9)
    ):
        *rows, total = counting.stage_table(counts, stages, unit)[1:]
        assert sum(row[1] for row in rows) == pytest.approx(total[1])
        assert total[1:] == pytest.approx([sum(total[2:]), *total[2:]])
        assert total[1] == pytest.approx(parts["decoder"][column])
        kept = [parts[name][column] for name in ("backbone", "neck", "query generator", "decoder")]
        assert sum(kept) == pytest.approx(parts["total"][column])


def test_a_deformable_convolution_costs_the_plain_one_and_its_samples():
    layer = DeformableConv2d(8, 16, 3, 2, 1, groups=4, bias=False, norm=torch.nn.Identity())
    counts = FlopCountAnalysis(layer, torch.zeros(1, 8, 10, 6))
    counts.set_op_handle(**counting.HANDLES).tracer_warnings("none")
    offsets, convolution, samples = 18 * 8 * 9, 16 * 2 * 9, 8 * 9 * 4
    assert counts.total() == 5 * 3 * (offsets + convolution + samples)


def test_what_a_model_lacks_is_not_shown(capsys):
    def shown(config):
        file = str(CONFIGS / f"{config}.py")
        few = "model.query_generator.num_queries=5"
        analyze.main(["model", "--config-file", file, "--size", "64", "64", few])
        return capsys.readouterr().out

    adamixer, ours = shown("adamixer_r50_12ep"), shown("stageinteractor_lite0_trees")
    for row in ("bias generator", "static mixing", "spatial filter adapter"):
        assert row in ours and row not in adamixer
    for row in ("self-attention", "filter generator", "feature sampling"):
        assert row in ours and row in adamixer


@pytest.mark.parametrize("name", ["retinanet", "faster_rcnn"])
def test_parameters_of_peers_are_counted(name, capsys):
    """Models of Detectron2's, which have no stages."""
    config = str(CONFIGS / f"{name}_lite0_bccd.py")
    analyze.main(["model", "--config-file", config])
    model = instantiate(load_config(config, []).model)
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    row = re.search(r"^total .*$", capsys.readouterr().out, re.M)[0].replace(",", "").split()
    assert row == ["total", str(total), str(trained), str(total - trained)]


def test_every_config_is_listed_with_the_ap_of_its_docstring(capsys):
    analyze.main(["model"])
    lines = capsys.readouterr().out.splitlines()
    listed = {line.split()[0]: line.split() for line in lines if ".py " in line}
    assert set(listed) == {path.name for path in CONFIGS.glob("*.py")}
    assert listed["stageinteractor_r50_12ep.py"][-3:] == ["44.8", "table", "2"]
    assert listed["stageinteractor_r50_900q_36ep.py"][-3:] == ["50.8", "table", "3"]
    assert listed["stageinteractor_r50_mstrain_12ep.py"][-2:] == ["-", "-"]
    for name, words in listed.items():
        assert (" AP in the paper" in (CONFIGS / name).read_text()) == (words[-1] != "-")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config-file", "no.py"], "error: no config file no.py"),
        (["model.decoder.num_classes=3"], "error: no config"),
        (["--config-file", "lite0", "model.decodr.num_classes=3"], "did you mean model.decoder"),
        (["--config-file", "lite0", "model.decoder.num_heads=3"], "error: model: embed_dim=128"),
        (["--config-file", "lite0", "--size", "0", "64"], "error: --size"),
        (["--config-file", "common"], "has no model"),
    ],
)
def test_mistakes_end_with_one_line(arguments, message):
    files = {
        "lite0": CONFIGS / "stageinteractor_lite0_trees.py",
        "common": CONFIGS.parents[2] / "configs/common/train.py",
    }
    with pytest.raises(SystemExit) as ended:
        analyze.main(["model", *(str(files.get(a, a)) for a in arguments)])
    text = str(ended.value)
    assert message in text and text.startswith("error: ") and "\n" not in text
