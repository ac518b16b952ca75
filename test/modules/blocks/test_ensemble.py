"""Ensembles of networks: one batched matmul a layer, the same as its members one by one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from tensordict.nn import InteractionType, set_interaction_type
from torch import nn

from torchrl_wm.modules import (
    BoundedLogVar,
    DrawnMember,
    EnsembleLinear,
    EnsembleMLP,
    GaussianEnsemble,
)


def member(network: EnsembleMLP, number: int) -> nn.Sequential:
    """One member as ordinary layers."""
    parts = []
    for layer in network.layers:
        linear = nn.Linear(layer.in_features, layer.out_features)
        linear.weight.data = layer.weight[number].detach().T.clone()
        linear.bias.data = layer.bias[number, 0].detach().clone()
        parts += [linear, nn.SiLU()]
    return nn.Sequential(*parts[:-1])


def shaken(network: nn.Module) -> nn.Module:
    """Biases begin at zero, which would hide that they are used."""
    for parameter in network.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return network


@given(
    st.sampled_from([(), (1,), (5,), (2, 3), (4, 1, 2)]),
    st.integers(1, 4),
    st.sampled_from([(), (8,), (8, 6)]),
)
@settings(deadline=None, max_examples=40)
def test_members_are_what_they_are_alone(size, members, hidden) -> None:
    network = shaken(EnsembleMLP(members, 3, 2, hidden=hidden))
    value = torch.randn(*size, 3)
    out = network(value)
    assert out.shape == (members, *size, 2)
    for number in range(members):
        alone = member(network, number)(value)
        assert torch.allclose(out[number], alone, atol=1e-6)


def test_members_apart_get_inputs_of_their_own() -> None:
    network = shaken(EnsembleMLP(3, 4, 2, hidden=(8,)))
    value = torch.randn(3, 5, 4)
    out = network.members_apart(value)
    for number in range(3):
        alone = member(network, number)(value[number])
        assert torch.allclose(out[number], alone, atol=1e-6)


def test_gradients_of_members_do_not_mix() -> None:
    network = shaken(EnsembleMLP(3, 4, 2, hidden=(8,)))
    network(torch.randn(5, 4))[1].sum().backward()
    for layer in network.layers:
        touched = layer.weight.grad.flatten(1).abs().sum(1) > 0
        assert touched.tolist() == [False, True, False]


def test_one_matmul_a_layer() -> None:
    from torch.profiler import profile, ProfilerActivity

    network = EnsembleMLP(7, 4, 2, hidden=(8, 8, 8))
    value = torch.randn(5, 4)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        network(value)
    names = [event.name for event in recorded.events()]
    assert names.count("aten::baddbmm") == 4
    assert "aten::addmm" not in names and "aten::mm" not in names


def test_members_begin_apart() -> None:
    layer = EnsembleLinear(4, 10, 5)
    assert not torch.equal(layer.weight[0], layer.weight[1])
    assert layer.weight.abs().max() <= 2 / (2 * 10**0.5)


def test_an_ensemble_of_none_is_refused() -> None:
    with pytest.raises(ValueError, match="members=0"):
        EnsembleMLP(0, 3, 2)


def test_the_log_variance_stays_within_its_bounds() -> None:
    bounded = BoundedLogVar(3, low=-4.0, high=1.0)
    raw = torch.tensor([-1e6, -1.0, 1e6]).requires_grad_()
    out = bounded(raw)
    # The two soft bounds overlap by what softplus leaves of their distance.
    assert out[0] == -4 and 1 <= out[2] < 1.01 and -4 < out[1] < 1
    out.sum().backward()
    assert raw.grad.isfinite().all() and raw.grad[1] > 0


@pytest.mark.parametrize("bounds", [(1.0, -1.0), (-30.0, 0.0), (0.0, 20.0)])
def test_bounds_that_make_no_sense_are_refused(bounds) -> None:
    with pytest.raises(ValueError, match="within limits"):
        BoundedLogVar(2, low=bounds[0], high=bounds[1])


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4, 1e8, 1e15])
def test_the_log_variance_cannot_run_off_under_adversarial_targets(scale) -> None:
    torch.manual_seed(0)
    ensemble = GaussianEnsemble(2, 3, 2, hidden=(16,))
    optimizer = torch.optim.Adam(ensemble.parameters(), lr=0.1)
    for step in range(300):
        value = torch.randn(16, 3)
        sign = torch.randint(0, 2, (16, 2)) * 2 - 1
        target = scale * sign if step % 3 else torch.zeros(16, 2)
        loc, log_var = ensemble(value)
        loss = F.gaussian_nll_loss(loc, target.expand_as(loc), log_var.exp())
        loss = loss + 0.01 * ensemble.bounds.width()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert log_var.isfinite().all()
        assert log_var.min() >= -20.01 and log_var.max() <= 10.01
    assert all(p.isfinite().all() for p in ensemble.parameters())


@pytest.mark.parametrize("size", [(), (1,), (7,), (4, 5)])
def test_rows_that_ask_one_member_each(size):
    network = EnsembleMLP(3, 2, 1, hidden=(8,))
    value = torch.randn(*size, 2)
    out, everyone = network.drawn(value), network(value)
    assert out.shape == (*size, 1)
    assert torch.isclose(everyone, out, atol=1e-6).any(0).all()


def test_members_that_are_drawn_have_equally_many_rows():
    network = EnsembleMLP(3, 2, 1, hidden=())
    value = torch.randn(300, 2)
    chosen = torch.isclose(network(value), network.drawn(value), atol=1e-7)
    assert chosen.flatten(1).sum(1).tolist() == [100, 100, 100]


def test_a_mode_is_the_members_average():
    network = DrawnMember(EnsembleMLP(3, 2, 1, hidden=(8,)))
    value = torch.randn(5, 2)
    with set_interaction_type(InteractionType.MODE):
        torch.testing.assert_close(network(value), network.ensemble(value).mean(0))
    assert not torch.equal(network(value), network(value))
