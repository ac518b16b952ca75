"""Diagnostics of a model with a penalty: what is real has none."""

from __future__ import annotations

import pytest
import torch
from _models import SpecEnv, transitions
from tensordict import TensorDict
from torchrl.data import Composite, Unbounded

from torchrl_wm import WorldModelEnv
from torchrl_wm.diagnostics import (
    open_loop_error,
    reward_error,
    termination_metrics,
    write_report,
)
from torchrl_wm.models import make_ensemble_world_model
from torchrl_wm.modules import fit_normalizers, with_penalty

EPISODES = 40


def episodes() -> TensorDict:
    data = transitions(EPISODES)
    data["next", "observation"][:-1] = data["observation"][1:]
    for name in ("terminated", "truncated", "done"):
        data["next", name] = torch.zeros(EPISODES, 1, dtype=torch.bool)
    return data


def envs(declared: bool = False, **kwargs) -> tuple[WorldModelEnv, WorldModelEnv]:
    model, _ = make_ensemble_world_model(
        SpecEnv(), members=3, hidden=(8,), propagation="mean", **kwargs
    )
    fit_normalizers(model, episodes())
    careful = with_penalty(model, 2.0, limit=0.0, limit_reward=-50.0)
    spec = Composite(penalty=Unbounded((1,))) if declared else None
    plain = WorldModelEnv(model, SpecEnv())
    return plain, WorldModelEnv(careful, SpecEnv(), observation_spec=spec)


@pytest.mark.parametrize("declared", [False, True])
def test_rewards_and_ends_are_compared_without_it(declared) -> None:
    plain, careful = envs(declared)
    data = episodes()
    for measure in (
        lambda env: reward_error(env, data, 5),
        lambda env: open_loop_error(env, data, 5),
        lambda env: termination_metrics(env, data),
    ):
        torch.manual_seed(0)
        expected = measure(plain)
        torch.manual_seed(0)
        torch.testing.assert_close(
            measure(careful).to_dict(), expected.to_dict(), equal_nan=True
        )
    # Afterwards it pays again.
    out = careful.imagine(2, tensordict=data[:4].exclude("next"))["next"]
    assert (out["reward"] == -50).all() and out["terminated"].all()


def test_a_limit_is_no_head_of_terminations() -> None:
    _, careful = envs(termination="none")
    with pytest.raises(ValueError, match="predicts no terminations"):
        termination_metrics(careful, episodes())


def test_a_report(tmp_path) -> None:
    numbers, data = [], episodes()
    for name, env in zip("ab", envs()):
        report = write_report(tmp_path / f"{name}.html", env, data, horizon=3)
        numbers.append({k: v for k, v in report.numbers.items() if v == v})
    assert numbers[0] == pytest.approx(numbers[1])
