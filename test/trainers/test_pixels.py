"""Real envs that are observed by what they show: images, runs on them, and envs that show none."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from _real_envs import make_nested_ragged, Ragged, Shown, TDMPC2 as SMALL
from _runs import assert_same, interrupt
from torchrl.envs import GymWrapper, PendulumEnv
from torchrl.envs.utils import check_env_specs

from torchrl_wm.models import read_specs
from torchrl_wm.trainers import (
    film_policy,
    load_policy,
    make_real_env,
    Policy,
    RunConfig,
    TDMPC2Trainer,
)

PIXELS = {**SMALL, "pixels": 16, "pixel_depth": 2, "image_shift": 1}
PIXELS.update(batch_size=4, num_candidates=8, policy_candidates=2, top_k=4)


class Wrong(Shown):
    """Shows a list."""

    def render(self):
        return ["nothing"]


def trained(**settings) -> TDMPC2Trainer:
    trainer = TDMPC2Trainer(**{**PIXELS, "env": Shown, **settings})
    trainer.train()
    return trainer


# Observing ----------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 16, 50])
def test_the_image_is_what_the_env_shows(size) -> None:
    env = make_real_env(Shown, pixels=size)
    check_env_specs(env)
    episode = env.rollout(9)
    images = episode["pixels"]
    assert images.shape[1:] == (size, size, 3) and images.dtype is torch.uint8
    (entry,) = read_specs(env).pixels
    assert (entry.key, entry.layout, entry.scale) == ("pixels", "HWC", 255)
    assert read_specs(env).observation_keys == ["pixels"]
    # The same share of it is orange.
    places = make_real_env(Shown, pixels=size, pixels_only=False).rollout(9)
    assert set(read_specs(env).observation_keys) == {"pixels"}
    red = images[..., 0].float().mean((1, 2))
    assert (red - 255 * 4 / 40).abs().max() < 3
    bar = images[..., 0].float().mean(1).argmax(1) / size * 40
    assert torch.equal(images[1:], episode["next", "pixels"][:-1])
    assert places["observation"].shape[1:] == (2,) and len(bar) == len(images)


def test_it_is_drawn_once_for_each_step_that_is_kept() -> None:
    env = make_real_env(Shown, pixels=16, action_repeat=2)
    Shown.frames = 0
    steps = len(env.rollout(3, break_when_any_done=True))
    assert Shown.frames == 1 + steps


def test_the_observations_of_the_env_beside_it() -> None:
    env = make_real_env(Shown, pixels=16, pixels_only=False, seed=3)
    plain = make_real_env(Shown, seed=3)
    torch.manual_seed(0)
    both = env.rollout(5)
    torch.manual_seed(0)
    assert torch.equal(both["observation"], plain.rollout(5)["observation"])
    assert sorted(read_specs(env).observation_keys) == ["observation", "pixels"]
    place = 20 + 10 * both["next", "observation"][:, 0]
    shown = both["next", "pixels"][..., 0].float().mean(1).argmax(1) * 40 / 16
    assert (shown - place).abs().max() < 5


def test_own_entries_that_are_nested() -> None:
    with pytest.raises(ValueError, match="render_mode=None.*rgb_array"):
        make_real_env(make_nested_ragged, pixels=16)

    def make(render_mode):
        inner = make_nested_ragged()
        return inner.__class__(GymWrapper(Shown(render_mode)), inner.transform.clone())

    env = make_real_env(make, pixels=16, pixels_only=False)
    entries = env.rollout(4)
    assert entries["agent", "observation"].shape[1:] == (2,)
    assert entries["pixels"].shape[1:] == (16, 16, 3)
    alone = make_real_env(make, pixels=16).rollout(4)
    assert ("agent", "observation") not in alone.keys(True)
    assert alone["next", "agent", "reward"].shape[1:] == (1,)


# Runs ----------------------------------------------------------------------------


def test_several_envs_go_on_to_the_bit(tmp_path) -> None:
    settings = {**PIXELS, "env": Shown, "num_envs": 2, "replay_storage": "disk"}
    settings.update(max_episode_steps=None, steps=30)
    whole = TDMPC2Trainer(**settings)
    whole.train()
    assert whole.counts.updates > 4
    storage = whole.data.storage
    assert storage.number_of_images < 1.5 * len(storage)
    interrupt(TDMPC2Trainer.start(tmp_path / "run", **settings), 13)
    again = TDMPC2Trainer.resume(tmp_path / "run", env=Shown)
    assert 0 < again.collected_frames < whole.collected_frames
    again.train()
    assert_same(again, whole)


def test_envs_in_processes_show_the_same() -> None:
    settings = {"env": Shown, "num_envs": 2, "random_steps": 12, "steps": 12}
    settings.update(max_episode_steps=3, pretraining_updates=1, evaluation_interval=0)
    here, there = (
        trained(**settings, collector=where) for where in ("single", "processes")
    )
    assert_same(here, there)


def test_the_command_line(tmp_path) -> None:
    from torchrl_wm.cli import main

    short = {k: v for k, v in PIXELS.items() if k not in ("env", "logger")}
    short.update(steps=24, evaluation_interval=24)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in short.items()]
    run = str(tmp_path / "run")
    start = ["train", "tdmpc2", "--env", "_real_envs:Shown", "--run", run]
    assert main([*start, *options, "--logger", "csv"]) == 0
    assert main(["train", "--resume", run, "--steps", "40", "--no-report"]) == 0
    assert main(["evaluate", run, "--episodes", "1", "--json"]) == 0
    assert main(["play", run, "--out", str(tmp_path / "film.gif")]) == 0
    policy = load_policy(run)
    image = np.zeros((16, 16, 3), np.uint8)
    frame = np.zeros((24, 40, 3), np.uint8)
    first = policy.act(image)
    assert first.shape == (1,)
    policy.reset()
    assert policy.act(np.stack([frame, frame, frame])).shape == (3, 1)
    policy.reset()
    with pytest.raises(ValueError, match=r"must have the shape \(16, 16, 3\)"):
        policy.act(np.zeros(2, np.float32))


def test_a_policy_of_both() -> None:
    trainer = trained(pixels_only=False, steps=24, evaluation_interval=0)
    policy = Policy(trainer)
    frame = np.zeros((24, 40, 3), np.uint8)
    both = {"observation": np.zeros(2, np.float32), "pixels": frame}
    assert policy.act(both).shape == (1,)
    policy.reset()
    with pytest.raises(ValueError, match="must have the entries.*'pixels'"):
        policy.act({"observation": both["observation"]})


def test_films_are_drawn_by_the_env(tmp_path) -> None:
    trainer = trained(env="Pendulum-v1", max_episode_steps=6, steps=24, random_steps=12)
    # The pendulum's state, which could be drawn, is not observed.
    assert not film_policy(trainer, tmp_path / "film.gif", max_steps=3)


def test_frames_are_drawn_in_their_own_context() -> None:
    """Gymnasium draws MuJoCo's frames in whatever context was current last, black if it is closed."""
    current = []

    class Viewer:
        def make_context_current(self):
            current.append(1)

    class Rendered(Shown):
        mujoco_renderer = type("", (), {"viewer": Viewer()})

    make_real_env(Rendered, pixels=16).rollout(2)
    assert len(current) >= 3


# Envs that show nothing -----------------------------------------------------------


class Silent(Shown):
    """Takes no render mode."""

    def __init__(self) -> None:
        super().__init__(None)


@pytest.mark.parametrize(
    "env, found",
    [
        (Silent, "Silent shows none: render_mode=None"),
        (Ragged(), "Ragged shows none: render_mode=None"),
        (Wrong, r"Wrong shows none: .*render\(\) returned a list"),
    ],
)
def test_envs_without_frames(env, found) -> None:
    with pytest.raises(ValueError, match=f"(?s){found}.*returns.*height, width, 3"):
        TDMPC2Trainer(**{**PIXELS, "env": env})


def test_a_torchrl_env_without_frames() -> None:
    with pytest.raises(ValueError, match="PendulumEnv shows none: it is neither"):
        make_real_env(PendulumEnv(), pixels=16)


def test_an_env_that_observes_pixels_itself() -> None:
    class Painted(Shown):
        observation_space = gymnasium.spaces.Dict(
            {"pixels": gymnasium.spaces.Box(0, 255, (16, 16, 3), np.uint8)}
        )

    with pytest.raises(ValueError, match="observes 'pixels' itself"):
        make_real_env(Painted, pixels=16)


@pytest.mark.parametrize("size", [0, 7, "64"])
def test_sizes_that_no_image_has(size) -> None:
    with pytest.raises(ValueError, match="pixels must be"):
        RunConfig(pixels=size)
