"""What holds of recurrent and TD-MPC2 models alike: batched envs, teams, buffers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from _env_kinds import drawn_transitions, env_of
from _small_models import MAKE
from envs.test_multi_agent import TeamEnv
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.envs.utils import check_env_specs

from torchrl_wm import WorldModelEnv
from torchrl_wm.models import load_world_model, save_world_model

NAMES = ("planet", "dreamer-v3", "tdmpc2", "transformer")
#: How those of them that do not predict terminations by themselves do.
ENDING = {"planet": {"continue_head": True}}


@pytest.fixture(params=NAMES)
def make(request):
    return MAKE[request.param]


@pytest.mark.parametrize("size", [(3,), (2, 2)])
@pytest.mark.parametrize("nested", [False, True])
def test_batched_and_nested_envs(make, size, nested) -> None:
    """The reference env's batch size is not the model's."""
    env = env_of("vector", "categorical", size, nested=nested)
    world_model, loss = make(env)
    batch = drawn_transitions(env, 4, 3)
    assert all(value.isfinite() for value in loss(batch).values())
    starts = batch.select(*world_model.encoder.in_keys).reshape(-1)
    imagined = WorldModelEnv(world_model, env, start_states=starts, max_steps=4)
    assert imagined.batch_size == size
    check_env_specs(imagined)
    imagined.rollout(2)
    assert nested or imagined.slow_because is None
    out = imagined.imagine(3)
    assert out.shape == (*size, 3)
    # As a buffer gives it back.
    buffer = ReplayBuffer(storage=LazyTensorStorage(10), batch_size=4)
    buffer.extend(out.reshape(-1).exclude("collector"))
    assert buffer.sample().shape == (4,)


@pytest.mark.parametrize("done", [("root",), ("agents",), ("agents", "root")])
def test_teams_of_agents(make, done) -> None:
    env = TeamEnv(done=done)
    world_model, loss = make(env)
    batch = drawn_transitions(env, 4, 2)
    losses = loss(batch)
    assert all(value.isfinite() for value in losses.values())
    starts = batch[:, 0].select(("agents", "observation"))
    imagined = WorldModelEnv(world_model, env, start_states=starts)
    check_env_specs(imagined)
    out = imagined.imagine(3)
    assert out["next", "agents", "reward"].shape == (3, 3, 1)


def test_copies(make) -> None:
    """By pickle and deepcopy: the same model, and one of its own."""
    env = env_of("vector", "bounded")
    world_model, loss = make(env)
    batch = drawn_transitions(env, 4, 3)
    for other in (pickle.loads(pickle.dumps(world_model)), copy.deepcopy(world_model)):
        outs = []
        for model in (world_model, other):
            torch.manual_seed(0)
            outs.append(model(batch.clone())["next", "reward"])
        assert torch.equal(*outs)
        for parameter in other.parameters():
            parameter.data.add_(1.0)
    torch.manual_seed(0)
    assert torch.equal(world_model(batch.clone())["next", "reward"], outs[0])


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_terminations_by_a_threshold_or_by_chance(name, nested) -> None:
    env = env_of("vector", "bounded", nested=nested)
    batch = drawn_transitions(env, 500)
    place = ("next", "agent") if nested else "next"
    ended, rate = {}, {}
    for kind, settings in {
        "eager": {"termination_threshold": 1e-6},
        "late": {"termination_threshold": 1 - 1e-6},
        "chance": {"sample_termination": True},
    }.items():
        torch.manual_seed(0)
        model, _ = MAKE[name](env, **ENDING.get(name, {}), **settings)
        out = model(batch.exclude("next").clone())[place]
        ended[kind] = out["terminated"].float().mean().item()
        rate[kind] = 1 - out["continue_prob"].mean().item()
    assert ended["eager"] == 1 and ended["late"] == 0
    assert 0.1 < rate["chance"] < 0.9
    assert abs(ended["chance"] - rate["chance"]) < 0.1
    with pytest.raises(ValueError, match="threshold is a probability"):
        MAKE[name](env, **ENDING.get(name, {}), termination_threshold=1.0)


@pytest.mark.parametrize("name", NAMES)
def test_files_from_before_a_setting_load_with_its_default(name, tmp_path) -> None:
    """Those of terminations came later than the first files."""
    env = env_of("vector", "bounded")
    model, _ = MAKE[name](env, sample_termination=True, termination_threshold=0.9)
    path = tmp_path / "model.pt"
    save_world_model(model, path)
    again = load_world_model(path).recipe.config
    assert again.sample_termination and again.termination_threshold == 0.9
    content = torch.load(path, weights_only=True)
    for setting in ("sample_termination", "termination_threshold"):
        del content["recipe"]["config"][setting]
    torch.save(content, path)
    older = load_world_model(path)
    assert older.recipe == MAKE[name](env)[0].recipe
    batch, outs = drawn_transitions(env, 5).exclude("next"), []
    for world_model in (model, older):
        torch.manual_seed(0)
        outs.append(world_model(batch.clone())["next", "reward"])
    assert torch.equal(*outs)
