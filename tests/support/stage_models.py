"""Checkpoints of models whose stages are looked into."""

import torch
from detectron2.config import instantiate

from projects.stageinteractor.config.overrides import load_config
from support.runs import CONFIG, ROOT


def save_model(path, options, config=CONFIG):
    """Write a checkpoint of random weights, with predictions that differ; return the model."""
    torch.manual_seed(1)
    model = instantiate(load_config(str(ROOT / config), options).model)
    for stage in model.decoder.stages:
        torch.nn.init.normal_(stage.box_head[-1].weight, std=0.05)
    torch.save({"model": model.state_dict()}, path)
    return model
