"""Entries of an env that are called as a model's own are refused, not mixed up."""

from __future__ import annotations

import re

import pytest
import torch
from _models import make_model, SpecEnv
from _real_envs import LastAction
from torchrl.data import Composite, Unbounded
from torchrl.envs import GymWrapper, RenameTransform, TransformedEnv

from torchrl_wm import WorldModelEnv
from torchrl_wm.models.building import build, BUILDERS

OWN = {
    "diffusion": ["frame", "past_frames", "past_actions", "judge_hidden", "judge_cell"],
    "ensemble": ["loc", "log_var", "disagreement", "member", "ensemble_reward"],
    "jepa": ["latent"],
    "mlp": ["latent"],
    "rssm": ["state", "belief", "embedding", "prior_logits", "posterior_mean"],
    "tdmpc2": ["latent"],
    "transformer": ["latent", "belief", "cache", "step_in_context"],
}
HEADS = ["terminated_logits", "continue_pred", "continue_prob", "reward_logits"]
LOSS = ["weight", "priority_weight", "member_weight", "target_latent", "true_reward"]
SMALL = {
    "diffusion": {"hidden": (4,)},
    "ensemble": {"members": 2, "hidden": (4,), "termination_hidden": (4,)},
    "jepa": {"hidden": (4,), "latent_size": 4, "reward": True},
    "mlp": {"hidden": (4,), "latent_size": 4},
    "rssm": {"belief_size": 16, "hidden_size": 4, "num_cells": 4, "depth": 1},
    "tdmpc2": {"latent_size": 8, "num_cells": 4, "encoder_cells": 4},
    "transformer": {"latent_size": 4, "width": 8, "heads": 2, "hidden": (4,)},
}
NAMES = [(b, key) for b in OWN for key in (*OWN[b], *HEADS, *LOSS)]


def make(builder: str, env, **settings):
    return build(builder, env, None, {**SMALL[builder], **settings})


def renamed_as_told(env, error) -> TransformedEnv:
    """The env with the transform that the message names."""
    arguments = re.search(r"RenameTransform\((.*)\)\)", str(error.value)).group(1)
    parts = re.findall(r"(\w+)=\[('?)(\w*)\2\]", arguments)
    return TransformedEnv(
        env, RenameTransform(**{name: [key] if key else [] for name, _, key in parts})
    )


def test_all_builders_are_here() -> None:
    assert OWN.keys() == BUILDERS.keys()


@pytest.mark.parametrize("builder, key", NAMES)
def test_names_of_the_models_own_are_refused(builder, key) -> None:
    env = SpecEnv(extra_observations={key: (1,)})
    with pytest.raises(ValueError, match=f"{key!r}.*RenameTransform") as error:
        make(builder, env)
    world_model, _ = make(builder, renamed_as_told(env, error))
    assert f"env_{key}" in world_model.encoder.in_keys


@pytest.mark.parametrize("builder", OWN)
def test_actions_are_refused_too(builder) -> None:
    key = OWN[builder][0]
    env = SpecEnv(action_key=key)
    with pytest.raises(ValueError, match=f"{key!r}.*in_keys_inv") as error:
        make(builder, env)
    world_model, _ = make(builder, renamed_as_told(env, error))
    assert f"env_{key}" in world_model.dynamics.in_keys


@pytest.mark.parametrize("builder", OWN)
@pytest.mark.parametrize("key", ["action", ("robot", "action")])
def test_an_observation_where_the_action_stands_is_refused(builder, key) -> None:
    env = SpecEnv(extra_observations={key: (3,)}, action_key=key)
    with pytest.raises(ValueError, match="RenameTransform.*env_action") as error:
        make(builder, env)
    assert repr(key) in str(error.value)
    world_model, _ = make(builder, env, observation_keys=["observation"])
    assert world_model.encoder.in_keys == ["observation"]
    assert key in world_model.dynamics.in_keys


@pytest.mark.parametrize("name", ["action", "next"])
def test_an_env_whose_last_action_is_observed(name) -> None:
    env = GymWrapper(LastAction(name))
    with pytest.raises(ValueError, match=f"{name!r}.*RenameTransform") as error:
        make("ensemble", env)
    env = renamed_as_told(env, error)
    world_model, _ = make("ensemble", env)
    rollout = env.rollout(4)
    torch.testing.assert_close(rollout["next", f"env_{name}"], 5 + rollout["action"])
    imagined = WorldModelEnv(world_model, env).imagine(2, tensordict=rollout[:1])
    torch.testing.assert_close(
        imagined[f"env_{name}"][:, 0], rollout[f"env_{name}"][:1]
    )


@pytest.mark.parametrize("builder", OWN)
def test_a_loss_reads_weights_that_the_model_does_not(builder) -> None:
    env = SpecEnv(extra_observations={"weight": (1,)})
    with pytest.raises(ValueError, match="'weight'"):
        make(builder, env, observation_keys=["observation"])


@pytest.mark.parametrize("builder, key", [(b, key) for b in OWN for key in OWN[b]])
def test_the_same_names_further_down_are_free(builder, key) -> None:
    env = SpecEnv(observation_key=("robot", key))
    world_model, _ = make(builder, env)
    assert world_model.encoder.in_keys == [("robot", key)]


def test_a_latent_that_is_the_observation_may_be_called_so() -> None:
    env = SpecEnv(observation_key="latent")
    world_model, _ = make("ensemble", env)
    assert world_model.latent_keys == ["latent"]
    spec = Composite(latent=Unbounded((6,)))
    assert WorldModelEnv(world_model, env).observation_spec["latent"] == spec["latent"]


def test_a_model_by_hand_whose_encoder_reads_the_action_is_refused() -> None:
    env = SpecEnv(extra_observations={"action": (6,)})
    with pytest.raises(ValueError, match="encoder reads.*'action'.*RenameTransform"):
        WorldModelEnv(make_model(observation="action"), env)
