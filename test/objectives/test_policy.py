"""The policy's loss: the formula, what it trains, masks, choices."""

from __future__ import annotations

import math

import pytest
import torch
from _models import SpecEnv
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod
from torch import nn
from torchrl.data import Bounded, Categorical, OneHot
from torchrl.envs import GymEnv

from torchrl_wm.models import (
    make_tdmpc2_policy,
    make_tdmpc2_q_ensemble,
    make_tdmpc2_world_model,
    TDMPC2Config,
)
from torchrl_wm.objectives import PolicyPriorLoss, ValueScale

CONFIG = TDMPC2Config(latent_size=16, num_cells=16, num_q=3)


def parts(spec=None, key="action"):
    spec = Bounded(-1.0, 1.0, (2,)) if spec is None else spec
    env = SpecEnv(action_spec=spec, action_key=key)
    q = make_tdmpc2_q_ensemble(env, CONFIG)
    with torch.no_grad():
        for parameter in q.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return make_tdmpc2_policy(env, CONFIG), q


def rolled(rows=5, steps=3, mask=None) -> TensorDict:
    z = torch.rand(rows, steps + 1, 16)
    out = TensorDict({"latent": z[:, :-1], "next": {"latent": z[:, 1:]}}, [rows, steps])
    if mask is not None:
        out["collector", "mask"] = mask
    return out


@pytest.mark.parametrize("key", ["action", ("agent", "action")])
def test_the_formula(key) -> None:
    policy, q = parts(key=key)
    loss = PolicyPriorLoss(policy, q, decay=0.5, entropy_weight=0.1, subset=None)
    loss.scale.value.fill_(2.0)
    loss.scale.tau = 1e-30
    latents = rolled()
    torch.manual_seed(0)
    out = loss(latents)
    z = torch.cat([latents["latent"], latents["next", "latent"][:, -1:]], 1)
    torch.manual_seed(0)
    dist = policy.get_dist(TensorDict({"latent": z}, [5, 4]))
    action = dist.rsample()
    q.eval()
    values = q.value(q.logits([z], [action]), "mean")[..., 0]
    entropy = -dist.log_prob(action)
    step = (values / 2 + 0.1 * 2 * entropy).mean(0)
    expected = -(step * 0.5 ** torch.arange(4)).mean()
    torch.testing.assert_close(out["loss_policy"], expected)
    torch.testing.assert_close(out["entropy"], entropy.mean().detach())


def test_the_entropy_is_right_where_actions_reach_their_bounds() -> None:
    policy, q = parts(Bounded(-2.0, 2.0, (1,)))
    last = [m for m in policy.modules() if isinstance(m, nn.Linear)][-1]
    bias = torch.tensor([12.0, 0.9])  # float32 has no tanh(12) below 1
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(bias)
    loss = PolicyPriorLoss(policy, q, decay=1.0, entropy_weight=1.0)
    loss.scale.value.fill_(1e12)  # the entropy alone
    torch.manual_seed(0)
    out = loss(rolled(200))
    out["loss_policy"].backward()
    torch.manual_seed(0)
    loc, share = bias.requires_grad_().expand(200, 4, 2).unbind(-1)
    normal = torch.distributions.Normal(loc, (-10 + 6 * (share.tanh() + 1)).exp())
    rolled(200)
    x = normal.rsample()
    slope = math.log(2) + 2 * (math.log(2) - x - nn.functional.softplus(-2 * x))
    entropy = (slope - normal.log_prob(x)).mean()
    (-entropy).backward()
    torch.testing.assert_close(out["entropy"], entropy.detach())
    torch.testing.assert_close(last.bias.grad, bias.grad)


def test_only_the_policy_is_trained() -> None:
    policy, q = parts()
    latents = rolled()
    latents["latent"].requires_grad_()
    loss = PolicyPriorLoss(policy, q)
    loss(latents)["loss_policy"].backward()
    assert all(p.grad is not None for p in policy.parameters())
    assert all(p.grad is None and p.requires_grad for p in q.parameters())
    assert {*map(id, loss.parameters())} == {*map(id, policy.parameters())}
    assert q.training


def test_it_goes_where_the_values_are_higher() -> None:
    policy, q = parts()

    class Wanted(type(q)):
        def logits(self, latents, actions):
            return -(actions[0] - 0.5).square().sum(-1, keepdim=True)

        def value(self, logits, *_):
            return 10 * logits

    q.__class__ = Wanted
    loss = PolicyPriorLoss(policy, q)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        loss(rolled())["loss_policy"].backward()
        optimizer.step()
    action = policy.get_dist(rolled()).deterministic_sample
    assert (action - 0.5).abs().max() < 0.2


def test_steps_behind_the_end_do_not_count() -> None:
    policy, q = parts()
    mask = torch.ones(5, 3, dtype=torch.bool)
    mask[0, 1:] = False
    latents = rolled(mask=mask)
    loss = PolicyPriorLoss(policy, q, decay=1.0, subset=None)
    torch.manual_seed(0)
    before = loss(latents)["loss_policy"]
    latents["latent"][0, 1:] = 7.0
    latents["next", "latent"][0, 1:] = 7.0
    loss.scale.value.fill_(1.0)
    torch.manual_seed(0)
    assert torch.equal(loss(latents)["loss_policy"], before)
    nothing = rolled(mask=torch.zeros(5, 3, dtype=torch.bool))
    assert loss(nothing)["loss_policy"] == 0


@pytest.mark.parametrize("spec", [OneHot(3), Categorical(3)], ids=["one-hot", "number"])
def test_choices_are_weighed_by_their_probabilities(spec) -> None:
    policy, q = parts(spec)
    loss = PolicyPriorLoss(policy, q, decay=1.0, entropy_weight=0.1, subset=None)
    latents = rolled()
    out = loss(latents)
    z = torch.cat([latents["latent"], latents["next", "latent"][:, -1:]], 1)
    chances = policy.get_dist(TensorDict({"latent": z}, [5, 4])).probs
    q.eval()
    total = 0.0
    for option in range(3):
        action = torch.full((5, 4), option)
        if isinstance(spec, OneHot):
            action = nn.functional.one_hot(action, 3)
        value = q.value(q.logits([z], [action]), "mean")[..., 0] / loss.scale.value
        total = total + chances[..., option] * (
            value - 0.3 * chances[..., option].log()
        )
    torch.testing.assert_close(out["loss_policy"], -total.mean())
    out["loss_policy"].backward()
    assert all(p.grad is not None for p in policy.parameters())


def test_the_scale_of_values() -> None:
    scale = ValueScale(tau=0.5)
    scale.update(torch.linspace(0, 100, 101))
    assert scale.value.item() == pytest.approx((1 + 90) / 2)
    scale.update(torch.zeros(7))  # never below 1
    assert scale.value.item() == pytest.approx((45.5 + 1) / 2)
    assert scale(torch.tensor(46.5)).item() == pytest.approx(2)
    again = ValueScale()
    again.load_state_dict(scale.state_dict())
    assert torch.equal(again.value, scale.value)
    with pytest.raises(ValueError, match="low=0.9"):
        ValueScale(low=0.9, high=0.1)


def test_the_scale_follows_the_first_step() -> None:
    policy, q = parts()
    loss = PolicyPriorLoss(policy, q, scale=ValueScale(tau=1.0))
    out = loss(rolled(200))
    assert out["value_scale"] == loss.scale.value >= 1


def test_on_what_a_loss_hands_out() -> None:
    env = GymEnv("Pendulum-v1")
    model, model_loss = make_tdmpc2_world_model(env, CONFIG)
    model_loss.return_latents = True
    batch = env.rollout(12).reshape(4, 3)
    latents = model_loss(batch)["latents"]
    policy = make_tdmpc2_policy(env, CONFIG)
    out = PolicyPriorLoss(policy, make_tdmpc2_q_ensemble(env, CONFIG))(latents)
    assert out["loss_policy"].requires_grad


@pytest.mark.parametrize("decay", [0.0, 1.1])
def test_bad_decay(decay) -> None:
    with pytest.raises(ValueError, match="decay"):
        PolicyPriorLoss(*parts(), decay=decay)


def test_a_policy_of_another_action() -> None:
    _, q = parts()
    other = Mod(nn.Linear(16, 2), ["latent"], ["move"])
    with pytest.raises(ValueError, match="move.*must be one action"):
        PolicyPriorLoss(other, q)
