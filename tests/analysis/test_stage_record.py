"""Promises of analysis/stage_record.py: what is recorded is what the model computes."""

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.structures import Boxes, Instances

from projects.stageinteractor.analysis.stages.stage_record import (
    Label,
    check_queries,
    choose_queries,
    partners,
    record_stages,
    recording,
)
from projects.stageinteractor.config.overrides import load_config
from projects.stageinteractor.errors import UserError
from projects.stageinteractor.modeling.boxes import positional_encoding, xyzr_to_corners
from projects.stageinteractor.modeling.filter_reuse import AdaptedFilter
from projects.stageinteractor.modeling.stage import DecoderState
from support.runs import CONFIG, ROOT, overrides

NUM_STAGES, NUM_QUERIES, NUM_CLASSES = 4, 10, 3
HEIGHT, WIDTH = 141, 203  # of the picture; the network sees it at another size
ADAMIXER = "projects/stageinteractor/configs/adamixer_lite0_bccd.py"
KINDS = {(True, True): "kept", (True, False): "dropped",
         (False, True): "borrowed", (False, False): "refused"}


def make_model(config=CONFIG):
    """A tiny model whose boxes, filters and gates differ from query to query."""
    torch.manual_seed(1)
    options = overrides(ROOT / "x.json", "out", **{"model.decoder.points_per_stage": "[8,8,8,8]"})
    options = [option for option in options if option.startswith("model.")]
    model = instantiate(load_config(str(ROOT / config), options).model).eval()
    for stage in model.decoder.stages:
        torch.nn.init.normal_(stage.box_head[-1].weight, std=0.1)
        torch.nn.init.normal_(stage.class_head[-1].weight, std=0.3)
        if getattr(stage.mixing, "channel_adapter", None):
            torch.nn.init.normal_(stage.mixing.channel_adapter.gates.weight, std=0.3)
    for stage in model.decoder.stages:
        if getattr(stage.mixing, "spatial_adapter", None):
            torch.nn.init.normal_(stage.mixing.spatial_adapter.row_gate.weight, std=0.3)
    return model


@pytest.fixture(scope="module")
def model():
    return make_model()


def make_picture():
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 255, (3, 64, 96), generator=generator).float()
    return {"image": image, "height": HEIGHT, "width": WIDTH}


def objects_near(record, number):
    """As many objects, near what the last stages predict for the first queries."""
    boxes = torch.tensor(record.boxes[-1, :number] + record.boxes[-2, :number]) / 2
    boxes = boxes[torch.arange(number) % len(boxes)] if len(boxes) else boxes
    classes = torch.arange(number) % NUM_CLASSES
    return Instances((HEIGHT, WIDTH), gt_boxes=Boxes(boxes), gt_classes=classes)


@pytest.fixture(scope="module")
def record(model):
    return record_stages(model, make_picture())


@pytest.fixture(scope="module")
def labelled(model, record):
    return record_stages(model, make_picture(), objects_near(record, 4))


def slow_iou(a, b):
    w, h = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None)
    return w * h / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - w * h)


def test_boxes_and_scores_are_those_of_each_stage_in_pixels_of_the_picture():
    """In float64, since the record's attention is computed in other steps than the model's."""
    model = make_model().double()
    record = record_stages(model, make_picture())
    with torch.no_grad():
        outputs = model.decode(model.preprocess([make_picture()]))
    corners = xyzr_to_corners(outputs.xyzr[:, 0]).numpy()
    expected = corners * [WIDTH / 96, HEIGHT / 64, WIDTH / 96, HEIGHT / 64]
    assert record.boxes.shape == (NUM_STAGES + 1, NUM_QUERIES, 4)
    np.testing.assert_allclose(record.boxes[1:], expected, rtol=1e-5)
    np.testing.assert_allclose(record.boxes[0], np.tile([0, 0, WIDTH, HEIGHT], (NUM_QUERIES, 1)))
    np.testing.assert_allclose(record.scores, outputs.logits[:, 0].sigmoid(), rtol=1e-6)


def test_the_last_stage_is_what_the_detector_finds(model, record):
    with torch.no_grad():
        found = model([make_picture()])[0]["instances"]
    best = record.scores[-1].ravel().argsort()[::-1][:model.detections_per_image]
    clipped = np.clip(record.boxes[-1, best // NUM_CLASSES], 0, [WIDTH, HEIGHT, WIDTH, HEIGHT])
    inside = (clipped[:, 2:] > clipped[:, :2]).all(1)
    best, clipped = best[inside], clipped[inside]
    np.testing.assert_allclose(found.pred_boxes.tensor, clipped, rtol=1e-5, atol=1e-3)
    assert found.pred_classes.tolist() == (best % NUM_CLASSES).tolist()


def test_points_are_where_the_stage_samples(model, record):
    """Against the decoder run by hand; shares of levels against the formula in method and paper."""
    with torch.no_grad():
        images = model.preprocess([make_picture()])
        maps = model.neck(model.backbone(images.tensor))
        content, xyzr = model.query_generator(torch.tensor(images.image_sizes))
        decoder = model.decoder
        pyramid = decoder.make_pyramid(maps, decoder.strides, decoder.num_groups)
        state = DecoderState(content, xyzr, (), pyramid)
        for index, stage in enumerate(decoder.stages):
            attended = stage.attention(state.content, state.xyzr)
            points = stage.points(attended, state.xyzr)[0].numpy()  # (N, G, P, 3)
            expected = points[..., :2] * [WIDTH / 96, HEIGHT / 64]
            np.testing.assert_allclose(record.points[index], expected, rtol=1e-5, atol=1e-4)
            z = points[..., 2:].astype(float)
            energy = np.exp(-(z - 1 - np.log2(decoder.strides)) ** 2 / 2)
            shares = energy / energy.sum(-1, keepdims=True)
            np.testing.assert_allclose(record.levels[index], shares, atol=1e-5)
            _, state = stage(state)


def test_attention_is_the_one_that_the_stage_applies(model, record):
    """Weighted values of each head, projected, are what the attention adds to the content.

    And what it adds while the weights are recorded is what it adds otherwise.
    """
    attention = model.decoder.stages[1].attention
    generator = torch.Generator().manual_seed(3)
    content = torch.randn(2, NUM_QUERIES, 32, generator=generator)
    xyzr = torch.cat([torch.rand(2, NUM_QUERIES, 2, generator=generator) * 90,
                      torch.rand(2, NUM_QUERIES, 2, generator=generator) + 4], dim=-1)
    with torch.no_grad():
        with recording(model) as seen:
            recorded = attention(content, xyzr)
        weights = seen[1]["attention"]
        encoded = content + positional_encoding(xyzr, 32)
        value = attention.in_proj(encoded)[..., 64:].view(2, NUM_QUERIES, attention.num_heads, -1)
        mixed = torch.einsum("bhnm,bmhd->bnhd", weights, value).reshape(2, NUM_QUERIES, 32)
        expected = attention.norm(encoded + attention.out_proj(mixed))
    torch.testing.assert_close(recorded, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(attention(content, xyzr), recorded, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(record.attention.sum(-1), 1, atol=1e-5)


def test_partners_are_the_most_attended_other_queries(record):
    for stage in range(NUM_STAGES):
        for query in range(NUM_QUERIES):
            weights = dict(enumerate(record.attention[stage, query].tolist()))
            del weights[query]
            expected = sorted(weights.values(), reverse=True)[:3]
            found = partners(record, stage, query, 3)
            assert [weights[other] for other in found] == expected
    assert len(partners(record, 0, 0, 99)) == NUM_QUERIES - 1


def test_the_share_of_a_reused_filter_is_what_blending_takes_from_it(model, record, monkeypatch):
    """Old filters of ones and own ones of zeros leave, after blending, the share itself."""
    shares = []

    def blend(self):
        ones = AdaptedFilter(self.own * 0, self.own * 0 + 1, self.row_gate, self.column_gate)
        shares.append(original(ones).view(NUM_QUERIES, -1).mean(-1).numpy())
        return original(self)

    original = AdaptedFilter.blend
    monkeypatch.setattr(AdaptedFilter, "blend", blend)
    record_stages(model, make_picture())
    assert [list(stage) for stage in record.reused] == [[], [], [1], [1, 2]]
    assert record.reused_rows[:2] == [None, None]
    # A stage blends its channel filters, the oldest first, then the rows of its spatial one.
    given = [share for stage, rows in zip(record.reused[2:], record.reused_rows[2:])
             for share in (*stage.values(), rows)]
    np.testing.assert_allclose(shares, given, atol=1e-5)
    assert (np.ptp(given, axis=1) > 1e-3).all()  # the gates do depend on the query


@pytest.mark.parametrize("number", [0, 1, 4, NUM_QUERIES + 3])
def test_labels_are_those_of_a_slow_count(model, record, number):
    objects = objects_near(record, min(number, NUM_QUERIES))
    if number > NUM_QUERIES:
        objects = Instances.cat([objects, objects[:number - NUM_QUERIES]])
    labels = record_stages(model, make_picture(), objects).labels
    match, boxes = labels.match, record.boxes[1:]
    winners = [[dict(zip(row, range(NUM_QUERIES))).get(number, -1)
                for number in range(len(labels.boxes))] for row in match.tolist()]
    assert labels.winners().tolist() == winners
    assert ((match >= 0).sum(1) == min(number, NUM_QUERIES)).all()
    for stage in range(NUM_STAGES):
        for query in range(NUM_QUERIES):
            won = {}
            for other in range(max(stage - 1, 0), NUM_STAGES):
                if match[other, query] >= 0:
                    won.setdefault(match[other, query], []).append(other)
            offers = labels.offers[stage].get(query, [])
            assert {offer.object: offer.won_in for offer in offers} == won
            for offer in offers:
                iou = slow_iou(boxes[stage, query], labels.boxes[offer.object])
                assert offer.iou == pytest.approx(iou, abs=1e-4)
                assert offer.kind == KINDS[stage in offer.won_in, iou >= 0.5]


def test_every_kind_of_label_occurs(labelled):
    """Else the test above would prove less than it says."""
    offers = [label for stage in labelled.labels.offers for row in stage.values() for label in row]
    assert {label.kind for label in offers} == set(KINDS.values())


def test_labels_agree_with_the_targets_of_training(model, record):
    """The classes that training would take are those of the labels kept or borrowed."""
    seen = []
    hook = model.criterion.label_assigner.register_forward_hook(
        lambda module, inputs, assignment: seen.append(assignment.classes[:, 0])
    )
    labels = record_stages(model, make_picture(), objects_near(record, 6)).labels
    hook.remove()
    expected = torch.zeros_like(seen[0])
    for stage, by_query in enumerate(labels.offers):
        for query, row in by_query.items():
            for label in row:
                if label.kind in ("kept", "borrowed"):
                    expected[stage, query, labels.classes[label.object]] = 1
    assert torch.equal(seen[0], expected) and expected.sum() > 4


def test_adamixer_has_labels_of_its_own_stage_only_and_reuses_nothing(record):
    model = make_model(ADAMIXER)
    found = record_stages(model, make_picture(), objects_near(record, 4))
    offers = [label for stage in found.labels.offers for row in stage.values() for label in row]
    assert {label.kind for label in offers} == {"kept"}  # its threshold is zero
    assert len(offers) == 4 * NUM_STAGES
    assert found.reused == [{}] * NUM_STAGES and found.reused_rows == [None] * NUM_STAGES


def test_recording_leaves_the_model_as_it_was(model):
    with torch.no_grad():
        before = model([make_picture()])[0]["instances"]
        record_stages(model, make_picture())
        after = model([make_picture()])[0]["instances"]
    assert torch.equal(before.pred_boxes.tensor, after.pred_boxes.tensor)
    assert not any(module._forward_hooks for module in model.modules())
    assert not any("attend" in vars(module) for module in model.modules())


def test_chosen_are_the_best_and_those_that_borrow_most(labelled):
    scores = np.zeros_like(labelled.scores)
    scores[-1, [5, 3, 7], [0, 1, 2]] = 0.7, 0.9, 0.6

    def borrow(*objects):
        return [Label(number, "borrowed", 0.6, [0]) for number in objects]

    offers = [{4: borrow(1), 7: borrow(0, 1), 8: borrow(0)}, {8: borrow(1), 7: borrow(1)}]
    record = labelled._replace(scores=scores, labels=labelled.labels._replace(offers=offers))
    assert choose_queries(record, 1) == [3, 7]
    assert choose_queries(record, 2) == [3, 5, 7, 8]
    assert choose_queries(record, 3) == [3, 5, 7, 8, 4]  # 7 is among the best
    assert choose_queries(record._replace(labels=None), 2) == [3, 5]
    assert sorted(choose_queries(record, 99)) == list(range(NUM_QUERIES))


def test_a_query_that_there_is_not_is_refused(record):
    assert check_queries([3, 1, 3], record) == [3, 1]
    for number in (-1, NUM_QUERIES):
        with pytest.raises(UserError, match=f"no query {number}: the model has 0 to 9"):
            check_queries([number], record)


@pytest.mark.parametrize("head, value", [("class_head", float("nan")), ("box_head", 1e4)])
def test_numbers_that_are_not_finite_are_refused(head, value):
    """Among them boxes whose scale is finite, but not its power of two."""
    model = make_model()
    torch.nn.init.constant_(getattr(model.decoder.stages[3], head)[-1].bias, value)
    with pytest.raises(UserError, match="not finite"):
        record_stages(model, make_picture())
