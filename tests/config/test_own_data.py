"""Your own COCO-format data with any config: files from the command line, the rest from them."""

import json
import math
import re
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from omegaconf import OmegaConf

from projects.stageinteractor.checkpoint import SafeCheckpointer
from projects.stageinteractor.config.building import resolve_detections
from projects.stageinteractor.config.overrides import load_config
from projects.stageinteractor.config.own_data import resolve_dataset
from projects.stageinteractor.errors import UserError
from support.runs import environment
from support.shapes import make_shapes

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "projects/stageinteractor/configs"
SMALL = CONFIGS / "stageinteractor_lite0_trees.py"
BCCD = CONFIGS / "stageinteractor_lite0_bccd.py"
TINY = [
    "train.init_checkpoint=''",
    "train.device=cpu",
    "model.decoder.points_per_stage=[8,8]",
    "model.decoder.embed_dim=32",
    "model.decoder.feature_dim=16",
    "model.query_generator.num_queries=10",
    "dataloader.train.total_batch_size=2",
]


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    """A training split with an empty image, and another validation split."""
    root = tmp_path_factory.mktemp("own data")  # a space in the path
    train = make_shapes(root / "train", images=6, size=(64, 96), empty=True)
    val = make_shapes(root / "val", images=3, size=(64, 96), seed=1)
    return train, val


def files(splits, **extra):
    train, val = splits
    options = {"train": train, "val": val, "images": train.parent / "images",
               "val_images": val.parent / "images", **extra}
    return [f"dataset.{key}='{value}'" if isinstance(value, Path) else f"dataset.{key}={value}"
            for key, value in options.items() if value is not None]


def resolved(config, overrides, training=True):
    cfg = load_config(str(config), overrides)
    given = {text.partition("=")[0] for text in overrides}
    return cfg, resolve_dataset(cfg, given, training=training)


@pytest.mark.parametrize("name, key", [
    ("stageinteractor_lite0_bccd", "model.detections_per_image"),
    ("retinanet_lite0_bccd", "model.max_detections_per_image"),
    ("faster_rcnn_lite0_bccd", "model.roi_heads.box_predictor.test_topk_per_image"),
])
def test_the_model_keeps_the_detections_that_count(name, key):
    limit = "dataloader.evaluator.max_dets_per_image"
    cfg = load_config(str(CONFIGS / f"{name}.py"), [f"{limit}=250"])
    resolve_detections(cfg, {limit})
    assert OmegaConf.select(cfg, key) == 250
    cfg = load_config(str(CONFIGS / f"{name}.py"), [f"{limit}=250", f"{key}=7"])
    resolve_detections(cfg, {limit, key})
    assert OmegaConf.select(cfg, key) == 7
    for wrong in ("0", "many", "1.5", "true"):
        cfg = load_config(str(CONFIGS / f"{name}.py"), [f"{limit}={wrong}"])
        with pytest.raises(UserError, match=f"{limit}={wrong}".replace("true", "True")):
            resolve_detections(cfg, {limit})


def train_net(*arguments, config=SMALL, expect=0):
    command = [sys.executable, "tools/train_net.py", "--config-file", config, *arguments]
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300,
    )
    text = done.stdout + done.stderr
    assert done.returncode == expect, text[-3000:]
    return text


@pytest.mark.parametrize("config, num_classes", [
    ("stageinteractor_r50_12ep", "decoder.num_classes"),
    ("stageinteractor_swin_s_300q_36ep", "decoder.num_classes"),
    ("adamixer_r50_12ep", "decoder.num_classes"),
    ("stageinteractor_lite0_trees", "decoder.num_classes"),
    ("retinanet_lite0_bccd", "num_classes"),
    ("faster_rcnn_lite0_bccd", "roi_heads.num_classes"),
])
def test_files_and_class_count_reach_every_config(splits, config, num_classes):
    cfg, _ = resolved(CONFIGS / f"{config}.py", files(splits))
    node = cfg.model
    for name in num_classes.split("."):
        node = node[name]
    assert node == 3
    assert len(instantiate(cfg.dataloader.train.dataset)) == 5
    assert len(instantiate(cfg.dataloader.test.dataset)) == 3
    assert cfg.dataloader.evaluator.dataset_name == str(splits[1])


def test_a_config_of_ones_own_may_name_the_files(splits, tmp_path):
    """Beside its parent, as all configs are; the command line overrules it."""
    named = {"train": str(splits[0]), "val": str(splits[1]),
             "images": str(splits[0].parent / "images"),
             "val_images": str(splits[1].parent / "images")}
    file = CONFIGS / "test_own_data_config.py"
    try:
        file.write_text(
            "from .stageinteractor_r50_12ep import dataloader, lr_multiplier, model, optimizer, "
            f"train\n\ndataset = {named!r}\n"
        )
        cfg, _ = resolved(file, ["dataset.keep_empty=true"])
    finally:
        file.unlink()
    assert cfg.model.decoder.num_classes == 3
    assert len(instantiate(cfg.dataloader.train.dataset)) == 6


def test_evaluation_needs_the_validation_split_only(splits):
    cfg, _ = resolved(SMALL, files(splits, train=None), training=False)
    assert cfg.model.decoder.num_classes == 3
    assert "trees" in cfg.dataloader.train.dataset.json_file


@pytest.mark.parametrize("keep, images", [("false", 5), ("true", 6)])
def test_images_without_objects_are_kept_or_dropped(splits, keep, images):
    cfg, _ = resolved(SMALL, files(splits, keep_empty=keep))
    assert len(instantiate(cfg.dataloader.train.dataset)) == images


def test_images_are_looked_for_beside_the_json_file(splits, tmp_path):
    """Where no folder is given."""
    for file in splits:
        coco = json.loads(file.read_text())
        for image in coco["images"]:
            image["file_name"] = f"images/{image['file_name']}"
        (file.parent / "beside.json").write_text(json.dumps(coco))
    beside = [file.parent / "beside.json" for file in splits]
    cfg, _ = resolved(SMALL, files(beside, images=None, val_images=None))
    for split, file in zip(("train", "test"), beside):
        records = instantiate(cfg.dataloader[split].dataset)
        assert all(Path(record["file_name"]).is_file() for record in records)
        assert cfg.dataloader[split].dataset.image_root == str(file.parent)


@pytest.mark.parametrize("options, message", [
    ({"val": None}, "dataset.val is missing"),
    ({"train": None}, "dataset.train is missing"),
    ({"images": 2024}, "dataset.images=2024: .*quotes"),
    ({"train": "[a.json,b.json]"}, "dataset.train=.*: not a path"),
    ({"train": None, "val": None}, "dataset.images needs dataset.train=FILE and dataset.val=FILE"),
])
def test_what_is_missing_is_named(splits, options, message):
    with pytest.raises(UserError, match=message):
        resolved(SMALL, files(splits, **options))


def test_a_mistyped_key_of_a_config_is_refused(splits):
    cfg = load_config(str(SMALL), files(splits))
    cfg.dataset.keep_emtpy = True
    with pytest.raises(UserError, match="dataset.keep_emtpy: .*train, val"):
        resolve_dataset(cfg, set(), training=True)


def test_a_class_count_on_the_command_line_stands(splits):
    """And is compared with the data when that is loaded, by train_net.py."""
    cfg, _ = resolved(SMALL, [*files(splits), "model.decoder.num_classes=7"])
    assert cfg.model.decoder.num_classes == 7


def damage(file, folder):
    """A copy of a COCO file with three mistakes of different kinds."""
    coco = json.loads(file.read_text())
    coco["images"][0]["file_name"] = "gone.png"
    coco["annotations"][1]["bbox"][2] = 0
    coco["annotations"][2]["category_id"] = 77
    path = folder / "damaged.json"
    path.write_text(json.dumps(coco))
    return path


def test_all_mistakes_come_before_training(splits, tmp_path):
    """From the real command: no traceback, nothing written; each with its id."""
    damaged = damage(splits[0], tmp_path)
    options = [*TINY, f"train.output_dir={tmp_path / 'out'}"]
    given = files((damaged, splits[1]), images=splits[0].parent / "images")
    text = train_net(*given, *options, expect=1)
    assert "mistakes in the data set: 3" in text and "Traceback" not in text
    for trace in ("gone.png", "annotation 2", "annotation 3", "77"):
        assert trace in text, trace
    assert not (tmp_path / "out").exists()


def test_mistakes_can_be_allowed(splits, tmp_path):
    """They are still said; what they say stays out of training where it can."""
    coco = json.loads(splits[0].read_text())
    coco["annotations"][1]["bbox"][2] = 0
    damaged = tmp_path / "damaged.json"
    damaged.write_text(json.dumps(coco))
    allowed = files((damaged, splits[1]), allow_mistakes="true")
    cfg, remarks = resolved(SMALL, allowed)
    assert "annotation 2" in remarks
    count = sum(len(r["annotations"]) for r in instantiate(cfg.dataloader.train.dataset))
    assert count == len(coco["annotations"]) - 1


def test_files_of_different_classes_are_never_allowed(splits, tmp_path):
    """And no number of classes that nobody has set is blamed."""
    coco = json.loads(splits[1].read_text())
    coco["categories"] = coco["categories"][:1]
    coco["annotations"] = [a for a in coco["annotations"] if a["category_id"] == 1]
    fewer = tmp_path / "fewer.json"
    fewer.write_text(json.dumps(coco))
    for allow in ("false", "true"):
        with pytest.raises(UserError) as caught:
            resolved(SMALL, files((splits[0], fewer), val_images=splits[1].parent / "images",
                                 allow_mistakes=allow))
        assert "num_classes" not in str(caught.value)
    assert f"{splits[0]} has 3 classes and {fewer} has 1 classes" in str(caught.value)


def test_what_the_model_cannot_find_is_remarked_on(splits):
    """Images become `size` pixels high: 64 x 96 before."""
    def remarks(size, *options):
        key = "dataloader.test.mapper.augmentations.0"
        options = [f"{key}.short_edge_length={size}", f"{key}.max_size=999", *options]
        return resolved(BCCD, [*files(splits), *options])[1]

    objects = json.loads(splits[0].read_text())["annotations"]
    numbers = Counter(item["image_id"] for item in objects)
    most = max(numbers.values())
    assert not re.search("queries|small objects", remarks(640))
    text = remarks(640, f"model.query_generator.num_queries={most - 1}")
    images = sum(number == most for number in numbers.values())
    assert f"{splits[0]}: {images} images have more than {most - 1} objects" in text
    assert f"model.query_generator.num_queries={most - 1}" in text
    sizes = [math.sqrt(item["bbox"][2] * item["bbox"][3]) for item in objects]
    scale = 8 / statistics.median_low(sizes) * 0.999
    small = sum(size * round(scale * 64) / 64 < 8 for size in sizes)
    assert f"{splits[0]}: {small} of {len(sizes)} objects" in remarks(round(scale * 64))
    assert "queries" not in resolved(CONFIGS / "retinanet_lite0_bccd.py", files(splits))[1]


def test_files_that_cannot_be_read_are_never_allowed(splits, tmp_path):
    broken = tmp_path / "broken.json"
    broken.write_text(splits[1].read_text()[:100])
    with pytest.raises(UserError, match="broken.json: line 1 column"):
        resolved(SMALL, files((splits[0], broken), allow_mistakes="true"))


def test_train_evaluate_and_fine_tune(splits, tmp_path):
    """With nothing but files; then onto two classes, keeping all but the classifiers."""
    out = tmp_path / "three"
    options = [*files(splits), *TINY, "train.epochs=1"]
    text = train_net(*options, f"train.output_dir={out}",
                     config=SMALL.parent / "stageinteractor_lite0_trees.py")
    assert "1 epochs of 5 images, 2 a step: 3 iterations" in text
    recorded = LazyConfig.load(str(out / "config.yaml"))
    assert recorded.model.decoder.num_classes == 3
    final = out / "model_final.pth"
    text = train_net("--eval-only", *files(splits, train=None), *TINY,
                     f"train.output_dir={out}", f"train.init_checkpoint={final}")
    assert (out / "eval/coco_instances_results.json").is_file() and "triangle" in text

    renamed = tmp_path / "renamed.json"
    renamed.write_text(splits[1].read_text().replace('"triangle"', '"square"'))
    other = files((splits[0], renamed), train=None, val_images=splits[1].parent / "images")
    text = train_net("--eval-only", *other, *TINY, f"train.output_dir={out}",
                     f"train.init_checkpoint={final}", expect=1)
    assert "number 2 is triangle there and square in the data" in text and "Traceback" not in text

    two = []
    for file in splits:
        coco = json.loads(file.read_text())
        coco["categories"] = coco["categories"][:2]
        coco["annotations"] = [a for a in coco["annotations"] if a["category_id"] < 3]
        two.append(tmp_path / f"{file.parent.name}.json")
        two[-1].write_text(json.dumps(coco))
    text = train_net(*files(two, images=splits[0].parent / "images",
                            val_images=splits[1].parent / "images"),
                     *TINY, f"train.init_checkpoint={final}", "train.max_iter=1",
                     "optimizer.lr=1e-30", "optimizer.weight_decay=0.0",
                     f"train.output_dir={tmp_path / 'two'}")
    assert "was trained for other classes: number 2 is triangle there and None" in text
    line = "the classifiers of the stages keep 2 of 2 by name (rectangle, circle)"
    assert text.count(line) == 1 and "class_head" not in text.split("Starting training")[0].split(
        "[Checkpointer]")[1]
    before, after = (torch.load(path, weights_only=True)["model"]
                     for path in (final, tmp_path / "two/model_final.pth"))
    kept = {key for key in after if ".class_head.3." in key}
    assert len(kept) == 4 and all(after[key].shape[0] == 2 for key in kept)
    # A learning rate of 1e-30 is lost in every weight but those that were exactly zero.
    for key in after:
        known = before[key][:2] if key in kept else before[key]
        moved = after[key] != known
        assert not known[moved].any() and (after[key][moved].abs() < 1e-29).all()


def test_what_else_does_not_fit_is_counted(tmp_path, caplog):
    """A checkpoint with other classes and another backbone does not pass for a whole one."""
    def model(**changes):
        cfg = load_config(str(SMALL), [*TINY, *(f"{k}={v}" for k, v in changes.items())])
        return instantiate(cfg.model)

    torch.save(
        {"model": model(**{"model.decoder.num_classes": 5, "model.decoder.ffn_dim": 16})
         .state_dict()},
        tmp_path / "other.pth",
    )
    checkpointer = SafeCheckpointer(model())
    checkpointer.logger.propagate = True
    checkpointer.load(str(tmp_path / "other.pth"))
    # Weight and bias of the first linear layer, weight of the second, of two stages.
    assert "has 5 classes, this model 1" in caplog.text and "6 other weights" in caplog.text


def test_another_width_is_not_taken_for_other_classes(tmp_path, caplog):
    def model(**changes):
        cfg = load_config(str(SMALL), [*TINY, *(f"{k}={v}" for k, v in changes.items())])
        return instantiate(cfg.model)

    torch.save({"model": model(**{"model.decoder.embed_dim": 64}).state_dict()}, tmp_path / "m.pth")
    with pytest.raises(UserError, match="does not fit the config: .* have another shape"):
        SafeCheckpointer(model(), strict=True).load(str(tmp_path / "m.pth"))
    checkpointer = SafeCheckpointer(model())
    checkpointer.logger.propagate = True
    checkpointer.load(str(tmp_path / "m.pth"))
    assert "classes, this model" not in caplog.text
