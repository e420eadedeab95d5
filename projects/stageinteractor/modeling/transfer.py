"""Copying tensors from the host to a device."""

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the host to a device, without waiting for the copy if that is CUDA."""
    # Elsewhere such a copy may lose values: https://github.com/pytorch/pytorch/issues/139550
    return tensor.to(device, non_blocking=device.type == "cuda")
