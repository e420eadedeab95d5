"""A run resumes only onto what it was trained on; what else has changed is logged."""

import json
import logging
import shutil

import pytest
import torch
from detectron2.data import MetadataCatalog
from omegaconf import OmegaConf

from projects.stageinteractor.engine import resume
from projects.stageinteractor.engine.resume import (
    RunSettings,
    fingerprint,
    other_images,
    other_parameters,
)
from support.runs import checkpoint_of, metrics


@pytest.fixture
def warnings(caplog):
    resume.LOGGER.propagate = True
    return lambda: [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


@pytest.mark.parametrize("options, messages", [
    ({"dataloader.train.total_batch_size": 4, "train.max_iter": 5}, [
        "4 images a step instead of 2: training continues at iteration 4, with the next images",
    ]),
    ({"optimizer.lr": 0.5, "train.max_iter": 5, "dataloader.train.num_workers": 1}, [
        "the learning rate of the run, 0.0003, stays",
        "5 iterations instead of 8: the schedule is stretched to them",
    ]),
])
def test_a_run_resumes_with_other_settings(
    options, messages, train, train_stopped, tmp_path, warnings
):
    train_stopped(4, tmp_path)
    train(tmp_path, "--resume", **options)
    found = [text for text in warnings() if text.startswith("resuming: ")]
    assert len(found) == len(messages)
    assert all(text.startswith(f"resuming: {said}") for text, said in zip(found, messages))
    final = checkpoint_of(tmp_path)
    assert final["iteration"] + 1 == options["train.max_iter"]
    groups = final["trainer"]["optimizer"]["param_groups"]
    assert {group["initial_lr"] for group in groups} == {3e-4}
    batch = options.get("dataloader.train.total_batch_size", 2)
    assert final["data"]["images"] == 4 * 2 + batch


def settings_of(batch_size=2, epochs=None, max_iter=8):
    return RunSettings(OmegaConf.create({
        "train": {"epochs": epochs, "max_iter": max_iter, "accumulation_steps": 1},
        "dataloader": {"train": {"total_batch_size": batch_size}},
        "optimizer": {"lr": 0.1},
    }), num_images=7)


def test_a_schedule_in_epochs_continues_at_the_same_epoch():
    """7 images, 2 a step: 4 steps an epoch. With 4 a step there are 2, and 3 epochs take 6."""
    settings = settings_of(batch_size=4, epochs=3, max_iter=6)
    settings.load_state_dict(settings_of(epochs=3, max_iter=12).state_dict())
    assert settings.first_iteration(3) == 2
    assert len(settings.changes(2)) == 1  # the other length follows from the batch size
    plain = settings_of(batch_size=4)
    plain.load_state_dict(settings_of().state_dict())
    assert plain.first_iteration(3) == 4


def test_another_number_of_processes_is_logged():
    settings = settings_of()
    settings.load_state_dict({**settings.state_dict(), "processes": 2, "num_images": 9})
    processes, images = settings.changes(4)
    assert processes.startswith("1 processes instead of 2")
    assert images.startswith("7 training images instead of 9")


def changed(annotations, change):
    """The file of a variant of annotations, beside their images."""
    coco = json.loads(annotations.read_text())
    change(coco)
    path = annotations.parent / f"{change.__name__}.json"
    path.write_text(json.dumps(coco))
    return path


def data_of(file):
    return {f"dataloader.{split}.dataset.json_file": file for split in ("train", "test")}


def move_a_box(coco):
    coco["annotations"][0]["bbox"][2] += 1


def drop_an_image(coco):
    image = coco["images"].pop()
    coco["annotations"] = [a for a in coco["annotations"] if a["image_id"] != image["id"]]


def rename_a_class(coco):
    coco["categories"][1]["name"] = "disc"


def swap_classes(coco):
    first, second = coco["categories"][:2]
    first["name"], second["name"] = second["name"], first["name"]


def add_a_class(coco):
    coco["categories"].append({"id": 4, "name": "star"})


@pytest.fixture
def refused(whole, train, tmp_path, capfd):
    """Resumes a copy of the whole run with other options.

    Returns:
        the first line of the error, and whether it offers to accept the changes.
    """
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)

    def refused(state=None, **options):
        if state:
            torch.save(state, folder / "model_final.pth")
        before = metrics(folder)
        with pytest.raises(SystemExit) as ended:
            train(folder, "--resume", **options)
        assert ended.value.code == 1 and metrics(folder) == before
        first, second = capfd.readouterr().err.split("error: ")[1].splitlines()
        assert f"train.init_checkpoint={folder}/" in second
        assert "train.output_dir=NEW_FOLDER" in second
        return first, "train.accept_changes=true" in second

    return refused


@pytest.mark.parametrize("options, parts", [
    ({"model.query_generator.num_queries": 12}, ["(10, ", "(12, "]),
    ({"model.decoder.points_per_stage": "[8,8,8,8]"}, ["decoder.stages.3", "is not there"]),
    ({"model.backbone.frozen_modules": "[]"}, ["backbone.", "is trained"]),
])
def test_another_model_is_not_resumed(options, parts, refused):
    first, may_be_accepted = refused(**options, **{"train.accept_changes": "true"})
    assert all(part in first for part in parts) and not may_be_accepted, first


def test_more_classes_are_not_resumed(mixed_images, refused):
    more = data_of(changed(mixed_images, add_a_class))
    first, may_be_accepted = refused(**more, **{"model.decoder.num_classes": 4})
    assert not may_be_accepted
    assert "class_head" in first and "star" in first and "(3, " in first and "(4, " in first


@pytest.mark.parametrize("change, parts", [
    (move_a_box, ["dataloader.train: 1 with other boxes", "dataloader.test: 1 with other boxes"]),
    (drop_an_image, ["dataloader.train: 1 missing"]),
    (rename_a_class, ["circle", "disc"]),
    (swap_classes, ["rectangle", "circle"]),
])
def test_other_data_is_not_resumed_unless_it_is_accepted(change, parts, mixed_images, refused):
    first, may_be_accepted = refused(**data_of(changed(mixed_images, change)))
    assert all(part in first for part in parts) and may_be_accepted, first


def test_accepted_changes_are_logged_once(mixed_images, whole, train, tmp_path, warnings):
    shutil.copytree(whole, tmp_path / "run")
    data = data_of(changed(mixed_images, move_a_box))
    accepted = {**data, "train.accept_changes": "true", "train.max_iter": 9}
    train(tmp_path / "run", "--resume", **accepted)
    assert sum("train.accept_changes" in text for text in warnings()) == 1
    assert checkpoint_of(tmp_path / "run")["iteration"] == 8
    train(tmp_path / "run", "--resume", **{**data, "train.max_iter": 9})  # known by now


def test_a_fingerprint_depends_on_neither_order_nor_place():
    boxes = [
        {"bbox": [1, 2, 3, i], "bbox_mode": 1, "category_id": i, "iscrowd": 0} for i in range(3)
    ]
    images = [
        {"file_name": f"here/{i}.png", "height": 4, "width": 5 + i, "annotations": boxes}
        for i in range(3)
    ]
    MetadataCatalog.get("here").set(image_root="here")
    MetadataCatalog.get("there").set(image_root="there/x")
    other = [
        {**image, "file_name": image["file_name"].replace("here", "there/x"),
         "annotations": [{**box, "bbox": [*map(float, box["bbox"])]} for box in boxes[::-1]]}
        for image in images[::-1]
    ]
    there = OmegaConf.create({"names": ["there"]})
    one = fingerprint(images, OmegaConf.create({"names": "here"}))
    assert one.shape == (3, 2) and not other_images(one, fingerprint(other, there))
    for change, said in (({"width": 6}, "1 with other"), ({"annotations": boxes[1:]}, "1 with oth"),
                         ({"file_name": "there/x/9.png"}, "1 new, 1 missing")):
        two = fingerprint([{**other[0], **change}, *other[1:]], there)
        assert other_images(one, two).startswith(said)
    assert other_images(one, fingerprint(other[1:], there)) == "1 missing"
    assert other_images(one, fingerprint([*other, other[0]], there)) == "1 new"


def test_the_state_of_another_optimizer_is_not_resumed():
    ours = {"optimizer": "AdamW", "parameters": [["a"], ["b", "c"]]}
    assert other_parameters(ours, ours) == ""
    assert "SGD" in other_parameters({**ours, "optimizer": "SGD"}, ours)
    for parameters, part in (([["a"], ["b"]], "c is"), ([["a"], ["b", "c", "d"]], "d is"),
                             ([["a"], ["c", "b"]], "order"), ([["a", "b"], ["c"]], "groups")):
        assert part in other_parameters({**ours, "parameters": parameters}, ours)


def test_other_frozen_parts_are_not_resumed_from_a_checkpoint_without_names(whole, refused):
    """An earlier version recorded neither names nor images; all else of it resumes."""
    state = checkpoint_of(whole)
    del state["run"]
    first, may_be_accepted = refused(state, **{"model.backbone.frozen_modules": "[]"})
    assert "parameters are trained" in first and not may_be_accepted
