"""Reduce the recorded figures of the reference implementation to what the tests compare.

    python tests/support/golden/reduce.py FOLDER

FOLDER holds the full recordings (case_*.npz, state_dict_keys_*.txt and the initial statistics).
Writes everything else in this folder. See README.md.
"""

import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
STAGES = range(6)
RELEASED = {  # our name of a released checkpoint, and that in the recordings
    "r50": "r50_1x",
    "x101_dcn": "dx101",
    "swin_s": "swin_s",
    "adamixer_r50": "adamixer_r50_1x",
}
PARTS = ("pos_embed", "attn_bias", "attn_out", "level_weights", "sampled_feats", "M", "S")


def reduce_small(source: Path):
    """Decoder with 20 queries: outputs of all stages, parts of every stage sampled thinly."""
    case, parts = np.load(source / "case_a.npz"), np.load(source / "case_a_intermediates.npz")
    kept = {"init_xyzr": case["init_xyzr"], "init_content": case["init_content"]}
    for stage in STAGES:
        for key in ("xyzr", "boxes"):
            kept[f"stage{stage}_{key}"] = case[f"stage{stage}_{key}"]
        for key in ("cls_score", "object_feats"):
            kept[f"stage{stage}_{key}"] = case[f"stage{stage}_{key}"][:, ::3]
        for key in ("sample_xy", "sample_z"):
            kept[f"stage{stage}_{key}"] = case[f"stage{stage}_{key}"][:, :, ::9]
        for key in (*PARTS, "mixing_out", "ffn_out"):
            value = parts[f"stage{stage}_{key}"]
            kept[f"stage{stage}_{key}"] = value.reshape(-1)[:: max(1, value.size // 300)]
    for image in range(2):
        for key in (f"det_top100_netscale_img{image}", f"det_top100_labels_img{image}"):
            kept[key] = case[key]
    np.savez_compressed(HERE / "small.npz", **kept)


def train_entries(train, with_gradients: bool) -> dict:
    """What a training step is compared with; targets as indices of their ones."""
    kept = {key: train[key] for key in train.files if key.startswith(("loss/", "gt_"))}
    for key in train.files:
        if key.endswith(("_matched_gt", "_cost", "avg_factor_cls", "avg_factor_reg")):
            kept[key] = train[key]
        if key.endswith("_cls_target"):
            kept[key] = np.argwhere(train[key]).astype(np.int16)
    if with_gradients:
        kept["grad_names"], kept["grad_norms"] = train["grad_names"], train["grad_norms"]
        for level in range(4):
            if f"grad_feat{level}_norm" in train.files:
                kept[f"grad_feat{level}_norm"] = train[f"grad_feat{level}_norm"]
        for key in train.files:
            if key.startswith("grad/") and train[key].size <= 96:
                kept[key] = train[key]
    return kept


def reduce_training(source: Path):
    """Training steps of the small decoder, with and without objects in its second image."""
    both = {}
    for name in ("case_a_train", "case_a_train_zero_img1"):
        entries = train_entries(np.load(source / f"{name}.npz"), with_gradients=True)
        both.update({f"{name}:{key}": value for key, value in entries.items()})
    np.savez_compressed(HERE / "small_train.npz", **both)


def reduce_optimizer(source: Path):
    """Two optimiser steps of the small decoder with the recipe's clipping."""
    with np.load(source / "case_a_optim.npz") as steps:
        np.savez_compressed(HERE / "small_optimizer.npz", **steps)


def reduce_full(source: Path):
    """The complete R50 model: every fifth query, slices of backbone and neck, a training step."""
    case, train = np.load(source / "case_full.npz"), np.load(source / "case_full_train.npz")
    kept = {}
    for key in case.files:
        if key.startswith(("backbone", "neck")):
            kept[key] = case[key]
    for stage in STAGES:
        kept[f"stage{stage}_cls_score"] = case[f"stage{stage}_cls_score"][:, ::5]
        kept[f"stage{stage}_boxes"] = case[f"stage{stage}_boxes"]
    for key in ("det_top100_netscale_img0", "det_top100_rescaled_img0", "det_top100_labels_img0"):
        kept[key] = case[key]
    kept["scale_factor"] = case["scale_factor"]
    entries = train_entries(train, with_gradients=True)
    kept.update({f"train:{key}": value for key, value in entries.items()})
    np.savez_compressed(HERE / "full.npz", **kept)


def reduce_swin(source: Path):
    """The complete Swin-S model: every tenth query, slices of backbone and neck."""
    case = np.load(source / "case_swin_s.npz")
    kept = {key: case[key] for key in case.files if key.startswith(("backbone", "neck"))}
    for stage in STAGES:
        for key in ("cls_score", "boxes"):
            kept[f"stage{stage}_{key}"] = case[f"stage{stage}_{key}"][:, ::10]
    for key in ("det_top300_netscale_img0", "det_top300_labels_img0"):
        kept[key] = case[key]
    np.savez_compressed(HERE / "swin_s.npz", **kept)


def reduce_adamixer(source: Path):
    """The complete AdaMixer R50: every fifth query, and a training step."""
    case = np.load(source / "case_adamixer_r50.npz")
    kept = {}
    for stage in STAGES:
        kept[f"stage{stage}_cls_score"] = case[f"stage{stage}_cls_score"][:, ::5]
        kept[f"stage{stage}_boxes"] = case[f"stage{stage}_boxes"]
    for key in ("det_top100_netscale_img0", "det_top100_labels_img0"):
        kept[key] = case[key]
    entries = train_entries(case, with_gradients=True)
    kept.update({f"train:{key}": value for key, value in entries.items()})
    np.savez_compressed(HERE / "adamixer_r50.npz", **kept)


def reduce_entries(source: Path):
    """Names and shapes of every entry of the released checkpoints."""
    for here, there in RELEASED.items():
        lines = (source / f"state_dict_keys_{there}.txt").read_text().splitlines()
        entries = [line.split("\t")[:2] for line in lines if line and not line.startswith("#")]
        text = "\n".join(f"{name} {shape.strip('(,)').replace(' ', '')}" for name, shape in entries)
        (HERE / "released" / f"{here}.txt").write_text(text + "\n")


def reduce_initial(source: Path):
    """Mean, standard deviation, least and largest of every initial weight outside the backbone."""
    figures = json.loads((source / "init_stats_r50_1x.json").read_text())
    kept = {
        name: [float(f"{entry[key]:.6g}") for key in ("mean", "std", "min", "max")]
        for name, entry in figures.items()
        if not name.startswith("backbone.") and "init_proposal_bboxes" not in name
    }
    lines = (f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in kept.items())
    (HERE / "r50_initial.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


STEPS = (
    reduce_small,
    reduce_training,
    reduce_optimizer,
    reduce_full,
    reduce_swin,
    reduce_adamixer,
    reduce_entries,
    reduce_initial,
)

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for step in STEPS:
        step(folder)
