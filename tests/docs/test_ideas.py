"""docs/ideas/: every number of the worked examples is computed by the code that it explains."""

import doctest
import math
import re

import pytest
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from projects.stageinteractor.modeling import CrossStageLabelAssigner, HungarianMatcher
from projects.stageinteractor.modeling.boxes import box_iou, corners_to_xyzr
from projects.stageinteractor.modeling.criterion import log_assignment
from projects.stageinteractor.modeling.filter_reuse import reused_stages
from projects.stageinteractor.modeling.mixing import CascadeMixing
from projects.stageinteractor.modeling.sampling import SamplingPoints, level_weights
from projects.stageinteractor.modeling.targets import gather_targets
from support.pages import ROOT, read, table, tables

IDEAS = ROOT / "docs/ideas"
LABELS, REUSE, SAMPLING = (
    f"docs/ideas/{name}.md" for name in ("cross_stage_labels", "filter_reuse", "sampling")
)
PUBLISHED = {  # supplement, tables 1 to 4, and main paper, table 6
    "cross_stage_labels": {42.6, 43.0, 44.1, 44.8},
    "filter_reuse": {42.6, 43.0, 44.1, 43.9, 43.5, 44.8},
    "cascade_mixing": {43.9, 44.0, 43.7, 44.8, 44.1, 43.5},
    "sampling": {43.7, 44.1, 44.8, 44.6},
}


@pytest.mark.parametrize("page", sorted(path.name for path in IDEAS.glob("*.md")))
def test_examples_print_what_the_page_says(page):
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", read(f"docs/ideas/{page}"), re.M | re.S))
    parsed = doctest.DocTestParser().get_doctest(code, {}, page, page, 0)
    assert bool(parsed.examples) == (page in ("filter_reuse.md", "cascade_mixing.md"))
    failures = []
    doctest.DocTestRunner().run(parsed, out=failures.append)
    assert not failures, "".join(failures)


def label_example():
    """Predicted boxes (3, 1, 2, 4), the cat, matches and assignment of the page's example."""
    rows = table(LABELS, "label")
    boxes = torch.tensor([[float(n) for n in re.findall(r"\d+", row["box"])] for row in rows])
    boxes = boxes.view(3, 1, 2, 4)
    corners = re.search(r"with a cat in \[([\d, ]+)\]", read(LABELS))[1]
    cat = Instances((100, 100), gt_classes=torch.tensor([0]))
    cat.gt_boxes = Boxes(torch.tensor([[float(n) for n in corners.split(",")]]))
    targets = gather_targets([cat], [(100, 100)], torch.device("cpu"))
    logits = torch.zeros(3, 1, 2, 1)
    match = HungarianMatcher()(logits, boxes, targets)
    assignment = CrossStageLabelAssigner()(logits, boxes, match, targets.boxes, targets.labels)
    return rows, box_iou(boxes, targets.boxes[0, 0]), match, assignment


def test_labels_of_the_example_are_the_assigners():
    rows, iou, match, assignment = label_example()
    scope = CrossStageLabelAssigner().in_scope(3, match.device)
    for row in rows:
        stage, query = int(row["stage"]), int(row["query"])
        place = stage, 0, query
        won = match[:, 0, query] >= 0
        assert row["IoU"] == f"{iou[place]:.2f}"
        assert row["wins"] == ("yes" if won[stage] else "no")
        offered = [j for j in range(3) if scope[stage, j] and won[j]]
        assert row["offered from stages"] == ", ".join(map(str, offered))
        has_label = bool(assignment.classes[place])
        assert row["label"] == ("cat" if has_label else "–")
        assert has_label == bool(assignment.keep[stage, :, 0, query].any())
        own = {True: "kept", False: "dropped"}
        others = {True: "borrowed", False: "refused"}
        assert row["the label is"] == (own if won[stage] else others)[has_label]
    assert {row["the label is"] for row in rows} == {"kept", "dropped", "borrowed", "refused"}


def test_shares_of_the_example_are_those_of_the_log():
    *_, assignment = label_example()
    with EventStorage() as storage:
        log_assignment(assignment)
    shares = {name: storage.latest()[f"labels/{name}"][0] for name in ("kept", "dropped", "gained")}
    text = " ".join(read(LABELS).split())
    said = re.search(r"kept (\d+) %, dropped (\d+) %, gained (\d+) %", text)
    assert [round(100 * float(shares[n])) for n in shares] == [int(n) for n in said.groups()]


def test_reuse_by_stage_is_that_of_the_complete_model():
    """Columns of the page's table: stages reused, rows, and millions of weights."""
    def weights(*modules):
        return sum(p.numel() for module in modules if module for p in module.parameters())

    def millions(*modules):
        return f"{weights(*modules) / 1e6:.2f}"

    rows, saved = table(REUSE, "without reuse"), 0
    assert len(rows) == 6
    for stage, row in enumerate(rows):
        points, old = (64 if stage == 0 else 32), reused_stages(stage, first_reuse_stage=2)
        mixing, plain = (CascadeMixing(num_points=points, num_reused=n) for n in (len(old), 0))
        made = mixing.filter_sizes[1] // points
        assert row == {
            "stage": str(stage),
            "channel filters of stages": ", ".join(map(str, old)) or "–",
            "spatial rows made": str(made),
            "and reused": str(mixing.out_points - made),
            "generator": millions(mixing.filter_generator),
            "static mixing and gates": millions(
                mixing.static_mixings, mixing.channel_adapter, mixing.spatial_adapter
            ),
            "whole mixing": millions(mixing),
            "without reuse": millions(plain),
        }
        saved += weights(plain) - weights(mixing)
    assert f"by {saved / 1e6:.2f} million weights" in " ".join(read(REUSE).split())
    static = mixing.static_mixings[0]
    said = re.search(r"`across` maps (\d+) numbers.*`within` (\d+) to", " ".join(
        read("docs/ideas/cascade_mixing.md").split()))
    assert [static.across.in_features, static.within.in_features] == [int(n) for n in said.groups()]


def triple(text):
    return [float(number) for number in text.strip("()").split(",")]


def test_sampling_points_of_the_example():
    rows = table(SAMPLING, "sub-point offset")
    points = SamplingPoints(embed_dim=8, num_groups=1, num_points=4)
    with torch.no_grad():  # weights start at zero: biases are the offsets
        points.first_offsets.bias.copy_(torch.tensor(
            [triple(rows[i]["first-level offset"]) for i in (0, 2)]).flatten())
        points.sub_offsets.bias.copy_(torch.tensor(
            [triple(rows[i]["sub-point offset"]) for i in (0, 1)]).flatten())
        box = corners_to_xyzr(torch.tensor([[[80.0, 50, 120, 70]]]))  # 40 x 20 around (100, 60)
        placed = points(torch.randn(1, 1, 8), box)[0, 0, 0]
    said = torch.tensor([[float(row[axis]) for axis in "xyz"] for row in rows])
    torch.testing.assert_close(placed, said, rtol=0, atol=0.005)
    assert [row["sub-point offset"] for row in rows[:2]] == [
        row["sub-point offset"] for row in rows[2:]]
    assert math.isclose(box[0, 0, 2], 4.82, abs_tol=0.005)


def test_level_weights_of_the_example():
    for row in table(SAMPLING, "stands for"):
        weights = level_weights(torch.tensor(float(row["z"])), (4, 8, 16, 32))
        said = [int(row[f"stride {stride}"]) for stride in (4, 8, 16, 32)]
        assert [round(100 * weight) for weight in weights.tolist()] == said
        assert row["stands for"] == f"{2 ** int(row['z'])} pixels"


@pytest.mark.parametrize("page", PUBLISHED)
def test_figures_of_the_paper_are_those_of_its_tables(page):
    """Every AP in the section on the paper is published, and every published one is there."""
    section = read(f"docs/ideas/{page}.md").partition("## What the paper reports")[2]
    said = {float(number) for number in re.findall(r"\b4\d\.\d\b", section.partition("\n## ")[0])}
    assert said == PUBLISHED[page]


def test_overrides_are_those_of_the_ablations():
    """A switch that the project's README lists is written as there."""
    listed = {row["override"] for row in table("projects/stageinteractor/README.md", "override")}
    switches = [row["override"] for path in IDEAS.glob("*.md") for row in table(
        str(path.relative_to(ROOT)), "override")]
    assert len(switches) > 12 and len(listed & {*switches}) >= 8


def test_the_contents_list_every_page():
    listed = re.findall(r"\]\((\w+\.md)\)", read("docs/ideas/README.md"))
    assert sorted(["README.md", *listed]) == sorted(path.name for path in IDEAS.glob("*.md"))
    assert all(tables(f"docs/ideas/{name}") for name in listed)
