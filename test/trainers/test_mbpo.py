"""MBPOTrainer: what a run does and refuses."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from _real_envs import make_nested, make_reacher, MBPO as SMALL, Reacher1D, Unbounded

from torchrl_wm.trainers import MBPOConfig, MBPOTrainer, Steps


def trained(**settings) -> MBPOTrainer:
    trainer = MBPOTrainer(**{**SMALL, **settings})
    trainer.train()
    return trainer


def last_step(trainer: MBPOTrainer) -> Steps:
    """What the recipe was given last."""
    one = torch.ones(1, dtype=torch.bool)
    return Steps(trainer.data[-1:], trainer.collected_frames, one, one.long(), ~one)


def test_a_run() -> None:
    trainer = trained(termination="none")
    episodes = [row for row in trainer.metrics if "return" in row]
    assert [row["step"] for row in episodes] == [15, 30, 45, 60]
    evaluations = [row for row in trainer.metrics if "evaluation_return" in row]
    assert [row["step"] for row in evaluations] == [30, 60]
    assert len(trainer.data) == 60
    assert trainer.imagine.imagined_frames == 5 * 20  # at 20, 30, 40, 50 and 60
    assert len(trainer.imagined) == 2 * 20  # the last two rounds
    assert {"loss_nll", "loss_actor", "loss_qvalue"} <= set(episodes[-1])


def test_the_return_is_the_envs_own() -> None:
    trainer = trained()
    rewards = trainer.data[:]["next", "reward"].reshape(4, 15)
    returns = [row["return"] for row in trainer.metrics if "return" in row]
    torch.testing.assert_close(rewards.sum(1), torch.tensor(returns))


def test_horizons_follow_their_schedule() -> None:
    config = MBPOConfig(horizon_schedule=(20, 60, 1, 5))
    assert [config.horizon(step) for step in (0, 20, 40, 60, 99)] == [1, 1, 3, 5, 5]
    trainer = trained(horizon_schedule=(20, 60, 1, 3), termination="none")
    lengths = [trainer.config.horizon(step) for step in (20, 30, 40, 50, 60)]
    assert trainer.imagine.imagined_frames == 20 * sum(lengths) == 20 * 10


def test_nested_keys() -> None:
    trainer = trained(env=make_nested, termination="none")
    rewards = trainer.data[:]["next", "agent", "reward"].reshape(-1, 15).sum(1)
    returns = [row["return"] for row in trainer.metrics if "return" in row]
    torch.testing.assert_close(rewards, torch.tensor(returns))


def test_a_run_that_stops_with_an_episode_records_it() -> None:
    trainer = trained(evaluation_interval=15, stop_return=-1e9)
    assert [row["step"] for row in trainer.metrics] == [15, 15]
    assert "return" in trainer.metrics[1] and trainer.episodes == 1


def test_only_the_newest_rounds_are_learned_from() -> None:
    trainer = trained(
        horizon_schedule=(20, 60, 3, 1), real_share=0.25, termination="none"
    )
    known = trainer.imagined[:]["next", "observation"]
    assert len(known) > 40  # two rounds of 20 rollouts, each of one step by now
    batches = list(trainer.recipe.batches(last_step(trainer)))
    assert len(batches) == 2
    # After the real ones.
    drawn = torch.cat([batch["next", "observation"][4:] for batch in batches])
    at = (drawn.unsqueeze(1) == known).all(-1).int().argmax(1)
    cursor = trainer.imagined.write_count % 120
    assert ((cursor - 1 - at) % 120 < 40).all()


def test_batches_mix_real_and_imagined_transitions() -> None:
    trainer = trained(real_share=0.25)
    batch = next(trainer.recipe.batches(last_step(trainer)))
    assert batch.batch_size == (16,)
    real = trainer.data[:]["observation"]
    is_next_real = torch.tensor(
        [
            bool((real == row).all(-1).any())
            and any(
                torch.equal(after, following)
                for after, following in zip(
                    trainer.data[:]["next", "observation"][(real == row).all(-1)],
                    row_next.expand(99, 3),
                )
            )
            for row, row_next in zip(batch["observation"], batch["next", "observation"])
        ]
    )
    assert is_next_real.sum() == 4


def test_without_imagination_it_is_sac() -> None:
    trainer = trained(real_share=1.0)
    assert not len(trainer.imagined) and not trainer.learner.steps
    assert all("loss_nll" not in row for row in trainer.metrics)


def test_targets_follow_after_each_update() -> None:
    trainer = MBPOTrainer(
        **{**SMALL, "steps": 20, "tau": 0.5, "learning_rate": 1e-30, "real_share": 1.0}
    )
    sac = trainer.sac
    values, targets = sac.qvalue_network_params, sac.target_qvalue_network_params
    targets.data.apply_(lambda target: target.add_(1.0))
    trainer.train()  # of its 30 steps, 20 random ones, those from the 20th on update twice
    updates = 2 * (30 - 20 + 1)
    for value, target in zip(
        values.data.values(True, True), targets.data.values(True, True)
    ):
        expected = value + 0.5**updates
        torch.testing.assert_close(target, expected, rtol=0, atol=1e-6)
    assert updates == trainer.counts.updates


def test_policies_stay_within_the_bounds() -> None:
    trainer = trained()
    actions = trainer.data[:]["action"]
    assert actions.abs().max() <= 2 and actions.abs().max() > 1


def test_dictionaries_of_observations_and_terminations() -> None:
    trainer = trained(env=make_reacher, max_episode_steps=30)
    assert {"place", "speed"} <= set(trainer.data[:].keys())
    assert np.isfinite(trainer.metrics[-1]["return"])


def test_the_seed_decides_everything() -> None:
    first, second, other = trained(), trained(), trained(seed=1)
    assert (first.data[:] == second.data[:]).all()
    assert not (first.data[:] == other.data[:]).all()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"env": "CartPole-v1"}, "(?s)continuous, bounded actions.*PETSTrainer"),
        ({"env": Unbounded}, "no finite bounds|continuous, bounded"),
        ({"real_share": 0.0}, "real_share"),
        ({"horizon_schedule": (0, 1, 0, 1)}, "horizon_schedule"),
    ],
)
def test_bad_settings(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        MBPOTrainer(**{**SMALL, **settings})


@pytest.mark.parametrize("make", [lambda: gymnasium.make("Pendulum-v1"), make_reacher])
def test_evaluations_leave_the_env_that_was_given_alone(make) -> None:
    trainer = trained(env=make(), evaluation_interval=7, real_share=1.0)
    rows = trainer.data[:]
    keys = trainer.world_model.encoder.in_keys
    for key in keys:
        steps = (rows["next", key][:-1] == rows[key][1:]).all(-1)
        ended = rows["next", "done"][:-1, 0]
        assert (steps | ended).all()  # each step begins where the one before it ended


@pytest.mark.parametrize(
    "name, value",
    [
        ("random_steps", 0),
        ("random_hold", 0),
        ("hidden", (16, 0)),
        ("hidden", ()),
        ("model_interval", 0),
        ("imagination_interval", 0),
        ("evaluation_interval", -1),
        ("evaluation_episodes", 0),
        ("checkpoint_interval", 0),
        ("batch_size", 0),
        ("gamma", 2.0),
        ("updates_per_step", 0),
    ],
)
def test_numbers_that_make_no_sense(name, value) -> None:
    with pytest.raises(ValueError, match=name):
        MBPOConfig(**{name: value}) if name != "gamma" else MBPOTrainer(gamma=value)


class Matrix(Reacher1D):
    """Its observation is a matrix."""

    observation_space = gymnasium.spaces.Box(-9, 9, (2, 1))

    def _observation(self):
        return self.state.reshape(2, 1).copy()


def test_observations_that_are_no_vectors() -> None:
    with pytest.raises(
        ValueError, match=r"(?s)observation.*\(2, 1\).*FlattenObservation"
    ):
        MBPOTrainer(**{**SMALL, "env": Matrix})
