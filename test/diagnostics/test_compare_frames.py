"""Films: what is on which frame, where pictures come from, and the files."""

from __future__ import annotations

import os
import subprocess
import sys

import gymnasium
import numpy as np
import pytest
import torch
from _diagnosed import line, observed_clock, padded, walk, walk_env
from _models import clock_env, clock_model, SpecEnv
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod
from torchrl.data import Bounded, Composite
from torchrl.envs import Compose, DoubleToFloat, GymEnv, GymWrapper, TransformedEnv

from torchrl_wm import WorldModel, WorldModelEnv
from torchrl_wm.diagnostics import observation_renderer, render_comparison, save_video
from torchrl_wm.modules.keys import join

PLAIN = {"captions": False}


def shade(observation: np.ndarray) -> np.ndarray:
    """A small picture as grey as the clock says."""
    return np.full((4, 6, 3), int(10 * observation[0]), np.uint8)


def panels(film: np.ndarray, width: int = 6) -> list[np.ndarray]:
    """The grey of real, imagined and difference at each time, from their first pixels."""
    return [film[:, 0, number * (width + 4), 0].tolist() for number in range(3)]


def test_what_is_on_the_frames() -> None:
    """The clock falls behind by one a step."""
    film = render_comparison(observed_clock(), line(3, 2.0), render=shade, **PLAIN)
    assert film.shape == (4, 4, 3 * 6 + 2 * 4, 3) and film.dtype == np.uint8
    real, imagined, difference = panels(film)
    assert real == [0, 20, 40, 60] and imagined == [0, 10, 20, 30]
    assert difference == [0, 10, 20, 30]
    assert (film[:, :, 6:10] == 255).all()


def test_differences_do_not_wrap_around() -> None:
    film = render_comparison(observed_clock(), line(3, 0.5), render=shade, **PLAIN)
    assert panels(film)[2] == [0, 5, 10, 15]


def test_an_episode_is_shown_up_to_its_end_or_padding() -> None:
    env = observed_clock()
    film = render_comparison(env, line(9, 1.0, ends=(3,)), render=shade, **PLAIN)
    assert len(film) == 5
    assert len(render_comparison(env, padded(line(5, 1.0), 3), render=shade)) == 6
    assert len(render_comparison(env, line(9, 1.0), render=shade, max_steps=2)) == 3
    with pytest.raises(ValueError, match=r"one episode, \[T\], got \(2, 9\)"):
        render_comparison(env, line(9, 1.0).expand(2, 9), render=shade)


def test_after_an_imagined_end_the_picture_stands_still() -> None:
    model = observed_clock().world_model
    head = Mod(lambda x: x >= 2, [("next", "observation")], [("next", "terminated")])
    model = WorldModel(model.encoder, model.dynamics, model.reward_head, done_head=head)
    env = WorldModelEnv(model, clock_env())
    _, imagined, _ = panels(render_comparison(env, line(5, 1.0), render=shade, **PLAIN))
    assert imagined[:3] == [0, 10, 20] and imagined[3:] == [72, 72, 72]


def test_a_policy_acts_in_the_imagined_env() -> None:
    env, episode = walk_env(), walk(4, noise=0.0)
    episode["action"].zero_()

    def push(td: TensorDict) -> TensorDict:
        return td.set("action", torch.ones(*td.batch_size, 2))

    def draw(observation: np.ndarray) -> np.ndarray:
        return np.full((4, 6, 3), np.clip(100 + 10 * observation[0], 0, 255), np.uint8)

    own = panels(render_comparison(env, episode, policy=push, render=draw, **PLAIN))[1]
    recorded = panels(render_comparison(env, episode, render=draw, **PLAIN))[1]
    start = 100 + 10 * float(episode["observation"][0, 0])
    assert np.abs(np.array(own) - (start + 10 * np.arange(5))).max() <= 1
    assert len(set(recorded)) == 1


@pytest.mark.parametrize("key", ["pixels", ("camera", "image")])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_recorded_and_decoded_pixels(key, dtype) -> None:
    """Floats are decoded: in the range of bytes, where bytes were recorded."""
    scale = 255 if dtype is torch.uint8 else 1

    def decode(latent):
        return (
            (latent / 10 * scale)
            .unsqueeze(-1)
            .unsqueeze(-1)
            .expand(*latent.shape[:-1], 3, 4, 6)
        )

    model = clock_model(decoder=Mod(decode, ["latent"], [key]))
    reference = clock_env()
    observed = reference.observation_spec.clone()
    observed[key] = Bounded(0, scale, (3, 4, 6), dtype=dtype)
    reference.observation_spec = observed
    spec = Composite(shape=())
    spec[key] = Bounded(0.0, float(scale), (3, 4, 6))
    env = WorldModelEnv(model, reference, observation_spec=spec)
    episode = line(4, 2.0)
    for prefix in ((), ("next",)):
        time = episode.get((*prefix, "observation"))
        image = decode(time).clamp(0, scale)
        episode[join(*prefix, key)] = image.to(dtype)
    real, imagined, _ = panels(render_comparison(env, episode, **PLAIN))
    assert np.abs(np.array(real) - 25.5 * np.array([0, 2, 4, 6, 8])).max() <= 1
    assert np.abs(np.array(imagined) - 25.5 * np.arange(5)).max() <= 1
    assert render_comparison(env, episode, pixels_key=key, **PLAIN).shape == (
        5,
        4,
        26,
        3,
    )


def test_captions_and_sizes() -> None:
    plain = render_comparison(observed_clock(), line(3, 2.0), render=shade, **PLAIN)
    film = render_comparison(observed_clock(), line(3, 2.0), render=shade)
    assert film.shape[1] > plain.shape[1]
    assert (film[:, -4:] == plain).all()
    large = render_comparison(observed_clock(), line(3, 2.0), render=shade, height=40)
    strip = large.shape[1] - 40
    assert large.shape[2] == 3 * 60 + 2 * 4 and strip > 10
    words = large[:, :strip]
    assert (words < 100).any() and not (words[0] == words[1]).all()  # the step, returns


@pytest.mark.parametrize("name", ["Pendulum-v1", "CartPole-v1"])
def test_real_envs_draw_themselves(name) -> None:
    pytest.importorskip("pygame")
    env = gymnasium.make(name, render_mode="rgb_array")
    observation, _ = env.reset(seed=3)
    wrapped = TransformedEnv(GymWrapper(env), Compose(DoubleToFloat()))
    for given in (name, env, wrapped, GymEnv(name)):
        drawn = observation_renderer(given)(observation)
        assert np.abs(drawn.astype(int) - env.render()).mean() < 0.5
    before = env.unwrapped.state
    observation_renderer(env)(observation * 0 + 0.1)
    assert env.unwrapped.state is before  # an env of its own draws


DRAW = """
import gymnasium, numpy as np
for name in ("InvertedPendulum-v5", "Hopper-v5"):
    env = gymnasium.make(name, render_mode="rgb_array")
    observation, _ = env.reset(seed=0)
    first = env.render()
    print("MuJoCo draws here")
    from torchrl_wm._rendering import RealEnvRenderer
    renderer = RealEnvRenderer(name)
    drawn = renderer(observation).astype(int)
    assert np.abs(drawn - first).mean() < 3  # the floor, of a runner that is at zero
    moved = observation.copy()
    moved[1] += 0.5
    assert np.abs(renderer(moved) - drawn).mean() > 1
"""


def test_mujoco_draws_positions_that_are_observed() -> None:
    """In a process of its own: MuJoCo without a display can end it."""
    pytest.importorskip("mujoco")
    done = subprocess.run(
        [sys.executable, "-c", DRAW],
        env={"MUJOCO_GL": "egl", **os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    if "MuJoCo draws here" not in done.stdout:
        pytest.skip("nothing renders MuJoCo here")
    assert done.returncode == 0, done.stderr


def test_mujoco_without_a_display_is_an_error_and_no_abort(monkeypatch) -> None:
    pytest.importorskip("mujoco")
    for name in ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    if sys.platform == "linux":
        with pytest.raises(RuntimeError, match="MUJOCO_GL=egl"):
            observation_renderer("InvertedPendulum-v5")


def test_envs_that_nothing_draws() -> None:
    assert observation_renderer("MountainCar-v0") is None
    assert observation_renderer(SpecEnv()) is None
    assert observation_renderer(shade) is shade
    with pytest.raises(ValueError, match="Nothing draws the observations of 'Mountain"):
        render_comparison(observed_clock(), line(3, 1.0), render="MountainCar-v0")
    with pytest.raises(ValueError, match="Nothing says how to draw.*Pass render"):
        render_comparison(observed_clock(), line(3, 1.0))
    with pytest.raises(TypeError, match="render must be the id"):
        observation_renderer(3)
    episode = line(3, 1.0)
    with pytest.raises(KeyError, match="no observation 'angle' to draw"):
        render_comparison(
            observed_clock(), episode, render=shade, observation_key="angle"
        )
    episode["pixels"] = episode["next", "pixels"] = torch.zeros(3, 3, 4, 6)
    with pytest.raises(ValueError, match="The imagined episode has no .*pixels"):
        render_comparison(observed_clock(), episode)
    with pytest.raises(ValueError, match="render or pixels_key"):
        render_comparison(observed_clock(), episode, render=shade, pixels_key="pixels")


def test_several_observations_are_drawn_as_a_dictionary() -> None:
    env = SpecEnv(observation=1, extra_observations={("body", "speed"): (2,)})
    keys = ["observation", ("body", "speed")]
    model = WorldModel(
        Mod(lambda x, s: (x, s), keys, keys),
        Mod(
            lambda x, s, a: (x + 1, s),
            [*keys, "action"],
            [("next", "observation"), ("next", "body", "speed")],
        ),
        Mod(lambda x: x + 0, [("next", "observation")], [("next", "reward")]),
    )
    episode = line(3, 1.0)
    episode["action"] = torch.zeros(3, 2)
    episode["body", "speed"] = episode["next", "body", "speed"] = torch.ones(3, 2)
    seen = []

    def draw(observation):
        seen.append(sorted(observation))
        return np.zeros((4, 6, 3), np.uint8)

    render_comparison(WorldModelEnv(model, env), episode, render=draw)
    assert seen[0] == ["body.speed", "observation"]


# Files ------------------------------------------------------------------------


def colours(count: int, height: int = 8, width: int = 10) -> np.ndarray:
    film = np.zeros((count, height, width, 3), np.uint8)
    film[..., 0] = np.linspace(0, 250, count).astype(np.uint8)[:, None, None]
    return film


def test_gif(tmp_path) -> None:
    image = pytest.importorskip("PIL.Image")
    film = colours(5)
    path = save_video(tmp_path / "new" / "film.gif", film, fps=10)
    with image.open(path) as gif:
        assert gif.n_frames == 5 and gif.info["duration"] == 100 and gif.size == (10, 8)
        for number in range(5):
            gif.seek(number)
            frame = np.asarray(gif.convert("RGB")).astype(int)
            assert np.abs(frame - film[number]).max() <= 8
    assert [p.name for p in path.parent.iterdir()] == ["film.gif"]


def test_mp4_of_odd_sizes(tmp_path) -> None:
    pytest.importorskip("moviepy")
    from moviepy import VideoFileClip

    path = save_video(tmp_path / "film.mp4", colours(12, 33, 47), fps=6)
    with VideoFileClip(str(path)) as clip:
        assert clip.size == [48, 34] and clip.fps == 6
        assert clip.duration == pytest.approx(2, abs=0.2)
        red = [int(clip.get_frame(t)[10, 10, 0]) for t in (0.0, 1.9)]
    assert red[0] < 30 and red[1] > 200


def test_what_cannot_be_written(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"one of \['.gif', '.mp4'\]"):
        save_video(tmp_path / "film.avi", colours(2))
    with pytest.raises(ValueError, match=r"\[T, height, width, 3\] uint8"):
        save_video(tmp_path / "film.gif", colours(2).astype(np.float32))
    with pytest.raises(ValueError, match="nothing to write"):
        save_video(tmp_path / "film.gif", colours(0))
    with pytest.raises(ValueError, match="fps"):
        save_video(tmp_path / "film.gif", colours(2), fps=0)
    assert not list(tmp_path.iterdir())


def test_without_the_libraries(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=r"torchrl-wm\[plot\]"):
        save_video(tmp_path / "film.gif", colours(2))
    monkeypatch.setitem(sys.modules, "moviepy.video.io.ImageSequenceClip", None)
    with pytest.raises(ImportError, match=r"torchrl-wm\[render\]"):
        save_video(tmp_path / "film.mp4", colours(2))
    film = render_comparison(observed_clock(), line(3, 2.0), render=shade, **PLAIN)
    assert len(film) == 4
