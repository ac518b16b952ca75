"""What a run looks like."""

from __future__ import annotations

import pytest
import torch
from _real_envs import make_reacher, MBPO, PETS

from torchrl_wm.trainers import (
    make_real_env,
    MBPOTrainer,
    PETSTrainer,
    save_prediction_fan,
    write_run_report,
)


def test_a_report_says_what_the_model_promises(tmp_path) -> None:
    trainer = MBPOTrainer(**MBPO)
    trainer.train()
    first, again, other = (
        write_run_report(trainer, tmp_path / "report.html", episodes=1, seed=seed)
        for seed in (0, 0, 5)
    )
    name = "exploitation_gap/real return"
    assert first.numbers[name] == again.numbers[name] != other.numbers[name]
    assert trainer.episodes == len([r for r in trainer.metrics if "return" in r])


def test_a_policy_that_is_given_acts_in_the_model_and_in_the_real_env(tmp_path) -> None:
    trainer = MBPOTrainer(**MBPO)
    trainer.train()
    in_real_env = set()

    def idle(td):
        in_real_env.add("step_count" in td.keys())
        return td.set("action", torch.zeros(*td.batch_size, 1))

    few = {"episodes": 1, "policy_steps": 5, "policy_episodes": 2}
    write_run_report(trainer, tmp_path / "report.html", policy=idle, **few)
    assert in_real_env == {True, False}


@pytest.mark.parametrize(
    "kind, settings",
    [
        (MBPOTrainer, {**MBPO, "num_envs": 2, "env": make_reacher}),
        (PETSTrainer, {**PETS, "num_envs": 2}),
        (PETSTrainer, {**PETS, "env": "CartPole-v1", "termination": "cartpole"}),
    ],
    ids=["mbpo", "pets", "choices"],
)
def test_runs_of_all_kinds_have_a_report_and_a_fan(tmp_path, kind, settings) -> None:
    trainer = kind(**settings)
    trainer.train()
    state, metrics = torch.get_rng_state(), list(trainer.metrics)
    drawn = {}
    if settings["env"] is make_reacher:
        drawn = {"render": "_real_envs:draw_reacher"}
    report = write_run_report(trainer, tmp_path / "report.html", episodes=2, **drawn)
    (episode,) = trainer.evaluate(1, seed=0)
    fan = save_prediction_fan(
        trainer, tmp_path / "new" / "fan.png", episode, particles=4
    )
    assert fan.stat().st_size > 1000
    assert torch.equal(state, torch.get_rng_state()) and trainer.metrics == metrics
    returns = trainer.returns(2, seed=0)
    verdict = f"reaches {sum(returns) / 2:.4g} in 2 fresh episodes"
    assert verdict in (tmp_path / "report.html").read_text()
    # A planner of the real env cannot act in the imagined one.
    left = {"exploitation_gap"} if kind is PETSTrainer else set()
    assert set(report.left_out) == {"dreams", *left}


def test_a_run_without_a_model_has_no_report(tmp_path) -> None:
    trainer = MBPOTrainer(**{**MBPO, "real_share": 1.0, "evaluation_interval": 0})
    trainer.train()
    with pytest.raises(ValueError, match="has not learnt.*plot_learning_curve"):
        write_run_report(trainer, tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_tasks_of_dm_control_are_made_for_films_as_gymnasiums_are() -> None:
    pytest.importorskip("dm_control")
    env = make_real_env("dm_control/cartpole/balance", render_mode="rgb_array")
    assert len(env.rollout(3)) == 3
