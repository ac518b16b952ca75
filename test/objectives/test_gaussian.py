"""The Gaussian likelihood term, against formulas written out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod
from torch import nn
from torchrl.data import Unbounded
from torchrl.envs import GymEnv

from torchrl_wm import WorldModel, WorldModelLoss
from torchrl_wm.models import make_ensemble_world_model
from torchrl_wm.modules import (
    EnsembleDynamics,
    Entry,
    fit_normalizers,
    GaussianEnsemble,
    GaussianHead,
)
from torchrl_wm.objectives import (
    bootstrap_counts,
    DoneTerm,
    gaussian_nll,
    GaussianNLLTerm,
)

OBS, ACTION, MEMBERS = 3, 1, 4


def model_over(key="observation") -> WorldModel:
    dynamics = EnsembleDynamics(
        GaussianEnsemble(MEMBERS, OBS + ACTION, OBS + 1, hidden=(8,)),
        [Entry.from_spec(key, Unbounded((OBS,)))],
        [Entry.from_spec("action", Unbounded((ACTION,)))],
        reward=Entry.from_spec("reward", Unbounded((1,))),
        normalize=False,
    )
    return WorldModel(
        Mod(nn.Identity(), [key], [key]),
        dynamics,
        Mod(nn.Identity(), [("next", "ensemble_reward")], [("next", "reward")]),
        done_head=Mod(
            nn.Linear(OBS, 1), [("next", key)], [("next", "terminated_logits")]
        ),
    )


def transitions(*size: int, key="observation") -> TensorDict:
    td = TensorDict({"action": torch.randn(*size, ACTION)}, size)
    td.set(key, torch.randn(*size, OBS))
    following = TensorDict({"reward": torch.randn(*size, 1)}, size)
    following.set("terminated", torch.rand(*size, 1) > 0.5)
    following.set(key, torch.randn(*size, OBS))
    return td.set("next", following)


def by_hand(model, batch, key="observation"):
    """``[*B, E]``: the mean over dims of -log N, by torch's own distribution."""
    predicted = model(batch.clone())["next"]
    target = torch.cat([batch["next"].get(key), batch["next", "reward"]], -1)
    normal = torch.distributions.Normal(
        predicted["loc"], (predicted["log_var"] / 2).exp()
    )
    return -normal.log_prob(target.unsqueeze(-2)).mean(-1)


@pytest.mark.parametrize("key", ["observation", ("robot", "state")])
@pytest.mark.parametrize("size", [(6,), (2, 3)])
def test_it_is_the_likelihood_of_all_members(key, size) -> None:
    model, batch = model_over(key), transitions(*size, key=key)
    loss = WorldModelLoss(
        model, losses=[GaussianNLLTerm(bound_weight=0.0)], reduction="none"
    )
    out = loss(batch)["loss_nll"]
    assert torch.allclose(out, by_hand(model, batch, key).mean(-1), atol=1e-5)
    out.sum().backward()
    for layer in model.dynamics.ensemble.network.layers:
        assert (layer.weight.grad.flatten(1).abs().sum(1) > 0).all()


def test_the_distance_of_the_bounds_is_a_part_of_it() -> None:
    model, batch = model_over(), transitions(5)
    values = [
        WorldModelLoss(model, losses=[GaussianNLLTerm(bound_weight=w)])(batch)[
            "loss_nll"
        ]
        for w in (0.0, 0.1)
    ]
    width = model.dynamics.ensemble.bounds.width()
    assert torch.allclose(values[1] - values[0], 0.1 * width, atol=1e-5)


def test_given_counts_weigh_members() -> None:
    model, batch = model_over(), transitions(6)
    counts = torch.randint(0, 3, (6, MEMBERS)).float()
    term = GaussianNLLTerm(bound_weight=0.0)
    loss = WorldModelLoss(model, losses=[term], reduction="none")
    out = loss(batch.clone().set("member_weight", counts))["loss_nll"]
    expected = (by_hand(model, batch) * counts).mean(-1)
    assert torch.allclose(out, expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"\(6, 2\).*\(6, 4\)"):
        loss(batch.clone().set("member_weight", counts[:, :2]))


def test_counts_that_are_made_beforehand_are_those_of_each_batch() -> None:
    model, batch = model_over(), transitions(20)
    term = GaussianNLLTerm(bootstrap=True)
    loss = WorldModelLoss(model, losses=[term], reduction="none")
    counts = term.member_counts(batch, loss, MEMBERS).float()
    given = loss(batch[5:9].clone().set("member_weight", counts[5:9]))["loss_nll"]
    assert torch.equal(given, loss(batch[5:9])["loss_nll"])


def counts_of(model, batch, seed: int = 0, key="observation") -> torch.Tensor:
    """How often each transition counts for each member, ``[*B, E]``, by the members' gradients."""
    predicted = model.dynamics(batch.select(key, "action"))["next"]
    loc = predicted["loc"].detach().requires_grad_()
    fixed = WorldModel(
        model.encoder,
        Mod(
            lambda o, a: (loc, predicted["log_var"].detach(), o, loc[..., 0, :1]),
            [key, "action"],
            [("next", "loc"), ("next", "log_var"), ("next", key), ("next", "r")],
        ),
        Mod(nn.Identity(), [("next", "r")], [("next", "reward")]),
    )
    settings = {"bootstrap": True, "seed": seed, "bound_weight": 0.0}
    term = GaussianNLLTerm([key, "reward"], **settings)
    WorldModelLoss(fixed, losses=[term], reduction="sum")(batch)["loss_nll"].backward()
    target = torch.cat([batch["next"].get(key), batch["next", "reward"]], -1)
    one = (loc.detach() - target.unsqueeze(-2)) * (-predicted["log_var"]).exp()
    scale = one.shape[-1] * one.shape[-2]
    return (loc.grad * scale / one).mean(-1).detach()


def test_bootstrap_leaves_transitions_out_for_a_member() -> None:
    model, batch = model_over(), transitions(1)
    for seed in range(50):
        counts = counts_of(model, batch, seed)[0]
        if counts[0].abs() < 1e-3 and counts[1] > 0.5:
            break
    term = GaussianNLLTerm(bootstrap=True, seed=seed, bound_weight=0.0)
    loss = WorldModelLoss(model, losses=[term])
    value = loss(batch)["loss_nll"]
    expected = (by_hand(model, batch) * counts).mean()
    assert torch.allclose(value, expected, atol=1e-3)
    value.backward()
    weight = model.dynamics.ensemble.network.layers[0].weight.grad
    assert not weight[0].any() and weight[1].any()


@pytest.mark.parametrize("key", ["observation", ("robot", "state")])
@pytest.mark.parametrize("varied", ["state", "action", "target", "reward"])
def test_bootstrap_tells_transitions_apart_by_all_of_them(varied, key) -> None:
    """Equal targets in different states, say, have weights of their own."""
    place = {
        "state": key,
        "action": "action",
        "target": ("next", *((key,) if isinstance(key, str) else key)),
        "reward": ("next", "reward"),
    }[varied]
    rows = transitions(1, key=key).expand(200).clone()
    other = transitions(200, key=key)
    model = model_over(key)
    assert (counts_of(model, rows, key=key).std(0) < 1e-3).all()
    rows.set(place, other.get(place))
    counts = counts_of(model, rows, key=key)
    assert (counts.std(0) > 0.7).all() and (counts.mean(0) - 1).abs().max() < 0.35
    again = counts_of(model, rows.flip(0), key=key)
    assert torch.allclose(again.flip(0), counts, atol=1e-2)


@given(st.integers(1, 5), st.integers(0, 2**40), st.integers(1, 6))
@settings(deadline=None, max_examples=20)
def test_counts_are_poisson_and_depend_on_the_row_alone(dims, seed, members) -> None:
    generator = torch.Generator().manual_seed(seed % 2**31)
    rows = torch.randn(4000, dims, generator=generator)
    counts = bootstrap_counts(rows, members, seed)
    assert counts.shape == (4000, members)
    order = torch.randperm(4000, generator=generator)
    again = bootstrap_counts(rows[order].reshape(40, 100, dims), members, seed)
    assert torch.equal(again.reshape(4000, members), counts[order])
    for count in range(4):
        share = (counts == count).float().mean(0)
        expected = math.exp(-1) / math.factorial(count)
        assert (share - expected).abs().max() < 0.045
    if members > 1:
        assert abs(torch.corrcoef(counts.T.float())[0, 1]) < 0.08
    assert not torch.equal(bootstrap_counts(rows, members, seed + 1), counts)


@pytest.mark.parametrize(
    "value, loc, log_var", [(0.3, -0.2, 0.7), (5.0, 5.0, -8.0), (1e3, 0.0, 3.0)]
)
def test_the_likelihood_is_scipy_free_arithmetic(value, loc, log_var) -> None:
    expected = (
        0.5 * math.log(2 * math.pi)
        + 0.5 * log_var
        + (value - loc) ** 2 / (2 * math.exp(log_var))
    )
    out = gaussian_nll(*(torch.tensor(x).double() for x in (value, loc, log_var)))
    assert out.item() == pytest.approx(expected)


def test_masks_and_weights_count() -> None:
    model, batch = model_over(), transitions(6)
    term = GaussianNLLTerm(bound_weight=0.0)
    loss = WorldModelLoss(model, losses=[term])
    each = by_hand(model, batch).mean(-1)
    mask = torch.tensor([True, True, False, True, False, True])
    weight = torch.rand(6)
    spoilt = batch.clone()
    for key in ("observation", ("next", "observation"), ("next", "reward")):
        spoilt[key][~mask] = float("nan")
    spoilt.set(("collector", "mask"), mask)
    value = loss(spoilt)["loss_nll"]
    assert torch.allclose(value, each[mask].mean(), atol=1e-5)
    value.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    weighed = loss(batch.clone().set("weight", weight))["loss_nll"]
    assert torch.allclose(weighed, (each * weight).sum() / weight.sum(), atol=1e-5)


def test_terminations_are_learnt_from_real_next_observations() -> None:
    model, batch = model_over(), transitions(9)
    loss = WorldModelLoss(model, losses=[DoneTerm(real_next=True)])
    value = loss(batch)["loss_done"]
    logits = model.done_head.module(batch["next", "observation"])
    label = batch["next", "terminated"].float()
    expected = nn.functional.binary_cross_entropy_with_logits(logits, label)
    assert torch.allclose(value, expected)
    value.backward()
    assert model.done_head.module.weight.grad.any()
    assert all(p.grad is None or not p.grad.any() for p in model.dynamics.parameters())


@pytest.mark.parametrize("agents", [1, 3])
def test_a_head_of_several_dims_is_no_ensemble(agents) -> None:
    model = model_over()
    head = GaussianHead(
        nn.Linear(OBS, 2 * agents),
        [("next", "observation")],
        ("next", "reward"),
        shape=(agents, 1),
    )
    model.reward_head = head
    term = GaussianNLLTerm.of_head("reward_head", "reward", bound_weight=0.0)
    batch = transitions(5)
    batch["next", "reward"] = torch.randn(5, agents, 1)
    loss = WorldModelLoss(model, losses=[term], reduction="none")
    torch.manual_seed(0)
    out = loss(batch)["loss_nll"]
    torch.manual_seed(0)
    predicted = model(batch.clone())["next"]
    normal = torch.distributions.Normal(
        predicted["reward_loc"], (predicted["reward_log_var"] / 2).exp()
    )
    expected = -normal.log_prob(batch["next", "reward"]).mean((-2, -1))
    assert torch.allclose(out, expected, atol=1e-5)


def test_wrong_wirings_are_named() -> None:
    model = model_over()
    with pytest.raises(ValueError, match="reward_head writes"):
        WorldModelLoss(model, losses=[GaussianNLLTerm(component="reward_head")])
    loss = WorldModelLoss(model, losses=[GaussianNLLTerm(["observation"])])
    with pytest.raises(ValueError, match=r"\['observation'\], 3 numbers"):
        loss(transitions(4))
    lacking = transitions(4).exclude(("next", "reward"))
    with pytest.raises(KeyError, match=r"needs the label \('next', 'reward'\)"):
        WorldModelLoss(model, losses=[GaussianNLLTerm()])(lacking)
    assert WorldModelLoss(model, losses=[GaussianNLLTerm()]).in_keys == [
        "observation",
        "action",
        ("next", "observation"),
        ("next", "reward"),
    ]


def test_beta_weights_the_likelihood_by_the_variance():
    env = GymEnv("Pendulum-v1")
    world_model, _ = make_ensemble_world_model(
        env, members=2, hidden=(8,), normalize=False, termination="none"
    )
    batch = env.rollout(20)
    out = world_model.step(batch.copy())["next"]
    loc, log_var = out["loc"], out["log_var"]
    target = torch.cat([batch["next", "observation"], batch["next", "reward"]], -1)
    nll = gaussian_nll(target.unsqueeze(-2), loc, log_var)
    weight = log_var.exp().sqrt()
    weight = weight / weight.mean((0, 1))
    term = GaussianNLLTerm(beta=0.5, bound_weight=0.0)
    loss = WorldModelLoss(world_model, losses=[term])(batch)["loss_nll"]
    torch.testing.assert_close(loss, (nll * weight).mean())
    plain = GaussianNLLTerm(bound_weight=0.0)
    loss = WorldModelLoss(world_model, losses=[plain])(batch)["loss_nll"]
    torch.testing.assert_close(loss, nll.mean())
    with pytest.raises(ValueError, match="beta"):
        GaussianNLLTerm(beta=2.0)


@pytest.mark.parametrize("members", [False, True])
def test_weighted_likelihoods_leave_padding_out(members) -> None:
    """The weights of a batch have mean 1 over what is valid."""
    env = GymEnv("Pendulum-v1")
    model, _ = make_ensemble_world_model(env, members=3 if members else 1, hidden=(8,))
    batch = env.rollout(8)
    fit_normalizers(model, batch)
    loss = WorldModelLoss(model, losses=[GaussianNLLTerm(beta=0.5)])
    alone = loss(batch[:3])["loss_nll"]
    batch["collector", "mask"] = torch.arange(8) < 3
    torch.testing.assert_close(loss(batch)["loss_nll"], alone)
    batch["collector", "mask"] = torch.zeros(8, dtype=torch.bool)
    assert loss(batch)["loss_nll"].isfinite()
