"""Ready-made models of bytes, bits and choices: observations as the real env's space has them."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from _built import image, ObservingEnv, sequences
from _env_kinds import Dot
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from tensordict import TensorDict
from torchrl.data import Binary, Bounded, MultiOneHot, OneHot, Unbounded
from torchrl.envs import GymWrapper

from torchrl_wm import GymWorldModelEnv, GymWorldModelVectorEnv, WorldModelEnv
from torchrl_wm.models import (
    make_mlp_world_model,
    make_rssm_world_model,
    save_world_model,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SMALL = {
    make_mlp_world_model: {
        "hidden": (16,),
        "latent_size": 8,
        "pixel_depth": 2,
        "termination": "none",
    },
    make_rssm_world_model: {
        "belief_size": 16,
        "hidden_size": 16,
        "num_cells": 16,
        "pixel_depth": 2,
        "continue_head": False,
    },
}
SEEN = {
    "image": (image(8, 12, 3), spaces.Box(0, 255, (8, 12, 3), np.uint8)),
    "memory": (Unbounded((9,), dtype=torch.uint8), spaces.Box(0, 255, (9,), np.uint8)),
    "levels": (
        Bounded(-1, 2, (3,), dtype=torch.int64),
        spaces.Box(-1, 2, (3,), np.int64),
    ),
    "cell": (OneHot(4), spaces.Discrete(4)),
    "cards": (MultiOneHot([2, 3]), spaces.MultiDiscrete([2, 3])),
    "lights": (Binary(4), spaces.MultiBinary(4)),
}
VERSION = "torchrl_wm/WorldModel-v0"


def built(make, name: str, nested: bool = False):
    """A model of one entry whose decoder gives numbers of all sizes, and its env."""
    spec = SEEN[name][0]
    key = ("robot", name) if nested else name
    env = ObservingEnv({key: spec, "speed": Unbounded((2,))} if nested else {key: spec})
    model, _ = make(env, **SMALL[make])
    scale = 2.0 if name in ("cell", "cards", "lights") else 400.0
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.mul_(3).add_(scale * 1e-3 * torch.randn_like(parameter))
    return model, env, key


def expected(model, key, latents: dict) -> np.ndarray:
    """The decoder's own numbers, made what the env shows by hand."""
    state = TensorDict({k: torch.as_tensor(v)[None] for k, v in latents.items()}, [1])
    with torch.no_grad():
        value = model.eval().decode(state)[key][0]
    name = key if isinstance(key, str) else key[-1]
    if name == "cell":
        return value.argmax().numpy()
    if name == "cards":
        return np.array([value[:2].argmax(), value[2:].argmax()])
    if name == "lights":
        return (value > 0.5).to(torch.int8).numpy()
    low, high = (-1, 2) if name == "levels" else (0, 255)
    return value.round().clamp(low, high).numpy()


@pytest.mark.parametrize("make", SMALL)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", sorted(SEEN))
def test_observations_are_the_real_envs(make, name, nested) -> None:
    model, base, key = built(make, name, nested)
    starts = sequences(base, 5)
    space = SEEN[name][1]
    imagined = WorldModelEnv(model, base, start_states=starts, decode=True)
    for args, kwargs in (
        ([model], {"base_env": base, "start_states": starts}),
        ([model], {"start_states": starts}),  # the specs that the model knows
        ([imagined], {}),
    ):
        env = GymWorldModelEnv(*args, **kwargs)
        seen = env.observation_space
        assert (seen[f"robot/{name}"] if nested else seen) == space
        first, info = env.reset(seed=0)
        assert env.observation_space.contains(first)
        for _ in range(2):
            observation, _, _, _, info = env.step(env.action_space.sample())
            assert env.observation_space.contains(observation)
            value = observation[f"robot/{name}"] if nested else observation
            assert np.array_equal(value, expected(model, key, info["model_state"]))
        envs = GymWorldModelVectorEnv(*args, num_envs=3, **kwargs)
        envs.reset(seed=0)
        observations, *_, infos = envs.step(envs.action_space.sample())
        assert envs.observation_space.contains(observations)
        rows = observations[f"robot/{name}"] if nested else observations
        for i, row in enumerate(rows):
            latents = {k: v[i] for k, v in infos["model_state"].items() if k[0] != "_"}
            assert np.array_equal(row, expected(model, key, latents))


@pytest.mark.parametrize("name", ["image", "cell", "lights", "levels"])
def test_by_gymnasiums_names_and_from_a_file(name, tmp_path) -> None:
    model, base, _ = built(make_mlp_world_model, name)
    save_world_model(model, tmp_path / "model.pt")
    space = SEEN[name][1]
    kwargs = {"start_states": sequences(base, 5), "max_episode_steps": 7}
    for given in (model, tmp_path / "model.pt"):
        env = gymnasium.make(VERSION, world_model=given, **kwargs)
        assert env.observation_space == space
        check_env(env.unwrapped, skip_render_check=True)
        envs = gymnasium.make_vec(VERSION, num_envs=2, world_model=given, **kwargs)
        assert envs.single_observation_space == space
        observations, _ = envs.reset(seed=0)
        assert envs.observation_space.contains(observations)
        assert envs.observation_space.contains(envs.step(envs.action_space.sample())[0])


def test_a_start_of_the_callers_own() -> None:
    model, base, _ = built(make_rssm_world_model, "image")
    picture = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
    env = GymWorldModelEnv(model, base_env=base, start_states=sequences(base, 5))
    observation, _ = env.reset(options={"observation": picture})
    assert np.array_equal(observation, picture)
    observation, info = env.reset(seed=1)
    again, _ = env.reset(options={"state": info["model_state"]})
    assert np.array_equal(again, expected(model, "image", info["model_state"]))


def test_a_model_that_diverged_shows_no_black_images() -> None:
    model, base, _ = built(make_mlp_world_model, "image")
    env = GymWorldModelEnv(model, base_env=base, start_states=sequences(base, 5))
    env.reset(seed=0)
    with torch.no_grad():
        next(model.decoder.parameters()).fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="next.*image"):
        env.step(env.action_space.sample())
    with torch.no_grad():
        next(model.encoder.parameters()).fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="latents.*latent"):
        env.reset()


def camera() -> gymnasium.Env:
    """The dot in colours, on an image large enough for Stable-Baselines3's CNN."""

    class Large(Dot):
        SIDE = 36

    def colours(observation: dict) -> np.ndarray:
        return observation["view"].repeat(3, -1)

    space = spaces.Box(0, 255, (36, 36, 3), np.uint8)
    return gymnasium.wrappers.TransformObservation(Large(), colours, space)


def test_sb3s_cnn_policy_trains_in_a_model() -> None:
    sb3 = pytest.importorskip("stable_baselines3")
    from torchrl_wm.export import SB3VecEnv

    real = camera()
    base = GymWrapper(real)
    model, _ = make_rssm_world_model(base, **SMALL[make_rssm_world_model])
    env = SB3VecEnv(model, num_envs=2, base_env=base, max_episode_steps=10)
    assert env.observation_space == real.observation_space
    agent = sb3.PPO("CnnPolicy", env, n_steps=8, batch_size=16, n_epochs=1, seed=0)
    assert agent.learn(16).num_timesteps == 16
    action, _ = agent.predict(real.reset(seed=0)[0])
    assert real.action_space.contains(action)
