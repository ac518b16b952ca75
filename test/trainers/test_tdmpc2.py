"""TDMPC2Trainer: what a run does, what it acts with, and what it refuses."""

from __future__ import annotations

import copy
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from _models import SpecEnv
from _real_envs import (
    make_nested,
    make_nested_ragged,
    make_reacher,
    Pictures,
    Ragged,
    Several,
    TDMPC2 as SMALL,
    Unbounded,
)
from _runs import assert_same, interrupt
from torchrl.data import Bounded
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_wm.models import (
    make_tdmpc2_policy,
    make_tdmpc2_q_ensemble,
    make_tdmpc2_world_model,
)
from torchrl_wm.trainers import load_policy, make_real_env, TDMPC2Config, TDMPC2Trainer
from torchrl_wm.trainers.recipes.tdmpc2 import discount, PRESETS


def trained(**settings) -> TDMPC2Trainer:
    trainer = TDMPC2Trainer(**{**SMALL, **settings})
    trainer.train()
    return trainer


# Runs ---------------------------------------------------------------------------


def test_a_run_goes_from_random_steps_to_plans() -> None:
    trainer = trained()
    rows = [row for row in trainer.metrics if "return" in row]
    assert [row["step"] for row in rows] == [12, 24, 36, 48]
    assert [row["random"] for row in rows] == [1, 1, 0, 0]
    # 4 updates at once, on the 20th step, and one after each step that follows.
    assert trainer.counts.updates == 4 + 28
    names = ("consistency", "reward", "done", "value", "policy")
    assert all(np.isfinite(rows[-1][f"loss_{name}"]) for name in names)
    assert {"entropy", "value_scale"} <= rows[-1].keys()
    assert [r["step"] for r in trainer.metrics if "evaluation_return" in r] == [24, 48]


def test_pretraining_is_as_long_as_the_random_steps() -> None:
    trainer = trained(pretraining_updates=None, steps=24)
    assert trainer.counts.updates == 20 + 4
    assert trained(pretraining_updates=0, steps=24).counts.updates == 5


@pytest.mark.parametrize(
    "env, collector",
    [
        (Ragged, "single"),
        (make_nested_ragged, "single"),
        pytest.param(make_nested_ragged, "processes", marks=pytest.mark.slow),
    ],
)
def test_several_envs_that_end_go_on_to_the_bit(env, collector, tmp_path) -> None:
    settings = {**SMALL, "env": env, "num_envs": 2, "collector": collector}
    settings["max_episode_steps"] = None
    whole = TDMPC2Trainer(**settings)
    whole.train()
    assert whole.counts.updates > 4
    interrupt(TDMPC2Trainer.start(tmp_path / "run", **settings), 19)
    torch.manual_seed(99)
    again = TDMPC2Trainer.resume(tmp_path / "run", env=env)
    assert 0 < again.collected_frames < whole.collected_frames
    again.train()
    assert_same(again, whole)


@pytest.mark.parametrize(
    "env",
    [make_reacher, make_nested, "CartPole-v1", "_real_envs:make_reacher"],
    ids=["dictionary", "nested", "choice", "module"],
)
def test_envs(env) -> None:
    trainer = trained(env=env, evaluation_interval=0)
    rows = [row for row in trainer.metrics if "return" in row]
    assert rows[-1]["random"] == 0 and np.isfinite(rows[-1]["loss_policy"])


def test_nested_keys_are_what_the_replay_keeps() -> None:
    trainer = trained(env=make_nested, steps=24, evaluation_interval=0)
    assert trainer.data[:]["agent", "action"].shape == (24, 1)
    assert trainer.data[:]["next", "agent", "reward"].shape == (24, 1)


def test_images() -> None:
    trainer = trained(env=Pictures, steps=30, random_steps=12, evaluation_interval=0)
    rows = trainer.data[:]
    assert rows["pixels"].dtype == torch.uint8
    shifted = trainer.recipe.sample()["pixels"]
    # The bars are moved aside, the replay is as it was.
    places = [i.float().mean((-3, -1)).argmax(-1) for i in (shifted, rows["pixels"])]
    assert shifted.dtype == torch.uint8 and places[0].max() < 16
    assert (trainer.data[:] == rows).all()
    still = TDMPC2Trainer(**{**SMALL, "env": Pictures, "image_shift": 0})
    still.recipe.replay.extend(rows)
    seen = still.recipe.sample()["pixels"].flatten(0, 1)
    assert all((image == rows["pixels"]).flatten(1).all(1).any() for image in seen)


def test_without_terminations() -> None:
    trainer = trained(termination="none", steps=24, evaluation_interval=0)
    assert trainer.world_model.done_head is None
    assert "loss_done" not in trainer.metrics[-1]


def test_the_seed_decides_everything() -> None:
    first, second = (trained(steps=36) for _ in range(2))
    assert_same(first, second)
    other = trained(steps=36, seed=1)
    assert not (first.data[:]["action"] == other.data[:]["action"]).all()


def test_the_command_line(tmp_path) -> None:
    from torchrl_wm.cli import main

    short = {k: v for k, v in SMALL.items() if k not in ("env", "logger", "steps")}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in short.items()]
    run = str(tmp_path / "run")
    start = ["train", "tdmpc2", "--env", "Pendulum-v1", "--run", run, "--steps=36"]
    assert main([*start, *options, "--logger", "csv", "--no-report"]) == 0
    assert main(["train", "--resume", run, "--steps", "48", "--no-report"]) == 0
    assert main(["evaluate", run, "--episodes", "1", "--json"]) == 0
    assert main(["report", run, "--episodes", "1", "--horizon", "3"]) == 0
    observation = np.zeros(3, np.float32)
    assert load_policy(run).act(observation).shape == (1,)


# Learning -------------------------------------------------------------------------


def test_the_encoder_learns_more_slowly() -> None:
    recipe = TDMPC2Trainer(**SMALL, learning_rate=1e-2, encoder_rate=0.1).recipe
    slow, fast = recipe.optimizer.param_groups
    assert slow["lr"] == pytest.approx(1e-3) and fast["lr"] == 1e-2
    encoder = {*map(id, recipe.world_model.encoder.parameters())}
    assert {*map(id, slow["params"])} == encoder
    trained = {*map(id, fast["params"])}
    for part in (recipe.world_model.dynamics, recipe.q, recipe.world_model.done_head):
        assert {*map(id, part.parameters())} <= trained
    assert not {*map(id, recipe.prior.parameters())} & (encoder | trained)


def test_an_update_moves_targets_values_and_policy() -> None:
    trainer = trained(steps=24)
    recipe = trainer.recipe

    def state():
        parts = (recipe.loss, recipe.prior)
        return [{k: v.clone() for k, v in p.state_dict().items()} for p in parts]

    (loss, prior), _ = state(), recipe.learn(trainer.new_steps)
    after_loss, after_prior = state()
    moved = {
        key for key, value in loss.items() if not torch.equal(value, after_loss[key])
    }
    for name in (
        "world_model.encoder",
        "world_model.dynamics",
        "target_q_ensemble_params",
    ):
        assert any(key.startswith(name) for key in moved), name
    assert all(not torch.equal(v, after_prior[k]) for k, v in prior.items())


def test_gradients_are_clipped() -> None:
    trainer = trained(steps=24, clip=1e-3)
    gradients = [p.grad for p in trainer.recipe.prior.parameters()]
    assert torch.nn.utils.get_total_norm(gradients) <= 1.1e-3


# Acting ---------------------------------------------------------------------------


def acted(trainer, kind) -> torch.Tensor:
    torch.manual_seed(0)
    with set_exploration_type(kind):
        return trainer.policy(trainer.make_env().reset())["action"]


def test_the_policy_alone_acts_in_evaluations_if_asked() -> None:
    trainer = trained(evaluate_with="policy", steps=36)
    env = trainer.make_env()
    states = [episode["observation"] for episode in trainer.evaluate(1)]
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        start = env.reset().set("observation", states[0][0])
        expected = trainer.recipe.policy.actor(start.select("observation"))["action"]
        assert torch.equal(trainer.policy(start)["action"], expected)
        assert "latent" not in start.keys()
    with set_exploration_type(ExplorationType.RANDOM):
        assert not torch.equal(trainer.policy(start)["action"], expected)
    rows = [row for row in trainer.metrics if "evaluation_return" in row]
    assert np.isfinite(rows[-1]["evaluation_return"])


def test_plans_explore_while_they_learn_alone() -> None:
    trainer = trained(steps=24)
    quiet, random = (
        acted(trainer, kind)
        for kind in (ExplorationType.DETERMINISTIC, ExplorationType.RANDOM)
    )
    assert not torch.equal(quiet, random)
    planner = trainer.recipe.planner
    assert (planner.init_std, planner.min_std) == (2.0, 0.05)
    assert planner.temperature == 0.5 and planner.discount == trainer.recipe.gamma


# Settings -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, 0.975),  # of 200 steps
        ({"action_repeat": 2}, 0.95),
        ({"max_episode_steps": 150}, 1 - 5 / 150),
        ({"max_episode_steps": 20}, 0.95),
        ({"env": "MountainCarContinuous-v0"}, 1 - 5 / 999),
        ({"env": "InvertedPendulum-v5"}, 0.995),
        ({"env": "dm_control/cartpole/swingup", "action_repeat": 2}, 0.99),
        ({"env": "_real_envs:make_reacher"}, 0.99),
    ],
)
def test_the_discount_follows_the_length_of_episodes(settings, expected) -> None:
    config = TDMPC2Config(**settings)
    try:
        env = make_real_env(config.env, **config.env_settings)
    except (ImportError, ValueError) as err:
        pytest.skip(str(err))
    assert discount(config, env) == pytest.approx(expected)
    given = TDMPC2Trainer(**{**SMALL, "gamma": 0.9}).recipe
    assert given.gamma == 0.9 == given.planner.discount


def test_presets() -> None:
    config = TDMPC2Config(device="cpu")
    assert config.preset == "small" and config.size("latent_size") == 64
    assert TDMPC2Config(preset="19M").size("num_cells") == 1024
    assert TDMPC2Config(preset="5M", num_q=3).model.num_q == 3
    assert all(preset.keys() == PRESETS["small"].keys() for preset in PRESETS.values())


@pytest.mark.parametrize(
    "preset, expected", [("1M", 1_214_651), ("5M", 4_960_618), ("19M", 18_062_442)]
)
def test_presets_have_the_parameters_of_the_authors_code(preset, expected) -> None:
    """Those of encoder, dynamics, reward, values and policy for dm_control's walker.

    Counted in commit e9f5932 of github.com/nicklashansen/tdmpc2, with its model_size.
    """
    specs = SpecEnv(observation=24, action_spec=Bounded(-1.0, 1.0, (6,)))
    config = TDMPC2Config(preset=preset, termination="none").model
    world_model, _ = make_tdmpc2_world_model(specs, config)
    parts = [f(specs, config) for f in (make_tdmpc2_q_ensemble, make_tdmpc2_policy)]
    count = sum(p.numel() for m in (world_model, *parts) for p in m.parameters())
    assert count == expected


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"env": Unbounded}, "no finite bounds"),
        ({"gamma": 0.0}, "above 0"),
        ({"gamma": 1.5}, "gamma must lie between 0 and 1"),
        ({"planning_horizon": 4}, "longer than the sequences.*horizon=3"),
        ({"random_steps": 2}, "no sequence of horizon=3"),
        ({"random_steps": 5, "num_envs": 2}, "at least 6"),
        ({"replay_capacity": 2}, "no room"),
        ({"preset": "2M"}, "Unknown preset '2M'"),
        ({"latent_size": 20}, "group=8 does not divide"),
        ({"top_k": 13}, "top_k=13"),
        ({"policy_candidates": 12}, "num_policy_candidates=12"),
        ({"evaluate_with": "both"}, "Unknown evaluate_with"),
        ({"horizn": 4}, "Did you mean 'horizon'"),
    ],
)
def test_bad_settings(settings, message) -> None:
    with pytest.raises((ValueError, TypeError), match=f"(?s){message}"):
        TDMPC2Trainer(**{**SMALL, **settings})


def test_actions_that_are_several_choices() -> None:
    with pytest.raises(ValueError, match="single choices, and.*one choice"):
        TDMPC2Trainer(**{**SMALL, "env": Several})


# Compiling ------------------------------------------------------------------------


def learnt(recipe) -> tuple[dict, list[torch.Tensor]]:
    """Return the losses of the next update, and the gradients that it was made with."""
    torch.manual_seed(0)
    losses = recipe.learn(SimpleNamespace(count=1))
    parts = (recipe.loss, recipe.prior)
    return losses, [p.grad.clone() for m in parts for p in m.parameters()]


@pytest.mark.parametrize(
    "backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
@torch._inductor.config.patch(fallback_random=True)  # the random numbers of eager code
def test_compiled_updates_are_eager_ones_in_two_graphs(backend, monkeypatch) -> None:
    graphs, torch_compile = [], torch.compile

    def counting(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    monkeypatch.setattr(torch, "compile", partial(torch_compile, backend=counting))
    settings = {"env": make_nested_ragged, "max_episode_steps": None}
    data = trained(**settings, steps=30, evaluation_interval=0).recipe.parts
    eager, compiled = (
        TDMPC2Trainer(**{**SMALL, **settings, "compile": c}).recipe
        for c in (False, True)
    )

    def check(source: dict) -> None:
        """Load the parts of a run into both, and compare their next updates."""
        states = {n: copy.deepcopy(part.state_dict()) for n, part in source.items()}
        for recipe in (eager, compiled):
            recipe.replay.empty()  # it reads rows only then
            for name, part in recipe.parts.items():
                part.load_state_dict(states[name])
        torch.testing.assert_close(
            *map(learnt, (eager, compiled)), rtol=1e-5, atol=1e-6
        )

    check(data)
    for _ in range(3):  # other ends of episodes, other batches
        compiled.learn(SimpleNamespace(count=1))
    check(compiled.parts)
    assert len(graphs) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("error:.*could not be compiled")
def test_a_compiled_run() -> None:
    trainer = trained(compile=True, steps=24)
    assert all(np.isfinite(r["return"]) for r in trainer.metrics if "return" in r)
