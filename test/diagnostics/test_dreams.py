"""What models of images dream: films and errors of known models, in any form of image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _built import DotEnv, image, ObservingEnv
from _env_kinds import Dot
from _models import OBS, rssm_model, SpecEnv, transitions
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod
from torch import nn
from torchrl.data import Unbounded
from torchrl.envs import GymWrapper

from torchrl_wm import WorldModel, WorldModelEnv
from torchrl_wm.diagnostics import (
    observation_renderer,
    open_loop_error,
    open_loop_video,
    prediction_fan,
    render_comparison,
    write_report,
)
from torchrl_wm.models import make_rssm_world_model
from torchrl_wm.modules.keys import join

PLAIN = {"captions": False}
FIRST, SLOPE = (
    20,
    6,
)  # of 255: how bright a recorded episode begins, and what is added a step


class Paint(nn.Module):
    """An image that is as bright as a latent says, ``[*B, 1]``."""

    in_env_units = True

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, shade):
        ones = [1] * len(self.shape)
        return shade.reshape(*shade.shape[:-1], *ones).expand(
            *shade.shape[:-1], *self.shape
        )


def made(key, spec, *, recurrent: bool = True, belief: str = "speed") -> WorldModelEnv:
    """A model of brightness that needs two frames to know how fast it changes.

    One that is not recurrent believes that nothing changes.
    """
    dims = tuple(range(-len(spec.shape), 0))

    def mean(seen):
        return seen.float().mean(dims).unsqueeze(-1)

    next_latents = [("next", "shade"), ("next", belief)]
    if recurrent:

        def correct(shade, speed, seen):
            return seen, speed + seen - shade

        encoder = Mod(mean, [key], ["seen"])
        dynamics = Mod(
            lambda shade, speed, action: (shade + speed, speed + 0),
            ["shade", belief, "action"],
            next_latents,
        )
        parts = {
            "posterior": Mod(correct, [*next_latents, ("next", "seen")], next_latents),
            "initial_state": TensorDict(
                {"shade": torch.zeros(1), belief: torch.zeros(1)}
            ),
        }
    else:
        encoder = Mod(mean, [key], ["shade"])
        dynamics = Mod(lambda s, a: s + 0, ["shade", "action"], [("next", "shade")])
        parts = {}
    reward = Mod(lambda shade: shade + 0, [("next", "shade")], [("next", "reward")])
    decoder = Mod(Paint(tuple(spec.shape)), ["shade"], [key])
    model = WorldModel(encoder, dynamics, reward, decoder=decoder, **parts)
    return WorldModelEnv(model, ObservingEnv({key: spec}), decode=True)


def brightening(key, spec, length: int, first: float = FIRST) -> TensorDict:
    """An episode that becomes brighter by the same amount with each step."""
    white = float(spec.space.high.max())
    ones = [1] * len(spec.shape)
    shade = (first + SLOPE * torch.arange(length + 1.0)) * white / 255
    seen = shade.reshape(-1, *ones).expand(-1, *spec.shape).to(spec.dtype)
    done = torch.zeros(length, 1, dtype=torch.bool)
    out = TensorDict({"action": torch.zeros(length, 2)}, batch_size=[length])
    out.set(key, seen[:-1])
    out.set(join("next", key), seen[1:])
    return out.set(("next", "reward"), torch.zeros(length, 1)).set(
        ("next", "done"), done
    )


def tiles(film: np.ndarray, height: int, width: int, windows: int) -> np.ndarray:
    """The brightness of each tile's first pixel, ``[3, windows, T]`` for real, model, error."""
    assert film.shape[1:] == (3 * (height + 4), windows * (width + 8) - 4, 3)
    rows, columns = (
        [2 + number * size for number in range(count)]
        for count, size in ((3, height + 4), (windows, width + 8))
    )
    return film[:, rows][:, :, columns, 0].transpose(1, 2, 0).astype(int)


FORMS = [
    ("pixels", image(8, 10, 3)),
    (("camera", "view"), image(1, 9, 8, floats=True)),
    ("rgba", image(8, 8, 4)),
    (("arm", "grey"), image(8, 9)),
    ("image", image(3, 4, 6)),
]


@pytest.mark.parametrize("key, spec", FORMS, ids=[str(key) for key, _ in FORMS])
def test_frames_are_seen_and_then_imagined(key, spec) -> None:
    env = made(key, spec)
    data = torch.stack([brightening(key, spec, 13, first) for first in (20, 60)])
    sides = [n for n in spec.shape if n > 4 or spec.shape == (3, 4, 6)][-2:]
    film = open_loop_video(env, data, 9, height=sides[0], **PLAIN)
    assert film.dtype == np.uint8 and len(film) == 5 + 9
    real, model, error = tiles(film, *sides, 2)
    steps = SLOPE * np.arange(14)
    assert np.abs(real - [20 + steps, 60 + steps]).max() <= 1
    assert np.abs(model - real).max() <= 1 and error.max() <= 1
    edge = film[:, 0, 0]
    assert (edge[:5] == edge[0]).all() and (edge[5:] == edge[5]).all()
    assert edge[0].argmax() == 1 and edge[5].argmax() == 0  # green, red


def test_the_context_is_what_the_filter_gives() -> None:
    """After one frame the speed is wrong: that of a change from black."""
    key, spec = FORMS[0]
    env, data = made(key, spec), brightening(key, spec, 12)
    film = open_loop_video(env, data[:6], 6, context=1, height=8, **PLAIN)
    real, model, error = tiles(film, 8, 10, 1)
    assert model[0].tolist() == [FIRST * k for k in range(1, 8)]
    assert error[0].tolist() == np.abs(real - model)[0].tolist()
    # A later stretch of the episode begins with all that was filtered before.
    film = open_loop_video(env, data, 6, context=1, windows=2, height=8, **PLAIN)
    _, model, error = tiles(film, 8, 10, 2)
    assert error[0].max() > 50 and error[1].max() == 0


@pytest.mark.parametrize("key", ["pixels", ("camera", "view")])
def test_a_model_without_a_filter_encodes_the_last_frame_of_the_context(key) -> None:
    spec = image(8, 10, 3)
    env = made(key, spec, recurrent=False)
    film = open_loop_video(
        env, brightening(key, spec, 9), 5, context=5, height=8, **PLAIN
    )
    real, model, error = tiles(film, 8, 10, 1)
    assert model[0].tolist() == [*real[0, :5].tolist(), *[real[0, 4]] * 5]
    assert error[0, 5:].tolist() == [SLOPE * k for k in range(1, 6)]


def test_several_images_stand_side_by_side_and_some_are_chosen() -> None:
    specs = {("a", "left"): image(8, 8, 3), ("a", "right"): image(1, 10, 12)}
    world_model, _ = make_rssm_world_model(
        ObservingEnv({**specs, "x": Unbounded((2,))}),
        belief_size=8,
        num_cells=8,
        hidden_size=8,
        depth=1,
        pixel_depth=2,
        categoricals=2,
        classes=2,
    )
    real_env = ObservingEnv({**specs, "x": Unbounded((2,))})
    env = WorldModelEnv(world_model, real_env, decode=True)
    data = torch.stack([real_env.fake_tensordict()] * 8).clone()
    both = open_loop_video(env, data, 3, **PLAIN)
    # By default both are enlarged to 80 pixels.
    assert both.shape == (8, 3 * 84, 2 * (80 + 96 + 8) - 4, 3)
    one = open_loop_video(env, data, 3, keys=[("a", "left")], height=8, **PLAIN)
    assert one.shape == (8, 3 * 12, 2 * (8 + 8) - 4, 3)
    named = open_loop_video(env, data, 3, keys=[("a", "left")], height=32)
    assert named.shape[1] > 3 * 36 and named.shape[2] > 2 * 40 - 4
    with pytest.raises(KeyError, match=r"no image \['x'\] to show"):
        open_loop_video(env, data, 3, keys=["x"])


def test_what_cannot_be_shown() -> None:
    key, spec = FORMS[0]
    env, data = made(key, spec), brightening(key, spec, 10)
    with pytest.raises(ValueError, match="context=5 .*horizon=7.*11 steps.*has 10"):
        open_loop_video(env, data, 7)
    for name in ("context", "windows", "horizon"):
        with pytest.raises(ValueError, match=f"{name} must be a positive int"):
            open_loop_video(env, data, **{"horizon": 3, name: 0})
    plain = WorldModelEnv(env.world_model, ObservingEnv({key: spec}))
    with pytest.raises(KeyError, match="no image.*decode=True"):
        open_loop_video(plain, data, 3)
    with pytest.raises(TypeError, match="open_loop_video needs a WorldModelEnv"):
        open_loop_video(env.world_model, data, 3)


def test_a_report_measures_them(tmp_path) -> None:
    key, spec = ("camera", "view"), image(8, 8, 1)
    data = torch.stack([brightening(key, spec, 14, first) for first in (20, 60)])
    path = tmp_path / "report.html"
    report = write_report(path, made(key, spec), data, horizon=10, particles=1)
    ahead = torch.arange(5.0, 15)[:, None] * SLOPE + torch.tensor([20.0, 60.0])
    wanted = {
        "model": torch.zeros(10),
        "the last frame stays": SLOPE * torch.arange(1.0, 11) / 255,
        "the mean frame": (ahead - ahead.mean()).abs().mean(1) / 255,
    }
    for name, errors in wanted.items():
        for steps, error in (("1 step", errors[0]), ("10 steps", errors[-1])):
            number = report.numbers[f"dreams/camera.view: {name}, {steps}"]
            assert number == pytest.approx(float(error), abs=1e-6)
    stays = report.measured["dreams"].get(("persistence", *key)).flatten()
    torch.testing.assert_close(stays, wanted["the last frame stays"])
    assert "camera.view is off by 0.0%" in report.verdicts["dreams"]
    assert "less than both at 10 of them" in report.verdicts["dreams"]
    assert report.left_out["video"].startswith("the film of what the model dreams")
    text = path.read_text()
    assert "What the model dreams</h2>" in text
    assert text.count("data:image/gif;base64,") == 1


def test_a_report_on_a_small_rssm_of_pixels(tmp_path) -> None:
    real = DotEnv()
    world_model, _ = make_rssm_world_model(
        real, belief_size=8, num_cells=8, hidden_size=8, depth=1, pixel_depth=2
    )
    env = WorldModelEnv(world_model, real, decode=True)
    episodes = [real.rollout(n) for n in (12, 7)]
    path = tmp_path / "report.html"
    report = write_report(path, env, episodes, horizon=20, particles=1, real_env=real)
    assert "pixels is off by" in report.verdicts["dreams"]
    assert report.measured["dreams"].batch_size == (8,)  # of 12 steps, five frames seen
    assert path.stat().st_size < 1_000_000


def test_a_report_on_episodes_that_are_too_short(tmp_path) -> None:
    key, spec = FORMS[0]
    env, data = made(key, spec, recurrent=False), brightening(key, spec, 4)
    report = write_report(tmp_path / "report.html", env, data, particles=1)
    assert report.left_out["dreams"] == "no episode has more than 5 frames."


# Where imagination starts from -------------------------------------------------


def test_a_recurrent_models_fan_begins_after_a_context() -> None:
    key, spec = FORMS[0]
    env = made(key, spec)
    data = brightening(key, spec, 12)
    fan = prediction_fan(env, data, 6, particles=2)
    seen = data["next", "pixels"][4:10].float()
    torch.testing.assert_close(fan["real", "pixels"], seen)
    torch.testing.assert_close(fan["mean", "pixels"], seen)
    first = prediction_fan(env, data, 6, start=0, particles=2)
    assert (first["mean", "pixels"][-1] > first["real", "pixels"][-1] + 50).all()
    # A short episode leaves less of it.
    fan = prediction_fan(env, data, 11, particles=2)
    torch.testing.assert_close(
        fan["real", "pixels"], data["next", "pixels"][1:].float()
    )
    torch.testing.assert_close(fan["mean", "pixels"], fan["real", "pixels"])
    plain = made(key, spec, recurrent=False)
    fan = prediction_fan(plain, data, 6, particles=2)
    torch.testing.assert_close(
        fan["real", "pixels"], data["next", "pixels"][:6].float()
    )


@pytest.mark.parametrize("belief", ["speed", ("own", "speed")])
def test_films_go_on_from_what_was_filtered(belief) -> None:
    """Each third step the model looks again: it knows the speed from the second frame on."""
    key, spec = FORMS[0]
    env = made(key, spec, belief=belief)
    data = brightening(key, spec, 10)
    film = render_comparison(env, data, horizon=3, **PLAIN)
    assert film.shape == (11, 8, 3 * 10 + 8, 3)
    real, imagined = film[:, 0, 0, 0].astype(int), film[:, 0, 14, 0].astype(int)
    off = [FIRST * (k + 1) - real[k] for k in range(4)]  # from the first frame
    assert (imagined - real).tolist() == off + [0] * 7
    assert render_comparison(env, data, horizon=3).shape[1] > 8
    with pytest.raises(ValueError, match="horizon must be a positive int"):
        render_comparison(env, data, horizon=0)


def test_an_imagined_end_lasts_until_the_next_look() -> None:
    key, spec = FORMS[0]
    env = made(key, spec, recurrent=False)
    model = env.world_model
    head = Mod(lambda s: s >= 0, [("next", "shade")], [("next", "terminated")])
    model = WorldModel(
        model.encoder,
        model.dynamics,
        model.reward_head,
        done_head=head,
        decoder=model.decoder,
    )
    env = WorldModelEnv(model, ObservingEnv({key: spec}), decode=True)
    film = render_comparison(env, brightening(key, spec, 6), horizon=3, **PLAIN)
    seen = [FIRST + SLOPE * k for k in (0, 3)]
    grey = [int(0.6 * shade + 60) for shade in seen]
    wanted = [seen[0], seen[0], grey[0], grey[0], seen[1], grey[1], grey[1]]
    assert film[:, 0, 14, 0].tolist() == wanted


def test_latents_that_a_policy_recorded_are_not_compared() -> None:
    """A primer leaves zeros below "next"."""
    env = WorldModelEnv(rssm_model(), SpecEnv(), decode=True)
    data = transitions(2, 8)
    data["next", "belief"] = torch.zeros(2, 8, 4)
    error = open_loop_error(env, data, 3)
    assert set(error["model"].keys()) == {"observation", "reward"}
    assert error["model", "observation"].shape == (3, OBS)


def test_images_of_a_real_env_are_their_own_drawing() -> None:
    real = GymWrapper(Dot(channels_first=True))
    draw = observation_renderer(real)
    seen = real.reset(seed=0)["view"].numpy()
    frame = draw({"view": seen})
    assert frame.shape == (16, 16, 3) and (frame == seen[0][..., None]).all()
    assert (draw(seen) == frame).all()
    with pytest.raises(ValueError, match=r"images \['view'\].*has none of them"):
        draw({"speed": np.zeros(2)})
