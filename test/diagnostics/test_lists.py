"""Episodes of different lengths, given as a list."""

from __future__ import annotations

import math

import pytest
import torch
from _diagnosed import padded, walk, walk_env
from tensordict.nn import TensorDictModule as Mod

from torchrl_wm.diagnostics import (
    calibration_curve,
    disagreement,
    exploitation_gap,
    one_step_prediction,
    open_loop_error,
    prediction_fan,
    render_comparison,
    reward_error,
    termination_metrics,
    write_report,
)

KEY = ("body", "place")
LENGTHS = (30, 12, 21)


@pytest.fixture(scope="module")
def episodes() -> list:
    torch.manual_seed(0)
    out = [walk(length, key=KEY) for length in LENGTHS]
    for name in ("terminated", "done"):
        out[1]["next", name][-1] = True
    return out


@pytest.fixture(scope="module")
def env():
    def ends(place):
        return (place.sum(-1, True) - 1) * 1e3

    head = Mod(ends, [("next", *KEY)], [("next", "terminated_logits")])
    return walk_env((-0.5, 0.2, 0.6), scale=1.3, key=KEY, done_head=head)


def rows_of(episodes) -> torch.Tensor:
    return torch.cat([padded(e, 30 - len(e))[None] for e in episodes])


MEASURES = {
    "open_loop": lambda env, given: open_loop_error(env, given, 5),
    "rewards": lambda env, given: reward_error(env, given, 4, stride=2),
    "one_step": one_step_prediction,
    "calibration": calibration_curve,
    "terminations": termination_metrics,
    "disagreement": disagreement,
    "fan": lambda env, given: prediction_fan(env, given, 12, particles=4),
}


@pytest.mark.parametrize("name", MEASURES)
def test_a_list_is_measured_as_its_rows(name, env, episodes) -> None:
    measure = MEASURES[name]
    found, wanted = measure(env, episodes), measure(env, rows_of(episodes))
    assert found.batch_size == wanted.batch_size
    for key in wanted.keys(True, True):
        assert found[key].shape == wanted[key].shape
        torch.testing.assert_close(found[key], wanted[key], equal_nan=True)
    if name == "one_step":
        real = torch.cat([e.get(("next", *KEY)) for e in episodes])
        assert torch.equal(found.get(("real", *KEY)), real)
    if name == "disagreement":
        lengths = found["collector", "mask"].sum(-1)
        assert lengths.tolist() == list(LENGTHS)


def test_batches_of_rows_may_be_in_the_list(env) -> None:
    torch.manual_seed(1)
    rows = walk(2, 3, 9, key=KEY)
    parts = [rows.reshape(6, 9)[:5], rows.reshape(6, 9)[5]]
    for given in (parts, tuple(parts)):
        found = open_loop_error(env, given, 3)
        wanted = open_loop_error(env, rows, 3)
        torch.testing.assert_close(
            found.get(("model", *KEY)), wanted.get(("model", *KEY))
        )


def test_a_policys_real_episodes_may_be_a_list(env, episodes) -> None:
    policy = Mod(lambda place: torch.zeros_like(place), [KEY], ["action"])
    gap = exploitation_gap(env, policy, episodes, 40)
    assert gap["real_length"].flatten().tolist() == list(LENGTHS)
    sums = torch.stack([e["next", "reward"].sum() for e in episodes])
    torch.testing.assert_close(gap["real_return"].flatten(), sums)


def test_a_report_of_a_list(env, episodes, tmp_path) -> None:
    settings = {"horizon": 25, "particles": 2}
    report = write_report(tmp_path / "a.html", env, episodes, **settings)
    rows = write_report(tmp_path / "b.html", env, rows_of(episodes), **settings)
    assert report.verdicts == rows.verdicts and "fan" in report.verdicts
    assert not [n for n, v in report.numbers.items() if "RMSE" in n and math.isnan(v)]
    facts = (tmp_path / "a.html").read_text()
    assert f"{sum(LENGTHS)}" in facts


@pytest.mark.parametrize("measure", MEASURES.values())
@pytest.mark.parametrize(
    "given, error, message",
    [
        ([], ValueError, "the list is empty"),
        ([{"observations": [1.0]}], TypeError, "list with dict.*load_transitions"),
        (3, TypeError, "tensordict .* or a list of tensordicts.* got int"),
    ],
)
def test_what_is_no_list_of_episodes(measure, given, error, message, env) -> None:
    with pytest.raises(error, match=message):
        measure(env, given)


def test_a_gap_to_no_episodes_is_refused(env) -> None:
    with pytest.raises(ValueError, match="the list is empty"):
        exploitation_gap(env, None, [], 5)


def test_episodes_that_do_not_fit_together_are_named(env, episodes) -> None:
    less = episodes[1].exclude(("next", "reward"))
    with pytest.raises(KeyError, match=r"episode 2 do not share.*'reward'"):
        open_loop_error(env, [*episodes[:2], less], 3)
    other = walk(8, dim=3, key=KEY)
    with pytest.raises(ValueError, match=r"shape \(2,\) per step.*\(3,\) in episode 1"):
        one_step_prediction(env, [episodes[0], other])
    with pytest.raises(ValueError, match=r"episode 1.*at least one step.*\(0,\)"):
        reward_error(env, [episodes[0], episodes[1][:0]], 3)
    with pytest.raises(TypeError, match=r"one episode.*episodes\[0\]"):
        render_comparison(env, episodes)
