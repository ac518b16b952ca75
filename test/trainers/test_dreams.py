"""Runs whose models dream of images: their films, loggers and reports."""

from __future__ import annotations

import numpy as np
import pytest
from _env_kinds import Dot
from _real_envs import TDMPC2
from PIL import Image
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.envs import GymWrapper, RenameTransform, TransformedEnv

from torchrl_wm import _registry
from torchrl_wm.models import make_rssm_world_model
from torchrl_wm.trainers import (
    film_policy,
    Recipe,
    register_recipe,
    RunConfig,
    start_run,
    TDMPC2Trainer,
    watching,
    write_run_report,
)
from torchrl_wm.trainers.recipe import make_replay

SETTINGS = {
    "max_episode_steps": 14,
    "random_steps": 14,
    "steps": 56,
    "logger": "csv",
    "evaluation_interval": 0,
}


class Looking(Recipe):
    """An untrained recurrent model of images, and a policy that looks at the corner of an image."""

    config_class = RunConfig

    def __init__(self, config: RunConfig, env) -> None:
        super().__init__(config, env)
        (key,) = (k for k in env.observation_spec.keys(True, True) if "view" in k)
        self.world_model, loss = make_rssm_world_model(
            env, belief_size=8, num_cells=8, hidden_size=8, depth=1, pixel_depth=2
        )
        corner = nn.Linear(4, 2)
        self.policy = TensorDictModule(
            lambda view: corner(view[..., :4, 0, 0] / 255).tanh(), [key], ["action"]
        )
        self.replay = make_replay(100)
        self.parts = {"loss": loss, "replay": self.replay}

    def learn(self, steps):
        return {}


def plain():
    return GymWrapper(Dot())


def nested():
    return TransformedEnv(plain(), RenameTransform(["view"], [("camera", "view")]))


def films_of(run, name: str) -> list[np.ndarray]:
    out = []
    for path in sorted((run.path / "films").glob(f"{name}-*.gif")):
        with Image.open(path) as film:
            frames = []
            for number in range(film.n_frames):
                film.seek(number)
                frames.append(np.asarray(film.convert("RGB")))
        out.append(np.stack(frames))
    return out


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(_registry, "_REGISTERED", {})
    register_recipe("looking", Looking)


@pytest.mark.parametrize("env", [plain, nested])
def test_images_are_their_own_drawing(env, tmp_path, recwarn) -> None:
    settings = {**SETTINGS, "env": env, "film_interval": 28}
    trainer = start_run("looking", tmp_path / "run", **settings)
    trainer.train()
    for film in films_of(trainer.run, "policy"):
        assert film.shape == (
            15,
            120 + 18,
            3 * 120 + 8,
            3,
        )  # real, imagined, difference
    dreams = films_of(trainer.run, "dream")
    assert len(dreams) == len(films_of(trainer.run, "policy")) == 2
    for film in dreams:  # five frames seen, and ten steps imagined: one stretch
        assert film.shape[0] == 15 and film.shape[1] == 3 * (80 + 4) + 18
    assert not [w for w in recwarn if "not " in str(w.message)]
    path = tmp_path / "film.gif"
    assert film_policy(trainer, path, horizon=4, max_steps=10, height=None)
    with Image.open(path) as film:
        assert film.n_frames == 11 and film.size == (3 * 16 + 8, 16 + 18)
    # The real env has no renderer: its images are shown.
    assert not film_policy(trainer, path, real_only=True, height=None)
    (episode,) = trainer.evaluate(1, seed=0)
    key = "view" if env is plain else ("camera", "view")
    with Image.open(path) as film:
        film.seek(film.n_frames - 1)
        shown = np.asarray(film.convert("L")).astype(int)
        assert np.abs(shown - episode["next", key][-1, ..., 0].numpy()).max() <= 8
    if env is nested:
        report = write_run_report(trainer, episodes=1, horizon=5)
        assert "camera.view is off by" in report.verdicts["dreams"]


def test_an_error_of_a_picture_ends_no_run(tmp_path, monkeypatch) -> None:
    def fail(*args):
        raise RuntimeError("no paint")

    monkeypatch.setattr(watching, "dream_of", fail)
    settings = {**SETTINGS, "env": plain, "film_interval": 28}
    trainer = start_run("looking", tmp_path / "run", **settings)
    with pytest.warns(UserWarning) as caught:
        trainer.train()
    said = [str(w.message) for w in caught if "no paint" in str(w.message)]
    assert said == ["What the model dreams is not shown (RuntimeError: no paint)."]
    assert len(films_of(trainer.run, "policy")) == 2


def test_a_model_that_shows_nothing_is_filmed_as_the_real_env(tmp_path) -> None:
    """TD-MPC2's latents are not decoded."""
    pytest.importorskip("pygame")
    trainer = TDMPC2Trainer(**{**TDMPC2, "steps": 24, "evaluation_interval": 0})
    trainer.train()
    assert trainer.recipe.has_learnt
    assert not film_policy(trainer, tmp_path / "film.gif", max_steps=3)
    seen = []

    def draw(observation):
        seen.append(observation.shape)
        return np.zeros((8, 8, 3), np.uint8)

    assert not film_policy(trainer, tmp_path / "film.gif", max_steps=3, render=draw)
    assert seen == [(3,)] * 4
