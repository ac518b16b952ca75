"""TD-MPC2's policy prior: its distribution, bounds and kinds of actions."""

from __future__ import annotations

import pytest
import torch
from _models import SpecEnv
from tensordict import TensorDict
from tensordict.nn import InteractionType, set_interaction_type
from torchrl.data import Bounded, Categorical, Composite, MultiOneHot, OneHot, Unbounded
from torchrl.envs import GymEnv

from torchrl_wm.models import make_tdmpc2_policy, TDMPC2Config

SMALL = TDMPC2Config(latent_size=16, num_cells=16)


def policy_of(spec, key="action", config=SMALL):
    return make_tdmpc2_policy(SpecEnv(action_spec=spec, action_key=key), config)


def latents(*size) -> TensorDict:
    return TensorDict({"latent": torch.randn(*size, 16)}, size)


@pytest.mark.parametrize(
    "spec",
    [
        Bounded(-1.0, 1.0, (2,)),
        Bounded(torch.tensor([100.0, -3.0]), torch.tensor([200.0, -2.0]), (2,)),
        Bounded(-1.0, 2.0, (2, 3)),
        Bounded(-1.0, 1.0, ()),
        Bounded(-1.0, 1.0, (2,), dtype=torch.float64),
        OneHot(4, dtype=torch.int64),  # as TorchRL draws them
        Categorical(4),
    ],
    ids=["vector", "odd bounds", "matrix", "scalar", "double", "one-hot", "number"],
)
@pytest.mark.parametrize("size", [(), (5,), (2, 3)])
@pytest.mark.parametrize("key", ["action", ("agent", "action")])
def test_actions_are_in_the_spec(spec, size, key) -> None:
    policy = policy_of(spec, key)
    assert policy.in_keys == ["latent"]
    for kind in (InteractionType.RANDOM, InteractionType.DETERMINISTIC):
        with set_interaction_type(kind):
            action = policy(latents(*size))[key]
        assert action.shape == (*size, *spec.shape) and action.dtype == spec.dtype
        assert spec.expand(*size, *spec.shape).is_in(action)


def test_choices_compile_to_one_graph() -> None:
    policy, inputs = policy_of(OneHot(4)), latents(5)
    compiled = torch.compile(policy, backend="eager", fullgraph=True)
    for kind in (InteractionType.RANDOM, InteractionType.DETERMINISTIC):
        actions = []
        for function in (policy, compiled):
            torch.manual_seed(0)
            with set_interaction_type(kind):
                actions.append(function(inputs.copy())["action"])
        torch.testing.assert_close(*actions)


def test_the_log_std_map() -> None:
    """Eq. of the authors' code: ``low + (high - low) / 2 * (tanh(x) + 1)``."""
    policy = policy_of(Bounded(-1.0, 1.0, (1,)))
    gaussian = policy.module[0].module
    for number, expected in ((-1e3, -10.0), (0.0, -4.0), (1e3, 2.0)):
        with torch.no_grad():
            gaussian.network[-1].weight.zero_()
            gaussian.network[-1].bias.copy_(torch.tensor([0.3, number]))
        loc, scale = gaussian(torch.randn(5, 16))
        torch.testing.assert_close(loc, torch.full((5, 1), 0.3))
        torch.testing.assert_close(scale.log(), torch.full((5, 1), expected))


def test_the_density_is_that_of_the_squashed_gaussian() -> None:
    policy = policy_of(Bounded(-2.0, 2.0, (1,)))
    dist = policy.get_dist(latents(1))
    grid = torch.linspace(-1.9999, 1.9999, 200_001).view(-1, 1, 1)
    density = dist.log_prob(grid).exp().flatten()
    assert torch.trapezoid(density, grid.flatten()).item() == pytest.approx(1, abs=0.02)


def test_gradients_reach_every_parameter() -> None:
    policy = policy_of(Bounded(-1.0, 1.0, (2,)))
    dist = policy.get_dist(latents(6))
    action = dist.rsample()
    (action.sum() + dist.log_prob(action).sum()).backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for p in policy.parameters()
    )


@pytest.mark.parametrize(
    "spec, message",
    [
        (Unbounded((2,)), "no finite|finite bounds"),
        (MultiOneHot((2, 3)), "single choice"),
        (Categorical(4, (2,)), "makes one choice"),
    ],
)
def test_actions_that_are_refused(spec, message) -> None:
    with pytest.raises(ValueError, match=message):
        policy_of(spec)


def test_several_actions_are_refused() -> None:
    env = SpecEnv()
    env.full_action_spec = Composite(a=Bounded(-1, 1, (1,)), b=Bounded(-1, 1, (1,)))
    with pytest.raises(ValueError, match="serves one action"):
        make_tdmpc2_policy(env, SMALL)


def test_settings() -> None:
    with pytest.raises(ValueError, match="log_std_min=3"):
        make_tdmpc2_policy(GymEnv("Pendulum-v1"), log_std_min=3)
    with pytest.raises(TypeError, match="Did you mean 'log_std_max'"):
        make_tdmpc2_policy(GymEnv("Pendulum-v1"), log_std_mx=3)
