"""A trainer of one number."""

import torch

from projects.stageinteractor.engine.trainer import Trainer


class Scalar(torch.nn.Module):
    """loss = weight * mean(batch)."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, batch):
        self.dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        return {"loss": (self.weight * torch.tensor(batch)).mean()}


def make_trainer(batches, lr=0.1, **options):
    model = Scalar()
    return Trainer(model, batches, torch.optim.SGD(model.parameters(), lr), **options)
