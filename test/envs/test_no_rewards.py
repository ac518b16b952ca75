"""World models without a reward head: imagined, trained, exported to nobody who needs rewards."""

from __future__ import annotations

import pytest
import torch
from _models import ACTION, LATENT, linear, make_model, OBS, SpecEnv, transitions
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod
from torchrl.envs.utils import check_env_specs

from torchrl_wm import GymWorldModelEnv, WorldModel, WorldModelEnv, WorldModelLoss
from torchrl_wm.modules.keys import join
from torchrl_wm.planners import CEMPlanner, GoalDistance


def unrewarded(latent="latent") -> WorldModel:
    return WorldModel(
        linear(["observation"], [latent], (OBS, LATENT)),
        linear([latent, "action"], [join("next", latent)], (LATENT + ACTION, LATENT)),
    )


@pytest.mark.parametrize("latent", ["latent", ("deep", "latent")])
@pytest.mark.parametrize("size", [(), (3,)])
def test_the_env_has_no_rewards(latent, size) -> None:
    model = unrewarded(latent)
    env = WorldModelEnv(
        model, SpecEnv(size), start_states=lambda n: model.encode(observed(n))
    )
    check_env_specs(env)
    assert not env.reward_keys
    steps = env.rollout(4)
    assert "reward" not in steps["next"].keys()
    imagined = env.imagine(4, tensordict=model.encode(observed(size)))
    assert imagined[join("next", latent)].shape == (*size, 4, LATENT)


def observed(size) -> TensorDict:
    return TensorDict({"observation": torch.randn(*size, OBS)}, size)


def test_training_what_there_is() -> None:
    model, batch = unrewarded(), transitions(5)
    loss = WorldModelLoss(model, losses=["latent"])
    assert loss(batch)["loss_latent"].requires_grad
    with pytest.raises(ValueError, match="reward_head"):
        WorldModelLoss(model)


def test_gymnasium_asks_for_rewards() -> None:
    model = unrewarded()
    env = WorldModelEnv(
        model, SpecEnv(), start_states=lambda n: model.encode(observed(n))
    )
    with pytest.raises(ValueError, match="predicts none.*reward_head"):
        GymWorldModelEnv(env)


def test_a_reward_that_the_dynamics_predict() -> None:
    """No head is needed where another component writes the reward."""
    model = WorldModel(
        linear(["observation"], ["latent"], (OBS, LATENT)),
        Mod(
            lambda z, a: (z + 1, z[..., :1]),
            ["latent", "action"],
            [("next", "latent"), ("next", "reward")],
        ),
    )
    env = WorldModelEnv(model, SpecEnv())
    assert "reward" in env.rollout(2, tensordict=model.encode(observed(())))["next"]


def test_taking_a_head_away_needs_a_new_env() -> None:
    model = make_model()
    env = WorldModelEnv(model, SpecEnv())
    model.reward_head = None
    with pytest.raises(ValueError, match="Make a new WorldModelEnv"):
        env.rollout(2, tensordict=model.encode(observed(())))


@pytest.mark.parametrize("latent", ["latent", ("deep", "latent")])
def test_planning_for_a_goal(latent) -> None:
    env = WorldModelEnv(unrewarded(latent), SpecEnv())
    planner = CEMPlanner(env, 5, 2, 16, 4, score=GoalDistance(latent, goal="goal"))
    start = env.world_model.encode(observed(())).set("goal", torch.ones(LATENT))
    assert planner(start)["action"].shape == (ACTION,)
    with pytest.raises(ValueError, match="no rewards.*score="):
        CEMPlanner(env, 5, 2, 16, 4)
