"""What planners refuse, and what their errors advise: each piece of advice is followed here."""

from __future__ import annotations

import inspect

import pytest
import torch
from _models import LATENT, linear, make_model, OBS, observations, SpecEnv
from tensordict import TensorDict
from torchrl.data import Composite, Unbounded
from torchrl.modules import (
    CEMPlanner as TorchRLCEM,
    MPPIPlanner as TorchRLMPPI,
    ValueOperator,
)

from torchrl_wm import WorldModel, WorldModelEnv
from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import join
from torchrl_wm.planners import CEMPlanner, ICEMPlanner, MPCPlanner, MPPIPlanner

SMALL = {"planning_horizon": 3, "optim_steps": 2, "num_candidates": 12, "top_k": 3}
GOALS = ["goal", ("task", "goal")]


def parameters_of(kind: type) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(kind).parameters)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (CEMPlanner, TorchRLCEM),
        (ICEMPlanner, TorchRLCEM),
        (MPPIPlanner, TorchRLMPPI),
    ],
)
def test_signatures_name_all_arguments(ours, theirs) -> None:
    kept = parameters_of(ours)
    positional = [name for name, p in kept.items() if p.kind is not p.KEYWORD_ONLY]
    assert positional == list(parameters_of(theirs))
    assert parameters_of(MPCPlanner).keys() <= kept.keys()
    for parameter in kept.values():
        assert parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    keys = {"reward_key": ("next", "reward"), "action_key": "action"}
    for name, default in keys.items():
        assert kept[name].default == default


def test_positional_arguments_are_those_of_the_signature() -> None:
    env = WorldModelEnv(make_model(), SpecEnv())
    keys = [("next", "reward"), "action"]
    for planner in (
        ICEMPlanner(env, *SMALL.values(), *keys),
        MPPIPlanner(env, None, 2.0, *SMALL.values(), *keys),
    ):
        for name, value in SMALL.items():
            assert getattr(planner, name) == value
        assert (planner.reward_key, planner.action_key) == tuple(keys)
    with pytest.raises(TypeError, match="multiple values.*'top_k'"):
        ICEMPlanner(env, *SMALL.values(), top_k=3)


@pytest.mark.parametrize("planner_class", [CEMPlanner, ICEMPlanner, MPPIPlanner])
@pytest.mark.parametrize(
    ("reward", "given"),
    [
        ("score", "score"),  # without the "next" that it stands below
        (("team", "score"), ("team", "score")),
        (("team", "score"), ("next", "reward")),
    ],
)
def test_a_reward_key_that_is_none(planner_class, reward, given) -> None:
    env = WorldModelEnv(make_model(reward=reward), SpecEnv(reward_key=reward))
    right = join("next", reward)
    with pytest.raises(ValueError) as error:
        planner_class(env, **SMALL, reward_key=given)
    message = str(error.value)
    assert f"no reward {given!r}; its steps write {[right]}." in message
    assert f"Pass reward_key={right!r}, with 'next'." in message
    planner_class(env, **SMALL, reward_key=right)


def test_an_action_key_that_is_none() -> None:
    key = ("arm", "torque")
    env = WorldModelEnv(make_model(action=key), SpecEnv(action_key=key))
    with pytest.raises(ValueError) as error:
        CEMPlanner(env, **SMALL, action_key="torque")
    assert f"no action 'torque'; it has {[key]}. Pass action_key={key!r}." in str(
        error.value
    )
    CEMPlanner(env, **SMALL, action_key=key)


def goal_env(goal, **options) -> WorldModelEnv:
    """The reward is how near the first latent is to the goal; the action moves it."""
    spec = Composite(shape=())
    spec[goal] = Unbounded((3,))
    model = make_model(decoder=True)
    model = WorldModel(
        model.encoder,
        linear(
            ["latent", "action", goal], [("next", "latent")], [LATENT + 2 + 3, LATENT]
        ),
        model.reward_head,
        decoder=model.decoder,
    )
    return WorldModelEnv(model, SpecEnv(), observation_spec=spec, **options)


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("encoded", [False, True])
def test_context_is_not_called_a_latent(goal, encoded) -> None:
    env = goal_env(goal)
    planner = CEMPlanner(env, **SMALL)
    state = observations(2)
    if encoded:
        state = env.world_model.encode(state)
    with pytest.raises(MissingEntryError) as error:
        planner(state)
    message = str(error.value)
    assert f"needs {[goal]}" in message and "constant context" in message
    assert "latents" not in message and "encode(" not in message
    assert f"tensordict[{goal!r}] = ..., of the shape (2, 3)" in message
    state[goal] = torch.ones(2, 3)
    assert planner(state)["action"].shape == (2, 2)


@pytest.mark.parametrize("goal", GOALS)
def test_both_are_named_where_both_are_missing(goal) -> None:
    planner = CEMPlanner(goal_env(goal), **SMALL)
    with pytest.raises(MissingEntryError) as error:
        planner(TensorDict({"other": torch.zeros(4, 1)}, [4]))
    message = str(error.value)
    assert "starts from the latents ['latent']" in message
    assert "give the observations ['observation']" in message
    assert f"It needs {[goal]}" in message and "(4, 3)" in message


def test_observations_that_the_terminal_value_reads() -> None:
    model = make_model(decoder=True)
    env = WorldModelEnv(model, SpecEnv(), decode=True)
    value = ValueOperator(torch.nn.Linear(OBS, 1), in_keys=["observation"])
    planner = CEMPlanner(env, **SMALL, terminal_value=value)
    latents = model.encode(observations(3)).select("latent")
    with pytest.raises(MissingEntryError) as error:
        planner(latents)
    message = str(error.value)
    assert "needs the observations ['observation']" in message
    assert "starts from the latents" not in message
    assert planner(model.decode(latents))["action"].shape == (3, 2)
