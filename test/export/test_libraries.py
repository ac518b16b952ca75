"""The export in the libraries that it is for: Stable-Baselines3, CleanRL's style, TorchRL."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from _export_models import ACTION_SPACE, Net, net_env, OBS_SPACE
from _models import imagined_env, make_model, observations, SpecEnv
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from torch import nn
from torchrl.data import OneHot
from torchrl.envs import (
    check_env_specs,
    Compose,
    DoubleToFloat,
    GymWrapper,
    StepCounter,
    TransformedEnv,
)

from torchrl_wm import GymWorldModelEnv, GymWorldModelVectorEnv, WorldModelEnv

sb3 = pytest.importorskip("stable_baselines3")

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_checker import check_env as check_env_sb3
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecMonitor,
    VecNormalize,
)

from torchrl_wm.export import SB3VecEnv

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

IMAGE = spaces.Box(0, 255, (3, 36, 36), np.uint8)
DICT = spaces.Dict({"image": IMAGE, "vector": spaces.Box(-np.inf, np.inf, (3,))})


class Pictures:
    """A model of pictures, or of a dictionary with one, for one env or many."""

    def __init__(self, space: spaces.Space, num_envs: int | None = None) -> None:
        self.space = space
        self.lead = () if num_envs is None else (num_envs,)

    def observe(self, state):
        image = (state[..., :1, None, None] * 10).clamp(0, 255).to(torch.uint8)
        image = image.expand(*self.lead, 3, 36, 36)
        if self.space is IMAGE:
            return image
        return {"image": image, "vector": state}

    def reset(self):
        state = torch.rand(*self.lead, 3)
        return {"state": state, "observation": self.observe(state)}

    def step(self, state, action):
        state = state + action.mean(-1, keepdim=True) + 1
        return state, self.observe(state), state.sum(-1)


def single(policy: str, limit: int = 20) -> gymnasium.Env:
    if policy == "MlpPolicy":
        return GymWorldModelEnv(imagined_env(), max_episode_steps=limit)
    space = IMAGE if policy == "CnnPolicy" else DICT
    return GymWorldModelEnv(
        Pictures(space), space, ACTION_SPACE, max_episode_steps=limit
    )


def vector(policy: str, num_envs: int = 3, limit: int = 20) -> SB3VecEnv:
    if policy == "MlpPolicy":
        return SB3VecEnv(imagined_env(), num_envs=num_envs, max_episode_steps=limit)
    space = IMAGE if policy == "CnnPolicy" else DICT
    return SB3VecEnv(
        Pictures(space, num_envs),
        space,
        ACTION_SPACE,
        num_envs=num_envs,
        max_episode_steps=limit,
    )


class TinyExtractor(sb3.common.torch_layers.BaseFeaturesExtractor):
    """Small enough for tests, over whatever is observed."""

    def __init__(self, space: spaces.Space) -> None:
        super().__init__(space, 8)
        size = spaces.utils.flatdim(space)
        self.net = nn.Linear(min(size, 64), 8)

    def forward(self, obs):
        parts = obs.values() if isinstance(obs, dict) else [obs]
        flat = torch.cat([part.flatten(1).float() for part in parts], -1)
        return self.net(flat[:, -64:])


def agent(algorithm: str, policy: str, env, seed: int = 0):
    kwargs = {
        "PPO": {"n_steps": 16, "batch_size": 16, "n_epochs": 1},
        "A2C": {},
        "SAC": {"learning_starts": 10, "buffer_size": 100, "batch_size": 8},
    }[algorithm]
    extractor = (
        {} if policy == "MlpPolicy" else {"features_extractor_class": TinyExtractor}
    )
    return getattr(sb3, algorithm)(
        policy, env, seed=seed, policy_kwargs={"net_arch": [8], **extractor}, **kwargs
    )


@pytest.mark.parametrize("policy", ["MlpPolicy", "MultiInputPolicy", "CnnPolicy"])
def test_sb3_check_env(policy):
    check_env_sb3(single(policy))


@pytest.mark.parametrize("algorithm", ["PPO", "SAC", "A2C"])
@pytest.mark.parametrize("policy", ["MlpPolicy", "MultiInputPolicy", "CnnPolicy"])
def test_sb3_learns(algorithm, policy):
    for env in (Monitor(single(policy)), vector(policy)):
        learner = agent(algorithm, policy, env).learn(64)
        assert learner.num_timesteps >= 64
        obs = env.reset()
        action, _ = learner.predict(obs[0] if isinstance(obs, tuple) else obs)
        assert env.action_space.shape == np.shape(action)[-1:]


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_two_runs_of_one_seed_are_identical(noise):
    torch.manual_seed(0)
    net, batch_net = Net(noise), Net(noise, batch=(3,))
    batch_net.load_state_dict(net.state_dict())

    def one():
        return DummyVecEnv(
            [
                lambda: GymWorldModelEnv(
                    net, OBS_SPACE, ACTION_SPACE, max_episode_steps=9
                )
            ]
            * 2
        )

    def many():
        return SB3VecEnv(
            batch_net, OBS_SPACE, ACTION_SPACE, num_envs=3, max_episode_steps=9
        )

    def run(make, seed):
        torch.rand(int(torch.randint(5, ())))  # the caller's random numbers differ
        learner = agent("PPO", "MlpPolicy", make(), seed).learn(100)
        return torch.cat([p.detach().flatten() for p in learner.policy.parameters()])

    for make in (one, many):
        first = run(make, 1)
        assert torch.equal(first, run(make, 1))
        assert not torch.equal(first, run(make, 2))


def test_sb3_vec_env_is_what_sb3_makes_of_single_envs():
    """Terminal observations, time limits and rewards, step by step."""
    env = imagined_env()
    start = {"state": torch.full((4,), 0.5)}

    def make():
        return GymWorldModelEnv(env, initial_state=start["state"], max_episode_steps=4)

    theirs = DummyVecEnv([make] * 2)
    ours = SB3VecEnv(env, num_envs=2, initial_state=start["state"], max_episode_steps=4)
    assert ours.observation_space == theirs.observation_space
    assert np.allclose(theirs.reset(), ours.reset(), atol=1e-6)
    rng = np.random.default_rng(0)
    for _ in range(9):
        action = rng.uniform(-1, 1, (2, 2)).astype(np.float32)
        expected, got = theirs.step(action), ours.step(action)
        for a, b in zip(expected[:3], got[:3]):
            assert np.allclose(a, b, atol=1e-6) and a.dtype == b.dtype
        for a, b in zip(expected[3], got[3]):
            assert a["TimeLimit.truncated"] == b["TimeLimit.truncated"]
            assert ("terminal_observation" in a) == ("terminal_observation" in b)
            if "terminal_observation" in a:
                assert np.allclose(
                    a["terminal_observation"], b["terminal_observation"], atol=1e-6
                )


def test_a_termination_at_the_time_limit_is_no_truncation():
    from _models import clock_env, clock_model, ends_at, times

    env = WorldModelEnv(clock_model(ends_at(2.0)), clock_env(), start_states=times(0.0))
    for limit, truncated in ((2, False), (1, True)):
        envs = SB3VecEnv(env, num_envs=2, max_episode_steps=limit)
        envs.reset()
        for _ in range(limit):
            infos = envs.step(np.zeros((2, 1), np.float32))[3]
        assert [info["TimeLimit.truncated"] for info in infos] == [truncated] * 2


def test_sb3_wrappers_and_evaluation():
    envs = VecNormalize(VecMonitor(vector("MlpPolicy")))
    returns = []

    class Watch(BaseCallback):
        def _on_step(self):
            returns.extend(
                i["episode"]["r"] for i in self.locals["infos"] if "episode" in i
            )
            return True

    learner = agent("PPO", "MlpPolicy", envs).learn(96, callback=Watch())
    assert len(returns) >= 3
    for env in (vector("MlpPolicy"), Monitor(single("MlpPolicy"))):
        mean, _ = evaluate_policy(learner, env, n_eval_episodes=3, warn=False)
        assert np.isfinite(mean)


def test_sb3_vec_env_methods():
    envs = vector("MlpPolicy")
    assert envs.get_attr("render_mode") == [None] * 3
    assert envs.env_is_wrapped(Monitor) == [False] * 3
    assert envs.seed(3) == [3, 4, 5]
    first = envs.reset()
    envs.seed(3)
    assert np.array_equal(first, envs.reset())
    assert not np.array_equal(first, envs.reset())
    envs.set_options({"state": np.zeros((3, 4), np.float32)})
    assert (envs.reset() == 0).all() and (envs.reset() != 0).any()
    envs.step(np.zeros((3, 2), np.float32))
    assert envs.get_attr("elapsed_steps", [0, 2]) == [1, 1]
    envs.set_attr("max_episode_steps", 2)
    assert envs.step(np.zeros((3, 2), np.float32))[2].all()
    with pytest.raises(ValueError, match="one batch"):
        envs.set_attr("max_episode_steps", 2, [0])
    with pytest.raises(NotImplementedError, match="one batch"):
        envs.env_method("reset")
    envs.set_options([{"state": 1}, {}, {}])
    with pytest.raises(ValueError, match="one batch"):
        envs.reset()
    with pytest.raises(ValueError, match="SameStep"):
        SB3VecEnv(GymWorldModelVectorEnv(imagined_env(), num_envs=2))
    with pytest.raises(TypeError, match="given already"):
        SB3VecEnv(envs.env, num_envs=2)
    images = SB3VecEnv(
        Pictures(IMAGE, 2), IMAGE, ACTION_SPACE, num_envs=2, render_mode="rgb_array"
    )
    images.reset()
    assert images.render().shape == (72, 36, 3)
    images.close()


def test_sb3_make_vec_env_by_name():
    envs = make_vec_env(
        "torchrl_wm/WorldModel-v0",
        n_envs=2,
        env_kwargs={"world_model": imagined_env(), "max_episode_steps": 5},
    )
    agent("A2C", "MlpPolicy", envs).learn(30)


def test_discrete_actions_in_sb3():
    env = WorldModelEnv(
        make_model(action_dim=3),
        SpecEnv(action_spec=OneHot(3, dtype=torch.float32)),
        start_states=observations(4),
    )
    envs = SB3VecEnv(env, num_envs=3, max_episode_steps=8)
    sb3.DQN("MlpPolicy", envs, learning_starts=10, buffer_size=100).learn(60)
    agent("PPO", "MlpPolicy", envs).learn(60)
    check_env_sb3(GymWorldModelEnv(env))


def test_other_processes():
    """Workers of SB3 and of Gymnasium; both give what one process gives."""
    here = SyncVectorEnv([net_env])
    others = [AsyncVectorEnv([net_env]), SubprocVecEnv([net_env])]
    others[1].seed(0)
    action = np.zeros((1, 2), np.float32)
    first, step = here.reset(seed=0)[0], here.step(action)
    for env in others:
        other = env.reset(seed=0)[0] if env is others[0] else env.reset()
        stepped = env.step(action)
        env.close()
        assert np.allclose(first, other, atol=1e-6)
        assert np.allclose(step[0], stepped[0], atol=1e-6)
        latent = (
            stepped[-1]["model_state"]
            if env is others[0]
            else stepped[-1][0]["model_state"]
        )
        assert np.allclose(step[-1]["model_state"], latent, atol=1e-6)


def test_a_ppo_of_cleanrls_kind():
    """One file's loop: a batch of envs, recorded episodes, GAE, the clipped loss."""
    torch.manual_seed(0)
    envs = GymWorldModelVectorEnv(
        imagined_env(), num_envs=8, max_episode_steps=10, autoreset_mode="SameStep"
    )
    envs = RecordEpisodeStatistics(envs)
    size, acted = (
        envs.single_observation_space.shape[0],
        envs.single_action_space.shape[0],
    )
    actor, critic = nn.Linear(size, acted), nn.Linear(size, 1)
    parameters = [*actor.parameters(), *critic.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    steps, gamma, lmbda = 16, 0.99, 0.95
    obs, _ = envs.reset(seed=0)
    returns = []
    for _ in range(3):
        batch = {
            key: [] for key in ("obs", "action", "log_prob", "reward", "done", "value")
        }
        for _ in range(steps):
            seen = torch.as_tensor(obs)
            with torch.no_grad():
                dist = torch.distributions.Normal(actor(seen), 0.3)
                action, value = dist.sample(), critic(seen).squeeze(-1)
            clipped = action.clamp(-1, 1).numpy()
            obs, reward, terminated, truncated, infos = envs.step(clipped)
            done = torch.as_tensor(terminated | truncated)
            row = (
                seen,
                action,
                dist.log_prob(action).sum(-1),
                torch.as_tensor(reward).float(),
                done.float(),
                value,
            )
            for key, entry in zip(batch, row):
                batch[key].append(entry)
            if "episode" in infos:
                returns.extend(infos["episode"]["r"][infos["_episode"]])
        data = {key: torch.stack(entries) for key, entries in batch.items()}
        advantage, last = torch.zeros(steps, 8), 0.0
        with torch.no_grad():
            following = critic(torch.as_tensor(obs)).squeeze(-1)
        for t in reversed(range(steps)):
            alive = 1 - data["done"][t]
            delta = data["reward"][t] + gamma * following * alive - data["value"][t]
            last = delta + gamma * lmbda * alive * last
            advantage[t], following = last, data["value"][t]
        target = advantage + data["value"]
        for _ in range(2):
            dist = torch.distributions.Normal(actor(data["obs"]), 0.3)
            ratio = (dist.log_prob(data["action"]).sum(-1) - data["log_prob"]).exp()
            gain = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            loss = (
                -gain.mean() + (critic(data["obs"]).squeeze(-1) - target).pow(2).mean()
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert len(returns) == 8 * (3 * steps // 10)
    assert np.isfinite(returns).all() and torch.isfinite(loss)


@pytest.mark.parametrize("make", [net_env, lambda: GymWorldModelEnv(imagined_env())])
def test_torchrls_wrapper(make):
    env = TransformedEnv(
        GymWrapper(make()), Compose(DoubleToFloat(), StepCounter(max_steps=25))
    )
    check_env_specs(env)
    assert env.rollout(30).shape == (20 if make is net_env else 25,)
