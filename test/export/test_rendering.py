"""Frames of imagined states."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from _export_models import ACTION_SPACE, Clock, OBS_SPACE, ZERO
from _models import clock_env, clock_model, imagined_env, times
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from tensordict.nn import TensorDictModule as Mod
from torchrl.envs import GymEnv

from torchrl_wm import (
    GymWorldModelEnv,
    GymWorldModelVectorEnv,
    make_env,
    WorldModel,
    WorldModelEnv,
)
from torchrl_wm._rendering import as_frame

FIRST = np.linspace(0, 1, 6 * 8).reshape(6, 8)


def image_env(image, space, **kwargs) -> GymWorldModelEnv:
    """An env that observes one image."""
    env = GymWorldModelEnv(
        Clock(),
        space,
        ACTION_SPACE,
        reset_fn=lambda: {"obs": image},
        render_mode="rgb_array",
        **kwargs,
    )
    env.reset()
    return env


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "low, high, dtype",
    [
        (0, 1, np.float32),
        (-0.5, 0.5, np.float32),
        (-1, 1, np.float64),
        (0, 255, np.uint8),
        (0, 255, np.float32),
        (-np.inf, np.inf, np.float32),
    ],
)
def test_pixels_of_any_order_and_range(channels, first, low, high, dtype):
    ends = (0, 1) if np.isinf(low) else (low, high)
    image = np.repeat((FIRST * (ends[1] - ends[0]) + ends[0])[None], channels, 0)
    image = image if first else image.transpose(1, 2, 0)
    image = image.round().astype(dtype) if dtype == np.uint8 else image.astype(dtype)
    frame = image_env(image, spaces.Box(low, high, image.shape, dtype)).render()
    assert frame.shape == (6, 8, 3) and frame.dtype == np.uint8
    assert np.abs(frame.astype(int) - (FIRST[..., None] * 255)).max() <= 1
    assert (frame == frame[..., :1]).all()


def test_channels_stay_where_they_are():
    image = np.zeros((3, 6, 8), np.uint8)
    image[1] = 255  # green
    frame = image_env(image, spaces.Box(0, 255, image.shape, np.uint8)).render()
    assert (frame == [0, 255, 0]).all()


@pytest.mark.parametrize("shape", [(3, 5, 3), (4, 6, 8), (2,), (2, 3, 4, 3)])
def test_what_is_no_image(shape):
    with pytest.raises((ValueError, RuntimeError), match="render_fn"):
        image_env(np.zeros(shape), spaces.Box(0, 1, shape)).render()


def test_values_far_outside_of_the_range():
    with pytest.raises(ValueError, match="Give its space these bounds"):
        as_frame(FIRST * 255, None, "image")


@pytest.mark.parametrize("key", ["image", "pixels", "rgb"])
def test_image_keys(key):
    space = spaces.Dict({"a": spaces.Box(-1, 1, (2,)), key: spaces.Box(0, 1, (6, 8))})
    env = image_env({"a": np.zeros(2), key: FIRST}, space)
    assert env.render()[-1, -1].tolist() == [255] * 3
    space = spaces.Dict({"a": spaces.Box(-1, 1, (2,)), "b": spaces.Box(0, 1, (6, 8))})
    with pytest.raises(RuntimeError, match="render_fn"):
        image_env({"a": np.zeros(2), "b": FIRST}, space).render()


def test_render_fn():
    seen = []

    def render_fn(model, state, obs):
        seen.append((model, state, obs))
        return torch.full((4, 5, 3), float(state[0]) / 2)

    env = GymWorldModelEnv(
        model := Clock(),
        OBS_SPACE,
        ACTION_SPACE,
        render_fn=render_fn,
        render_mode="rgb_array",
    )
    with pytest.raises(RuntimeError, match="reset"):
        env.render()
    env.reset()
    env.step(ZERO)
    frame = env.render()
    assert frame.shape == (4, 5, 3) and (frame == 128).all()
    assert seen[0][0] is model and seen[0][2].tolist() == [1, 1, 1]
    seen[0][1][:] = 50  # a copy
    assert env.state.tolist() == [1]
    with pytest.raises(ValueError, match="not both"):
        GymWorldModelEnv(
            Clock(),
            OBS_SPACE,
            ACTION_SPACE,
            render_fn=render_fn,
            render_env="Pendulum-v1",
        )


def test_without_a_render_mode_nothing_is_rendered():
    env = GymWorldModelEnv(Clock(), OBS_SPACE, ACTION_SPACE)
    env.reset()
    with pytest.warns(UserWarning, match="render_mode"):
        assert env.render() is None
    envs = GymWorldModelVectorEnv(imagined_env(), num_envs=2)
    with pytest.raises(RuntimeError, match="render_mode"):
        envs.render()


def test_decoded_pixels_of_a_world_model():
    def decode(latent):
        return (
            (latent / 4).unsqueeze(-1).unsqueeze(-1).expand(*latent.shape[:-1], 3, 6, 8)
        )

    decoder = Mod(decode, ["latent"], ["pixels"])
    env = WorldModelEnv(
        clock_model(decoder=decoder), clock_env(), start_states=times(0.0), decode=True
    )
    gym = GymWorldModelEnv(env, render_mode="rgb_array")
    gym.reset()
    gym.step(np.zeros(1))
    assert (gym.render() == 64).all() and gym.render().shape == (6, 8, 3)
    check_env(gym)
    envs = GymWorldModelVectorEnv(env, num_envs=2, render_mode="rgb_array")
    envs.reset(options={"state": torch.tensor([[0.0], [4.0]])})
    assert [frame.max() for frame in envs.render()] == [0, 255]


def real_model(size: int, actions: int) -> WorldModel:
    """A world in which nothing moves."""
    return WorldModel(
        Mod(torch.nn.Identity(), ["observation"], ["observation"]),
        Mod(
            lambda o, a: o.clone(), ["observation", "action"], [("next", "observation")]
        ),
        Mod(torch.nn.Linear(size, 1), [("next", "observation")], [("next", "reward")]),
    )


@pytest.mark.parametrize("name, size", [("Pendulum-v1", 3), ("CartPole-v1", 4)])
def test_the_real_envs_renderer(name, size):
    pytest.importorskip("pygame")
    env = make_env(
        real_model(size, 1), base_env=name, render_mode="rgb_array", render_env=name
    )
    real = gymnasium.make(name, render_mode="rgb_array")
    for seed in (0, 1):
        observation, _ = env.reset(seed=seed)
        if name == "Pendulum-v1":
            state = [np.arctan2(observation[1], observation[0]), observation[2]]
        else:
            state = observation
        real.reset(seed=5)
        real.unwrapped.state = np.array(state, np.float64)
        assert np.array_equal(env.render(), real.render())
    frame = env.render()
    frame[:] = 0
    assert env.render().any()
    env.close()


def test_the_real_envs_renderer_needs_its_observation():
    pytest.importorskip("pygame")
    env = GymWorldModelEnv(
        imagined_env(), render_mode="rgb_array", render_env="Pendulum-v1"
    )
    env.reset()
    with pytest.raises(ValueError, match="decode=True"):
        env.render()
    for other in (
        "MountainCar-v0",
        GymEnv("Pendulum-v1"),
        gymnasium.make("Pendulum-v1"),
    ):
        with pytest.raises(ValueError, match="render_env"):
            GymWorldModelEnv(imagined_env(), render_env=other)


def test_record_video(tmp_path):
    pytest.importorskip("moviepy")
    env = image_env(
        FIRST,
        spaces.Box(0, 1, (6, 8)),
        max_episode_steps=3,
        transition_fn=lambda m, s, a: (s, 1 - FIRST, 0.0),
    )
    video = gymnasium.wrappers.RecordVideo(env, str(tmp_path), disable_logger=True)
    video.reset()
    for _ in range(3):
        video.step(ZERO)
    video.close()
    assert [path.suffix for path in tmp_path.iterdir()] == [".mp4"]


def test_gymnasiums_render_collection():
    env = gymnasium.make(
        "torchrl_wm/WorldModel-v0",
        world_model=Clock(),
        observation_space=OBS_SPACE,
        action_space=ACTION_SPACE,
        render_fn=lambda: FIRST,
        render_mode="rgb_array_list",
    )
    env.reset()
    env.step(ZERO)
    assert len(env.render()) == 2
