"""What a run looks like."""

from __future__ import annotations

import pytest
from _real_envs import MBPO

from torchrl_wm.trainers import make_real_env, MBPOTrainer, write_run_report


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


def test_a_run_without_a_model_has_no_report(tmp_path) -> None:
    trainer = MBPOTrainer(**{**MBPO, "real_share": 1.0, "evaluation_interval": 0})
    trainer.train()
    with pytest.raises(ValueError, match="real_share=1.*plot_learning_curve"):
        write_run_report(trainer, tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_tasks_of_dm_control_are_made_for_films_as_gymnasiums_are() -> None:
    pytest.importorskip("dm_control")
    env = make_real_env("dm_control/cartpole/balance", render_mode="rgb_array")
    assert len(env.rollout(3)) == 3
