"""Envs and planners that acted in a collector, and are then copied, pickled, saved, or sent elsewhere."""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial

import cloudpickle
import pytest
import torch
from _models import make_model, observations, SpecEnv
from tensordict import TensorDict
from torchrl.collectors import Collector, MultiSyncCollector
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.envs import GymEnv, StepCounter, TransformedEnv

from torchrl_wm import WorldModelEnv
from torchrl_wm.models import make_mlp_world_model
from torchrl_wm.planners import CEMPlanner, ICEMPlanner, MPPIPlanner


def saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


pytestmark = pytest.mark.filterwarnings("ignore:A normaliser is used before")

COPIES = {
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "cloudpickle": lambda thing: cloudpickle.loads(cloudpickle.dumps(thing)),
    "save": saved,
    "deepcopy": copy.deepcopy,
}
SIZES = {"planning_horizon": 3, "optim_steps": 2, "num_candidates": 10, "top_k": 3}
MOVE, SCORE = ("agent", "move"), ("agent", "score")


def collect(env, policy) -> Collector:
    collector = Collector(
        env,
        policy,
        frames_per_batch=6,
        total_frames=6,
        auto_register_policy_transforms=False,
    )
    for batch in collector:
        assert batch.numel() == 6
    assert collector.env.collector is collector
    collector.shutdown()
    return collector  # alive: so is what it left in the env


def nested_env(start_states) -> WorldModelEnv:
    model = make_model(action=MOVE, reward=SCORE)
    base = SpecEnv(action_key=MOVE, reward_key=SCORE)
    return WorldModelEnv(
        model, base, batch_size=[], start_states=start_states, max_steps=4
    )


def acts_alike(one, other, state: TensorDict, key="action") -> bool:
    actions = []
    for policy in (one, other):
        torch.manual_seed(0)
        actions.append(policy(state.copy())[key])
    return torch.equal(*actions)


@pytest.mark.parametrize("copied", COPIES.values(), ids=list(COPIES))
def test_an_imagined_env_and_its_planner(copied) -> None:
    env = nested_env(observations(5))
    planner = ICEMPlanner(
        env, **SIZES, action_key=MOVE, reward_key=("next", *SCORE), warm_start=True
    )
    collector = collect(env, planner)
    twin = copied(env)
    assert env.collector is collector and twin.collector is None
    assert acts_alike(planner, copied(planner), observations(2), MOVE)
    start = env.world_model.encode(observations(3))
    for each in (env, twin):
        each.set_seed(1)
    torch.manual_seed(1)
    expected = env.rollout(4, tensordict=start)
    torch.manual_seed(1)
    assert (twin.rollout(4, tensordict=start) == expected).all()
    # It collects anew, and is copied once more.
    collect(twin, planner)
    copied(twin)


@pytest.mark.parametrize("copied", COPIES.values(), ids=list(COPIES))
@pytest.mark.parametrize("source", ["env", "transformed", "buffer"])
def test_a_real_env_that_is_also_where_imagination_starts(source, copied) -> None:
    real = GymEnv("Pendulum-v1")
    if source == "transformed":
        real = TransformedEnv(real, StepCounter(9))
    starts = real
    if source == "buffer":
        starts = ReplayBuffer(storage=LazyTensorStorage(20))
        starts.extend(real.rollout(8))
    model = make_mlp_world_model(real, hidden=(8,), latent_size=4)[0].eval()
    env = WorldModelEnv(model, real, start_states=starts, max_steps=3)
    planner = MPPIPlanner(env, None, temperature=1.0, **SIZES)
    collector = collect(real, planner)
    twin = copied(planner)
    assert real.collector is collector
    assert acts_alike(planner, twin, real.reset())
    assert twin.env.imagine(3)["latent"].isfinite().all()  # from its own source


def test_a_planner_in_another_env_than_ours() -> None:
    env = TransformedEnv(nested_env(observations(5)), StepCounter())
    planner = CEMPlanner(env, **SIZES, action_key=MOVE, reward_key=("next", *SCORE))
    collect(env, planner)
    state = env.reset()
    assert acts_alike(planner, COPIES["pickle"](planner), state, MOVE)


def test_a_planner_goes_on_in_worker_processes() -> None:
    make_real = partial(GymEnv, "Pendulum-v1")
    real = make_real()
    model, loss = make_mlp_world_model(real, hidden=(8,), latent_size=4)
    env = WorldModelEnv(model, real, start_states=real)
    planner = CEMPlanner(env, **SIZES)
    collect(real, planner)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = list(model.parameters())
    many = MultiSyncCollector(
        [make_real],
        planner,
        frames_per_batch=6,
        total_frames=6,
        auto_register_policy_transforms=False,
    )
    try:
        (batch,) = list(many)
    finally:
        many.shutdown()
    assert batch["action"].abs().max() <= 2 and batch["action"].unique().numel() > 1
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(one is other for one, other in zip(parameters, model.parameters()))
    loss(batch.flatten()).sum(reduce=True).backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)
