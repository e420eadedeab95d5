"""A regression that a trainer learns in a moment."""

import torch
from torch import nn


class Regression(nn.Module):
    """Squared error of two layers; a third one never gets a gradient."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        self.unused = nn.Linear(2, 2)

    def forward(self, batch):
        inputs = torch.tensor(batch, dtype=torch.float32)
        return {"loss": self.layers(inputs[:, :3]).sub(inputs[:, 3:]).square().mean()}
