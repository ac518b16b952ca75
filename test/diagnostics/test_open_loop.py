"""The k-step error: against known models, at episode ends, for decoded and latent models."""

from __future__ import annotations

import pytest
import torch
from _built import image, ObservingEnv, sequences
from _diagnosed import line, observed_clock, padded, walk, walk_env
from _models import clock_env, clock_model, gru_model, make_model, SpecEnv, transitions
from tensordict.nn import TensorDictModule as Mod
from torchrl.data import OneHot

from torchrl_wm import WorldModelEnv
from torchrl_wm.diagnostics import (
    one_step_prediction,
    open_loop_error,
    plot_open_loop_error,
    plot_prediction,
)
from torchrl_wm.diagnostics.recording import Recording
from torchrl_wm.models import make_mlp_world_model


@pytest.mark.parametrize("episodes", [line(20, 3.0), line(20, 3.0).expand(4, 20)])
def test_known_error(episodes) -> None:
    """The model falls behind by two a step, persistence by three."""
    error = open_loop_error(observed_clock(), episodes, horizon=5)
    k = torch.arange(1.0, 6).unsqueeze(-1)
    torch.testing.assert_close(error["model", "observation"], 2 * k)
    torch.testing.assert_close(error["persistence", "observation"], 3 * k)
    assert error.batch_size == (5,)
    torch.testing.assert_close(error["model", "reward"], 2 * k + 1)


def test_perfect_model_has_no_error_and_the_mean_does() -> None:
    error = open_loop_error(observed_clock(), line(30, 1.0), horizon=4)
    assert not error["model", "observation"].any()
    assert (error["mean", "observation"] > 5).all()


def test_windows_do_not_cross_the_end_of_an_episode() -> None:
    first, second = line(10, 1.0, ends=(9,)), line(10, 1.0)
    episodes = torch.cat([first, second])  # the observation jumps back in between
    error = open_loop_error(observed_clock(), episodes, horizon=5)
    assert not error["model", "observation"].any()


@pytest.mark.parametrize("key", ["is_init", ("agents", "is_init")])
def test_windows_do_not_cross_the_beginning_of_an_episode(key) -> None:
    """Of slices, is_init may be all that says where the next one begins."""
    episodes = torch.cat([line(10, 1.0), line(7, 1.0)])
    begins = torch.zeros(17, 1, dtype=torch.bool)
    begins[[0, 10]] = True
    episodes.set(key, begins)
    env = observed_clock()
    for given in (episodes, episodes.expand(2, 17)):
        error = open_loop_error(env, given, horizon=5)
        assert not error["model", "observation"].any()
    recording = Recording.of(env, episodes, "test")
    assert recording.done.nonzero()[:, 1].tolist() == [9]
    assert recording.longest_window() == 10
    assert len(recording.windows(5)) == 6 + 3


def test_decoded_observations_are_compared() -> None:
    decoder = Mod(lambda x: 10 * x, ["latent"], ["observation"])
    env = WorldModelEnv(clock_model(decoder=decoder), clock_env(), decode=True)
    error = open_loop_error(
        env, line(20, 1.0).select("observation", "action", "next"), 3
    )
    assert ("model", "observation") in error.keys(True)
    assert ("model", "latent") not in error.keys(True)
    assert error["model", "observation"][0] > 1


@pytest.mark.parametrize("key", ["seen", ("robot", "seen")])
@pytest.mark.parametrize("spec", [OneHot(4), image(8, 9, 3)])
def test_bits_and_bytes_are_subtracted_as_numbers(spec, key) -> None:
    real = ObservingEnv({key: spec})
    model, _ = make_mlp_world_model(real, hidden=(8,), latent_size=4, pixel_depth=2)
    env = WorldModelEnv(model, real, decode=True)
    episodes = sequences(real, 3, 6)
    episodes["next", "done"].zero_()
    error = open_loop_error(env, episodes, horizon=2)
    before, after = episodes.get(key).float(), episodes.get("next").get(key).float()
    expected = torch.stack([before[:, :-1] - after[:, i : 5 + i] for i in (0, 1)])
    torch.testing.assert_close(
        error.get("persistence").get(key), expected.pow(2).mean((1, 2)).sqrt()
    )
    start = env.reset(episodes[:, 0].select(key))
    start["action"] = episodes["action"][:, 0]
    shown = env.step(start).get("next").get(key)
    prediction = one_step_prediction(env, episodes[:, :1])
    assert torch.equal(prediction.get("loc").get(key)[:, 0], shown.float())
    assert torch.equal(prediction.get("start").get(key), before[:, 0])


def test_without_a_decoder_latents_are_compared() -> None:
    model = make_model(latent=("deep", "latent"))
    env = WorldModelEnv(model, SpecEnv())
    episodes = transitions(3, 12)
    episodes["next", "done"].zero_()
    error = open_loop_error(env, episodes, horizon=1)
    with torch.no_grad():
        predicted = model(episodes.clone())["next", "deep", "latent"]
        real = model.encoder.module(episodes["next", "observation"])
    expected = (predicted - real).pow(2).mean((0, 1)).sqrt()
    torch.testing.assert_close(error["model", "deep", "latent"][0], expected)


def test_bad_arguments() -> None:
    env = observed_clock()
    locked = WorldModelEnv(env.world_model, clock_env(), batch_size=2)
    with pytest.raises(ValueError, match=r"batch_size=\[\]"):
        open_loop_error(locked, line(10, 1.0), 3)
    for horizon in (0, 11):
        with pytest.raises(ValueError, match=f"horizon={horizon} steps fits"):
            open_loop_error(env, line(10, 1.0), horizon)
    with pytest.raises(ValueError, match="lies within one episode"):
        open_loop_error(env, line(10, 1.0, ends=(2, 5, 8)), 5)
    blind = WorldModelEnv(clock_model(), clock_env())
    with pytest.raises(ValueError, match="nothing to compare"):
        open_loop_error(blind, line(10, 1.0).exclude(("next", "observation")), 2)


def test_plots_show_the_data() -> None:
    pytest.importorskip("matplotlib")
    env = observed_clock()
    error = open_loop_error(env, line(20, 3.0), horizon=5)
    axes = plot_open_loop_error(error, "observation").axes[0]
    drawn = {curve.get_label(): list(curve.get_ydata()) for curve in axes.lines}
    assert drawn["model"] == [2, 4, 6, 8, 10]
    assert drawn["persistence"] == [3, 6, 9, 12, 15]
    real = torch.stack([line(6, 3.0), line(6, 1.0)])
    imagined = env.imagine(
        6, tensordict=real[:, 0].exclude("next"), actions=real["action"]
    )
    figure = plot_prediction(real, imagined, "observation", ["position"])
    assert len(figure.axes) == 2
    lines = figure.axes[0].lines
    assert list(lines[0].get_ydata()) == [3, 6, 9, 12, 15, 18]
    assert list(lines[1].get_ydata()) == [1, 2, 3, 4, 5, 6]
    assert figure.axes[0].get_ylabel() == "position"


def test_plot_of_what_was_not_measured() -> None:
    pytest.importorskip("matplotlib")
    error = open_loop_error(observed_clock(), line(20, 3.0), horizon=5)
    with pytest.raises(KeyError, match="'pixels' was not measured.*decode=True"):
        plot_open_loop_error(error, "pixels")


def test_episodes_without_actions() -> None:
    with pytest.raises(KeyError, match=r"lack the actions \['action'\]"):
        open_loop_error(observed_clock(), line(20, 3.0).exclude("action"), horizon=5)


@pytest.mark.parametrize("size", [(24,), (3, 24), (2, 3, 24)])
def test_any_batch_dims_and_padding(size) -> None:
    env, episodes = walk_env(), walk(*size)
    flat = episodes.reshape(-1, 24)
    expected = open_loop_error(env, flat, horizon=4)
    for given in (episodes, padded(episodes, 5)):
        error = open_loop_error(env, given, horizon=4)
        torch.testing.assert_close(error.to_dict(), expected.to_dict())


def test_the_mean_of_particles_has_less_error_than_one() -> None:
    env, episodes = walk_env(sample=True), walk(400, 6, noise=1e-3)
    one = open_loop_error(env, episodes, 5)["model", "observation"]
    many = open_loop_error(env, episodes, 5, particles=50)["model", "observation"]
    k = torch.arange(1.0, 6).unsqueeze(-1)
    torch.testing.assert_close(one, k.sqrt().expand(5, 2), rtol=0.15, atol=0.0)
    torch.testing.assert_close(many, (k / 50).sqrt().expand(5, 2), rtol=0.15, atol=0.0)


def test_recurrent_models_start_from_what_they_filter() -> None:
    env = WorldModelEnv(gru_model(), SpecEnv())
    episodes = transitions(2, 9)
    for name in ("done", "terminated", "truncated"):
        episodes["next", name].zero_()
    episodes["observation"][:, 1:] = episodes["next", "observation"][:, :-1]
    error = open_loop_error(env, episodes, horizon=3, stride=3)
    assert ("model", "belief") in error.keys(True) and len(error) == 3
    with torch.no_grad():
        filtered = env.world_model.observe(episodes)
        squared = []
        for start in (0, 3, 6):
            begin = filtered[:, start].select("latent", "belief")
            actions = episodes["action"][:, start : start + 3]
            imagined = env.imagine(3, tensordict=begin, actions=actions)
            real = filtered["next", "belief"][:, start : start + 3]
            squared.append((imagined["next", "belief"] - real).pow(2))
    expected = torch.cat(squared).mean(0).sqrt()
    torch.testing.assert_close(error["model", "belief"], expected)


def test_recorded_entries_of_another_shape() -> None:
    episodes = walk(10)
    episodes["next", "observation"] = episodes["next", "observation"][..., :1]
    with pytest.raises(ValueError, match=r"'observation' has the shape"):
        open_loop_error(walk_env(), episodes, 2)


def test_what_is_no_imagined_env() -> None:
    with pytest.raises(TypeError, match="needs a WorldModelEnv, got WorldModel"):
        open_loop_error(observed_clock().world_model, line(10, 1.0), 2)
    with pytest.raises(ValueError, match=r"\[\*B, T\]"):
        open_loop_error(observed_clock(), line(10, 1.0)[0], 2)
    with pytest.raises(ValueError, match="particles must be a positive int"):
        open_loop_error(observed_clock(), line(10, 1.0), 2, particles=0)
