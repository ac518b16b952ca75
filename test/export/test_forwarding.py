"""Methods and attributes of single envs, asked of many that are one batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _models import imagined_env
from gymnasium import spaces
from torch import nn

from torchrl_wm import GymWorldModelVectorEnv

sb3 = pytest.importorskip("stable_baselines3")

from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.vec_env import VecMonitor

from torchrl_wm.export import SB3VecEnv

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

PLACE = spaces.Box(-np.inf, np.inf, (2,), np.float32)
GOALS = spaces.Dict(observation=PLACE, achieved_goal=PLACE, desired_goal=PLACE)
N = 4


class Reach:
    """A place that the action moves, and a goal; in numpy."""

    colours = np.array([[1, 0], [2, 0], [3, 0], [4, 0]])
    name = "reach"

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.wind = 0.0

    def compute_reward(self, achieved_goal, desired_goal, infos):
        self.calls.append((len(achieved_goal), len(infos)))
        return -np.abs(achieved_goal - desired_goal).sum(-1)

    def seen(self, state):
        place, goal = state["place"], state["goal"]
        return {"observation": place, "achieved_goal": place, "desired_goal": goal}

    def reset(self, np_random, options):
        rows = options["num_envs"]
        state = {
            "place": np.zeros((rows, 2), np.float32),
            "goal": np_random.uniform(-1, 1, (rows, 2)).astype(np.float32),
        }
        return state, self.seen(state)

    def step(self, state, action):
        state = {"place": state["place"] + action, "goal": state["goal"]}
        reward = self.compute_reward(state["place"], state["goal"], [{}] * len(action))
        return state, self.seen(state), reward

    # What single envs may be asked ------------------------------------------

    def action_masks(self, state):
        return np.stack([state["place"][:, 0] >= 0, state["place"][:, 0] < 0], -1)

    def goals(self, obs):
        return {"goal": obs["desired_goal"], "unit": "m"}

    def noise(self):
        return torch.rand(N, 3)

    def further(self, by: float):
        return np.arange(N) + by

    def blow(self, wind: float) -> None:
        self.wind = wind

    def wrong(self):
        return np.zeros((N + 1, 2))


def reach(model=None, **kwargs) -> SB3VecEnv:
    return SB3VecEnv(
        model or Reach(),
        GOALS,
        spaces.Box(-1, 1, (2,)),
        num_envs=N,
        torch_actions=False,
        max_episode_steps=5,
        **kwargs,
    )


@pytest.mark.parametrize("monitored", [False, True])
def test_hindsight_replay(monitored) -> None:
    model = Reach()
    env = VecMonitor(reach(model)) if monitored else reach(model)
    agent = sb3.SAC(
        "MultiInputPolicy",
        env,
        replay_buffer_class=HerReplayBuffer,
        replay_buffer_kwargs={"n_sampled_goal": 4, "copy_info_dict": True},
        learning_starts=40,
        batch_size=20,
        policy_kwargs={"net_arch": [8]},
        seed=0,
    )
    agent.learn(80)
    model.calls.clear()
    batch = agent.replay_buffer.sample(20)
    # As many as are relabelled, at once; 4 of 5 are.
    assert (16, 16) in model.calls
    reached = batch.next_observations["achieved_goal"]
    expected = -(reached - batch.observations["desired_goal"]).abs().sum(-1)
    assert torch.allclose(batch.rewards[:, 0], expected, atol=1e-5)


def test_rows_of_the_arguments_are_what_the_result_is_about() -> None:
    env = reach()
    goals = np.eye(N)  # as many rows as envs, by chance
    for indices in ([0], None, [1, 3]):
        rewards = env.env_method(
            "compute_reward", goals, 0 * goals, [{}] * N, indices=indices
        )
        assert len(rewards) == (N if indices is None else len(indices))
        for reward in rewards:
            assert reward.tolist() == [-1.0] * N


def test_masks_of_all_envs_from_their_states() -> None:
    env = reach()
    assert env.has_attr("action_masks") and not env.has_attr("other_masks")
    with pytest.raises(RuntimeError, match=r"Call reset\(\) before action_masks"):
        env.env_method("action_masks")
    env.reset()
    env.step(np.array([[1, 0], [-1, 0], [-1, 0], [0.5, 0]], np.float32))
    masks = np.stack(env.env_method("action_masks"))
    assert masks.tolist() == [
        [True, False],
        [False, True],
        [False, True],
        [True, False],
    ]
    assert env.env_method("action_masks", indices=[2])[0].tolist() == [False, True]
    goals = env.env_method("goals", indices=[1])
    assert np.array_equal(goals[0]["goal"], env.env.state["goal"][1])
    assert goals[0]["unit"] == "m"


def test_what_a_method_returns() -> None:
    model = Reach()
    env = reach(model)
    assert [row.tolist() for row in env.env_method("further", 0.5)] == [
        0.5,
        1.5,
        2.5,
        3.5,
    ]
    assert env.env_method("blow", 3.0) == [None] * N and model.wind == 3.0
    with pytest.raises(ValueError, match="'blow'.*one batch.*all 4.*without indices"):
        env.env_method("blow", 1.0, indices=[0])
    with pytest.raises(ValueError, match=r"'wrong' returned \(5, 2\), and there are 4"):
        env.env_method("wrong")
    before = torch.get_rng_state()
    first, second = env.env_method("noise"), env.env_method("noise")
    assert np.array_equal(first, second) and type(first[0]) is np.ndarray
    assert torch.equal(before, torch.get_rng_state())
    for verb in ("reset", "step", "close"):
        with pytest.raises(
            NotImplementedError, match=f"one batch.*'{verb}'.*env.{verb}"
        ):
            env.env_method(verb)


def test_attributes() -> None:
    model = Reach()
    env = reach(model)
    assert env.get_attr("name") == ["reach"] * N
    assert [row.tolist() for row in env.get_attr("colours", [1, 3])] == [[2, 0], [4, 0]]
    env.set_attr("wind", 2.0)
    assert model.wind == 2.0 and "wind" not in vars(env.env)
    env.set_attr("max_episode_steps", 3)
    assert env.env.max_episode_steps == 3
    with pytest.raises(TypeError, match="'name' of Reach is no method.*get_attr"):
        env.env_method("name")


def test_what_neither_has() -> None:
    env = SB3VecEnv(imagined_env(), num_envs=N)
    with pytest.raises(
        AttributeError, match=r"Hindsight.*achieved_goal.*env.env.compu"
    ):
        env.env_method("compute_reward", np.zeros((2, 1)), np.zeros((2, 1)), [{}, {}])
    with pytest.raises(AttributeError, match=r"MaskablePPO.*\[N, n_actions\] bool"):
        env.env_method("action_masks")
    with pytest.raises(AttributeError, match="Neither .* nor its model WorldModel"):
        env.get_attr("gravity")


def test_a_function_of_the_callers_own() -> None:
    env = SB3VecEnv(imagined_env(), num_envs=N)
    env.env.action_masks = lambda state: state["latent"] > 0
    env.reset()
    masks = np.stack(env.env_method("action_masks"))
    assert np.array_equal(masks, (env.env.state["latent"] > 0).numpy())

    class Own(GymWorldModelVectorEnv):
        def action_masks(self):
            return np.arange(self.num_envs) % 2

    own = SB3VecEnv(Own(imagined_env(), num_envs=N, autoreset_mode="SameStep"))
    assert own.env_method("action_masks") == [0, 1, 0, 1]


def test_methods_of_modules_run_as_everything_else_of_the_models() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 1), nn.Dropout(0.9))

        def reset(self):
            return torch.ones(N, 2)

        def step(self, state, action):
            return state, state, state.sum(-1)

        def values(self, state):
            assert not torch.is_grad_enabled()
            return self.net(state)[:, 0]

    model = Model()
    envs = GymWorldModelVectorEnv(model, PLACE, PLACE, num_envs=N)
    envs.reset(seed=0)
    values = envs.call("values")
    expected = model.net[0](torch.ones(2)).item()
    assert np.allclose(values, [expected] * N) and model.net.training
    assert envs.world_model is model
