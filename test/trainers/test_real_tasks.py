"""A short run of each recipe on tasks of MuJoCo and dm_control: what users run."""

from __future__ import annotations

import math

import pytest
from _real_envs import MBPO, PETS

from torchrl_wm.trainers import MBPOTrainer, PETSTrainer, run_episodes

TASKS = ("InvertedPendulum-v5", "dm_control/cartpole/swingup")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "kind, settings", [(PETSTrainer, PETS), (MBPOTrainer, MBPO)], ids=["pets", "mbpo"]
)
def test_a_short_run(task, kind, settings) -> None:
    pytest.importorskip("dm_control" if task.startswith("dm") else "mujoco")
    settings = {**settings, "env": task, "max_episode_steps": 12, "num_envs": 2}
    trainer = kind(**settings)
    trainer.train()
    returns = [row["return"] for row in trainer.metrics if "return" in row]
    assert len(returns) >= 4 and all(map(math.isfinite, returns))
    assert trainer.has_learnt
    rows = trainer.data[:]
    assert all(rows[key].isfinite().all() for key in trainer.world_model.latent_keys)


def test_actions_are_repeated_in_dm_control() -> None:
    pytest.importorskip("dm_control")
    settings = {**PETS, "env": TASKS[1], "max_episode_steps": 5, "action_repeat": 4}
    trainer = PETSTrainer(**settings)
    (episode,) = trainer.evaluate(1)
    plain = PETSTrainer(**{**settings, "action_repeat": 1, "max_episode_steps": 20})

    def held(tensordict):
        step = int(tensordict["step_count"]) // 4
        return tensordict.set("action", episode["action"][step])

    (steps,) = run_episodes(plain.make_env(), held, 1, first_episode=1_000_000)
    rewards = steps["next", "reward"].reshape(5, 4).double().sum(1)
    assert episode["next", "reward"][:, 0].tolist() == pytest.approx(
        rewards.tolist(), rel=1e-5
    )
    keys = trainer.world_model.latent_keys
    for key in keys:
        assert (steps["next", key][3::4] == episode["next", key]).all()
