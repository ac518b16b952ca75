"""Dreamer's loss of imagined values: TorchRL's, in less time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.modules import MLP, SymExpTwoHot
from torchrl.objectives import DreamerV3ValueLoss, SoftUpdate
from torchrl_wm.modules import TwoHotHead
from torchrl_wm.objectives import ImaginedValueLoss

BINS = 41


def make_critic(latent="latent"):
    head = TwoHotHead(MLP(4, BINS, num_cells=[8]), SymExpTwoHot(BINS), zero=False)
    return TensorDictModule(head, [latent], ["state_value_logits", "state_value"])


def make_imagined(*size, latent="latent", spread=10.0):
    return TensorDict(
        {
            latent: torch.randn(*size, 4),
            "lambda_target": spread * torch.randn(*size, 1),
            "discount_weight": torch.rand(*size, 1),
        },
        size,
    )


def make_losses(critic, slow):
    settings = {"num_value_bins": BINS, "slow_critic_regularization": slow}
    ours = ImaginedValueLoss(critic, **settings)
    return ours, DreamerV3ValueLoss(critic, "two_hot", **settings)


@settings(deadline=None, max_examples=20)
@given(
    size=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    slow=st.sampled_from([0.0, 0.5, 1.0]),
    spread=st.sampled_from([1e-3, 10.0, 1e12]),  # the last one is beyond the bins
    latent=st.sampled_from(["latent", ("agent", "latent")]),
)
def test_equals_torchrl(size, slow, spread, latent):
    critic = make_critic(latent)
    imagined = make_imagined(*size, latent=latent, spread=spread)
    parameters, found = list(critic.parameters()), []
    for loss in make_losses(critic, slow):
        terms, steps = loss(imagined.copy())
        assert (steps["lambda_target"] == imagined["lambda_target"]).all()
        gradients = torch.autograd.grad(terms["loss_value"], parameters)
        found.append((terms["loss_value"], terms["value_slow_loss"], *gradients))
    for own, theirs in zip(*found):
        torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-5)


def test_logits_that_are_there_with_their_graph_are_taken():
    critic, imagined = make_critic(), make_imagined(4, 5)
    loss, _ = make_losses(critic, 1.0)
    parameters = list(critic.parameters())
    expected = torch.autograd.grad(loss(imagined)[0]["loss_value"], parameters)
    logits = critic.module.network(imagined["latent"])
    imagined["state_value_logits"] = logits
    found = torch.autograd.grad(loss(imagined)[0]["loss_value"], parameters)
    torch.testing.assert_close(found, expected)
    leaf = logits.detach().requires_grad_()
    imagined["state_value_logits"] = leaf
    loss(imagined)[0]["loss_value"].backward()
    assert leaf.grad.any() and all(p.grad is None for p in parameters)
    # Recorded ones have lost it: the critic judges anew.
    imagined["state_value_logits"] = torch.zeros_like(logits)
    found = torch.autograd.grad(loss(imagined)[0]["loss_value"], parameters)
    torch.testing.assert_close(found, expected)


def test_a_target_on_a_bin_is_that_bin():
    critic = make_critic()
    loss, _ = make_losses(critic, 0.0)
    imagined = make_imagined(2, 3)
    imagined["discount_weight"].fill_(1.0)
    imagined["lambda_target"].fill_(float(loss.value_bins[30]))
    logits = critic(imagined.copy())["state_value_logits"]
    expected = -logits.log_softmax(-1)[..., 30].mean()
    torch.testing.assert_close(loss(imagined)[0]["loss_value"], expected)


def test_the_slow_critic_follows():
    critic = make_critic()
    loss, theirs = make_losses(critic, 1.0)
    targets, imagined = SoftUpdate(loss, tau=0.5), make_imagined(2, 3)
    for parameter in critic.parameters():
        parameter.data.normal_()
    before = loss(imagined)[0]["value_slow_loss"]
    targets.step()
    assert loss(imagined)[0]["value_slow_loss"] != before
    theirs.load_state_dict(loss.state_dict())
    torch.testing.assert_close(
        loss(imagined)[0]["value_slow_loss"], theirs(imagined)[0]["value_slow_loss"]
    )


def test_an_untouched_slow_critic_has_no_gradient():
    critic = make_critic()
    loss, _ = make_losses(critic, 1.0)
    loss(make_imagined(2, 3))[0]["loss_value"].backward()
    slow = loss.target_value_model_params.values(True, True)
    assert all(value.grad is None for value in slow)
    assert all(parameter.grad is not None for parameter in critic.parameters())


def test_a_critic_of_plain_numbers_is_refused():
    critic = TensorDictModule(MLP(4, 1, num_cells=[8]), ["latent"], ["state_value"])
    with pytest.raises(TypeError, match="TwoHotHead"):
        ImaginedValueLoss(critic)


def test_settings_that_it_does_not_heed_are_refused():
    critic = make_critic()
    with pytest.raises(
        ValueError, match="has 41 bins, and the loss 21.*num_value_bins=41"
    ):
        ImaginedValueLoss(critic, num_value_bins=21)
    with pytest.raises(ValueError, match="returns means, got reduction='sum'"):
        ImaginedValueLoss(critic, num_value_bins=BINS, reduction="sum")


@pytest.mark.parametrize("key", ["latent", "lambda_target", "discount_weight"])
def test_what_is_missing_is_named(key):
    loss, _ = make_losses(make_critic(), 1.0)
    with pytest.raises(
        KeyError, match=f"reads \\['{key}'\\], which the imagined steps"
    ):
        loss(make_imagined(2, 3).exclude(key))
