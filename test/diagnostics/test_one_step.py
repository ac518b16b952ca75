"""One-step predictions, their calibration, and what the members disagree about."""

from __future__ import annotations

import pytest
import torch
from _diagnosed import padded, walk, walk_env
from _models import clock_env, clock_model, make_model, rssm_model, SpecEnv, transitions
from hypothesis import given, settings, strategies as st
from tensordict.nn import TensorDictModule as Mod
from torchrl.envs import GymEnv
from torchrl.modules import MLP

from torchrl_wm import WorldModel, WorldModelEnv
from torchrl_wm.diagnostics import calibration_curve, disagreement, one_step_prediction
from torchrl_wm.diagnostics.statistics import correlation, rank_correlation
from torchrl_wm.models import make_ensemble_world_model
from torchrl_wm.modules import fit_normalizers, GaussianHead


@pytest.mark.parametrize("key", ["observation", ("agents", "position")])
def test_members(key) -> None:
    episodes = walk(4, 5, key=key)
    prediction = one_step_prediction(walk_env((0.5, -1.0, 2.0), 0.3, key=key), episodes)
    rows = episodes.reshape(-1)
    expected = (rows.get(key) + rows["action"]).unsqueeze(1)
    expected = expected + torch.tensor([0.5, -1.0, 2.0]).view(1, 3, 1)
    assert prediction.batch_size == (20,)
    torch.testing.assert_close(prediction.get("loc").get(key), expected)
    torch.testing.assert_close(
        prediction.get("scale").get(key), torch.full((20, 3, 2), 0.3)
    )
    assert prediction.get("start").get(key).equal(rows.get(key))
    assert prediction.get("real").get(key).equal(rows.get("next").get(key))


def test_an_ensemble_that_predicts_rewards_and_several_observations() -> None:
    env = SpecEnv(extra_observations={("body", "speed"): (3,)})
    model, _ = make_ensemble_world_model(env, members=4, hidden=(8,), normalize=False)
    rows = torch.stack([env.fake_tensordict() for _ in range(6)])
    rows = rows.apply(lambda x: torch.randn_like(x) if x.is_floating_point() else x)
    prediction = one_step_prediction(WorldModelEnv(model, env), rows)
    shapes = {
        "observation": (6, 4, 6),
        ("body", "speed"): (6, 4, 3),
        "reward": (6, 4, 1),
    }
    for key, shape in shapes.items():
        assert prediction.get("loc").get(key).shape == shape
        assert prediction.get("scale").get(key).shape == shape
    assert "reward" not in prediction["start"].keys()
    step = model.step(model.encode(rows.exclude("next")))
    joined = [prediction.get("loc").get(k) for k in model.dynamics.targets]
    torch.testing.assert_close(torch.cat(joined, -1), step["next", "loc"])


def test_without_gaussians_what_is_decoded_is_compared() -> None:
    decoder = Mod(lambda x: 10 * x, ["latent"], ["observation"])
    env = WorldModelEnv(clock_model(decoder=decoder), clock_env(), decode=True)
    episodes = walk(8, dim=1)
    prediction = one_step_prediction(env, episodes)
    torch.testing.assert_close(
        prediction["loc", "observation"][:, 0], 10 * (episodes["observation"] + 1)
    )
    assert "scale" not in prediction.keys()
    assert prediction["start", "observation"].equal(episodes["observation"])
    with pytest.raises(ValueError, match="calibration_curve needs predicted Gaussians"):
        calibration_curve(env, episodes)
    with pytest.raises(ValueError, match="disagreement needs the members"):
        disagreement(env, episodes)


def test_recurrent_models() -> None:
    env = WorldModelEnv(rssm_model(), SpecEnv(), decode=True)
    prediction = one_step_prediction(env, transitions(2, 5))
    assert sorted(prediction["loc"].keys()) == ["observation", "reward"]
    assert prediction["loc", "observation"].isfinite().all()


def test_the_gaussian_of_a_reward_head() -> None:
    model = make_model()
    head = GaussianHead(
        MLP(4, 2, num_cells=[8]), [("next", "latent")], ("next", "reward")
    )
    model = WorldModel(model.encoder, model.dynamics, head)
    env, episodes = WorldModelEnv(model, SpecEnv()), transitions(9)
    names = {
        "targets": ["reward"],
        "loc": ("next", "reward_loc"),
        "log_var": ("next", "reward_log_var"),
    }
    prediction = one_step_prediction(env, episodes, **names)
    assert prediction["scale", "reward"].shape == (9, 1, 1)
    assert calibration_curve(env, episodes, **names)["members", "reward"].shape[1] == 1
    with pytest.raises(ValueError, match="have 1 dims, and the targets .* have 4"):
        one_step_prediction(env, episodes, **{**names, "targets": ["latent"]})


def test_what_was_not_recorded() -> None:
    env = walk_env()
    with pytest.raises(KeyError, match=r"lack the actions \['action'\]"):
        one_step_prediction(env, walk(9).exclude("action"))
    with pytest.raises(KeyError, match="encodings of .*next.*observation.*lack"):
        one_step_prediction(env, walk(9).exclude(("next", "observation")))
    with pytest.raises(KeyError, match=r"lack \('next', 'goal'\)"):
        one_step_prediction(env, walk(9), targets=["goal"])


# Calibration ---------------------------------------------------------------


def test_the_right_variance_is_calibrated() -> None:
    coverage = calibration_curve(walk_env(), walk(8, 2000))
    level = coverage["level"].expand(-1, 2)
    torch.testing.assert_close(
        coverage["mixture", "observation"], level, atol=0.02, rtol=0
    )
    torch.testing.assert_close(
        coverage["members", "observation"][:, 0], level, atol=0.02, rtol=0
    )


@pytest.mark.parametrize("scale, sign", [(0.5, -1), (2.0, 1)])
def test_wrong_variances(scale, sign) -> None:
    """Half the spread covers 0.9 as often as the normal covers 1.645 / 2 sigmas."""
    coverage = calibration_curve(walk_env(scale=scale), walk(8, 2000), levels=[0.9])
    inside = torch.special.ndtr(torch.tensor(1.6449 * scale)) * 2 - 1
    got = coverage["mixture", "observation"]
    torch.testing.assert_close(got, inside.expand(1, 2), atol=0.02, rtol=0)
    assert (sign * (got - 0.9) > 0).all()


def test_the_mixture_of_members_that_are_off_is_wider_than_each() -> None:
    coverage = calibration_curve(walk_env((-3.0, 3.0)), walk(8, 500, noise=0.1))
    assert (coverage["members", "observation"][10] < 0.05).all()
    half = (coverage["level"] > 0.2).squeeze(-1)
    assert (coverage["mixture", "observation"][half] > 0.5).all()


def test_only_elites_are_mixed() -> None:
    real_env = GymEnv("Pendulum-v1")
    model, _ = make_ensemble_world_model(real_env, members=4, elites=1, hidden=(8,))
    data = real_env.rollout(40)
    fit_normalizers(model, data)
    env = WorldModelEnv(model, real_env)
    model.dynamics.elites.fill_(2)
    coverage = calibration_curve(env, data)
    for key in ("observation", "reward"):
        chosen = coverage["members", key][:, 2]
        torch.testing.assert_close(coverage["mixture", key], chosen)


@pytest.mark.parametrize("levels", [(), (0.5, 1.0), (0.0,)])
def test_levels_that_are_none(levels) -> None:
    with pytest.raises(ValueError, match="levels must lie between 0 and 1"):
        calibration_curve(walk_env(), walk(9), levels=levels)


# Disagreement ----------------------------------------------------------------


def test_disagreement_in_units_of_the_changes() -> None:
    episodes = walk(3, 40)
    out = disagreement(walk_env((-1.0, 1.0)), episodes)
    change = episodes["next", "observation"] - episodes["observation"]
    unit = change.reshape(-1, 2).std(0, unbiased=False)
    expected = (1 / unit).pow(2).mean().sqrt()
    torch.testing.assert_close(
        out["disagreement"], expected.expand(3, 40, 1), rtol=1e-4, atol=0
    )
    error = (change - episodes["action"]) / unit  # the members' mean is the action
    expected = error.pow(2).mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(out["error"], expected, rtol=1e-4, atol=1e-5)


def test_disagreement_that_follows_the_error_has_rank_correlation_one() -> None:
    env = walk_env((-1.0, 1.0), dim=1)

    def step(position, action):  # the members are apart, and their mean is off, by x
        means = (position + action).unsqueeze(-2) + position.abs().unsqueeze(
            -2
        ) * torch.tensor([[0.5], [1.5]])
        return means.mean(-2), means, torch.zeros_like(means)

    env.world_model.dynamics.module = step
    episodes = walk(200, dim=1, noise=0.0)
    assert disagreement(env, episodes)["rank_correlation"] > 0.99


def test_padding_is_left_out_everywhere() -> None:
    env, episodes = walk_env((-1.0, 1.0, 0.5)), walk(2, 12)
    more = padded(episodes, 4)
    alone, masked = one_step_prediction(env, episodes), one_step_prediction(env, more)
    torch.testing.assert_close(masked.to_dict(), alone.to_dict())
    torch.testing.assert_close(
        calibration_curve(env, more).to_dict(),
        calibration_curve(env, episodes).to_dict(),
    )
    one, two = disagreement(env, episodes), disagreement(env, more)
    torch.testing.assert_close(two["error"][:, :12], one["error"])
    assert not two["error"][:, 12:].any() and not two["collector", "mask"][:, 12:].any()
    assert two["rank_correlation"] == one["rank_correlation"] or (
        two["rank_correlation"].isnan() and one["rank_correlation"].isnan()
    )
    with pytest.raises(ValueError, match="calls every step invalid"):
        one_step_prediction(env, more[:, 12:])


def test_constant_data_has_no_unit() -> None:
    episodes = walk(6)
    episodes["next", "observation"] = episodes["observation"]
    with pytest.raises(ValueError, match="no unit to measure disagreement"):
        disagreement(walk_env((0.0, 1.0)), episodes)


# Statistics -------------------------------------------------------------------


@given(st.lists(st.integers(-5, 5), min_size=3, max_size=12), st.integers(1, 5))
@settings(max_examples=30)
def test_ranks_do_not_see_monotone_changes(values, factor) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    y = torch.arange(len(values)).double()
    one, two = rank_correlation(x, y), rank_correlation((factor * x).exp(), y)
    torch.testing.assert_close(one, two, equal_nan=True)
    assert one.isnan() == (x.std() == 0)


def test_ties_share_their_rank() -> None:
    got = rank_correlation(torch.tensor([1.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 3.0]))
    ranks = torch.tensor([1.5, 1.5, 3.0]), torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(got, correlation(*ranks))
    assert got == pytest.approx(0.866, abs=1e-3)
