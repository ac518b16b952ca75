"""Scalars as distributions over bins, and the heads that predict them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod
from torch import nn
from torchrl.modules import MLP, SymExpTwoHot

from torchrl_wm.modules import SymlogTwoHot, TwoHotHead

values = st.floats(-2e4, 2e4, width=32)


class TestSymlogTwoHot:
    @given(x=values, bins=st.integers(2, 200))
    def test_encode(self, x, bins) -> None:
        """Two neighbours, whose mean is the scalar in symlog space; and back."""
        two_hot = SymlogTwoHot(bins)
        target = torch.tensor([x], dtype=torch.float64)
        two_hot = two_hot.double()
        encoded = two_hot.encode(target)
        assert encoded.shape == (1, bins)
        torch.testing.assert_close(encoded.sum(), torch.ones((), dtype=torch.float64))
        used = encoded[0].nonzero().squeeze(-1)
        assert 1 <= len(used) <= 2 and used.max() - used.min() <= 1
        mean = (encoded[0] * torch.linspace(-10, 10, bins, dtype=torch.float64)).sum()
        symlog = target.sign() * target.abs().log1p()
        torch.testing.assert_close(mean, symlog[0], atol=1e-5, rtol=1e-5)
        back = two_hot.decode(encoded.log())
        torch.testing.assert_close(back, target, atol=1e-4, rtol=1e-4)

    def test_beyond_the_bins(self) -> None:
        two_hot = SymlogTwoHot(11, limit=2.0)
        assert torch.equal(two_hot.encode(torch.tensor([1e9]))[0], torch.eye(11)[-1])
        assert torch.equal(two_hot.encode(torch.tensor([-1e9]))[0], torch.eye(11)[0])

    @pytest.mark.parametrize("bins", [2, 7, 101, 256])
    def test_nothing_said_is_zero(self, bins) -> None:
        assert SymlogTwoHot(bins)(torch.zeros(3, bins)).tolist() == [[0.0]] * 3

    def test_wrong_settings(self) -> None:
        for wrong in ({"num_bins": 1}, {"limit": 0.0}):
            with pytest.raises(ValueError, match="at least 2 bins and a positive"):
                SymlogTwoHot(**wrong)


class TestHead:
    @pytest.mark.parametrize("two_hot", [SymExpTwoHot(21), SymlogTwoHot(21)])
    @pytest.mark.parametrize("size", [(), (4,), (2, 3)])
    def test_logits_and_scalar(self, two_hot, size) -> None:
        head = TwoHotHead(MLP(5, 21, num_cells=[8]), two_hot, zero=False)
        inputs = torch.randn(*size, 3), torch.randn(*size, 2)
        logits, value = head(*inputs)
        assert logits.shape == (*size, 21) and value.shape == (*size, 1)
        assert torch.equal(value, two_hot.decode(head.network(*inputs)).unsqueeze(-1))

    def test_nested_keys_and_other_shapes(self) -> None:
        """Of agents each, say."""
        head = Mod(
            TwoHotHead(nn.Linear(4, 3 * 11), SymlogTwoHot(11), shape=(3, 1)),
            [("next", "latent")],
            [("next", "agents", "reward_logits"), ("next", "agents", "reward")],
        )
        td = head(TensorDict({"next": {"latent": torch.randn(5, 4)}}, [5]))
        assert td["next", "agents", "reward_logits"].shape == (5, 3, 11)
        assert td["next", "agents", "reward"].shape == (5, 3, 1)
        flat = TwoHotHead(nn.Linear(4, 22), SymlogTwoHot(11), shape=(2,))
        logits, value = flat(torch.randn(5, 4))
        assert logits.shape == (5, 2, 11) and value.shape == (5, 2)

    @pytest.mark.parametrize("two_hot", [SymExpTwoHot(), SymlogTwoHot()])
    def test_starts_at_zero(self, two_hot) -> None:
        head = TwoHotHead(MLP(4, two_hot.num_bins, num_cells=[8]), two_hot)
        logits, value = head(torch.randn(5, 4))
        assert not logits.any() and not value.any()
        two_hot.loss(logits, torch.ones(5)).mean().backward()
        assert head.network[-1].weight.grad.any()

    def test_wrong_networks(self) -> None:
        with pytest.raises(ValueError, match="last linear layer.*Identity has none"):
            TwoHotHead(nn.Identity())
        head = TwoHotHead(nn.Linear(4, 7), SymlogTwoHot(11))
        with pytest.raises(ValueError, match="gives 7 numbers.*11 bins.*give 11"):
            head(torch.randn(5, 4))


def test_a_label_that_is_no_number_makes_its_own_loss_none() -> None:
    """It names no bin, and must not be taken for the number of one."""
    labels = torch.tensor([float("nan"), float("inf"), 1.0])
    loss = SymlogTwoHot(11).loss(torch.zeros(3, 11), labels)
    assert loss.isnan().tolist() == [True, False, False]
