"""Films of what a run has learnt."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
from _real_envs import draw_reacher, make_reacher, MBPO, PETS, Reacher1D
from PIL import Image

from torchrl_wm.trainers import film_policy, MBPOTrainer, PETSTrainer

TRAINED = {**MBPO, "steps": 30, "evaluation_interval": 0}
SEEN = []


class Painted(Reacher1D):
    """Renders itself: a row of pixels for each step so far."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, **kwargs):
        self.time = 0
        return super().reset(**kwargs)

    def step(self, action):
        self.time += 1
        return super().step(action)

    def render(self):
        return np.full((12, 20, 3), 10 * self.time, np.uint8)


def draw(observation):
    SEEN.append(observation)
    return draw_reacher(observation)


def frames_of(path):
    with Image.open(path) as film:
        out = []
        for number in range(film.n_frames):
            film.seek(number)
            out.append(np.asarray(film.convert("RGB")))
    return out


@pytest.mark.parametrize("render", [draw, "drawing_of_mine:draw"])
def test_an_env_of_ones_own_is_drawn_by_a_function(
    tmp_path, monkeypatch, render
) -> None:
    trainer = MBPOTrainer(**{**TRAINED, "env": make_reacher, "num_envs": 2})
    (episode,) = trainer.evaluate(1, seed=4)
    path = tmp_path / "film.gif"
    SEEN.clear()
    module = types.SimpleNamespace(draw=draw)
    monkeypatch.setitem(sys.modules, "drawing_of_mine", module)
    # It has learnt nothing yet: the real alone.
    assert not film_policy(trainer, path, render=render, seed=4, height=None)
    assert [float(one["place"][0]) for one in SEEN] == [
        float(episode["place"][0, 0]),
        *episode["next", "place"][:, 0].tolist(),
    ]
    assert frames_of(path)[0].shape == (10, 30, 3)
    trainer.train()
    SEEN.clear()
    assert film_policy(trainer, path, render=render, horizon=4, height=40)
    assert all(set(one) == {"place", "speed"} for one in SEEN)
    assert frames_of(path)[0].shape[1] == 3 * 120 + 8  # real, imagined, difference
    SEEN.clear()
    assert not film_policy(
        trainer, path, render=render, real_only=True, episode=episode
    )
    assert len(SEEN) == len(episode) + 1
    assert frames_of(path)[0].shape == (240, 720, 3)


def test_what_draws_nothing_is_named(tmp_path) -> None:
    trainer = MBPOTrainer(**{**TRAINED, "env": make_reacher})
    with pytest.raises(ValueError, match="no renderer that gives frames.*render=f"):
        film_policy(trainer, tmp_path / "film.gif")
    with pytest.raises(ValueError, match="'MountainCar-v0' from its observations"):
        film_policy(trainer, tmp_path / "film.gif", render="MountainCar-v0")
    with pytest.raises(ValueError, match="no 'nowhere:draw'"):
        film_policy(trainer, tmp_path / "film.gif", render="nowhere:draw")
    with pytest.raises(TypeError, match="function of the observation"):
        film_policy(trainer, tmp_path / "film.gif", render=3)
    trainer.recipe.policy = None
    with pytest.raises(ValueError, match="'mbpo' learns no policy"):
        film_policy(trainer, tmp_path / "film.gif", render=draw)
    assert not list(tmp_path.iterdir())


def test_the_real_env_alone_is_filmed_as_it_renders_itself(tmp_path) -> None:
    trainer = PETSTrainer(**{**PETS, "env": Painted})
    trainer.train()
    path = tmp_path / "film.gif"
    assert not film_policy(trainer, path, height=None, max_steps=5)
    frames = frames_of(path)
    assert [int(frame[0, 0, 0]) for frame in frames] == [0, 10, 20, 30, 40, 50]
    assert frames[0].shape == (12, 20, 3)
    assert not film_policy(trainer, path, height=24, max_steps=5)
    assert frames_of(path)[0].shape == (24, 40, 3)


@pytest.mark.parametrize(
    "kind, settings",
    [(MBPOTrainer, {**TRAINED, "num_envs": 2}), (PETSTrainer, PETS)],
)
def test_what_is_imagined_stands_beside_the_real(tmp_path, kind, settings) -> None:
    trainer = kind(**settings)
    assert not film_policy(trainer, tmp_path / "film.gif", max_steps=2)
    trainer.train()
    assert film_policy(trainer, tmp_path / "film.gif", horizon=5, max_steps=8)
    frames = frames_of(tmp_path / "film.gif")
    assert len(frames) == 9 and frames[0].shape[1] == 3 * 240 + 8
    assert film_policy(trainer, tmp_path / "film.mp4", max_steps=3)


def test_horizons_and_lengths_are_counts(tmp_path) -> None:
    trainer = MBPOTrainer(**TRAINED)
    for name in ("horizon", "max_steps"):
        with pytest.raises(ValueError, match="at least 1"):
            film_policy(trainer, tmp_path / "film.gif", **{name: 0})
