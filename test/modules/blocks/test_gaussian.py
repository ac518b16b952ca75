"""Log-variances within bounds that are learned."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from torchrl_wm.modules import BoundedLogVar
from torchrl_wm.objectives import gaussian_nll


def test_bounds_that_crossed_are_no_distance_apart() -> None:
    bounds = BoundedLogVar(2)
    with torch.no_grad():
        bounds.low.copy_(torch.tensor([1.0, -2.0]))
        bounds.high.copy_(torch.tensor([-3.0, 1.0]))
    width = bounds.width()
    assert width == 3.0
    width.backward()
    assert bounds.low.grad.tolist() == [0.0, -1.0]
    assert bounds.high.grad.tolist() == [0.0, 1.0]


def test_variances_follow_when_the_noise_becomes_uneven() -> None:
    """Even noise closes the bounds; they must open again for what comes after it."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(1, 16), nn.SiLU(), nn.Linear(16, 2))
    bounds = BoundedLogVar(1)
    parameters = [*network.parameters(), *bounds.parameters()]
    optimizer = torch.optim.Adam(parameters, 2e-2)

    def train(steps: int, noise) -> None:
        for _ in range(steps):
            x = 2 * torch.rand(64, 1) - 1
            loc, raw = network(x).chunk(2, -1)
            value = noise(x) * torch.randn_like(x)
            loss = gaussian_nll(value, loc, bounds(raw)).mean() + 0.01 * bounds.width()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    train(1500, lambda x: 0.3)
    train(2000, lambda x: torch.where(x > 0, 1.0, 0.05))
    with torch.no_grad():
        raw = network(torch.tensor([[-0.8], [0.8]])).chunk(2, -1)[1]
        low, high = (bounds(raw) / 2).exp().flatten().tolist()
    assert low == pytest.approx(0.05, rel=0.4) and high == pytest.approx(1, rel=0.3)


@settings(deadline=None)
@given(
    st.floats(-25, 15),
    st.sampled_from([-1.0, 0.0, 1e-3, 0.5, 10.0, 40.0]),
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5),
)
def test_log_variances_stay_within_the_limits(low, width, raw) -> None:
    """Wherever training took the bounds: close to each other, crossed, beyond the limits."""
    bounds = BoundedLogVar(1)
    with torch.no_grad():
        bounds.low.fill_(low)
        bounds.high.fill_(low + width)
    out = bounds(torch.tensor([*raw, -1e9, 1e9]).unsqueeze(-1))
    assert out.min() >= -20 and out.max() <= 10
    order = torch.tensor([*raw, -1e9, 1e9]).argsort()
    assert (out[order].diff(dim=0) >= 0).all()


def test_gradients_lead_back_from_the_limit() -> None:
    bounds = BoundedLogVar(1, low=9.5, high=10.0)
    raw = torch.tensor([9.9], requires_grad=True)
    out = bounds(raw)
    assert out == 10
    out.backward()
    assert raw.grad > 0.1 and bounds.low.grad > 0.1 and bounds.high.grad > 0.1
