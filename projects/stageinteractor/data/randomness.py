"""Random numbers that depend only on how far a run is, so that a resumed run draws the same."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch

IMAGE, STEP = range(2)  # the second number of a seed: what the third one counts


def seed_random(*numbers: int):
    """Seed the generators of Python, numpy and torch from whole numbers of at least 0."""
    words = np.random.SeedSequence(numbers).generate_state(6)
    random.seed(words[:2].tobytes())
    np.random.seed(words[2:4])
    torch.manual_seed(int(words[4]) << 32 | int(words[5]))


@contextlib.contextmanager
def keep_random_states() -> Iterator[None]:
    """Restore the state of all random generators after the block."""
    states = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
