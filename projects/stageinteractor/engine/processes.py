"""Errors of a run in several processes."""

import re

import torch.distributed as dist

# Gloo raises plain errors, NCCL and the store errors of their own.
CONTACT_LOST = re.compile(r"gloo|connection (was )?(closed|reset|refused)|timed out|nccl", re.I)


def lost_contact(error: RuntimeError) -> bool:
    """Whether an error says that other processes cannot be reached."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    return isinstance(error, dist.DistError) or CONTACT_LOST.search(str(error)) is not None
