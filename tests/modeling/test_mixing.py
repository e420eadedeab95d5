"""Mixing and filter reuse: collapsed algebra equals the steps of the method, written out."""

import pytest
import torch
import torch.nn.functional as F

from projects.stageinteractor.modeling import StageInteractorDecoder, backward
from projects.stageinteractor.modeling.filter_reuse import (
    AdaptedFilter,
    ChannelFilterAdapter,
    DynamicFilters,
    reused_stages,
)
from projects.stageinteractor.modeling.mixing import CascadeMixing, StaticMixing


def randomize(module):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def test_blend_equals_the_two_gating_steps():
    own, old = torch.randn(5, 6, 7), torch.randn(5, 6, 7)
    a, b = torch.rand(5, 6), torch.rand(5, 7)
    rows = old * a[:, :, None] + own * (1 - a[:, :, None])
    both = rows * b[:, None, :] + own * (1 - b[:, None, :])
    torch.testing.assert_close(AdaptedFilter(own, old, a, b).blend(), both)


def test_gradients_of_a_blend():
    sizes = (2, 3, 4), (2, 3, 4), (2, 3), (2, 4)
    parts = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    assert torch.autograd.gradcheck(lambda *parts: AdaptedFilter(*parts).blend(), parts)


def test_at_initialisation_an_adapted_filter_is_a_quarter_old():
    adapter = ChannelFilterAdapter(embed_dim=8, num_groups=2, group_dim=3, num_reused=1)
    own, old = torch.randn(4, 3, 3), torch.randn(4, 3, 3)
    [(adapted, _)] = adapter(torch.randn(1, 2, 8), own, [old])
    torch.testing.assert_close(adapted.blend(), 0.25 * old + 0.75 * own)


@pytest.mark.parametrize(
    "stage, first, expected",
    [(0, 2, []), (1, 2, []), (2, 2, [1]), (5, 2, [1, 2, 3, 4]), (1, 1, [0]), (5, 6, [])],
)
def test_which_stages_are_reused(stage, first, expected):
    assert list(reused_stages(stage, first)) == expected


def test_static_mixing_equals_a_loop_over_points():
    """Across: over first-level points, one sub-point at a time. Within: the other way round."""
    module = randomize(StaticMixing(num_points=8, group_dim=3))  # 2 first-level points of K = 4
    features, residual = torch.randn(5, 8, 3), torch.randn(5, 8, 3)
    grid = features.view(5, 2, 4, 3)
    expected = residual.view(5, 2, 4, 3).clone()
    for k in range(4):
        expected[:, :, k] += module.across(grid[:, :, k].reshape(5, 6)).view(5, 2, 3)
    for p in range(2):
        expected[:, p] += module.within(grid[:, p].reshape(5, 12)).view(5, 4, 3)
    torch.testing.assert_close(module(features, residual), expected.view(5, 8, 3))


def test_cascade_equals_the_steps_of_the_method():
    """One query and one group at a time, with two reused filters."""
    module = randomize(
        CascadeMixing(
            embed_dim=8, feature_dim=6, num_groups=2, num_points=8, out_points=4, num_reused=2
        )
    )
    content, features = torch.randn(1, 3, 8), torch.randn(1, 3, 2, 8, 3)
    old = [DynamicFilters(torch.randn(6, 3, 3), torch.randn(6, 4, 8)) for _ in range(2)]
    result, own = module(features, content, old)

    def norm_relu(x):
        return ((x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()).clamp(min=0)

    generated = module.filter_generator(content).view(3, 2, 9 + 2 * 8)
    biases = module.bias_generator(content).view(3, 2, 3 + 4)
    channel_gates = module.channel_adapter.gates(content).sigmoid().view(3, 2, 3, 2, 2)
    step_biases = module.channel_adapter.biases(content).view(3, 2, 2, 3)
    row_gates = module.spatial_adapter.row_gate(content).sigmoid().view(3, 2, 2)
    column_gates = module.spatial_adapter.column_gate(content).sigmoid().view(3, 2, 8)
    flat = torch.zeros(3, 2, 4, 3)
    for n in range(3):
        for g in range(2):
            row = n * 2 + g
            x = features[0, n, g]
            m, s = generated[n, g, :9].view(3, 3), generated[n, g, 9:].view(2, 8)
            torch.testing.assert_close(own.channel[row], m)
            y, u = norm_relu(x @ m + biases[n, g, :3]), x
            for t in range(2):
                u = module.static_mixings[t](y[None], u[None])[0]
                b, a = channel_gates[n, g, :, 0, t], channel_gates[n, g, :, 1, t]
                adapted = old[t].channel[row] * a[:, None] + m * (1 - a[:, None])
                adapted = adapted * b + m * (1 - b)
                y = norm_relu(u @ adapted + step_biases[n, g, t])
            a, b = row_gates[n, g], column_gates[n, g]
            reused = old[1].spatial[row, :2] * a[:, None] + s * (1 - a[:, None])
            reused = reused * b + s * (1 - b)
            spatial = torch.cat([s, reused])
            flat[n, g] = norm_relu(spatial @ y + biases[n, g, 3:, None])
    update = module.out_proj(flat.view(1, 3, -1))
    expected = F.layer_norm(content + update, (8,), module.norm.weight, module.norm.bias)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


def tiny_decoder(**arguments):
    sizes = {"num_classes": 3, "embed_dim": 16, "feature_dim": 8}
    sizes |= {"num_heads": 2, "ffn_dim": 16, "num_groups": 2}
    return StageInteractorDecoder(**{**sizes, "out_points": 4, **arguments})


def run(decoder):
    pyramid = [torch.randn(1, 8, 64 // s, 64 // s) for s in (4, 8, 16, 32)]
    return decoder(torch.randn(1, 5, 16), torch.tensor([32.0, 32, 6, 0]).expand(1, 5, 4), pyramid)


@pytest.mark.parametrize("first_reuse_stage, reusing", [(1, [1, 2, 3]), (2, [2, 3]), (9, [])])
def test_first_reusing_stage_is_an_argument(first_reuse_stage, reusing):
    decoder = tiny_decoder(points_per_stage=[8] * 4, first_reuse_stage=first_reuse_stage)
    adapters = [i for i, s in enumerate(decoder.stages) if s.mixing.channel_adapter is not None]
    assert adapters == reusing
    assert run(decoder).logits.shape == (4, 1, 5, 3)


def test_number_of_stages_and_points_are_arguments():
    outputs = run(tiny_decoder(points_per_stage=[16, 8, 8]))
    assert outputs.logits.shape == (3, 1, 5, 3) and outputs.xyzr.shape == (3, 1, 5, 4)
    assert run(tiny_decoder(points_per_stage=[16])).content.shape == (1, 1, 5, 16)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"points_per_stage": [64, 32], "first_reuse_stage": 1}, "64"),
        ({"embed_dim": 12}, "multiple of 8"),
        ({"embed_dim": 16, "num_heads": 3}, "num_heads=3"),
        ({"feature_dim": 9}, "feature_dim=9"),
        ({"out_points": 3}, "out_points=3"),
        ({"first_reuse_stage": 0}, "first_reuse_stage=0"),
        ({"num_stages": 0}, "num_stages=0"),
        ({"points_per_stage": [8, 8], "num_stages": 3}, "num_stages=3: 1 to 2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_decoder(**arguments)


def test_mixing_keeps_residuals_and_own_filters_for_the_backward_pass(monkeypatch):
    """And gives the gradients that it gives when everything is kept."""
    module = randomize(
        CascadeMixing(
            embed_dim=16, feature_dim=64, num_groups=2, num_points=8, out_points=16, num_reused=3
        )
    )
    content, features = torch.randn(2, 9, 16), torch.randn(2, 9, 2, 8, 32)
    old = [DynamicFilters(torch.randn(36, 32, 32), torch.randn(36, 16, 8)) for _ in range(3)]
    leaves = [leaf.requires_grad_() for leaf in (content, features, *old[0], *old[1], *old[2])]
    leaves += module.parameters()
    given = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage
        return tensor

    def results():
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            mixed, own = module(features, content, old)
        loss = mixed.square().sum() + own.channel.sin().sum()
        return mixed, *torch.autograd.grad(loss, leaves, allow_unused=True)

    found, size = results(), sum(storage.nbytes() for storage in kept.values())
    filters, residuals = 18 * module.filter_generator.out_features, 3 * features.numel()
    assert size < 1.3 * 4 * (filters + residuals)
    monkeypatch.setattr(backward, "checkpoint", lambda function, *args, **options: function(*args))
    kept.clear()
    expected = results()
    assert sum(storage.nbytes() for storage in kept.values()) > 2 * size
    torch.testing.assert_close(found, expected)
