"""TD-MPC2's blocks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

from torchrl_wm.modules import NormedLinear, NormedMLP, SimNorm


@given(
    group=st.integers(1, 6),
    groups=st.integers(1, 5),
    size=st.sampled_from([(), (1,), (2, 3)]),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
)
def test_simnorm(group, groups, size, temperature) -> None:
    value = torch.randn(*size, group * groups)
    out = SimNorm(group, temperature)(value)
    expected = torch.cat(
        [
            (part / temperature).exp()
            / (part / temperature).exp().sum(-1, keepdim=True)
            for part in value.split(group, -1)
        ],
        -1,
    )
    torch.testing.assert_close(out, expected)


def test_simnorm_of_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="groups of 4, which do not divide the 6"):
        SimNorm(4)(torch.zeros(2, 6))
    for wrong in ({"group": 0}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match="positive group and temperature"):
            SimNorm(**wrong)


def test_normed_linear() -> None:
    layer, value = NormedLinear(3, 5), torch.randn(4, 3)
    linear = layer[0]
    hidden = value @ linear.weight.T + linear.bias
    hidden = hidden - hidden.mean(-1, keepdim=True)
    hidden = hidden / (hidden.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    expected = hidden * (1 + hidden.exp()).log().tanh()
    torch.testing.assert_close(layer(value), expected)


def test_normed_mlp() -> None:
    """Layers, and what follows the last of them."""
    plain = NormedMLP(3 + 2, 4, [6, 7], dropout=0.1)
    kinds = [type(module) for module in plain]
    assert kinds == [NormedLinear, NormedLinear, nn.Linear]
    dropouts = [m for m in plain.modules() if isinstance(m, nn.Dropout)]
    assert len(dropouts) == 1 and dropouts[0] in list(plain[0])
    a, b = torch.randn(2, 5, 3), torch.randn(2, 5, 2)
    plain.eval()
    assert torch.equal(plain(a, b), plain(torch.cat([a, b], -1)))
    simplex = NormedMLP(5, 4, [6], activation=lambda: SimNorm(2))
    torch.testing.assert_close(
        simplex(a, b).unflatten(-1, (2, 2)).sum(-1), torch.ones(2, 5, 2)
    )
