"""Promises of tools/analyze.py stages: each stage's figures are those of an independent count."""

import itertools
import json

import analyze as tool
import numpy as np
import pytest
import torch
import train_net
from detectron2.config import instantiate
from detectron2.utils.events import EventStorage
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from projects.stageinteractor.analysis.stages import stage_metrics
from projects.stageinteractor.analysis.stages.stage_metrics import (
    QUANTILES,
    StageEvaluator,
    analyze_stages,
    box_changes,
)
from projects.stageinteractor.analysis.stages.stage_report import draw_stages
from projects.stageinteractor.config.building import build_model, build_test_loader, load_dataset
from projects.stageinteractor.config.overrides import load_config
from projects.stageinteractor.modeling import StageInteractor
from projects.stageinteractor.modeling.boxes import corners_to_xyzr
from projects.stageinteractor.modeling.criterion import log_assignment
from projects.stageinteractor.modeling.decoder import DecoderOutput
from projects.stageinteractor.modeling.label_assigner import Assignment
from support.runs import CONFIG, ROOT, overrides
from support.shapes import make_shapes
from support.stage_models import save_model

NUM_STAGES, NUM_QUERIES, NUM_CLASSES = 3, 10, 3
NMS = "model._target_=projects.stageinteractor.modeling.ablations.StageInteractorWithNMS"
TWICE = {
    "dataloader.test.mapper.augmentations":
        "[{_target_:detectron2.data.transforms.Resize,shape:[128,192]}]"
}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), images=6, size=(64, 96), empty=True)


def analyze(output, checkpoint, options, config=CONFIG):
    """The JSON file of the real command."""
    arguments = ["--config-file", ROOT / config, "--checkpoint", checkpoint, "--output", output]
    tool.main(["stages", *map(str, arguments), *options])
    return json.loads((output / "stages.json").read_text())


def predict(annotations, scale=1):
    """Outputs of each image in turn that come closer to the objects from stage to stage.

    There are two queries near each object; the other ones are anywhere. `scale` is that of the
    network's pixels.
    """
    generator = torch.Generator().manual_seed(0)
    coco = COCO(annotations)
    outputs = []
    for image in coco.dataset["images"]:
        objects = coco.imgToAnns[image["id"]]
        queries = range(2 * len(objects), NUM_QUERIES)
        corner = torch.rand(len(queries), 2, generator=generator) * 40
        other = torch.cat([corner, corner + 24], dim=1)
        boxes = [[x, y, x + w, y + h] for x, y, w, h in (item["bbox"] for item in objects)]
        truth = torch.cat([torch.tensor(2 * boxes).reshape(-1, 4), other])
        logits = torch.randn(NUM_STAGES, 1, NUM_QUERIES, NUM_CLASSES, generator=generator) - 2
        for query, item in enumerate(2 * objects):
            logits[:, :, query, item["category_id"] - 1] += 3
        noise = torch.randn(NUM_STAGES, 1, NUM_QUERIES, 4, generator=generator)
        corners = truth + noise.clamp(-2, 2) * torch.tensor([2, 1.2, 0.6]).view(-1, 1, 1, 1)
        outputs.append(DecoderOutput(logits, corners_to_xyzr(corners * scale), logits))
    return outputs


def replace_decoding(monkeypatch, rounds):
    """Let the stages predict what is given for the images in turn, which timing would use up."""

    def decode(self, images):
        return DecoderOutput(*(part[:len(self.decoder.stages)] for part in next(rounds)))

    monkeypatch.setattr(StageInteractor, "decode", decode)
    monkeypatch.setattr(stage_metrics, "time_stages", lambda model, batch: [1] * NUM_STAGES)


@pytest.fixture
def predicted(shapes, monkeypatch):
    """The model, whatever its weights are, predicts `predict`; its outputs an image."""
    outputs = predict(shapes)
    replace_decoding(monkeypatch, itertools.cycle(outputs))
    return outputs


def build_test(cfg):
    """The loader of the test set and its evaluator."""
    options = {**cfg.dataloader.evaluator, "_target_": StageEvaluator, "output_dir": None}
    dataset = load_dataset(cfg, "test")
    return build_test_loader(cfg, dataset), instantiate(options)


def measure(cfg):
    return analyze_stages(build_model(cfg), *build_test(cfg))


def evaluate_only(options):
    """What `train_net.py --eval-only` gives."""
    metrics = train_net.evaluate_only(load_config(str(ROOT / CONFIG), options))["bbox"]
    return {name: None if np.isnan(value) else value for name, value in metrics.items()}


def slow_iou(a, b):
    shared = np.prod(np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None))
    return shared / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - shared)


def slow_corners(xyzr):
    x, y, z, r = xyzr
    w, h = 2 ** (z - r / 2), 2 ** (z + r / 2)
    return np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2])


def test_the_last_stage_has_the_figures_of_eval_only(shapes, tmp_path, predicted):
    checkpoint = tmp_path / "a model.pth"
    options = overrides(shapes, tmp_path, **{"train.init_checkpoint": f"'{checkpoint}'"})
    save_model(checkpoint, options)
    result = analyze(tmp_path / "new" / "stages", checkpoint, options)
    *others, last = [stage["metrics"] for stage in result["stages"]]
    last.pop("AR")
    assert last == evaluate_only(options)
    assert len(others) == NUM_STAGES - 1
    assert last["AP"] > 30
    # In place of the run's own files there are none of ours.
    assert not (tmp_path / "new" / "coco_instances_results.json").exists()


def test_each_stage_has_the_figures_of_the_model_that_ends_there(shapes, tmp_path, predicted):
    checkpoint = tmp_path / "model.pth"
    options = overrides(shapes, tmp_path, **{"train.init_checkpoint": checkpoint})
    save_model(checkpoint, options)
    result = analyze(tmp_path / "stages", checkpoint, options)
    found = [stage["metrics"] for stage in result["stages"]]
    assert len({of_stage.pop("AR") for of_stage in found}) == NUM_STAGES
    assert found[0]["AP"] + 5 < found[1]["AP"] < found[2]["AP"] - 5
    for number, metrics in enumerate(found, start=1):
        assert metrics == evaluate_only([*options, f"model.decoder.num_stages={number}"])


def test_the_time_of_the_first_stages(shapes, tmp_path, monkeypatch):
    """Relative to that of all, by a clock that counts what is computed."""
    options = overrides(shapes, tmp_path)
    model, now = save_model(tmp_path / "model.pth", options), [0]
    monkeypatch.setattr(stage_metrics, "select_clock", lambda device: lambda: now[0])

    def tick(part, seconds):
        part.register_forward_hook(lambda *_: now.__setitem__(0, now[0] + seconds))

    tick(model.backbone, 5)
    for seconds, stage in zip((3, 2, 1), model.decoder.stages):
        tick(stage, seconds)
    loader, evaluator = build_test(load_config(str(ROOT / CONFIG), options))
    result = analyze_stages(model, loader, evaluator)
    times = [stage["time"] for stage in result["stages"]]
    assert times == pytest.approx([8 / 11, 10 / 11, 1])
    assert len(model.decoder.stages) == NUM_STAGES


def test_each_stage_has_the_figures_of_pycocotools(shapes, tmp_path, monkeypatch):
    """Images twice as large for the network, so that boxes have to be scaled back and clipped."""
    cfg = load_config(str(ROOT / CONFIG), overrides(shapes, tmp_path, **TWICE))
    assert cfg.model.detections_per_image == NUM_QUERIES
    outputs = predict(shapes, scale=2)
    replace_decoding(monkeypatch, iter(outputs))
    result = measure(cfg)
    assert result["images"] == 6
    found = [stage["metrics"] for stage in result["stages"]]
    for stage in range(NUM_STAGES):
        rows = []
        for image, output in enumerate(outputs, start=1):
            scores, of_image = output.logits[stage, 0].sigmoid().tolist(), []
            for xyzr, of_query in zip(output.xyzr[stage, 0].double().numpy(), scores):
                x1, y1, x2, y2 = (slow_corners(xyzr) / 2).clip(0, [96, 64, 96, 64])
                of_image += [
                    {"image_id": image, "category_id": index, "score": score,
                     "bbox": [x1, y1, x2 - x1, y2 - y1]}
                    for index, score in enumerate(of_query, start=1)
                ]
            rows += sorted(of_image, key=lambda row: -row["score"])[:NUM_QUERIES]
        truth = COCO(shapes)
        evaluation = COCOeval(truth, truth.loadRes(rows), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        for name, index in (("AP", 0), ("AP50", 1), ("AP75", 2), ("APs", 3), ("AR", 8)):
            assert found[stage][name] == pytest.approx(100 * evaluation.stats[index], abs=1e-6)
    assert found[0]["AP"] + 5 < found[1]["AP"] < found[2]["AP"] - 5


def test_stages_that_change_nothing_are_equal(shapes, tmp_path):
    options = overrides(shapes, tmp_path)
    model = save_model(tmp_path / "model.pth", options)
    for stage in model.decoder.stages:
        for head in (stage.box_head, stage.class_head):
            torch.nn.init.zeros_(head[-1].weight)
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    result = analyze(tmp_path / "stages", tmp_path / "model.pth", options)
    first, *others = result["stages"]
    assert all(stage["metrics"] == first["metrics"] for stage in others)
    change = first["to_next"]["all"]
    assert change["boxes"] == 6 * NUM_QUERIES
    assert change["iou"] == {"mean": 1, "quantiles": [1] * len(QUANTILES)}
    assert change["shift"]["mean"] == change["scale"]["mean"] == change["ratio"]["mean"] == 0


def test_box_changes_are_those_of_a_slow_loop():
    xyzr = torch.randn(4, 2, 5, 4, dtype=torch.float64)
    xyzr[..., :2] *= 3
    xyzr[..., 2] += 2
    changes = box_changes(xyzr)
    for stage, image, query in itertools.product(range(3), range(2), range(5)):
        before, after = xyzr[stage:stage + 2, image, query].numpy()
        place = stage, image, query
        iou = slow_iou(slow_corners(before), slow_corners(after))
        assert changes["iou"][place] == pytest.approx(iou, abs=1e-6)
        shift = np.hypot(*(after - before)[:2]) / 2 ** before[2]
        assert changes["shift"][place] == pytest.approx(shift)
        sizes = [np.diff(slow_corners(box).reshape(2, 2), axis=0)[0] for box in (before, after)]
        areas, aspects = zip(*[(w * h, h / w) for w, h in sizes])
        assert changes["scale"][place] == pytest.approx(abs(np.log2(areas[1] / areas[0])) / 2)
        assert changes["ratio"][place] == pytest.approx(abs(np.log2(aspects[1] / aspects[0])))


def test_changes_are_summed_up_over_all_and_over_detected_queries(shapes, tmp_path, predicted):
    """What is not finite is left out."""
    predicted[2].xyzr[1, 0, 7, 0] = float("nan")
    result = measure(load_config(str(ROOT / CONFIG), overrides(shapes, tmp_path)))
    assert result["stages"][-1]["to_next"] is None
    for stage in range(NUM_STAGES - 1):
        groups = {"all": [], "detected": []}
        for output in predicted:
            for query in range(NUM_QUERIES):
                boxes = output.xyzr[stage:stage + 2, 0, query].double().numpy()
                iou = slow_iou(*map(slow_corners, boxes))
                groups["all"].append(iou)
                if output.logits[-1, 0, query].sigmoid().max() >= 0.3:
                    groups["detected"].append(iou)
        assert 0 < len(groups["detected"]) < len(groups["all"])
        for group, values in groups.items():
            found = result["stages"][stage]["to_next"][group]
            assert found["boxes"] == len(values)
            assert found["iou"]["mean"] == pytest.approx(np.nanmean(values), abs=1e-5)
            expected = np.nanquantile(values, QUANTILES)
            assert found["iou"]["quantiles"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("scope, first, last", [("[-1,null]", -1, 9), ("[0,0]", 0, 0)])
def test_labels_are_those_of_a_slow_loop(shapes, tmp_path, predicted, scope, first, last):
    """And together those that training logs."""
    options = [
        f"model.criterion.label_assigner.scope={scope}",
        "model.criterion.label_assigner.iou_threshold=0.75",
    ]
    cfg = load_config(str(ROOT / CONFIG), overrides(shapes, tmp_path) + options)
    model, (loader, evaluator) = build_model(cfg), build_test(cfg)
    matches, logged = [], []
    assign = model.criterion.label_assigner.forward

    def record(logits, boxes, match, *rest):
        assignment = assign(logits, boxes, match, *rest)
        matches.append(match)
        logged.append(assignment)
        return assignment

    model.criterion.label_assigner.forward = record
    result = analyze_stages(model, loader, evaluator)
    counts = np.zeros((NUM_STAGES, 3))
    objects = COCO(shapes).imgToAnns
    for image, (output, match) in enumerate(zip(predicted, matches), start=1):
        for stage, query in itertools.product(range(NUM_STAGES), range(NUM_QUERIES)):
            box, labels = slow_corners(output.xyzr[stage, 0, query].double().numpy()), set()
            won = match[:, 0, query].tolist()
            for other in range(max(stage + first, 0), min(stage + last, NUM_STAGES - 1) + 1):
                if won[other] < 0:
                    continue
                item = objects[image][won[other]]
                x, y, w, h = item["bbox"]
                fits = slow_iou(box, np.array([x, y, x + w, y + h])) >= 0.75
                if fits:
                    labels.add(item["category_id"])
                if other == stage:
                    counts[stage] += [fits, not fits, -int(fits)]
            counts[stage, 2] += len(labels)
    shares = counts / counts[:, :2].sum(1, keepdims=True)
    for stage, expected in zip(result["stages"], shares):
        assert list(stage["labels"]) == ["kept", "dropped", "gained"]
        assert list(stage["labels"].values()) == pytest.approx(expected)
    assert 0 < shares[0, 0] < shares[2, 0] and (shares[:, 2].any() == (first < 0))

    classes, boxes, match, iou, keep = zip(*logged)
    of_batch = [torch.cat(part, dim=1) for part in (classes, boxes, match)]
    of_pairs = [torch.cat(part, dim=2) for part in (iou, keep)]
    with EventStorage() as storage:
        log_assignment(Assignment(*of_batch, *of_pairs))
    total = counts.sum(0) / counts[:, :2].sum()
    for name, share in zip(("kept", "dropped", "gained"), total):
        assert storage.latest()[f"labels/{name}"][0] == pytest.approx(share)


def test_suppression_has_the_figures_of_the_model_with_it(shapes, tmp_path, monkeypatch):
    """That of the ablation, evaluated by `train_net.py`; images are enlarged for the network."""
    checkpoint = tmp_path / "model.pth"
    options = overrides(shapes, tmp_path, **{"train.init_checkpoint": checkpoint, **TWICE})
    save_model(checkpoint, options)
    replace_decoding(monkeypatch, itertools.cycle(predict(shapes, scale=2)))
    result = analyze(tmp_path / "stages", checkpoint, options)
    assert list(result["nms"]) == ["0.5", "0.75", "0.9"]
    assert result["nms"]["0.5"]["AP"] > result["stages"][-1]["metrics"]["AP"] + 1
    found = dict(result["nms"]["0.75"])
    assert found.pop("AR") > 0
    assert found == evaluate_only([*options, NMS, "model.nms_threshold=0.75"])


def test_adamixer_has_its_one_to_one_labels(shapes, tmp_path):
    config = "projects/stageinteractor/configs/adamixer_lite0_bccd.py"
    options = overrides(shapes, tmp_path, **{"dataloader.test.mapper.augmentations": "[]"})
    datasets = ("dataloader.test.dataset", "dataloader.train.dataset")
    options = [text for text in options if not text.startswith(datasets)]
    options += [f"dataset.val={shapes}", f"dataset.images={shapes.parent / 'images'}"]
    options += ["dataloader.test.num_workers=0"]
    save_model(tmp_path / "model.pth", options, config)
    result = analyze(tmp_path / "stages", tmp_path / "model.pth", options, config)
    assert [stage["labels"] for stage in result["stages"]] == 3 * [
        {"kept": 1, "dropped": 0, "gained": 0}
    ]


def test_the_picture_shows_the_figures(shapes, tmp_path, predicted):
    result = measure(load_config(str(ROOT / CONFIG), overrides(shapes, tmp_path)))
    metrics, changes, labels = draw_stages(result["stages"]).axes
    stages = result["stages"]
    for line in metrics.lines:
        name = line.get_label()
        assert list(line.get_ydata()) == [stage["metrics"][name] for stage in stages]
    assert [line.get_label() for line in metrics.lines] == ["AP", "AP50", "AP75", "AR"]
    for line, group in zip(changes.lines, ("all", "detected")):
        medians = [stage["to_next"][group]["iou"]["quantiles"][2] for stage in stages[:-1]]
        assert list(line.get_ydata()) == medians
    for stage in stages[:-1]:
        stage["to_next"]["detected"]["boxes"] = 0
    without = draw_stages(result["stages"]).axes[1]
    assert [text.get_text() for text in without.get_legend().get_texts()] == ["all queries"]
    assert len(without.lines) == 1
    bars = [bar.get_height() for bars in labels.containers for bar in bars]
    names = ("kept", "dropped", "gained")
    assert bars == [100 * stage["labels"][name] for name in names for stage in stages]
