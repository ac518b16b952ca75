"""DreamerTrainer and PlaNetTrainer: what runs of recurrent models do, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _real_envs import (
    DREAMER,
    make_nested,
    make_nested_ragged,
    make_reacher,
    Pictures,
    PLANET,
    Ragged,
    Several,
    TRANSFORMER,
    Unbounded,
)
from _runs import assert_same, interrupt
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_wm.trainers import (
    DreamerConfig,
    DreamerTrainer,
    load_policy,
    PlaNetConfig,
    PlaNetTrainer,
    write_run_report,
)
from torchrl_wm.trainers.recipes import dreamer, planet


CASES = {
    "dreamer": (DreamerTrainer, DREAMER),
    "planet": (PlaNetTrainer, PLANET),
    "transformer": (PlaNetTrainer, TRANSFORMER),
}
ALL = pytest.mark.parametrize("kind, settings", CASES.values(), ids=CASES)
BOTH = pytest.mark.parametrize(
    "kind, settings", [*CASES.values()][:2], ids=[*CASES][:2]
)


def trained(kind=DreamerTrainer, common=DREAMER, **settings):
    trainer = kind(**{**common, **settings})
    trainer.train()
    return trainer


def last_losses(trainer) -> dict[str, float]:
    return {k: v for k, v in trainer.metrics[-1].items() if k.startswith("loss_")}


# Runs ---------------------------------------------------------------------------


@ALL
def test_a_run_goes_from_random_steps_to_the_policy(kind, settings) -> None:
    trainer = trained(kind, settings)
    rows = [row for row in trainer.metrics if "return" in row]
    assert [row["step"] for row in rows] == [12, 24, 36, 48]
    assert [row["random"] for row in rows] == [1, 1, 0, 0]
    # One update when the random steps are over, then 8 replayed steps for each real one.
    assert trainer.counts.updates == 1 + (48 - 20) * 8 // (4 * 6)
    assert all(np.isfinite(value) for value in last_losses(trainer).values())
    assert [r["step"] for r in trainer.metrics if "evaluation_return" in r] == [24, 48]


@pytest.mark.filterwarnings("error:A normaliser is used")
def test_a_transformer_filters_random_steps_before_it_is_fitted() -> None:
    trained(PlaNetTrainer, TRANSFORMER, steps=24, evaluation_interval=0)


@pytest.mark.parametrize("version", ["v3", "v2", "v1"])
@pytest.mark.parametrize("env", ["Pendulum-v1", "CartPole-v1"])
def test_versions(version, env) -> None:
    trainer = trained(version=version, env=env, evaluation_interval=0)
    found = last_losses(trainer)
    assert {"loss_actor", "loss_value", "loss_kl"} <= found.keys()
    assert ("loss_replay_value" in found) == (version == "v3")
    assert all(np.isfinite(value) for value in found.values())


@ALL
@pytest.mark.parametrize(
    "env",
    [make_reacher, make_nested, "CartPole-v1"],
    ids=["dictionary", "nested", "choice"],
)
def test_envs(kind, settings, env) -> None:
    trainer = trained(kind, settings, env=env, evaluation_interval=0)
    found = last_losses(trainer)
    assert found and all(np.isfinite(value) for value in found.values())


FLAT, NESTED = (Ragged, "single"), (make_nested_ragged, "single")
PROCESSES = (make_nested_ragged, "processes")


# What processes do is theirs, not the recipe's: the others are slow, as each begins six of them.
@pytest.mark.parametrize(
    "case, env, collector",
    [
        *[(case, *at) for case in ("dreamer", "planet") for at in (FLAT, NESTED)],
        ("dreamer", *PROCESSES),
        ("transformer", *NESTED),
        pytest.param("planet", *PROCESSES, marks=pytest.mark.slow),
        pytest.param("transformer", *PROCESSES, marks=pytest.mark.slow),
    ],
)
def test_several_envs_that_end_go_on_to_the_bit(case, env, collector, tmp_path) -> None:
    kind, settings = CASES[case]
    changed = {"env": env, "num_envs": 2, "collector": collector, "random_steps": 24}
    settings = {**settings, **changed, "max_episode_steps": None}
    whole = kind(**settings)
    whole.train()
    assert whole.counts.updates > 4
    interrupt(kind.start(tmp_path / "run", **settings), 19)
    torch.manual_seed(99)
    again = kind.resume(tmp_path / "run", env=env)
    assert 0 < again.collected_frames < whole.collected_frames
    again.train()
    assert_same(again, whole)


def test_a_random_action_is_held_over_an_interruption(tmp_path) -> None:
    # One episode has just ended, and all that is written for it is as it was after a reset.
    held = {"num_envs": 2, "random_hold": 4, "random_steps": 40, "steps": 44}
    settings = {**DREAMER, **held, "env": Ragged, "max_episode_steps": None}
    whole = DreamerTrainer(**settings)
    whole.train()
    for after in (6, 8, 11):
        interrupt(DreamerTrainer.start(tmp_path / f"{after}", **settings), after)
        again = DreamerTrainer.resume(tmp_path / f"{after}", env=Ragged)
        again.train()
        assert_same(again, whole)


@BOTH
def test_episodes_that_end_only_by_time(kind, settings) -> None:
    for termination in ("learned", "none"):
        short = {**settings, "termination": termination, "evaluation_interval": 0}
        trainer, learns = trained(kind, short), termination == "learned"
        found = last_losses(trainer)
        assert ("loss_done" in found) == learns
        assert (trainer.world_model.done_head is not None) == learns
        assert all(np.isfinite(value) for value in found.values())


def test_images_are_kept_as_bytes() -> None:
    trainer = trained(env=Pictures, evaluation_interval=0, max_episode_steps=12)
    assert trainer.data[:]["pixels"].dtype == torch.uint8
    assert np.isfinite(last_losses(trainer)["loss_reconstruction"])


@BOTH
def test_the_report_compares_an_actor_in_the_model_with_the_real_env(
    kind, settings, tmp_path
) -> None:
    trainer = trained(kind, {**settings, "evaluation_interval": 0})
    options = {"episodes": 1, "horizon": 3, "policy_steps": 5, "policy_episodes": 2}
    report = write_run_report(trainer, tmp_path / "report.html", **options)
    assert ("exploitation_gap/gap" in report.numbers) == (kind is DreamerTrainer)


@ALL
def test_the_command_line(kind, settings, tmp_path) -> None:
    from torchrl_wm.cli import main

    short = {k: v for k, v in settings.items() if k not in ("env", "logger", "steps")}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in short.items()]
    run, name = str(tmp_path / "run"), kind.recipe_class.name
    start = ["train", name, "--env", "Pendulum-v1", "--run", run, "--steps=36"]
    assert main([*start, *options, "--logger", "csv", "--no-report"]) == 0
    assert main(["train", "--resume", run, "--steps", "48", "--no-report"]) == 0
    assert main(["evaluate", run, "--episodes", "1", "--json"]) == 0
    assert main(["report", run, "--episodes", "1", "--horizon", "3"]) == 0
    observation = np.zeros(3, np.float32)
    policy = load_policy(run)
    first, second = (policy.act(observation) for _ in range(2))
    assert first.shape == second.shape == (1,)


# Latents -------------------------------------------------------------------------


@BOTH
def test_latents_are_filtered_from_the_first_random_step_on(kind, settings) -> None:
    settings = {**settings, "sequence_start": "stored"}
    short = {"steps": 24, "evaluation_interval": 0, "checkpoint_interval": 1}
    trainer = trained(kind, settings, **short)
    rows, model = trainer.data[:12], trainer.world_model
    assert rows["belief"][0].eq(0).all() and rows["state"][0].ne(0).any()
    # The belief of a step follows from the latents and the action of the step before.
    with torch.no_grad():
        fresh = kind(**settings).world_model
        model.load_state_dict(fresh.state_dict())  # as they were at that time
        expected = model.step(rows[:-1].exclude("next"))["next", "belief"]
    torch.testing.assert_close(rows["belief"][1:], expected, rtol=1e-4, atol=1e-5)


@BOTH
def test_sequences_that_begin_anew_read_no_latents(kind, settings) -> None:
    short = {"steps": 24, "evaluation_interval": 0}
    stored, anew = (
        trained(kind, {**settings, "sequence_start": start}, **short).recipe
        for start in ("stored", "anew")
    )
    latents = set(stored.world_model.latent_keys)
    without = anew.sample()
    assert latents <= set(stored.sample().keys())
    assert not latents & set(without.keys())
    # As if an episode began at the first step of each.
    begun = without.clone()
    begun["is_init"][:, 0] = True
    found = []
    for batch in (without, begun):
        torch.manual_seed(0)
        found.append(anew.loss(batch)["loss_reconstruction"])
    assert torch.equal(*found)


def test_evaluation_acts_within_the_bounds_by_the_mode() -> None:
    trainer = trained(steps=24, evaluation_interval=0)
    with torch.no_grad():
        for parameter in trainer.recipe.actor.parameters():
            parameter.mul_(50)
    (episode,) = trainer.evaluate(1)
    assert episode["action"].abs().max() <= 2
    start = trainer.make_env().reset()
    latents = trainer.policy.filter(start.clone())
    for kind in (ExplorationType.RANDOM, ExplorationType.DETERMINISTIC):
        with set_exploration_type(kind):
            drawn = [trainer.recipe.actor(latents.clone())["action"] for _ in range(2)]
        assert torch.equal(*drawn) == (kind is ExplorationType.DETERMINISTIC)


# Learning -------------------------------------------------------------------------


def test_an_update_moves_model_actor_critic_and_slow_critic() -> None:
    trainer = trained(steps=36)
    recipe = trainer.recipe
    parts = {
        "model": recipe.world_model,
        "actor": recipe.actor,
        "value": recipe.value_loss,
    }
    before = {
        name: {k: v.clone() for k, v in part.state_dict().items()}
        for name, part in parts.items()
    }
    recipe.ratio = lambda total: 1
    recipe.learn(trainer.new_steps)
    for name, part in parts.items():
        after = part.state_dict()
        moved = [k for k, v in before[name].items() if not torch.equal(v, after[k])]
        assert moved, name
        if name == "value":
            assert any(key.startswith("target_") for key in moved)


def test_each_term_trains_its_own_networks() -> None:
    recipe = trained(steps=24, evaluation_interval=0).recipe
    batch = recipe.sample()
    latents = recipe.loss(batch).pop("latents")
    starts, _ = recipe.starts(latents)
    acting, imagined = recipe.actor_loss(starts.reshape(-1))
    recipe.optimizer.zero_grad()
    acting["loss_actor"].backward()
    others = [*recipe.loss.parameters(), *recipe.value_loss.parameters()]
    assert all(p.grad is None for p in others)
    assert all(p.grad is not None for p in recipe.actor.parameters())
    recipe.optimizer.zero_grad()
    imagined["state_value_logits"] = recipe.imagination.value_logits
    recipe.value_loss(imagined)[0]["loss_value"].backward()
    assert all(p.grad.any() for p in recipe.critic.parameters())
    others = [*recipe.loss.parameters(), *recipe.actor.parameters()]
    assert all(p.grad is None for p in others)


def test_imagination_begins_at_every_nth_state() -> None:
    recipe = trained(steps=24, evaluation_interval=0, imagine_every=4).recipe
    latents = recipe.loss(recipe.sample()).pop("latents")
    for _ in range(8):
        starts, chosen = recipe.starts(latents)
        assert torch.equal(starts["belief"], latents["next", "belief"][:, chosen])
        assert chosen.step == 4 and 0 <= chosen.start < 4


@pytest.mark.parametrize("env", ["Pendulum-v1", make_nested], ids=["flat", "nested"])
def test_imagined_steps_are_those_of_the_imagined_env(env) -> None:
    from torchrl_wm import WorldModelEnv

    recipe = trained(env=env, steps=24, evaluation_interval=0).recipe
    latents = recipe.loss(recipe.sample()).pop("latents")
    start = recipe.starts(latents)[0].reshape(-1)

    def actor(tensordict):
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            return recipe.actor(tensordict)

    torch.manual_seed(3)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        made = recipe.imagination.rollout(5, recipe.actor, start.clone())
    torch.manual_seed(3)
    imagined = WorldModelEnv(recipe.world_model, recipe.env, batch_size=[])
    expected = imagined.imagine(5, actor, start.clone())
    for key in (("next", "belief"), "state", ("next", recipe.env.reward_key)):
        torch.testing.assert_close(made[key], expected[key], rtol=1e-4, atol=1e-5)
    again = recipe.critic(made.select("state", "belief"))["state_value"]
    torch.testing.assert_close(made["state_value"], again)


# Settings -------------------------------------------------------------------------


def test_a_transformer_has_no_settings_of_an_rssm() -> None:
    for name, value in {"state_size": 4, "sequence_start": "stored"}.items():
        with pytest.raises(ValueError, match=f"has no {name}.*model='rssm'"):
            PlaNetConfig(model="transformer", **{name: value})
    with pytest.raises(ValueError, match="has no context.*model='transformer'"):
        PlaNetConfig(context=3)
    with pytest.raises(ValueError, match="heads must divide width"):
        PlaNetConfig(model="transformer", belief_size=10)


@pytest.mark.parametrize("kind", [dreamer, planet])
def test_presets_have_the_same_settings(kind) -> None:
    keys = [preset.keys() for preset in kind.PRESETS.values()]
    assert all(names == keys[0] for names in keys)


def test_preset_of_a_cpu() -> None:
    config = DreamerConfig(device="cpu")
    assert config.preset == "small" and config.size("belief_size") == 128
    assert DreamerConfig(device="cpu", belief_size=64).size("belief_size") == 64


@BOTH
@pytest.mark.parametrize(
    "changed, message",
    [
        ({"env": Unbounded}, "no finite bounds"),
        ({"random_steps": 5}, "random_steps=5.*batch_length=6.*at least 6"),
        ({"random_steps": 10, "num_envs": 2}, "at least 12"),
        ({"replay_capacity": 2}, "replay_capacity=2"),
        ({"train_ratio": 0.0}, "never trains"),
        ({"steps": 20, "random_steps": 20}, "ends the run before it learns"),
        ({"train_ratio": 0.1}, "train_ratio=0.1 never trains"),
        ({"train_ratio": float("nan")}, "train_ratio must be a number, got nan"),
        ({"learning_rate": -0.1}, "learning_rate must be above 0, got -0.1"),
        ({"clip": -1.0}, "clip must be .* 0, got -1"),
        ({"env": "Blackjack-v1"}, "parts of a Tuple space.*spaces.Dict"),
        ({"env": Several}, "single choices, and 'action' is.*one choice of it"),
        ({"preset": "2M"}, "Unknown preset '2M'"),
        ({"belief_sise": 4}, "Did you mean 'belief_size'"),
    ],
)
def test_bad_settings(kind, settings, changed, message) -> None:
    with pytest.raises((ValueError, TypeError), match=f"(?s){message}"):
        kind(**{**settings, **changed})


def test_states_to_imagine_from_are_in_every_sequence() -> None:
    with pytest.raises(ValueError, match="imagine_every=7 .* batch_length=6"):
        DreamerTrainer(**{**DREAMER, "imagine_every": 7})


@pytest.mark.filterwarnings("error:The world model predicts no terminations")
@pytest.mark.parametrize("settings", [{"termination": "none"}, {"version": "v1"}])
def test_episodes_that_terminate_and_should_not(settings) -> None:
    short = {"evaluation_interval": 0, "steps": 24, **settings}
    with pytest.warns(UserWarning) as seen:
        trained(env=make_nested_ragged, **short)
    found = [str(each.message) for each in seen]
    (told,) = (text for text in found if "predicts no terminations" in text)
    assert "at real step" in told and "termination='learned'" in told
    trained(**short)  # episodes that end only by time


def test_a_trainer_is_shown_in_a_line(tmp_path) -> None:
    trainer = DreamerTrainer.start(tmp_path / "run", **DREAMER)
    shown = repr(trainer)
    assert shown.startswith("DreamerTrainer(dreamer on ") and "step=0" in shown
    assert repr(str(tmp_path / "run")) in shown and "\n" not in shown


def test_gamma_is_below_1() -> None:
    with pytest.raises(ValueError, match="below 1"):
        DreamerTrainer(**DREAMER, gamma=1.0)


def test_rewards_of_nan() -> None:
    from torchrl_wm.trainers import NonFiniteLossError

    class Broken(Ragged):
        def step(self, action):
            observation, _, *rest = super().step(action)
            return observation, float("nan"), *rest

    with pytest.raises(NonFiniteLossError, match="reward"):
        trained(env=Broken)
