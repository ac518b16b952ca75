"""The KL term against formulas written out."""

from __future__ import annotations

import pytest
import torch
from _models import rssm_model
from hypothesis import given, settings, strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod
from torchrl.objectives import categorical_kl_terms

from torchrl_wm import WorldModel, WorldModelLoss
from torchrl_wm.objectives import KLTerm

OBS = 6


def sequences(*size: int) -> TensorDict:
    return TensorDict(
        {
            "observation": torch.randn(*size, OBS),
            "action": torch.rand(*size, 2),
            "next": {
                "observation": torch.randn(*size, OBS),
                "reward": torch.randn(*size, 1),
            },
        },
        batch_size=size,
    )


def filtered(model, data):
    """What the loss sees, with the noise it sees it."""
    torch.manual_seed(5)
    return model.observe(data)["next"]


def kl_of(model, data, **settings):
    loss = WorldModelLoss(model, losses=[KLTerm(**settings)], reduction="none")
    torch.manual_seed(5)
    return loss(data)["loss_kl"]


def gaussian(p_mean, p_std, q_mean, q_std):
    """``KL(q | p)`` of one-dimensional Gaussians."""
    return (
        (p_std / q_std).log()
        + (q_std**2 + (q_mean - p_mean) ** 2) / (2 * p_std**2)
        - 0.5
    )


def categorical(p_logits, q_logits, unimix=0.0):
    """``KL(q | p)`` of one categorical."""
    p, q = (x.exp() / x.exp().sum(-1, keepdim=True) for x in (p_logits, q_logits))
    p, q = ((1 - unimix) * x + unimix / x.shape[-1] for x in (p, q))
    return (q * (q / p).log()).sum(-1)


@settings(max_examples=25)
@given(
    free=st.sampled_from([0.0, 0.3, 1.0, 100.0]),
    balance=st.sampled_from([None, (0.8, 0.2), (1.0, 0.1), (0.0, 2.0)]),
    unimix=st.sampled_from([0.0, 0.01, 0.5]),
    version=st.sampled_from([1, 3]),
    size=st.sampled_from([(4,), (2, 3)]),
)
def test_formula(free, balance, unimix, version, size) -> None:
    torch.manual_seed(0)
    model, data = rssm_model(version), sequences(*size).refine_names(..., "time")
    out = kl_of(model, data, free_nats=free, balance=balance, unimix=unimix)
    seen = filtered(model, data)
    if version == 1:
        names = ("prior_mean", "prior_std", "posterior_mean", "posterior_std")
        kl = gaussian(*(seen[name] for name in names)).sum(-1)
    else:
        logits = seen["prior_logits"], seen["posterior_logits"]
        kl = categorical(*logits, unimix).sum(-1)
    expected = kl.clamp_min(free) * (1.0 if balance is None else sum(balance))
    assert out.shape == size
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_equals_torchrl() -> None:
    model, data = rssm_model(3), sequences(2, 3)
    seen = filtered(model, data)
    theirs = categorical_kl_terms(
        seen["posterior_logits"], seen["prior_logits"], free_nats=0.2, unimix=0.01
    )
    for balance, their in zip([(1.0, 0.0), (0.0, 1.0)], theirs):
        mine = kl_of(model, data, free_nats=0.2, unimix=0.01, balance=balance).mean()
        torch.testing.assert_close(mine, their)


def gradients(model, data, **settings) -> dict[str, float]:
    """Of the last layers of prior and posterior, which the noise does not reach."""
    out = kl_of(model, data, **settings).sum()
    last = {
        "prior": model.dynamics.module.rnn_to_prior_projector[-2],
        "posterior": model.posterior.module.obs_rnn_to_post_projector[-2],
    }
    weights = [layer.weight for layer in last.values()]
    # A single step, where the posterior's state is not read again.
    found = torch.autograd.grad(out, weights, allow_unused=True)
    return {
        name: 0.0 if grad is None else grad.abs().sum().item()
        for name, grad in zip(last, found)
    }


def test_what_balancing_trains() -> None:
    model, data = rssm_model(1), sequences(2, 1)
    both = gradients(model, data, free_nats=0.0, balance=None)
    dynamics = gradients(model, data, free_nats=0.0, balance=(1.0, 0.0))
    halves = gradients(model, data, free_nats=0.0, balance=(0.25, 0.0))
    assert both["prior"] and both["posterior"]
    assert dynamics["prior"] == pytest.approx(both["prior"], rel=1e-4)
    assert halves["prior"] == pytest.approx(both["prior"] / 4, rel=1e-4)
    # The first observation's state still comes from the posterior.
    representation = gradients(model, data, free_nats=0.0, balance=(0.0, 1.0))
    assert representation["prior"] == 0.0 and representation["posterior"]


def test_below_the_free_nats_nothing_is_trained() -> None:
    model, data = rssm_model(1), sequences(2, 3)
    found = gradients(model, data, free_nats=1e6)
    assert found == {"prior": 0.0, "posterior": 0.0}


def test_masks_and_weights() -> None:
    """Reduced over what counts, as every other term."""
    model, data = rssm_model(1), sequences(2, 4)
    each = kl_of(model, data, free_nats=0.0)
    data["weight"] = torch.tensor([[1.0] * 4, [3.0] * 4])
    data["collector", "mask"] = torch.ones(2, 4, dtype=torch.bool)
    data["collector", "mask"][0, 2:] = False
    loss = WorldModelLoss(model, losses=[KLTerm(0.5, free_nats=0.0)])
    torch.manual_seed(5)
    scale = data["weight"] * data["collector", "mask"]
    torch.testing.assert_close(
        loss(data)["loss_kl"], 0.5 * (scale * each).sum() / scale.sum()
    )


def test_begins_anew_with_an_episode() -> None:
    """A step after is_init has the KL of a sequence that begins there."""
    model, data = rssm_model(1), sequences(2, 5)
    # Without noise, so that both draw the same.
    for part in (model.dynamics.module, model.posterior.module):
        part.forward = lambda *x, f=part.forward: f(*x, noise=torch.zeros(3))
    data["is_init"] = torch.zeros(2, 5, 1, dtype=torch.bool)
    data["is_init"][:, 2] = True
    whole = kl_of(model, data, free_nats=0.0)
    tail = kl_of(model, data[:, 2:].exclude("is_init"), free_nats=0.0)
    torch.testing.assert_close(whole[:, 2:], tail)
    alone = kl_of(model, data.exclude("is_init"), free_nats=0.0)
    assert not torch.allclose(alone[:, 2:], tail)


def test_nested_keys() -> None:
    base, data = rssm_model(1), sequences(2, 3)
    names = {
        "prior": [("next", "robot", f"p_{n}") for n in ("mean", "std")],
        "posterior": [("next", "robot", f"q_{n}") for n in ("mean", "std")],
    }
    model = WorldModel(
        base.encoder,
        Mod(
            base.dynamics.module,
            base.dynamics.in_keys,
            [*names["prior"], ("next", "state"), ("next", "belief")],
        ),
        base.reward_head,
        posterior=Mod(
            base.posterior.module,
            base.posterior.in_keys,
            [*names["posterior"], ("next", "state")],
        ),
        initial_state=base.initial_state(()),
    )
    settings = {"prior": ("robot", "p"), "posterior": ("robot", "q")}
    torch.testing.assert_close(kl_of(model, data, **settings), kl_of(base, data))


class TestWrongUse:
    def test_settings(self) -> None:
        for wrong in ({"balance": (1.0,)}, {"balance": (-1.0, 1.0)}):
            with pytest.raises(ValueError, match="balance must be two weights"):
                KLTerm(**wrong)
        for wrong in ({"free_nats": -1.0}, {"unimix": 1.0}):
            with pytest.raises(ValueError, match="free_nats must not be negative"):
                KLTerm(**wrong)

    def test_models(self) -> None:
        model = rssm_model()
        with pytest.raises(ValueError, match="'kl' compares.*'p'.*KLTerm\\(prior="):
            WorldModelLoss(model, losses=[KLTerm(prior="p")])
        model.posterior = None
        with pytest.raises(ValueError, match="'kl' trains the posterior"):
            WorldModelLoss(model, losses=[KLTerm()])

    def test_open_loop(self) -> None:
        loss = WorldModelLoss(rssm_model(), losses=[KLTerm()], multi_step=True)
        with pytest.raises(KeyError, match="posterior only runs.*multi_step"):
            loss(sequences(2, 3))
