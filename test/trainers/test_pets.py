"""PETSTrainer: what a run does, leaves behind and refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _real_envs import make_nested, make_reacher, PETS as SMALL, Unbounded
from torchrl.envs import GymEnv, SerialEnv

from torchrl_wm.trainers import PETSConfig, PETSTrainer


def trained(**settings) -> PETSTrainer:
    trainer = PETSTrainer(**{**SMALL, **settings})
    trainer.train()
    return trainer


def test_a_run_goes_from_random_steps_to_planned_trials() -> None:
    trainer = trained()
    assert [row["step"] for row in trainer.metrics] == [12, 24, 36, 48]
    assert ["loss_nll" in row for row in trainer.metrics] == [False, True, True, True]
    assert len(trainer.data) == 48
    assert all(np.isfinite(row["return"]) for row in trainer.metrics)


def test_models_are_trained_within_trials_too() -> None:
    trainer = PETSTrainer(**SMALL, model_interval=5, first_model_steps=9)
    fit, trainings = trainer.recipe.fit_model, []

    def fit_model(steps):
        trainings.append((trainer.collected_frames, steps))
        return fit(steps)

    trainer.recipe.fit_model = fit_model
    trainer.train()
    later = [(step, 6) for step in (29, 34, 36, 41, 46, 48)]
    assert trainings == [(24, 9), *later]


def test_nested_keys() -> None:
    trainer = trained(env=make_nested, termination="none", trials=1)
    rewards = trainer.data[:]["next", "agent", "reward"].reshape(-1, 12).sum(1)
    returns = torch.tensor([row["return"] for row in trainer.metrics])
    torch.testing.assert_close(rewards, returns)


def test_functions_that_differ_from_the_env_are_named() -> None:
    def far_from_it(observation, action, next_observation):
        return observation[..., :1]

    with pytest.warns(UserWarning, match="reward function.*24 of 24 steps"):
        trained(reward_function=far_from_it, trials=1)


def test_random_actions_are_held() -> None:
    trainer = trained(random_hold=5, trials=1)
    first, second = trainer.data[:24]["action"].reshape(2, 12)
    for actions in (first, second):  # an episode begins with an action of its own
        changes = (actions[1:] != actions[:-1]).nonzero().flatten() + 1
        assert changes.tolist() == [5, 10]
    assert first[-1] != second[0]


def test_the_return_is_the_envs_own() -> None:
    trainer = trained()
    rewards = trainer.data[:]["next", "reward"].reshape(4, 12)
    returns = torch.tensor([row["return"] for row in trainer.metrics])
    torch.testing.assert_close(rewards.sum(1), returns)


@pytest.mark.parametrize(
    "env",
    [
        make_reacher,
        lambda: GymEnv("Pendulum-v1"),
        "_real_envs:make_reacher",
        "CartPole-v1",
        "torchrl_wm/ContinuousCartPole-v0",
    ],
    ids=["gymnasium", "torchrl", "module", "discrete", "ours"],
)
def test_envs(env) -> None:
    trainer = trained(env=env, trials=1, random_steps=10)
    assert [row["random"] for row in trainer.metrics][-2:] == [1, 0]


@pytest.mark.parametrize("planner", ["icem", "cem"])
@pytest.mark.parametrize("propagation", ["ts1", "tsinf", "expectation", "mean"])
def test_planners_and_propagations(planner, propagation) -> None:
    trainer = trained(planner=planner, propagation=propagation, trials=1)
    assert len(trainer.metrics) == 3


def test_known_functions_are_used_in_place_of_heads() -> None:
    trainer = trained(env="CartPole-v1", reward="cartpole", termination="cartpole")
    model = trainer.world_model
    assert not list(model.reward_head.parameters())
    assert not list(model.done_head.parameters())
    assert trained(termination="none").world_model.done_head is None


def test_functions_of_ones_own() -> None:
    def reward(observation, action, next_observation):
        return -next_observation[..., 2].abs()

    trainer = trained(reward_function=reward, trials=1)
    imagined = trainer.imagined_env.imagine(
        3, tensordict=trainer.data[:5].exclude("next")
    )
    torch.testing.assert_close(
        imagined["next", "reward"][..., 0],
        -imagined["next", "observation"][..., 2].abs(),
    )


def test_the_seed_decides_everything() -> None:
    first, second, other = trained(), trained(), trained(seed=1)
    assert (first.data[:] == second.data[:]).all()
    assert not (first.data[:] == other.data[:]).all()


def test_evaluation_begins_the_same_each_time_and_changes_nothing() -> None:
    trainer = trained(trials=1)
    state = torch.get_rng_state()
    first, second = trainer.evaluate(2), trainer.evaluate(2)
    assert torch.equal(state, torch.get_rng_state())
    for one, two in zip(first, second):
        assert torch.equal(one["observation"], two["observation"])
    assert not torch.equal(first[0]["observation"][0], first[1]["observation"][0])
    assert (first[0]["observation"][0] != trainer.data[:]["observation"][0]).any()


def test_batched_envs_are_refused() -> None:
    with pytest.raises(ValueError, match="one env at a time"):
        PETSTrainer(**{**SMALL, "env": SerialEnv(2, lambda: GymEnv("Pendulum-v1"))})


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"env": "Foo-v1"}, "There is no env 'Foo-v1'"),
        ({"env": "no_such_module:make"}, "There is no 'no_such_module:make'"),
        ({"env": 3}, "got int"),
        ({"env": Unbounded}, "action_range|bounds"),
        ({"planner": "mppi"}, "Unknown planner 'mppi'"),
        ({"reward": "pendelum"}, "Unknown reward 'pendelum'"),
        ({"termination": "sometimes"}, "Unknown termination 'sometimes'"),
        ({"max_episode_steps": 0}, "max_episode_steps"),
        ({"trails": 3}, "Did you mean 'trials'"),
    ],
)
def test_bad_settings(settings, message) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        PETSTrainer(**{**SMALL, **settings})


def test_the_config_of_another_recipe() -> None:
    from torchrl_wm.trainers import MBPOConfig

    with pytest.raises(TypeError, match="PETSConfig"):
        PETSTrainer(MBPOConfig())
    assert PETSTrainer(PETSConfig(**SMALL), trials=1).config.trials == 1


def test_episodes_that_never_end(monkeypatch) -> None:
    monkeypatch.setattr("torchrl_wm.trainers.acting.MAX_STEPS", 30)
    trainer = PETSTrainer(**{**SMALL, "max_episode_steps": 31, "random_steps": 40})
    with pytest.raises(RuntimeError, match="max_episode_steps"):
        trainer.train()
