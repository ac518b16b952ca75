"""Films and open-loop errors of a run that goes on."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from _real_envs import make_reacher, MBPO, PETS
from PIL import Image
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.envs import GymEnv, RenameTransform, TransformedEnv

from torchrl_wm import WorldModel, WorldModelEnv
from torchrl_wm.trainers import resume_run, start_run, trainer_class, watch
from torchrl_wm.trainers.loggers import MetricsTable, TensorBoard
from torchrl_wm.trainers.watching import open_loop_shares

ERRORS = [f"open_loop_error_{horizon}" for horizon in (1, 5, 20)]


def rows_of(trainer, measured):
    """The rows of the metrics with open-loop errors, or those without, but the wall time."""
    rows = ({**row, "seconds": 0} for row in trainer.metrics)
    return [row for row in rows if (ERRORS[0] in row) == measured]


def films_of(run, name="policy"):
    return sorted(path.name for path in (run.path / "films").glob(f"{name}-*"))


@pytest.mark.parametrize("name, settings", [("pets", PETS), ("mbpo", MBPO)])
def test_a_watched_run_is_the_run_that_it_would_have_been(
    tmp_path, name, settings
) -> None:
    settings = {**settings, "num_envs": 2, "logger": "csv"}
    plain = trainer_class(name)(**settings)
    plain.train()
    watched = start_run(name, tmp_path / "run", **settings, film_interval=12)
    watched.train()
    assert rows_of(watched, False) == rows_of(plain, False)
    state, other = watched.policy.state_dict(), plain.policy.state_dict()
    assert all(torch.equal(state[key], other[key]) for key in state)
    measured = rows_of(watched, True)
    total = watched.collected_frames
    films = [f"policy-{step:09d}.gif" for step in range(12, total + 1, 12)]
    assert films_of(watched.run) == films and len(films) >= 3
    dreams = [film.replace("policy", "dream") for film in films]
    assert films_of(watched.run, "dream") == dreams[1:]
    with Image.open(watched.run.path / "films" / dreams[1]) as fan:
        assert fan.n_frames == 1 and np.asarray(fan.convert("L")).std() > 10
    # Before it has learnt there is a film alone.
    assert [row["step"] for row in measured] == list(range(24, total + 1, 12))
    for row in measured:
        # An episode is shorter than 20 steps.
        assert [key for key in ERRORS if key in row] == ERRORS[:2]
        assert 0 < row[ERRORS[0]] < row[ERRORS[1]] < 50
    assert watched.run.metrics() == watched.metrics


def test_the_error_is_a_share_of_the_spread() -> None:
    """Of a model that adds 0.1 to each dim, in an env that stands still in one and runs in the other."""

    def dynamics(place, action):
        return place + 0.1

    model = WorldModel(
        TensorDictModule(torch.nn.Identity(), [("a", "place")], [("a", "place")]),
        TensorDictModule(
            dynamics, [("a", "place"), "action"], [("next", "a", "place")]
        ),
        TensorDictModule(lambda p: p[..., :1], [("a", "place")], [("next", "reward")]),
    )
    reference = TransformedEnv(
        GymEnv("Pendulum-v1"), RenameTransform(["observation"], [("a", "place")])
    )
    env = WorldModelEnv(model, reference)
    times = torch.arange(31.0)
    place = torch.stack([times * 0.3, torch.full((31,), 2.0), -times], -1)
    episode = TensorDict(
        {
            "a": {"place": place[:-1]},
            "action": torch.zeros(30, 1),
            "next": {"a": {"place": place[1:]}, "done": torch.zeros(30, 1).bool()},
        },
        [30],
    )
    found = open_loop_shares(env, episode)
    # From 11 starts; 15.5 is the mean of all that is predicted. The dim that stands still is left out.
    for horizon, share in found.items():
        spread = np.sqrt(np.mean((np.arange(11) + horizon - 15.5) ** 2))
        wanted = (horizon * 0.2 / (0.3 * spread) + horizon * 1.1 / spread) / 2
        assert share == pytest.approx(wanted, rel=1e-4)
    assert list(found) == [1, 5, 20]
    assert list(open_loop_shares(env, episode[:7])) == [1, 5]
    assert open_loop_shares(env, episode[:1]) == {}  # no spread in one step


def test_a_run_that_goes_on_has_the_rows_of_one_that_was_not_interrupted(
    tmp_path,
) -> None:
    settings = {**MBPO, "logger": "csv", "film_interval": 20, "num_envs": 2}
    whole = start_run("mbpo", tmp_path / "whole", **settings)
    whole.train()
    run = tmp_path / "run"
    start_run("mbpo", run, **{**settings, "steps": 36}).train()
    resumed = resume_run(run, steps=60)
    resumed.train()
    for measured in (True, False):
        assert rows_of(resumed, measured) == rows_of(whole, measured)
    assert films_of(resumed.run) == films_of(whole.run)


def test_what_nothing_draws_is_said_once_and_measured_all_the_same(tmp_path) -> None:
    settings = {**MBPO, "env": make_reacher, "film_interval": 12, "logger": "csv"}
    trainer = start_run("mbpo", tmp_path / "run", **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    said = [str(w.message) for w in caught if "not filmed" in str(w.message)]
    assert len(said) == 1 and "watch(trainer, render=f)" in said[0]
    assert len(rows_of(trainer, True)) >= 3
    assert not films_of(trainer.run)


def test_an_env_of_ones_own_is_drawn_by_a_function(tmp_path) -> None:
    seen = []

    def draw(observation):
        seen.append(observation)
        frame = np.zeros((8, 19), np.uint8)
        frame[:, int(np.clip(observation["place"][0] + 9, 0, 18))] = 255
        return frame

    settings = {**MBPO, "env": make_reacher, "film_interval": 25, "logger": "csv"}
    trainer = start_run("mbpo", tmp_path / "run", **{**settings, "steps": 50})
    watch(trainer, render=draw)  # in place of the run's own
    trainer.train()
    assert len(films_of(trainer.run)) == trainer.collected_frames // 25
    assert len(rows_of(trainer, True)) == trainer.collected_frames // 25
    assert all(set(one) == {"place", "speed"} for one in seen)


def test_a_run_without_a_model_is_filmed_alone(tmp_path) -> None:
    settings = {**MBPO, "real_share": 1.0, "film_interval": 30, "logger": "csv"}
    trainer = start_run("mbpo", tmp_path / "run", **settings)
    trainer.train()
    assert films_of(trainer.run) == ["policy-000000030.gif", "policy-000000060.gif"]
    assert not films_of(trainer.run, "dream")
    assert not rows_of(trainer, True)


def test_loggers_that_lack_something_for_films_are_left_out(tmp_path) -> None:
    settings = {**PETS, "logger": "tensorboard", "film_interval": 12}
    trainer = start_run("pets", tmp_path / "run", **settings)

    class Filmless(MetricsTable):
        def log_video(self, *args, **kwargs):
            raise ImportError("pip install what-films-need")

    (tmp_path / "other").mkdir()
    loggers = trainer.run.loggers
    loggers.insert(0, Filmless(tmp_path / "other"))
    with pytest.warns(UserWarning) as caught:
        trainer.train()
    said = [str(w.message) for w in caught if "gets no films" in str(w.message)]
    assert said == ["Filmless gets no films: pip install what-films-need"]
    films = films_of(trainer.run)
    assert len(films) >= 3
    # TensorBoard has them as images.
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    (board,) = (logger for logger in loggers if isinstance(logger, TensorBoard))
    board.experiment.flush()
    events = accumulator.EventAccumulator(board.log_dir).Reload()
    images = events.Images("policy")
    assert [f"policy-{image.step:09d}.gif" for image in images] == films
    whole = (trainer.run.path / "films" / films[-1]).read_bytes()
    assert images[-1].encoded_image_string == whole
    assert [s.step for s in events.Scalars(ERRORS[0])] == [
        row["step"] for row in rows_of(trainer, True)
    ]
