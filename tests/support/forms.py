"""The forms in which the pyramid is sampled: plain maps, the table, and the kernel of CUDA."""

import importlib.util

import pytest
import torch

from projects.stageinteractor.modeling.fast_sampling.table import FeatureTable
from projects.stageinteractor.modeling.sampling import FeatureMaps

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of the kernel

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton has no package for this system"
)


class KernelForm:
    """A table that the kernel samples: on a GPU, or else in Triton's interpreter."""

    def __init__(self, maps, strides, num_groups):
        from projects.stageinteractor.modeling.fast_sampling.kernel import KernelTable

        maps = [features.to(DEVICE) for features in maps]
        self.table = KernelTable.from_maps(maps, strides, num_groups)

    def sample(self, points):
        return self.table.sample(points.to(DEVICE)).to(points.device)


every_form = pytest.mark.parametrize(
    "form", [FeatureMaps, FeatureTable.from_maps, pytest.param(KernelForm, marks=needs_triton)]
)
