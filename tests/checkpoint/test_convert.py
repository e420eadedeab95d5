"""Conversion: released checkpoints of every kind come in whole and go out bit for bit."""

import re

import convert
import pytest
import torch
import torch.nn.functional as F
from detectron2.config import instantiate
from detectron2.modeling.backbone.swin import PatchMerging

from projects.stageinteractor.analysis.recorded import released_entry
from projects.stageinteractor.checkpoint import SafeCheckpointer
from projects.stageinteractor.checkpoint.released import (
    DEAD,
    convert_released,
    convert_to_released,
    project_name,
    swap_merged_patches,
)
from projects.stageinteractor.checkpoint.variant import describe
from projects.stageinteractor.checkpoint.weight_files import read_checkpoint
from projects.stageinteractor.config.overrides import CONFIGS, load_config
from support.golden_weights import released_shapes
from support.released_files import CLASSES, light_state, save_released

MODELS = {
    "r50": "stageinteractor_r50_12ep",
    "x101_dcn": "stageinteractor_x101_dcn_300q_36ep",
    "swin_s": "stageinteractor_swin_s_300q_36ep",
    "adamixer_r50": "adamixer_r50_12ep",
}






def run(capsys, *arguments):
    convert.main(["checkpoint", *map(str, arguments)])
    return capsys.readouterr().out


def refused(capsys, *arguments):
    """The message with which a conversion ends."""
    with pytest.raises(SystemExit) as caught:
        convert.main(["checkpoint", *map(str, arguments)])
    assert len(str(caught.value).splitlines()) <= 2
    return str(caught.value)


@pytest.mark.parametrize("model", MODELS)
def test_every_entry_in_and_out(model):
    """Every value of the full-size model is back at its place; what is dead is neutral again."""
    released = {name: released_entry(name, shape)
                for name, shape in released_shapes(model).items()}
    there = convert_released(released)
    assert not there.unplaced
    assert len(there.weights) + len(there.dropped) == len(released)
    own = instantiate(load_config(str(CONFIGS / f"{MODELS[model]}.py"), []).model)
    shapes = {name: value.shape for name, value in own.state_dict().items()
              if not DEAD.fullmatch(name)}
    assert {name: value.shape for name, value in there.weights.items()} == shapes

    back = convert_to_released(there.weights)
    assert not back.unplaced and not back.dropped
    assert back.weights.keys() == released.keys()
    for name, value in released.items():
        assert back.weights[name].dtype == value.dtype and back.weights[name].shape == value.shape
        alike = torch.equal(back.weights[name], value)
        assert alike or "subbox_score_list" in name and not back.weights[name].any(), name


@pytest.mark.parametrize("model", MODELS)
def test_the_tool_converts_both_ways(model, tmp_path, capsys):
    state = light_state(model)
    source = save_released(tmp_path, state)
    here, back = tmp_path / "here.pth", tmp_path / "back.pth"
    text = run(capsys, source, here)
    assert f"{MODELS[model]}.py train.init_checkpoint={here}" in text
    assert f"{sum(not DEAD.fullmatch(name) for name in state)} entries converted" in text
    assert "80 class names" in text and "no place" not in text
    assert torch.load(here)["class_names"] == list(CLASSES)

    assert f"train.init_checkpoint={here}" in run(capsys, here, back, "--to", "released")
    again = torch.load(back)
    assert again["meta"]["CLASSES"] == CLASSES
    assert again["state_dict"].keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(again["state_dict"][name], value) or "subbox_score_list" in name


@pytest.mark.parametrize("model", MODELS)
def test_training_loads_a_released_checkpoint_directly(model, tmp_path, caplog):
    """Every weight of the configured model is filled, and a line in the log says so."""
    state = light_state(model)
    cfg = load_config(str(CONFIGS / f"{MODELS[model]}.py"), [])
    with caplog.at_level("INFO"):
        checkpointer = SafeCheckpointer(instantiate(cfg.model), strict=True)
        checkpointer.logger.propagate = True
        checkpointer.load(save_released(tmp_path, state))
    method = "AdaMixer" if "adamixer" in model else "StageInteractor"
    assert f"is a released {method} checkpoint: " in caplog.text
    assert "no place" not in caplog.text
    loaded = checkpointer.model.state_dict()
    for name, value in state.items():
        if not DEAD.fullmatch(name):
            assert torch.equal(loaded[project_name(name)], value), name


@pytest.mark.parametrize(
    "model, queries, config",
    [
        ("r50", 300, "stageinteractor_r50_300q_36ep.py"),
        ("r50", 500, "stageinteractor_r50_500q_12ep.py"),
        # As many points as our config of 900 queries are no published figure: the file decides.
        ("r50", 900, "stageinteractor_r50_900q_36ep.py "
                     "model.decoder.points_per_stage=[64,32,32,32,32,32]"),
        ("r50", 50, "stageinteractor_r50_300q_36ep.py model.query_generator.num_queries=50"),
        ("adamixer_r50", 300, "adamixer_r50_300q_36ep.py"),
    ],
)
def test_the_number_of_queries_is_recognised(model, queries, config, tmp_path, capsys):
    boxes = next(name for name in released_shapes(model) if "init_proposal_bboxes" in name)
    content = "rpn_head.init_content_features.weight"
    changed = {content: torch.ones(1, 1).expand(queries, 256),
               boxes: torch.tensor([0.5, 0.5, 1, 1]).expand(queries, 4)}
    source = save_released(tmp_path, light_state(model, **changed))
    assert config + " train.init" in run(capsys, source, tmp_path / "here.pth")


def test_classes_points_and_a_deeper_backbone_are_recognised(tmp_path, capsys):
    """20 classes; 900 queries with as many points as our config of it; a ResNet-101."""
    state = {}
    for name, value in light_state("r50").items():
        if ".fc_cls." in name:
            value = value[:20]
        state[name] = value
        if name.startswith("backbone.layer3.5."):
            state |= {name.replace("layer3.5.", f"layer3.{block}."): value
                      for block in range(6, 23)}
    text = run(capsys, save_released(tmp_path, state), tmp_path / "here.pth")
    assert "StageInteractor, r101, 100 queries, 20 classes" in text
    assert ("stageinteractor_r101_300q_36ep.py model.query_generator.num_queries=100 "
            "model.decoder.num_classes=20 train.init") in text

    weights = convert_released(light_state("r50")).weights
    for stage in range(6):
        points = f"decoder.stages.{stage}.points"
        first, sub = (weights[f"{points}.{part}_offsets.bias"] for part in ("first", "sub"))
        weights[f"{points}.first_offsets.bias"] = first[:1].repeat(len(first) // 2)
        weights[f"{points}.sub_offsets.bias"] = sub[:1].repeat(2 * len(sub))
    assert describe(weights).points_per_stage == (64, 32, 32, 32, 32, 32)
    weights["decoder.stages.5.points.sub_offsets.bias"] = sub
    assert describe(weights).points_per_stage == (64, 32, 32, 32, 32, 16)


def test_other_backbones_are_not_taken_for_published_ones(tmp_path, capsys):
    """A Swin-T has 6 blocks where a Swin-S has 18."""
    state = {k: v for k, v in light_state("swin_s").items()
             if not re.match(r"backbone\.stages\.2\.blocks\.([6-9]|1\d)\.", k)}
    message = refused(capsys, save_released(tmp_path, state), tmp_path / "here.pth")
    assert "the backbone is none of the published" in message


def test_a_checkpoint_of_any_model_changes_its_container(tmp_path, capsys):
    """There and back, bit for bit; what is lost on the way is said."""
    weights = {"backbone.body.conv_stem.weight": torch.randn(4, 3).T, "head.bias": torch.ones(2)}
    source, there, back = (
        str(tmp_path / name) for name in ("model_best.pth", "weights.safetensors", "back.pth")
    )
    torch.save({"model": weights, "class_names": ["cat", "dog"], "iteration": 9, "trainer": {},
                "model_ema": {}}, source)
    text = run(capsys, source, there)
    assert f"2 entries as they were: wrote {there}\n" in text
    assert "left out beside the weights: iteration, model_ema, trainer\n" in text
    assert "2 class names kept: cat, dog\n" in text
    assert "left out" not in run(capsys, there, back)
    again = torch.load(back)
    assert again["class_names"] == ["cat", "dog"] and again["model"].keys() == weights.keys()
    assert all(torch.equal(again["model"][name], value) for name, value in weights.items())
    for name in ("same.pth", "same.safetensors"):
        source = back if name.endswith(".pth") else there
        assert "is not a released" in refused(capsys, source, tmp_path / name)


def test_released_checkpoints_come_in_as_safetensors_and_go_out_as_pth_alone(tmp_path, capsys):
    """The authors' code reads nothing else."""
    source = save_released(tmp_path, light_state("adamixer_r50"))
    here, back = tmp_path / "here.safetensors", tmp_path / "back.pth"
    text = run(capsys, source, here)
    assert f"{MODELS['adamixer_r50']}.py train.init_checkpoint={here}" in text
    assert read_checkpoint(str(here))["class_names"] == list(CLASSES)
    message = refused(capsys, here, tmp_path / "back.safetensors", "--to", "released")
    assert "the authors' code reads only .pth" in message
    run(capsys, here, back, "--to", "released")
    again = torch.load(back)
    assert again["meta"]["CLASSES"] == CLASSES
    assert again["state_dict"].keys() == light_state("adamixer_r50").keys()


def test_what_safetensors_cannot_hold_is_named(tmp_path, capsys):
    torch.save({"model": {"a": torch.ones(1, dtype=torch.complex128)}}, tmp_path / "here.pth")
    target = tmp_path / "here.safetensors"
    assert f"cannot write {target}: " in refused(capsys, tmp_path / "here.pth", target)
    assert not target.exists()


def test_names_of_several_processes_convert(tmp_path, capsys):
    state = {f"module.{name}": value for name, value in light_state("r50").items()}
    text = run(capsys, save_released(tmp_path, state), tmp_path / "here.pth")
    assert "570 entries converted" in text


@pytest.mark.parametrize("meta", [None, "text", {}, {"CLASSES": "cat"}, {"CLASSES": None}])
def test_any_meta_data(meta, tmp_path, capsys):
    """Without names, mmdet gets none rather than an empty list."""
    source, here, back = (str(tmp_path / f"{name}.pth") for name in ("in", "here", "back"))
    torch.save({"meta": meta, "state_dict": light_state("adamixer_r50")}, source)
    text = run(capsys, source, here)
    has_name = meta == {"CLASSES": "cat"}
    assert ("1 class names kept: cat\n" in text) == has_name
    run(capsys, here, back, "--to", "released")
    assert torch.load(back)["meta"] == ({"CLASSES": ("cat",)} if has_name else {})


def test_what_has_no_place_is_reported(tmp_path, capsys):
    source = save_released(tmp_path, light_state("r50", **{"mask_head.weight": torch.ones(1)}),
                           optimizer={"state": {}})
    text = run(capsys, source, tmp_path / "here.pth")
    assert "1 entries have no place and were left out:\n  mask_head.weight\n" in text
    assert "left out beside the weights: optimizer" in text
    assert "mask_head.weight" not in torch.load(tmp_path / "here.pth")["model"]


@pytest.mark.parametrize(
    "name",
    [
        "neck.gn_out.weight",
        "backbone.layer2.1.bn3.running_var",
        "roi_head.bbox_head.4.dynamic_conv.axis_atten_list.2.bias",
        "rpn_head.init_content_features.weight",
        "roi_head.bbox_head.0.dynamic_conv.mix_bias.weight",
        "roi_head.bbox_head.5.feat_extractor.gen_one_d.0.bias",
    ],
)
def test_a_missing_entry_stops_the_conversion(name, tmp_path, capsys):
    state = light_state("r50")
    del state[name]
    message = refused(capsys, save_released(tmp_path, state), tmp_path / "here.pth")
    assert f"{project_name(name)} is missing" in message
    assert not (tmp_path / "here.pth").exists()


def test_an_ablation_with_vanilla_points_is_no_adamixer(tmp_path, capsys):
    """It has no released form, and says what is missing for one."""
    weights = convert_released(light_state("r50")).weights
    for stage in range(6):
        for leaf in ("weight", "bias"):
            points = f"decoder.stages.{stage}.points"
            weights[f"{points}.offsets.{leaf}"] = weights.pop(f"{points}.first_offsets.{leaf}")
    torch.save({"model": weights}, tmp_path / "here.pth")
    message = refused(capsys, tmp_path / "here.pth", tmp_path / "back.pth", "--to", "released")
    assert "no whole StageInteractor: decoder.stages.0.points.first_offsets.bias" in message


def test_an_entry_of_another_shape_stops_the_conversion(tmp_path, capsys):
    source = save_released(tmp_path, light_state("r50", **{"neck.gn_out.weight": torch.ones(3)}))
    assert "neck.norm.weight is of shape (3,)" in refused(capsys, source, tmp_path / "here.pth")


def test_first_boxes_that_were_trained_are_refused(tmp_path, capsys):
    """They do not exist here: the model would compute something else."""
    boxes = torch.tensor([0.5, 0.5, 1, 1]).repeat(100, 1)
    boxes[7, 2] -= 0.01
    boxes = {"rpn_head.init_proposal_bboxes.weight": boxes}
    source = save_released(tmp_path, light_state("adamixer_r50", **boxes))
    assert "boxes of their own" in refused(capsys, source, tmp_path / "here.pth")


def test_what_cannot_be_converted_is_named(tmp_path, capsys):
    source, here = save_released(tmp_path, light_state("r50")), tmp_path / "here.pth"
    assert "no checkpoint nowhere.pth" in refused(capsys, "nowhere.pth", here)
    assert "exists already" in refused(capsys, source, source)
    assert "no folder" in refused(capsys, source, tmp_path / "missing/here.pth")
    assert "ends in .pth" in refused(capsys, source, tmp_path / "here.pkl")
    assert "ends in .pth" in refused(capsys, source, "")
    assert "is a released checkpoint already" in refused(capsys, source, here, "--to", "released")
    run(capsys, source, here)
    assert "is not a released" in refused(capsys, here, tmp_path / "twice.pth")
    torch.save({"model": {"backbone.body.conv_stem.weight": torch.ones(1)}}, tmp_path / "lite.pth")
    message = refused(capsys, tmp_path / "lite.pth", tmp_path / "x.pth", "--to", "released")
    assert "the backbone is none of the published" in message
    torch.save([1, 2], tmp_path / "list.pth")
    message = refused(capsys, tmp_path / "list.pth", tmp_path / "y.pth")
    assert "holds a list instead of weights" in message
    torch.save({"state_dict": {"a": "b"}}, tmp_path / "text.pth")
    message = refused(capsys, tmp_path / "text.pth", tmp_path / "y.pth")
    assert "text.pth does not hold weights" in message
    assert not list(tmp_path.glob("*.tmp"))


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_file_that_needs_code_is_refused_with_the_reason(tmp_path, capsys):
    state = light_state("r50") | {"trap": Malicious(str(tmp_path / "trace"))}
    message = refused(capsys, save_released(tmp_path, state), tmp_path / "here.pth")
    assert "it refers to" in message and "never code" in message
    assert not (tmp_path / "trace").exists() and not (tmp_path / "here.pth").exists()


def test_swin_patch_merging_computes_what_the_release_computes():
    """The release unfolds 2x2 patches channel by channel; Detectron2 concatenates four maps."""
    channels, released = 3, {}
    shapes = {"norm.weight": (12,), "norm.bias": (12,), "reduction.weight": (6, 12)}
    for leaf, shape in shapes.items():
        released[f"backbone.stages.0.downsample.{leaf}"] = torch.randn(shape)
    merging = PatchMerging(channels)
    merging.load_state_dict({
        name.removeprefix("backbone.stages.0.downsample."): swap_merged_patches(name, value)
        for name, value in released.items()
    })
    maps = torch.randn(2, channels, 6, 8)
    patches = F.unfold(maps, 2, stride=2).transpose(1, 2)  # (B, 12, 4 C)
    norm_weight, norm_bias, reduction = released.values()
    expected = F.layer_norm(patches, (12,), norm_weight, norm_bias) @ reduction.T
    torch.testing.assert_close(merging(maps.flatten(2).transpose(1, 2), 6, 8), expected)
    for name, value in released.items():
        ours = name.replace("stages", "layers")
        assert torch.equal(swap_merged_patches(ours, swap_merged_patches(name, value)), value)
