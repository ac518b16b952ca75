"""A policy from a log alone: what a run does, that it goes on to the bit, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from _runs import Interrupted, without_times

from torchrl_wm.cli.main import main
from torchrl_wm.modules import with_penalty
from torchrl_wm.trainers import (
    dream_of_run,
    export_policy,
    film_policy,
    load_policy,
    MOPOConfig,
    MOPOTrainer,
    resume_run,
    start_run,
    write_run_report,
)
from torchrl_wm.trainers.recipes.penalty_sweep import chosen_of, Outcome

SMALL = {
    "members": 3,
    "elites": 2,
    "hidden": (8,),
    "batch_size": 8,
    "model_steps": 6,
    "interval": 4,
    "steps": 20,
    "penalties": (0.0, 2.0),
    "horizon": 2,
    "rollouts": 6,
    "imagination_interval": 3,
    "retained_rounds": 2,
    "policy_batch_size": 20,
    "policy_hidden": (8,),
    "judged_episodes": 6,
    "judged_steps": 5,
    "logger": "csv",
}


def arrays(steps: int = 60, length: int = 15, **others) -> dict:
    """A log of a point that actions push, in episodes of one length."""
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (steps, 1))
    place = rng.normal(size=(steps, 2))
    following = place + 0.1 * actions + 0.01 * rng.normal(size=place.shape)
    return {
        "observations": place,
        "next_observations": following,
        "actions": actions,
        "rewards": -np.square(place).sum(-1),
        "terminations": np.zeros(steps, bool),
        "truncations": np.arange(1, steps + 1) % length == 0,
        **others,
    }


@pytest.fixture
def settings(tmp_path) -> dict:
    path = tmp_path / "log.npz"
    np.savez(path, **arrays())
    return {"data": str(path), **SMALL}


def whole_run(settings: dict, path):
    trainer = start_run("mopo", path, **settings)
    trainer.train()
    return trainer


def assert_same(one, other) -> None:
    assert without_times(one.metrics) == without_times(other.metrics)
    for mine, theirs in zip(one.candidates, other.candidates):
        for p, q in zip(
            mine.learning.loss.state_dict().values(),
            theirs.learning.loss.state_dict().values(),
        ):
            assert torch.equal(p, q)
        assert (mine.imagined[:] == theirs.imagined[:]).all()


def test_a_run(settings, tmp_path) -> None:
    trainer = whole_run(settings, tmp_path / "run")
    rows = trainer.metrics
    assert [row["step"] for row in rows] == [4, 8, 12, 16, 20]
    assert "loss_nll" in rows[0] and "imagined_return_0" not in rows[0]
    names = {"loss_actor", "imagined_return", "imagined_worst", "imagined_disagreement"}
    assert {f"{name}_{p}" for name in names for p in (0, 2)} <= set(rows[-1])
    assert rows[-1]["chosen_penalty"] in (0.0, 2.0)
    assert [c.learning.counts.updates for c in trainer.candidates] == [14, 14]
    # Rounds of 6 rollouts of 2 steps at the updates 0, 3, 6, 9 and 12; two are kept.
    assert all(len(c.imagined) == 24 for c in trainer.candidates)
    assert all(c.imagined.write_count == 60 for c in trainer.candidates)
    chosen = settings["penalties"].index(rows[-1]["chosen_penalty"])
    assert trainer.policy is trainer.candidates[chosen].learning.policy
    assert (tmp_path / "run" / "model.pt").exists()


def test_the_model_is_trained_once_and_its_best_weights_stay(settings) -> None:
    trainer = MOPOTrainer(**settings)
    trainer.train()
    assert trainer.training.learner.steps == 6
    best = trainer.training.best_model().state_dict()
    for name, value in trainer.world_model.state_dict().items():
        assert torch.equal(value, best[name]), name


def test_a_penalty_of_one_charges_the_spread_of_rewards_at_the_edge(settings) -> None:
    trainer = MOPOTrainer(**settings)
    trainer.train()
    rewards = arrays()["rewards"]
    edge = rewards.std(ddof=1) / trainer.coefficient(1.0)
    model = with_penalty(trainer.world_model, 1.0)
    steps = trainer.training.test.exclude("next")
    doubts = model.step(steps)["next", "penalty"]
    assert (doubts <= edge * (1 + 1e-5)).float().mean() >= 0.99
    assert (doubts > edge * (1 - 1e-5)).any()
    assert trainer.coefficient(3.0) == pytest.approx(3 * trainer.coefficient(1.0))


def test_rewards_are_lower_by_the_penalty(settings) -> None:
    trainer = MOPOTrainer(**{**settings, "real_share": 0.0, "penalties": (0.0, 1000.0)})
    trainer.train()
    free, charged = (c.imagined[:]["next", "reward"].mean() for c in trainer.candidates)
    assert charged < free - 10


@pytest.mark.parametrize("looks", [1, 2])
def test_it_goes_on_to_the_bit(looks, settings, tmp_path) -> None:
    settings["checkpoint_interval"] = looks
    trainer = start_run("mopo", tmp_path / "run", **settings)
    update = trainer.candidates[1].learning.update

    def stop(batch):
        if trainer.candidates[1].learning.counts.updates == 12:
            raise Interrupted
        return update(batch)

    trainer.candidates[1].learning.update = stop
    with pytest.raises(Interrupted):
        trainer.train()
    again = resume_run(tmp_path / "run")
    assert again.collected_frames == 16
    again.train()
    assert_same(again, whole_run(settings, tmp_path / "whole"))


def test_it_goes_on_while_the_model_is_trained(settings, tmp_path) -> None:
    trainer = start_run("mopo", tmp_path / "run", **settings)

    def stop(step: int, steps: int) -> None:
        if trainer.training.learner.steps == 5:
            raise Interrupted

    trainer.recipe.on_fit = stop
    with pytest.raises(Interrupted):
        trainer.train()
    again = resume_run(tmp_path / "run")
    assert again.collected_frames == 4
    again.train()
    assert_same(again, whole_run(settings, tmp_path / "whole"))


def test_it_is_made_longer(settings, tmp_path) -> None:
    whole_run({**settings, "steps": 12}, tmp_path / "run")
    longer = resume_run(tmp_path / "run", steps=20)
    longer.train()
    assert_same(longer, whole_run(settings, tmp_path / "whole"))


def test_the_other_penalties_make_no_difference_to_a_policy(settings) -> None:
    among = MOPOTrainer(**settings)
    among.train()
    alone = MOPOTrainer(**{**settings, "penalties": (2.0,)})
    alone.train()
    mine, own = among.candidates[1].learning.loss, alone.candidates[0].learning.loss
    for p, q in zip(mine.state_dict().values(), own.state_dict().values()):
        assert torch.equal(p, q)
    names = ("imagined_return_2", "imagined_worst_2", "loss_actor_2")
    assert all(among.metrics[-1][n] == alone.metrics[-1][n] for n in names)


def test_large_numbers_are_learnt_from(tmp_path) -> None:
    """In double precision, in which the log keeps them."""
    rows = arrays()
    for name in ("observations", "next_observations"):
        rows[name] = rows[name] + 1.7e9
    np.savez(tmp_path / "log.npz", **rows)
    with pytest.warns(UserWarning, match="too large for single precision"):
        trainer = MOPOTrainer(data=str(tmp_path / "log.npz"), **SMALL)
        trainer.train()
    assert trainer.candidates[0].imagined[:]["observation"].dtype is torch.float64
    assert np.isfinite(trainer.metrics[-1]["imagined_return_2"])


def test_all_policies_can_be_exported(settings) -> None:
    trainer = MOPOTrainer(**settings)
    assert list(trainer.exported_policies()) == ["policy"]  # none has learnt
    trainer.train()
    found = trainer.exported_policies()
    assert found == {"policy": trainer.policy, **trainer.policies}
    assert list(found) == ["policy", "0", "2"]


def test_a_single_penalty(settings) -> None:
    trainer = MOPOTrainer(**{**settings, "penalties": (1.5,)})
    trainer.train()
    assert trainer.metrics[-1]["chosen_penalty"] == 1.5
    assert len(trainer.candidates) == 1


def test_nested_keys(tmp_path) -> None:
    rows = arrays()
    place, following = rows.pop("observations"), rows.pop("next_observations")
    path = tmp_path / "log.npz"
    np.savez(
        path,
        **{
            "observations/arm/angle": place[:, :1],
            "observations/speed": place[:, 1:],
            "next_observations/arm/angle": following[:, :1],
            "next_observations/speed": following[:, 1:],
            **rows,
        },
    )
    trainer = MOPOTrainer(data=str(path), **SMALL)
    trainer.train()
    assert trainer.candidates[0].imagined[:]["next", "arm", "angle"].shape == (24, 1)
    written = write_run_report(trainer, tmp_path / "report.html")
    assert "penalty 2: return in the model" in written.path.read_text()


def test_a_log_of_one_episode(settings, tmp_path) -> None:
    np.savez(tmp_path / "one.npz", **arrays(length=60))
    with pytest.warns(UserWarning, match="one episode"):
        trainer = MOPOTrainer(**{**settings, "data": str(tmp_path / "one.npz")})
    trainer.train()
    assert trainer.metrics[-1]["step"] == 20


def test_an_end_where_the_data_ends_is_no_relief(settings) -> None:
    trainer = MOPOTrainer(**{**settings, "limit_quantile": 0.5, "horizon": 4})
    trainer.train()
    following = trainer.candidates[0].imagined[:]["next"]
    ended = following["terminated"]
    assert ended.any() and not ended.all()
    worst = 100 * arrays()["rewards"].min()  # for ever, with gamma=0.99
    assert following["reward"][ended].tolist() == pytest.approx(
        [worst] * int(ended.sum()), rel=1e-4
    )


# Commands ------------------------------------------------------------------------------


def options(settings: dict) -> list[str]:
    """The settings as words of the command line."""
    words = []
    for name, value in settings.items():
        values = value if isinstance(value, tuple) else (value,)
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return words


def test_without_an_env_the_model_answers(settings, tmp_path, capsys) -> None:
    folder = str(tmp_path / "run")
    train = ["train", "mopo", "--run", folder, "--no-progress", "--no-report"]
    assert main([*train, *options(settings)]) == 0
    capsys.readouterr()
    trainer = resume_run(folder)
    assert trainer.config.penalties == (0.0, 2.0)
    assert main(["evaluate", folder, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["penalty"] == trainer.metrics[-1]["chosen_penalty"]
    chosen = f"imagined_return_{said['penalty']:g}"
    assert said["imagined_return"] == pytest.approx(trainer.metrics[-1][chosen])
    assert main(["report", folder]) == 0
    text = (tmp_path / "run" / "report.html").read_text()
    assert "Penalties" in text and "real return" not in text
    assert "Is this policy to be trusted?" in text
    assert main(["play", folder]) == 2
    assert "--render" in capsys.readouterr().err


def test_the_report_sets_promises_beside_what_recorded_episodes_got(settings) -> None:
    trainer = MOPOTrainer(**settings)
    trainer.train()
    section = trainer.recipe.report_sections(None)[0]
    got = arrays()["rewards"].reshape(-1, 15).sum(1)
    found = section.numbers["return of recorded episodes"]
    assert found == pytest.approx(got.mean(), rel=1e-4)
    assert section.numbers["of the best tenth of them"] == pytest.approx(got.max())
    assert f"Recorded episodes got {found:.4g}" in section.verdict


def test_what_is_promised_ends_at_the_limit(settings) -> None:
    limits = {"limit_quantile": 0.2, "judged_steps": 12, "measure": "deviation"}
    trainer = MOPOTrainer(**{**settings, **limits})
    trainer.train()
    worst = arrays()["rewards"].min() / (1 - trainer.config.gamma)
    for outcome in trainer.recipe.outcomes:
        assert outcome.length < 6  # each step ends four of five
        assert outcome.mean < 0.5 * worst


def test_a_film_without_an_env_is_imagined(settings, tmp_path) -> None:
    trainer = MOPOTrainer(**settings)
    trainer.train()
    shown = []

    def draw(observation):
        shown.append(observation)
        return np.zeros([16, 16, 3], np.uint8)

    path = tmp_path / "film.gif"
    assert film_policy(trainer, path, render=draw, max_steps=7)
    assert path.exists() and len(shown) == 8
    # It begins where a held-out episode does.
    firsts = [e[0]["observation"] for e in trainer.recipe.held_out_episodes()]
    assert any(np.allclose(shown[0], first) for first in firsts)


def test_a_dream_without_an_env_begins_where_held_out_episodes_do(settings) -> None:
    trainer = MOPOTrainer(**settings)
    with pytest.raises(ValueError, match="has not learnt anything"):
        dream_of_run(trainer)
    trainer.train()
    session = dream_of_run(trainer, render=lambda place: np.zeros([8, 8, 3], np.uint8))
    moment = session.step("policy")
    assert not session.has_real and moment.real is None
    assert moment.disagreement is not None and session.usual_disagreement


def test_its_policy_acts_on_recorded_observations(settings, tmp_path) -> None:
    trainer = whole_run(settings, tmp_path / "run")
    policy = load_policy(tmp_path / "run")
    action = policy.act(trainer.recorded["observation"][0].numpy())
    assert action.shape == (1,) and abs(action[0]) <= 1.5


def test_without_an_env_its_policy_is_checked_on_the_log_and_leaves(
    settings, tmp_path
) -> None:
    trainer = whole_run(settings, tmp_path / "run")
    held_out = trainer.recipe.held_out_episodes()
    steps = 2 * sum(map(len, held_out)) + 1  # around the log more than once
    written = export_policy(tmp_path / "run", formats=["pt2"], steps=steps)
    assert written.deviations["pt2"] < 1e-5
    assert written.described["check"]["steps"] == steps
    act = torch.export.load(written.files["pt2"]).module()
    state = held_out[0]["observation"]
    found = act({"observation": state})["action"]
    policy = load_policy(tmp_path / "run")
    for row, action in zip(state, found):
        np.testing.assert_allclose(action, policy.act(row.numpy()), atol=1e-5)


def test_without_an_env_one_dreams_from_recorded_steps(settings, tmp_path) -> None:
    trainer = whole_run(settings, tmp_path / "run")
    session = dream_of_run(trainer, seed=1)
    assert not session.has_real
    begun = session.moments[0].imagined.values["observation"]
    recorded = torch.cat([e["observation"] for e in trainer.recipe.held_out_episodes()])
    assert (recorded - torch.tensor(begun)).abs().amax(-1).min() < 1e-6
    moment = session.step("policy")
    assert moment.imagined.reward is not None and moment.disagreement > 0
    assert session.usual_disagreement["high"] > 0


def test_with_an_env_policies_are_evaluated_there(tmp_path) -> None:
    from torchrl_wm.trainers import make_real_env

    rows = make_real_env("Pendulum-v1", seed=0, max_episode_steps=20)
    torch.manual_seed(0)
    log = torch.stack([rows.rollout(20) for _ in range(3)])
    log.select("observation", "action", "next", "done").memmap(tmp_path / "log")
    settings = {**SMALL, "data": str(tmp_path / "log"), "env": "Pendulum-v1"}
    trainer = MOPOTrainer(**settings, evaluation_interval=8, evaluation_episodes=1)
    trainer.train()
    found = [row for row in trainer.metrics if "evaluation_return" in row]
    # Not before the policies learn.
    assert [row["step"] for row in found] == [8, 16]
    last = found[-1]
    assert last["evaluation_return"] in (
        last["evaluation_return_0"],
        last["evaluation_return_2"],
    )
    written = write_run_report(trainer, tmp_path / "report.html", episodes=1)
    assert "penalty 0: real return" in written.path.read_text()
    assert "exploitation_gap" in written.verdicts


# What is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, message",
    [
        ({"penalties": ()}, "penalties .*each once"),
        ({"penalties": (-1.0,)}, "penalties .*0 or more"),
        ({"penalties": (1.0, 1.0)}, "penalties .*each once"),
        ({"penalties": (1.0, 1.0000001)}, "penalties .*six digits"),
        ({"members": 1, "elites": None}, "members=1 cannot.*--measure deviation"),
        ({"penalties": (float("nan"),)}, "penalties must be a number, got nan"),
        ({"steps": 6}, "no policy would learn.*train model"),
        ({"real_share": 1.0}, "real_share .*below 1"),
        ({"evaluation_interval": 4}, "evaluation_interval=4 needs the real env.*--env"),
    ],
)
def test_settings_that_make_no_sense(given, message) -> None:
    with pytest.raises(ValueError, match=message):
        MOPOConfig(**{"data": "log.npz", **SMALL, **given})


@pytest.mark.parametrize(
    "others, error, message",
    [
        ({"actions": np.ones((60, 1))}, ValueError, "All 60 actions .*the same"),
        ({"actions": np.arange(60) % 3}, ValueError, "(?s)continuous.*train model"),
        ({"rewards": None}, KeyError, "rewards"),
        ({"rewards": np.ones(60)}, ValueError, "All 60 rewards .* are 1"),
    ],
)
def test_logs_that_no_policy_can_learn_from(others, error, message, tmp_path) -> None:
    rows = {k: v for k, v in arrays(**others).items() if v is not None}
    np.savez(tmp_path / "log.npz", **rows)
    with pytest.raises(error, match=message):
        MOPOTrainer(data=str(tmp_path / "log.npz"), **SMALL)


def test_actions_that_never_change_in_some_dims(tmp_path) -> None:
    actions = np.random.default_rng(0).uniform(-1, 1, (60, 2))
    actions[:, 1] = 0.5
    np.savez(tmp_path / "log.npz", **arrays(actions=actions))
    with pytest.warns(UserWarning, match=r"never change in the dims \[1\]"):
        try:
            MOPOTrainer(data=str(tmp_path / "log.npz"), **SMALL)
        except ValueError as err:  # without an env the bounds are read off the data
            assert "equal" in str(err)


# Choosing ---------------------------------------------------------------------------------


def test_the_least_promise_decides() -> None:
    def outcome(mean: float, worst: float) -> Outcome:
        return Outcome(mean, worst, measured=1.0, charged=1.0, length=1.0)

    assert chosen_of([outcome(9.0, -5.0), outcome(3.0, 2.0), outcome(4.0, 1.0)]) == 1
