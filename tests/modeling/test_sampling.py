"""Sampling: points and features agree with the formulas, written out one number at a time."""

import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from projects.stageinteractor.modeling.fast_sampling import choice
from projects.stageinteractor.modeling.sampling import (
    FeatureMaps,
    SamplingPoints,
    level_weights,
    num_subpoints,
)
from support.forms import DEVICE, KernelForm, every_form, needs_triton

STRIDES = (4, 8, 16, 32)


def bilinear(feature_map, x, y):
    """Value of one channel (H, W) at a position in cells; cell centres at half integers."""
    height, width = feature_map.shape
    x, y = x - 0.5, y - 0.5
    left, top = math.floor(x), math.floor(y)
    value = 0.0
    for row, column in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
        if 0 <= row < height and 0 <= column < width:
            weight = (1 - abs(x - column)) * (1 - abs(y - row))
            value += weight * feature_map[row, column].item()
    return value


def slow_samples(pyramid, points, strides):
    batch, queries, groups, num_points, _ = points.shape
    group_dim = pyramid[0].shape[1] // groups
    out = torch.zeros(batch, queries, groups, num_points, group_dim, dtype=torch.float64)
    for b, n, g, p in torch.cartesian_prod(*map(torch.arange, points.shape[:4])).tolist():
        x, y, z = points[b, n, g, p].tolist()
        shares = [math.exp(-((z - 3 - level) ** 2) / 2) for level in range(len(strides))]
        for channel in range(group_dim):
            out[b, n, g, p, channel] = sum(
                share / sum(shares)
                * bilinear(maps[b, g * group_dim + channel], x / stride, y / stride)
                for share, maps, stride in zip(shares, pyramid, strides)
            )
    return out


@every_form
def test_features_equal_a_scalar_bilinear_loop(form):
    """Inside, at the border, far outside, and at every scale; maps of odd sizes."""
    pyramid = [torch.randn(2, 6, math.ceil(44 / s), math.ceil(71 / s)) for s in STRIDES]
    points = torch.rand(2, 3, 2, 5, 3) * torch.tensor([110, 90, 9]) - torch.tensor([20, 20, 0])
    points[0, 0, 0, :2] = torch.tensor([[0.0, 0.0, 2.0], [-500.0, 40.0, 5.0]])
    sampled = form(pyramid, STRIDES, num_groups=2).sample(points)
    torch.testing.assert_close(
        sampled.double(), slow_samples(pyramid, points, STRIDES), atol=1e-4, rtol=0
    )


@every_form
def test_gradients_of_features_and_points(form):
    """Of two stages that sample one after the other, the second in points of the first's result."""
    maps = [torch.randn(1, 4, 64 // s, 64 // s, dtype=torch.float64) for s in (8, 16)]
    points = torch.rand(2, 1, 2, 2, 3, 3, dtype=torch.float64) * torch.tensor([60, 60, 8])
    inputs = [tensor.requires_grad_() for tensor in (*maps, points)]

    def two_stages(a, b, points):
        pyramid = form([a, b], (8, 16), num_groups=2)
        first = pyramid.sample(points[0])
        return first, pyramid.sample(points[1] + first[..., :1])

    # The kernel adds to a gradient in any order, and is slow in the interpreter.
    options = {"nondet_tol": 1e-12, "fast_mode": True} if form is KernelForm else {}
    assert torch.autograd.gradcheck(two_stages, inputs, **options)


@every_form
def test_gradients_where_some_stages_have_none(form):
    """A loss of one stage only, the first or the last, and one on the maps themselves as well."""
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(1, 4, size, size, generator=generator).requires_grad_() for size in (8, 4)]
    points = torch.rand(2, 1, 2, 2, 3, 3, generator=generator) * torch.tensor([60, 60, 8])
    for used in (0, 1):
        results = []
        for kind in (FeatureMaps, form):
            pyramid = kind(maps, (8, 16), num_groups=2)
            samples = [pyramid.sample(stage_points) for stage_points in points]
            loss = samples[used].square().sum() + maps[0].sum()
            results.append(torch.autograd.grad(loss, maps))
        for value, expected in zip(*results):
            torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)


@every_form
def test_gradients_can_be_asked_for_one_after_the_other(form):
    """What one call adds up for the maps, or does not use, is not there in the next."""
    maps, points = torch.randn(1, 4, 8, 8).requires_grad_(), torch.rand(1, 2, 2, 3, 3) * 60
    points.requires_grad_()
    found = []
    for kind in (FeatureMaps, form):
        pyramid = kind([maps], (8,), num_groups=2)
        loss = (pyramid.sample(points) + pyramid.sample(points / 2)).square().sum()
        for wanted in ([points], [maps], [maps], [maps, points]):
            found.append(torch.autograd.grad(loss, wanted, retain_graph=True))
    for expected, value in zip(found[:4], found[4:]):
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)


@every_form
def test_points_without_a_position_have_no_feature_elsewhere(form):
    """A point that is not a number spoils no other point, and does not read outside the maps."""
    maps = [torch.randn(1, 4, 8, 8)]
    points = torch.rand(1, 2, 2, 3, 3) * torch.tensor([60, 60, 8])
    expected = form(maps, (8,), num_groups=2).sample(points)
    points[0, 0, 0, 0] = math.nan
    points[0, 0, 0, 1, :2] = math.inf
    sampled = form(maps, (8,), num_groups=2).sample(points)
    torch.testing.assert_close(sampled[:, 1], expected[:, 1])
    torch.testing.assert_close(sampled[0, 0, 1], expected[0, 0, 1])


@needs_triton
def test_kernel_samples_tables_of_any_size():
    """Points that fill no whole program, channels that are no power of two, one to five levels."""
    for levels, channels, queries in ((1, 3, 1), (3, 5, 7), (5, 48, 3)):
        strides = tuple(2**level for level in range(levels))
        maps = [torch.randn(2, 3 * channels, 32 // s, 48 // s) for s in strides]
        points = torch.rand(2, queries, 3, 7, 3) * torch.tensor([60, 40, 5]) - 5
        results = []
        for form in (FeatureMaps, KernelForm):
            leaves = [leaf.clone().requires_grad_() for leaf in (*maps, points)]
            samples = form(leaves[:-1], strides, 3).sample(leaves[-1])
            gradient = torch.linspace(-1, 1, samples.numel()).view(samples.shape)
            results.append((samples, *torch.autograd.grad(samples, leaves, gradient)))
        for value, expected in zip(*results):
            torch.testing.assert_close(value, expected, atol=1e-4, rtol=1e-4)


@needs_triton
def test_kernel_gives_only_the_gradients_that_are_wanted():
    maps, points = [torch.randn(1, 4, 8, 8)], torch.rand(1, 2, 2, 3, 3) * 60
    for wanted in ([True, False], [False, True]):
        grads = []
        for form in (FeatureMaps, KernelForm):
            leaves = [t.clone().requires_grad_(w) for t, w in zip((maps[0], points), wanted)]
            samples = form(leaves[:1], (8,), 2).sample(leaves[1])
            samples.square().sum().backward()
            grads.append([leaf.grad for leaf in leaves])
        for value, expected, is_wanted in zip(*grads, wanted):
            assert (value is not None) == is_wanted
            torch.testing.assert_close(value, expected)


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from projects.stageinteractor.modeling.fast_sampling.kernel import gradient_kernel, sample_kernel

constants = dict(CHANNELS=64, PADDED=64, LEVELS=4, BLOCK=16)
counts = "count", "cells", "groups", "points_of_image", "points_of_group"
types = {"levels": "*i32", **dict.fromkeys(constants, "constexpr"), **dict.fromkeys(counts, "i32")}
for kernel in (sample_kernel, gradient_kernel):
    signature = {name: types.get(name, "*fp32") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constants)
    assert triton.compile(source, GPUTarget("cuda", int(sys.argv[1]), 32)).asm["cubin"]
print("compiled")
"""


@needs_triton
@pytest.mark.parametrize("capability", [
    "80", *(pytest.param(other, marks=pytest.mark.slow) for other in ("75", "90", "100", "120"))
])
def test_kernels_compile_for_gpus_that_are_not_here(capability, tmp_path, monkeypatch):
    """From Turing to Blackwell. The interpreter takes what the compiler would not."""
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
        pytest.skip(f"Triton {triton.__version__} compiles ahead of time in another way")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    command = [sys.executable, "-c", COMPILE, capability]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "compiled\n", done.stderr


@needs_triton
def test_on_cuda_the_kernel_is_chosen(monkeypatch):
    from projects.stageinteractor.modeling.fast_sampling.kernel import KernelTable

    on_cuda = [SimpleNamespace(device=torch.device("cuda"))]
    monkeypatch.setattr(
        KernelTable, "from_maps", lambda maps, strides, num_groups: ("kernel", maps, num_groups)
    )
    monkeypatch.setattr(choice, "working_kernel", lambda device: KernelTable)
    assert choice.make_pyramid(on_cuda, STRIDES, 4) == ("kernel", on_cuda, 4)
    monkeypatch.setattr(choice, "working_kernel", lambda device: None)
    assert choice.make_pyramid(on_cuda, STRIDES, 4) == FeatureMaps(on_cuda, STRIDES, 4)


@needs_triton
def test_a_kernel_that_does_not_work_is_not_used_and_a_warning_says_so(monkeypatch, caplog):
    from projects.stageinteractor.modeling.fast_sampling import kernel

    try_kernel = choice.working_kernel.__wrapped__
    assert try_kernel(torch.device(DEVICE)) is kernel.KernelTable and not caplog.records

    def launch(*args):
        raise RuntimeError("Failed to find C compiler. Please specify via CC\nand more")

    monkeypatch.setattr(kernel, "launch", launch)
    assert try_kernel(torch.device(DEVICE)) is None
    monkeypatch.setitem(sys.modules, kernel.__name__, None)
    assert try_kernel(torch.device(DEVICE)) is None
    messages = [record.getMessage() for record in caplog.records]
    assert "RuntimeError: Failed to find C compiler" in messages[0] and "more" not in messages[0]
    assert "grid_sample" in messages[1] and "ModuleNotFoundError" in messages[1]


@pytest.mark.parametrize("points, expected", [(1, 1), (2, 2), (4, 2), (16, 4), (32, 8), (64, 8)])
def test_number_of_subpoints(points, expected):
    assert num_subpoints(points) == expected


def test_points_follow_the_two_level_formula():
    module = SamplingPoints(embed_dim=16, num_groups=2, num_points=8)  # K = 4, two first-level
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    content = torch.randn(1, 3, 16)
    xyzr = torch.tensor([[[60.0, 40, 5, 0.5], [10, 20, 3, -1], [0, 0, 6, 0]]])
    points = module(content, xyzr)
    assert points.shape == (1, 3, 2, 8, 3)
    first = module.first_offsets(content).view(3, 2, 2, 3)
    sub = module.sub_offsets(content).view(3, 4, 3)
    for n in range(3):
        x, y, z, r = xyzr[0, n].tolist()
        for g, p, k in torch.cartesian_prod(*map(torch.arange, (2, 2, 4))).tolist():
            dx1, dy1, dz1 = first[n, g, p].tolist()
            dx2, dy2, dz2 = sub[n, k].tolist()
            expected = [
                x + 2 ** (z - r / 2) * (dx1 + 2**dz1 * dx2),
                y + 2 ** (z + r / 2) * (dy1 + 2**dz1 * dy2),
                z + dz1 + dz2,
            ]
            assert points[0, n, g, p * 4 + k].tolist() == pytest.approx(expected, rel=1e-4)


def test_points_start_inside_and_around_the_box():
    """At initialisation: independent of the content, first sub-points at the first-level points."""
    module = SamplingPoints(embed_dim=16, num_groups=4, num_points=32)
    points = module(torch.randn(1, 2, 16), torch.tensor([50.0, 50, 5, 0]).expand(1, 2, 4))
    assert torch.equal(points[0, 0], points[0, 1])
    offsets = (points[0, 0, ..., :2] - 50) / 32
    assert offsets[:, ::8].abs().max() <= 0.5
    assert offsets.abs().max() <= 0.5 + 0.5 / math.sqrt(2) + 1e-6
    assert torch.equal(points[..., 2], torch.full_like(points[..., 2], 5))


def test_points_that_do_not_divide_into_subpoints_are_refused():
    with pytest.raises(ValueError, match="multiple of K = 4"):
        SamplingPoints(num_points=6)


def test_level_weights():
    weights = level_weights(torch.tensor([3.0, 6.0, 4.5]), STRIDES)
    assert weights.sum(-1) == pytest.approx(1)
    assert weights[0].argmax() == 0 and weights[1].argmax() == 3
    assert weights[2, 1] == pytest.approx(weights[2, 2].item())
