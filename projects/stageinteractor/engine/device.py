"""Which device to use."""

import torch

from ..errors import UserError


def select_device(name: str) -> str:
    """The device for ``train.device``; ``auto`` takes the best there is.

    Raises:
        UserError: a device that this machine does not have.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return next(device for device, is_there in available.items() if is_there)
    if not available.get(name.split(":")[0], False):
        there = ", ".join(device for device, is_there in available.items() if is_there)
        raise UserError(f"train.device={name} is not available here; there is: {there}")
    return name
