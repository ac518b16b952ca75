"""Trained runs act on what Gymnasium's envs return."""

from __future__ import annotations

import random

import gymnasium
import numpy as np
import pytest
import torch
from _real_envs import (
    DREAMER,
    make_nested,
    make_reacher,
    MBPO,
    PETS,
    Pictures,
    Reacher1D,
)
from gymnasium.spaces import Box, Dict, Discrete
from gymnasium.wrappers import TimeLimit, TransformObservation
from tensordict.nn import TensorDictModule
from torchrl.data import Unbounded
from torchrl.envs import CatFrames, GymEnv, TensorDictPrimer, TransformedEnv

from torchrl_wm.trainers import (
    DreamerTrainer,
    load_policy,
    MBPOTrainer,
    PETSTrainer,
    Policy,
    Recipe,
    resume_run,
    RunConfig,
    start_run,
    trainer_class,
)
from torchrl_wm.trainers.episode_seeds import episode_seed
from torchrl_wm.trainers.exporting.draws import GivenDraws
from torchrl_wm.trainers.trainer import EVALUATION_EPISODES

QUICK = {"evaluation_interval": 0}
#: How the first episode of ``trainer.evaluate(seed=5)`` begins.
SEED = episode_seed(5, EVALUATION_EPISODES)


class Double(Reacher1D):
    """All of it in float64, and bounds that float32 does not have."""

    observation_space = Dict({"inner": Dict({"both": Box(-9, 9, (2,), np.float64)})})
    action_space = Box(-0.1, 0.1, (1,), np.float64)

    def _observation(self):
        return {"inner": {"both": self.state.astype(np.float64)}}


class Lever(gymnasium.Env):
    """A choice that is counted from -1, in a state that is one of four."""

    observation_space, action_space = Discrete(4), Discrete(3, start=-1)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = int(self.np_random.integers(4))
        return self.state, {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.state = (self.state + int(action)) % 4
        return self.state, float(self.state == 2), False, False, {}


class Follower(TensorDictModule):
    """Hands on how often it has acted in an episode, and says so by its action."""

    def __init__(self, observed):
        keys = [observed, "acted", "is_init"]
        super().__init__(self._act, keys, ["action", "seen", ("next", "acted")])

    def _act(self, observed, acted, begins):
        assert not self.training
        acted = torch.where(begins, 0, acted) + 1
        return (acted / 10).float(), observed, acted

    def make_tensordict_primer(self, reset_key=None):
        spec = Unbounded((1,), dtype=torch.int64)
        return TensorDictPrimer(acted=spec, reset_key=reset_key)


class Follow(Recipe):
    """Learns nothing."""

    name = "follow"

    def __init__(self, config, env):
        super().__init__(config, env)
        self.policy, self.parts = Follower("observation"), {}

    def learn(self, steps):
        return {}


class Count(Recipe):
    """Chooses the option of the state's number."""

    name = "count"

    def __init__(self, config, env):
        super().__init__(config, env)
        keys = ["observation"], ["action"]
        self.policy, self.parts = TensorDictModule(self._choose, *keys), {}

    def _choose(self, observation):
        state = observation.long().argmax(-1).clamp(max=2)
        return torch.nn.functional.one_hot(state, 3)

    def learn(self, steps):
        return {}


def make_double():
    return Double()


def make_lever():
    return TimeLimit(Lever(), 9)


def make_stacked():
    """A pendulum of which the last three observations are read."""
    stack = CatFrames(3, dim=-1, in_keys=["observation"], out_keys=["observation"])
    return TransformedEnv(GymEnv("Pendulum-v1"), stack)


def by_hand(policy, env, steps):
    """Act in a Gymnasium env that begins as an evaluation does."""
    env.reset(seed=SEED)  # TorchRL seeds an env by a reset
    observation, _ = env.reset()
    actions = []
    for _ in range(steps):
        actions.append(policy.act(observation))
        assert env.action_space.contains(actions[-1])
        observation, *_ = env.step(actions[-1])
    return actions


@pytest.mark.parametrize(
    "kind, settings, make",
    [
        (MBPOTrainer, {}, "Pendulum-v1"),
        (MBPOTrainer, {"env": make_reacher}, make_reacher),
        (MBPOTrainer, {"env": "_real_envs:make_reacher", "num_envs": 2}, make_reacher),
        (MBPOTrainer, {"env": make_double}, make_double),
        (MBPOTrainer, {"env": make_stacked}, "Pendulum-v1"),
        (MBPOTrainer, {"env": make_nested}, "Pendulum-v1"),
        (PETSTrainer, {}, "Pendulum-v1"),
        (PETSTrainer, {"env": make_double, "planner": "cem"}, make_double),
        (PETSTrainer, {"env": "CartPole-v1", "termination": "cartpole"}, "CartPole-v1"),
    ],
)
def test_a_policy_acts_by_hand_as_in_evaluations(kind, settings, make) -> None:
    base = {MBPOTrainer: {**MBPO, "steps": 45, **QUICK}, PETSTrainer: PETS}[kind]
    trainer = kind(**{**base, **settings})
    trainer.train()
    (episode,) = trainer.evaluate(1, seed=5)
    # The plans are carried: without, no later action of a planner would be the same.
    policy = Policy(trainer, seed=SEED)
    env = gymnasium.make(make) if isinstance(make, str) else make()
    actions = by_hand(policy, env, len(episode))
    expected = episode[trainer.env.action_key]
    if isinstance(env.action_space, Discrete):
        assert all(isinstance(action, np.int64) for action in actions)
        expected = expected.long().argmax(-1)
    else:
        assert all(action.dtype == env.action_space.dtype for action in actions)
    assert np.abs(np.stack(actions) - expected.numpy()).max() < 1e-8
    policy.reset()
    if kind is MBPOTrainer:
        assert np.array_equal(by_hand(policy, env, 4), actions[:4])


def test_each_of_a_batch_is_acted_in_as_alone() -> None:
    trainer = MBPOTrainer(**{**MBPO, "steps": 30, "env": make_reacher, **QUICK})
    trainer.train()
    envs = gymnasium.vector.SyncVectorEnv([make_reacher] * 3)
    observation, _ = envs.reset(seed=2)
    batch, single = Policy(trainer), Policy(trainer)
    for _ in range(3):
        actions = batch.act(observation)
        assert envs.action_space.contains(actions)
        for row in range(3):
            alone = single.act({key: value[row] for key, value in observation.items()})
            assert np.allclose(actions[row], alone, atol=1e-6)
        observation, *_ = envs.step(actions)


def test_choices_are_counted_from_where_the_env_counts() -> None:
    policy = Policy(trainer_class(Count)(env=make_lever))
    envs = gymnasium.vector.SyncVectorEnv([make_lever] * 4)
    observation, _ = envs.reset(seed=0)
    actions = policy.act(observation)
    assert actions.dtype == np.int64 and envs.action_space.contains(actions)
    # The option chosen is the state's number, up to 2, counted from -1.
    assert np.array_equal(actions, np.minimum(observation, 2) - 1)
    policy.reset()
    action = policy.act(3)
    assert isinstance(action, np.int64) and action == 1


def test_what_a_policy_hands_on_begins_anew_where_asked() -> None:
    policy = Policy(trainer_class(Follow)(env="Pendulum-v1"))
    batch = np.zeros((3, 3))
    tens = [(policy.act(batch) * 10).round().ravel().tolist() for _ in range(2)]
    assert tens == [[1, 1, 1], [2, 2, 2]]
    policy.reset(np.array([False, True, False]))
    assert (policy.act(batch) * 10).round().ravel().tolist() == [3, 1, 3]
    with pytest.raises(ValueError, match=r"batch of 2.*batch of 3.*policy.reset\(\)"):
        policy.act(batch[:2])
    with pytest.raises(ValueError, match="a single observation.*batch of 3"):
        policy.act(batch[0])
    with pytest.raises(ValueError, match="mask has 2 values.*batch of 3"):
        policy.reset(np.array([True, False]))
    for wrong in (np.array([1, 0, 1]), True):
        with pytest.raises(ValueError, match=r"\[N\] bool"):
            policy.reset(wrong)
    # What was refused has changed nothing.
    assert (policy.act(batch) * 10).round().ravel().tolist() == [4, 2, 4]
    policy.reset()
    assert policy.act(batch[:2]).shape == (2, 1)
    policy.reset()
    assert np.allclose([policy.act(batch[0]) for _ in range(2)], [[0.1], [0.2]])


def test_some_episodes_of_a_recurrent_policy_begin_anew() -> None:
    trainer = DreamerTrainer(**{**DREAMER, "version": "v1"})
    policies = [Policy(trainer) for _ in range(3)]
    rng = np.random.default_rng(0)
    mask = np.array([False, True])
    with GivenDraws(lambda kind, shape, dtype: torch.full(shape, 0.3)):
        for time in range(4):
            if time == 2:
                policies[0].reset(mask)
                policies[2].reset()
            observed = rng.normal(size=(2, 3)).astype(np.float32)
            found = policies[0].act(observed)
            alone = [policy.act(row) for policy, row in zip(policies[1:], observed)]
            assert np.allclose(found, alone, atol=1e-6)
            assert abs(found[0] - found[1]) > 1e-5


def test_an_action_is_kept_as_long_as_in_the_run() -> None:
    trainer = trainer_class(Follow)(env="Pendulum-v1", action_repeat=3)
    (episode,) = trainer.evaluate(1, seed=5)
    policy = Policy(trainer)
    actions = by_hand(policy, gymnasium.make("Pendulum-v1"), 12)
    assert np.allclose(actions, episode["action"][:4].repeat_interleave(3, 0))
    policy.reset()
    observed = np.zeros((2, 3))
    first, second = policy.act(observed), policy.act(observed)
    policy.reset(np.array([False, True]))
    third, fourth = policy.act(observed), policy.act(observed)
    actions = np.stack([first, second, third, fourth])[..., 0]
    assert np.allclose(actions, [[0.1, 0.1]] * 3 + [[0.2, 0.1]])


@pytest.mark.parametrize(
    "env, observation, message",
    [
        (
            "Pendulum-v1",
            np.zeros(4),
            r"observation must have the shape \(3,\), or \(N, 3\).*\(4,\)",
        ),
        ("Pendulum-v1", np.zeros((2, 2, 3)), r"\(2, 2, 3\)"),
        ("Pendulum-v1", np.zeros((0, 3)), "empty"),
        ("Pendulum-v1", {"x": np.zeros(3)}, r"numbers of the shape \(3,\).*\['x'\]"),
        ("Pendulum-v1", [[1.0], [1.0, 2.0]], "numbers of the shape"),
        ("Pendulum-v1", "up", "numbers of the shape.*'up'"),
        (
            make_reacher,
            np.zeros(2),
            r"dictionary with the entries \['place', 'speed'\]",
        ),
        (make_reacher, {"place": np.zeros(1)}, r"missing are \['speed'\]"),
        (
            make_reacher,
            {"place": np.zeros(1), "speed": np.zeros(1), "time": 0},
            r"\['time'\] are unknown",
        ),
        (
            make_reacher,
            {"place": np.zeros((2, 1)), "speed": np.zeros(1)},
            "leading sizes",
        ),
        (
            make_double,
            {"inner": {"both": np.zeros(5)}},
            r"observation\['inner'\]\['both'\] must have the shape \(2,\).*\(5,\)",
        ),
        (
            Pictures,
            {"pixels": np.zeros((16, 16, 3)), "speed": np.zeros(1)},
            r"observation\['pixels'\] must be whole numbers from 0 to 255.*float64",
        ),
        (make_lever, np.zeros((2, 1)), r"shape \(\), or \(N\).*\(2, 1\)"),
    ],
)
def test_observations_that_do_not_fit_are_named(env, observation, message) -> None:
    policy = Policy(trainer_class(Count)(env=env))
    with pytest.raises(ValueError, match=message):
        policy.act(observation)


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_a_run_is_loaded_from_its_folder_and_left_as_it_is(tmp_path) -> None:
    trainer = start_run("pets", tmp_path / "run", **{**PETS, "seed": 3})
    with pytest.raises(FileNotFoundError, match="no checkpoint yet"):
        load_policy(tmp_path / "run")
    trainer.train()
    before, steps = contents(tmp_path), [int(p.name[-2:]) for p in trainer.run.saved()]
    state = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    policies = [
        load_policy(tmp_path / "run", seed=seed, checkpoint=step, device="cpu")
        for seed, step in ((1, None), (1, None), (2, None), (1, steps[0]))
    ]
    observation = np.array([1.0, 0.0, 0.5])
    first = []
    for policy in policies:
        first.append([float(policy.act(observation)[0]) for _ in range(3)])
    assert first[0] == first[1] and first[0] != first[2] and first[0] != first[3]
    assert contents(tmp_path) == before
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1:] == (np.random.get_state()[1].tolist(), random.getstate())
    resumed = Policy(resume_run(tmp_path / "run"), seed=1)
    assert [float(resumed.act(observation)[0]) for _ in range(3)] == first[0]


def test_what_a_run_was_given_is_given_again(tmp_path) -> None:
    settings = {**PETS, "termination": "none"}
    given = {"env": make_reacher, "reward_function": lambda o, a, n: -n["place"].abs()}
    start_run("pets", tmp_path / "run", **{**settings, **given}).train()
    with pytest.raises(ValueError, match="reward_function"):
        load_policy(tmp_path / "run")
    policy = load_policy(tmp_path / "run", **given)
    assert policy.act(make_reacher().reset(seed=0)[0]).shape == (1,)


def test_runs_without_a_policy_and_policies_that_read_rewards_are_refused() -> None:
    trainer = trainer_class(Follow)(env="Pendulum-v1")
    trainer.recipe.policy = None
    with pytest.raises(ValueError, match="'follow' learns no policy"):
        Policy(trainer)
    trainer.recipe.policy = Follower("episode_reward")
    with pytest.raises(ValueError, match="episode_reward"):
        Policy(trainer)


def test_modules_keep_their_mode() -> None:
    trainer = trainer_class(Follow)(RunConfig(env="Pendulum-v1"))
    policy = Policy(trainer)
    policy.act(np.zeros(3))
    assert trainer.recipe.policy.training
    assert len(trainer.evaluate(1)) == 1  # Follower asserts that it is in eval mode
    assert trainer.recipe.policy.training


def test_wrappers_of_the_env_belong_to_it() -> None:
    def make():
        env = gymnasium.make("Pendulum-v1")
        space = Box(-9, 9, (2,))
        return TransformObservation(env, lambda observation: observation[:2], space)

    policy = Policy(MBPOTrainer(**{**MBPO, "env": make}))
    assert policy.act(make().reset(seed=0)[0]).shape == (1,)
    with pytest.raises(ValueError, match=r"\(2,\).*\(3,\)"):
        policy.act(np.zeros(3))


def test_tasks_of_dm_control_are_acted_in_by_what_they_observe() -> None:
    suite = pytest.importorskip("dm_control.suite")
    settings = {**MBPO, "env": "dm_control/cartpole/balance", "steps": 30, **QUICK}
    trainer = MBPOTrainer(**settings)
    trainer.train()
    policy = Policy(trainer)
    observation = suite.load("cartpole", "balance").reset().observation
    action = policy.act(observation)
    assert action.shape == (1,) and abs(action) <= 1
    both = {key: np.stack([value] * 2) for key, value in observation.items()}
    policy.reset()
    assert np.allclose(policy.act(both), [action] * 2, atol=1e-6)
    with pytest.raises(ValueError, match=r"missing are \['velocity'\]"):
        policy.act({"position": observation["position"]})


@pytest.mark.gpu
@pytest.mark.parametrize("kind, settings", [(MBPOTrainer, MBPO), (PETSTrainer, PETS)])
def test_policies_act_on_a_gpu(kind, settings) -> None:
    trainer = kind(**{**settings, "device": "cuda"})
    trainer.train()
    state = torch.cuda.get_rng_state()
    actions = [Policy(trainer, seed=1).act(np.zeros((2, 3))) for _ in range(2)]
    assert np.array_equal(*actions) and actions[0].shape == (2, 1)
    assert torch.equal(state, torch.cuda.get_rng_state())
