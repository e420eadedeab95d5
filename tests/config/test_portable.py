"""Promises of files that travel: a checkpoint alone is enough, and nothing in it is executed."""

import functools
import json
import os
import re
import time
from pathlib import Path

import convert
import demo
import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from PIL import Image

from projects.stageinteractor.checkpoint import ModelFile, SafeCheckpointer
from projects.stageinteractor.config.overrides import load_config
from projects.stageinteractor.config.portable_config import encode, parse_portable, portable_config
from projects.stageinteractor.errors import UserError
from projects.stageinteractor.inference import load_detector
from projects.stageinteractor.inference import opening as loading
from support.models import CONFIGS
from support.portable_files import CLASSES, changed, save, small
from support.released_files import light_state, save_released
from support.saved_models import save_model


def picture():
    return np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)


# ---- what is written is what is read


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_travels_whole(path):
    cfg = load_config(str(path), [])
    text = portable_config(cfg, CLASSES)
    parsed, categories = parse_portable(text, "file")
    if "retinanet" not in path.stem:  # whose shapes are made as it is read
        assert encode(parsed.model) == encode(cfg.model)
    for key in ("augmentations", "image_format"):
        assert encode(parsed.dataloader.test.mapper[key]) == encode(cfg.dataloader.test.mapper[key])
    assert categories == CLASSES
    if "lite0" in path.stem:
        assert str(instantiate(parsed.model)) == str(instantiate(cfg.model))


def test_overrides_travel_too():
    override = "model.decoder.mixing=projects.stageinteractor.modeling.ablations.DynamicOnlyMixing"
    path = next(c for c in CONFIGS if c.stem == "stageinteractor_lite0_trees")
    cfg = load_config(str(path), [override, "model.detections_per_image=7"])
    model = instantiate(parse_portable(portable_config(cfg, CLASSES), "file").cfg.model)
    assert model.detections_per_image == 7
    assert type(model.decoder.stages[0].mixing).__name__ == "DynamicOnlyMixing"


def test_category_ids_of_any_kind_travel():
    classes = [{"id": i, "name": "a"} for i in (-1, 2**70, 1.5, "a b")]
    parsed = parse_portable(portable_config(small(), classes), "file")
    assert parsed.categories == classes


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_checkpoint_alone_is_enough(tmp_path, monkeypatch, suffix):
    """In a folder without any data."""
    cfg = small()
    file = save(tmp_path, cfg)
    if suffix == ".safetensors":
        convert.main(["checkpoint", file, str(tmp_path / "model.safetensors")])
        file = str(tmp_path / "model.safetensors")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    alone = load_detector(file, overrides=["train.device=cpu"])
    assert alone.categories == CLASSES and alone.class_names == ["cat", "a\"ö\n"]
    (augmentation,) = alone.augmentations.augs
    assert augmentation.short_edge_length in (240, [240], (240, 240), [240, 240])
    model = instantiate(cfg.model).eval()
    SafeCheckpointer(model).load(file)
    prepared = alone.prepare(picture())
    assert prepared["image"].shape == (3, 240, 336)
    with torch.no_grad():
        expected = model([prepared])[0]["instances"]
    found = alone(picture())
    assert len(found) == len(expected) > 5
    assert torch.allclose(found.scores, expected.scores, atol=1e-4)


def test_the_demo_needs_no_config(tmp_path):
    file = save(tmp_path, small())
    Image.fromarray(picture()).save(tmp_path / "a.png")
    demo.main(["--checkpoint", file, "--input", str(tmp_path / "a.png"), "--threshold", "0",
               "--output", str(tmp_path / "out"), "train.device=cpu"])
    found = json.loads((tmp_path / "out/detections.json").read_text())
    assert found["categories"] == CLASSES and len(found["annotations"]) > 5


def test_overrides_change_a_checkpoints_own_config(tmp_path):
    file = save(tmp_path, small())
    detector = load_detector(file, overrides=["model.detections_per_image=3", "train.device=cpu"])
    assert len(detector(picture())) == 3
    with pytest.raises(UserError, match="unknown config key model.detections: did you mean"):
        load_detector(file, overrides=["model.detections=3"])


@pytest.mark.parametrize("override, message", [
    ("model.backbone.model_name=nonsense", "with these overrides: RuntimeError: Unknown model"),
    ("model.pixel_mean=[1,2]", "with these overrides: pixel_mean and pixel_std have three"),
    ("model.detections_per_image=-3", "detections_per_image=-3: at least 1"),
    ("model.size_divisibility=-32", "size_divisibility=-32 is negative"),
    ("dataloader.test.mapper.image_format=bgr", "image_format=bgr: RGB or BGR"),
])
def test_a_wrong_value_is_named_and_the_file_not_blamed(tmp_path, override, message):
    with pytest.raises(UserError, match=message) as caught:
        load_detector(save(tmp_path, small()), overrides=["train.device=cpu", override])
    assert "version" not in str(caught.value)


@pytest.mark.parametrize("lack", [MemoryError(), OSError(5, "a disk"), torch.OutOfMemoryError()])
def test_a_lack_of_memory_is_no_mistake_of_the_config(tmp_path, monkeypatch, lack):
    def load(*_):
        raise lack

    monkeypatch.setattr(loading, "fill", load)
    with pytest.raises(type(lack)) as caught:
        load_detector(save(tmp_path, small()))
    assert caught.value is lack


def test_a_converted_checkpoint_carries_its_config(tmp_path):
    released, here = str(tmp_path / "released.pth"), str(tmp_path / "here.pth")
    for meta, first, last_id in (({}, "person", 90), (None, "class 0", 80)):
        save_released(tmp_path, light_state("r50"), **({} if meta is None else {"meta": meta}))
        convert.main(["checkpoint", released, here])
        cfg, categories = parse_portable(ModelFile.read(here).config, "file")
        assert cfg.model.query_generator.num_queries == 100
        # Without names of its own, COCO's, whose ids have gaps.
        assert categories[0]["name"] == first and categories[79]["id"] == last_id
        os.remove(here)


# ---- nothing is executed


MARK = "executed"


def run(path):
    """What a hostile file would like to be called."""
    Path(path).write_text("!")


def hostile(tmp_path):
    """Changes to a model's config that would make a careless reader run code."""
    mark = str(tmp_path / MARK)
    inner = "detectron2.layers.wrappers"  # it imports torch
    yield {"_target_": "os.system", "command": f"touch {mark}"}
    yield {"_target_": "tests.test_portable.run", "path": mark}
    yield {"_target_": "builtins.exec", "object": f"open({mark!r}, 'w')"}
    yield {"_target_": f"{inner}.torch.load", "f": mark}
    yield {"_target_": f"{inner}.torch.hub.load", "repo_or_dir": mark, "model": "x"}
    yield {"_target_": "detectron2.utils.env.setup_environment"}
    yield {"_target_": "detectron2.modeling.mmdet_wrapper.MMDetBackbone", "backbone": mark}
    yield {"_target_": "detectron2.config.LazyConfig.load", "filename": mark}
    yield {"_target_": "projects.stageinteractor.engine.load_config", "config_file": mark}
    yield {"_target_": {"_name_": "os.system"}, "command": f"touch {mark}"}
    yield {"_target_": {"_target_": "os.system", "command": f"touch {mark}"}}
    yield {"_target_": "${..hidden}", "command": f"touch {mark}"}
    yield {"_name_": "os.system"}
    yield {"_dataclass_": "os.system", "command": f"touch {mark}"}
    yield "${oc.env:HOME}"
    yield "${..dollar}{oc.env${..colon}HOME}"  # put together when it is resolved
    yield "$"
    module = "torch.nn.modules.module.Module"
    yield {"_target_": f"{module}.__setstate__", "self": "${..hidden}", "state": {"a": 1}}
    yield {"_target_": "torch.nn.modules.container.ParameterDict", "parameters": [["a", 1]]}
    yield {"_target_": "detectron2.modeling.ResNet.__init__", "stem": mark}
    yield {"_target_": "detectron2.layers.ShapeSpec.__class__", "name": mark}


@pytest.mark.parametrize("number", range(21))
def test_a_config_in_a_file_executes_nothing(tmp_path, number):
    (part,) = [part for i, part in enumerate(hostile(tmp_path)) if i == number]
    cfg = small()
    content = json.loads(portable_config(cfg, CLASSES))
    content["model"]["hidden"] = "os.system"
    content["model"]["backbone"]["frozen_modules"] = part
    file = save(tmp_path, cfg, json.dumps(content))
    with pytest.raises(UserError, match="config in .*model.pth"):
        load_detector(file)
    content["model"]["backbone"]["frozen_modules"] = []
    content["preprocessing"]["augmentations"] = [part]
    file = save(tmp_path, cfg, json.dumps(content))
    with pytest.raises(UserError, match="config in .*model.pth"):
        load_detector(file)
    assert not (tmp_path / MARK).exists()


def test_a_backbone_of_a_strangers_hub_is_not_fetched(tmp_path):
    cfg = small()
    content = json.loads(portable_config(cfg, CLASSES))
    content["model"]["backbone"]["model_name"] = "hf-hub:somebody/model"
    with pytest.raises(UserError, match="hf-hub:somebody/model"):
        load_detector(save(tmp_path, cfg, json.dumps(content)))




@pytest.mark.parametrize("key, value", [
    ("model.new", 1),
    ("model._target_", None),
    ("model.backbone.model_name", "nope"),
    ("model.decoder.num_classes", -3),
    ("model.decoder.num_classes", 10**15),
    ("model.decoder.embed_dim", "${...none}"),
    ("model.decoder.strides", 5),
    ("model_ema", None),
    ("model_ema", {}),
    ("preprocessing", []),
    ("preprocessing.image_format", "XYZ"),
    ("preprocessing.augmentations", None),
    ("preprocessing.augmentations", ["x"]),
    ("preprocessing.augmentations", [{"_target_": "detectron2.layers.ShapeSpec"}]),
    ("preprocessing.augmentations", [{"_target_": "detectron2.data.transforms.Resize", "x": 1}]),
    ("categories", None),
    ("categories", "abc"),
    ("categories", [1, 2]),
    ("categories", [{"id": 1}]),
    ("categories", []),
])
def test_a_config_of_another_version_is_told(tmp_path, key, value):
    """In one or two lines, without a traceback."""
    text = changed(key, value)
    if "num_classes" in key:  # else it follows from the names
        text = json.dumps({**json.loads(text), "categories": []})
    file = save(tmp_path, small(), text, names=())
    if key == "categories" and value == []:
        assert load_detector(file, overrides=["train.device=cpu"]).class_names == ["0", "1"]
        return
    with pytest.raises(UserError) as caught:
        load_detector(file)
    assert len(str(caught.value).splitlines()) <= 2


def doubled(depth):
    """Every part stands for the next one twice."""
    parts = {f"p{i}": ["${model.p" + f"{i + 1}" + "}"] * 2 for i in range(depth)}
    return {**json.loads(changed("model.new", 1))["model"], **parts, f"p{depth}": 1}


def doubled_paths(depth):
    """The path of every reference leads through the next one twice."""
    model = json.loads(changed("model.new", 1))["model"]
    parts = {f"p{i}": {"x": f"${{model.p{i + 1}.x.x}}"} for i in range(depth)}
    return {**model, **parts, f"p{depth}": {"x": {"x": {"x": 1}}}}


@pytest.mark.parametrize("key, value", [
    ("model", doubled(40)),
    ("model", doubled_paths(40)),
    ("model.new", {"again": "${model.new}"}),
    ("model.new", "${model.new}"),
    ("model.new", [0] * 3000),
    ("model.new", [[0] * 900, *["${.0}"] * 3]),
    ("model.size_divisibility", 10**9),
    ("model.size_divisibility", 2048),
    ("model.decoder.embed_dim", 10**6),
    ("model.decoder.embed_dim", float("inf")),
    ("model.decoder.embed_dim", float("nan")),
    ("model.pixel_mean", [0, 10**400, 0]),
    ("preprocessing.augmentations",
     [{"_target_": "detectron2.data.transforms.Resize", "shape": [20_000, 20]}]),
    ("model_ema.decay", -1e9),
])
def test_every_number_of_a_strangers_config_has_a_bound(tmp_path, key, value):
    file = save(tmp_path, small(), changed(key, value) if "." in key else json.dumps(
        {**json.loads(portable_config(small(), CLASSES)), key: value}
    ))
    begin = time.monotonic()
    with pytest.raises(UserError, match="config in .*model.pth .*--config-file") as caught:
        load_detector(file)
    assert len(str(caught.value).splitlines()) == 1 and time.monotonic() - begin < 20


@pytest.mark.parametrize("key, value", [
    ("model.decoder.embed_dim", 99_968),
    ("model.decoder.feature_dim", 99_968),
    ("model.query_generator.num_queries", 100_000),
    ("model.decoder.points_per_stage", [8] * 1500),
])
def test_a_model_that_is_not_the_files_takes_no_memory(tmp_path, monkeypatch, key, value):
    """It would take gigabytes, which only happen in the second half of `load_detector`."""
    monkeypatch.setattr(loading, "build_model", None)
    file = save(tmp_path, small(), changed(key, value))
    with pytest.raises(UserError) as caught:
        load_detector(file)
    assert re.search("does not fit the config|modules", str(caught.value))


def test_a_few_numbers_are_not_repeated_to_gigabytes(tmp_path, monkeypatch):
    file = save(tmp_path, small())
    content = torch.load(file)
    for name, value in content["model"].items():
        content["model"][name] = torch.zeros((), dtype=value.dtype).expand(value.shape)
    torch.save(content, file)
    monkeypatch.setattr(loading, "build_model", None)
    with pytest.raises(UserError, match="takes .* MB, many times the file"):
        load_detector(file)


@pytest.mark.parametrize("name", [
    "US$", "${model}", "$", "${", "${oc.env:HOME}", "{}", "_target_", "os.system", "a\\${b}", "'\"",
    "two\nlines", "\U0001f408", "???", "", "null", "key=value",
])
def test_names_are_data(tmp_path, name):
    cfg, classes = small(), [{"id": "x", "name": name}, {"id": -(2**70), "name": "cat"}]
    text = portable_config(cfg, classes)
    assert parse_portable(text, "file").categories == classes
    file = save(tmp_path, cfg, text, [name, "cat"])
    opened = ModelFile.read(file)
    resolved, found = loading.resolve_config(opened, None, ["model.decoder.ffn_dim=32"])
    assert found == classes and resolved.model.decoder.num_classes == 2


def test_a_config_that_cannot_be_read_is_not_needed_beside_another(tmp_path):
    """Its ids of classes are all that it would be asked for."""
    file = save(tmp_path, small(), "{")
    path = str(next(c for c in CONFIGS if c.stem == "stageinteractor_lite0_bccd"))
    _, classes = loading.resolve_config(ModelFile.read(file), path, ["train.device=cpu"])
    assert [item["name"] for item in classes] == ["cat", "a\"ö\n"]


def test_a_moving_average_is_what_is_kept(tmp_path):
    cfg = small()
    cfg.train.model_ema.enabled = True
    file = save(tmp_path, cfg)
    checkpoint = torch.load(file)
    average = {name: value + (value.dtype.is_floating_point * 0.01)
               for name, value in checkpoint["model"].items()}
    checkpoint["model_ema"] = {
        "n_averaged": torch.tensor(3), **{f"module.{k}": v for k, v in average.items()}
    }
    torch.save(checkpoint, file)
    convert.main(["checkpoint", file, str(tmp_path / "kept.safetensors")])
    found = [
        load_detector(path, overrides=["train.device=cpu"])(picture())
        for path in (file, tmp_path / "kept.safetensors")
    ]
    assert torch.equal(found[0].scores, found[1].scores)
    cfg.train.model_ema.enabled = False
    (tmp_path / "raw").mkdir()
    raw = load_detector(save(tmp_path / "raw", cfg), overrides=["train.device=cpu"])(picture())
    assert not torch.equal(found[0].scores, raw.scores)


@pytest.mark.parametrize("text, message", [
    ("", "model.pth has no config of its own: give --config-file FILE"),
    ("{", "config in .*model.pth cannot be read: give --config-file"),
    ("[]", "cannot be read"),
    ("{}", "cannot be read"),
    ("[" * 100_000, "cannot be read"),
    ('{"model": 1, "preprocessing": {}, "model_ema": {}, "categories": []}', "cannot be read"),
])
def test_a_config_that_is_none_is_told(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        load_detector(save(tmp_path, small(), text))


def test_a_file_of_before_asks_for_the_config(tmp_path):
    path = next(c for c in CONFIGS if c.stem == "stageinteractor_lite0_bccd")
    file = save_model(tmp_path / "old.pth", str(path), ["model.decoder.num_classes=2"], ["a", "b"])
    with pytest.raises(UserError, match="has no config of its own"):
        load_detector(file)
    assert load_detector(file, str(path), ["train.device=cpu"]).class_names == ["a", "b"]


class OwnBackbone(torch.nn.Module):
    """Somebody's own, which is not looked up in a file."""


def test_a_model_of_somebodys_own_is_not_written_down(tmp_path):
    cfg = small()
    cfg.model.backbone = L(OwnBackbone)()
    text = portable_config(cfg, CLASSES)
    assert json.loads(text)["model"] is None and json.loads(text)["categories"] == CLASSES
    file = save(tmp_path, small(), text)
    with pytest.raises(UserError, match="no model: it needs .*OwnBackbone\n.*give --config-file"):
        load_detector(file)


def test_a_run_is_not_stopped_by_what_cannot_be_written_down():
    """Training asks for the text; what is somebody's own only makes it shorter."""
    cfg = small()
    cfg.model.decoder.refine = functools.partial(OwnBackbone)  # has no name
    assert json.loads(portable_config(cfg, CLASSES))["model"] is None
    cfg.dataloader.test.mapper.augmentations = [functools.partial(OwnBackbone)]
    assert portable_config(cfg, CLASSES) == ""
    del cfg.dataloader.test.mapper.image_format
    assert portable_config(cfg, CLASSES) == ""


def test_a_runs_own_config_file_travels_as_well(tmp_path):
    """Where classes are texts."""
    for path in CONFIGS:
        LazyConfig.save(load_config(str(path), []), str(tmp_path / "config.yaml"))
        cfg = load_config(str(tmp_path / "config.yaml"), [])
        parsed = parse_portable(portable_config(cfg, CLASSES), "file").cfg
        if "lite0" in path.stem:
            assert str(instantiate(parsed.model)) == str(instantiate(cfg.model))


def test_ids_are_the_checkpoints_where_its_classes_are(tmp_path):
    """Also with a config whose data set is another one, or is not there."""
    file = save(tmp_path, small())
    path = next(c for c in CONFIGS if c.stem == "stageinteractor_lite0_bccd")
    options = ["train.device=cpu", "model.decoder.embed_dim=32", "model.decoder.feature_dim=16",
               "model.decoder.ffn_dim=32", "model.query_generator.num_queries=12"]
    assert load_detector(file, str(path), options).categories == CLASSES
