"""Collecting: several real envs, episodes of different lengths, and runs that go on within them."""

from __future__ import annotations

import threading

import gymnasium
import pytest
import torch
from _real_envs import MBPO as SMALL_MBPO, PETS as SMALL_PETS, Ragged
from _runs import assert_same, interrupt
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule

from torchrl_wm.trainers import (
    make_real_env,
    MBPOTrainer,
    PETSTrainer,
    RunConfig,
    RunFolder,
)
from torchrl_wm.trainers.collecting import RealSteps

RAGGED = "_real_envs:Ragged"
PETS = {
    **SMALL_PETS,
    "env": RAGGED,
    "trials": 6,
    "random_hold": 2,
    "model_interval": 4,
    "logger": "csv",
}
MBPO = {
    **SMALL_MBPO,
    "env": RAGGED,
    "steps": 44,
    "random_hold": 2,
    "evaluation_interval": 20,
    "evaluation_episodes": 1,
    "logger": "csv",
}


def push(value: float = 0.25) -> TensorDictModule:
    """A policy that always does the same."""
    return TensorDictModule(
        lambda place: torch.full_like(place[..., :1], value),
        ["observation"],
        ["action"],
    )


def collected(number: int, **settings) -> tuple[TensorDictBase, list[dict], RealSteps]:
    """The steps ``[T, N]`` of a policy that pushes, the rows of the metrics, the collector."""
    config = RunConfig(
        **{"env": RAGGED, "random_steps": 1, "logger": "csv", **settings}
    )
    kept = ("seed", "max_episode_steps", "action_repeat")
    env = make_real_env(config.env, **{name: getattr(config, name) for name in kept})
    collector = RealSteps(config, config.env, env, push(), torch.device("cpu"))
    collector.begin()
    total, all_steps, rows = 0, [], []
    for steps in collector:
        total += len(steps)
        all_steps.append(steps)
        rows += collector.finished(collector.count(steps, total), len(rows))
        if len(all_steps) == number:
            break
    collector.shutdown()
    return torch.stack(all_steps), rows, collector


def episodes_of(steps: TensorDictBase) -> list[TensorDictBase]:
    """The episodes of one env, ``[T]``, those that have ended."""
    ends = (steps["next", "done"].flatten().nonzero().flatten() + 1).tolist()
    return [steps[begin:end] for begin, end in zip([0, *ends], ends)]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_each_env_begins_every_nth_episode(number) -> None:
    steps, rows, collector = collected(40, num_envs=number, seed=7)
    assert steps.batch_size == (40, number)
    alone = make_real_env(RAGGED, seed=7)
    begins = [alone.reset()["observation"] for _ in range(60)]
    lengths = []
    for env in range(number):
        episodes = episodes_of(steps[:, env])
        assert len(episodes) == collector.episodes.finished[env] > 3
        for index, episode in enumerate(episodes):
            expected = begins[env + number * index]
            assert torch.equal(episode["observation"][0], expected)
            assert len(episode) == expected[1]  # as the env itself said
        lengths.append([len(episode) for episode in episodes])
    assert len({tuple(each) for each in lengths}) == number
    assert sorted(row["length"] for row in rows) == sorted(sum(lengths, []))


@pytest.mark.parametrize("number", [1, 3])
def test_rows_say_what_the_envs_gave(number) -> None:
    steps, rows, _ = collected(30, num_envs=number)
    assert [row["episode"] for row in rows] == list(range(1, len(rows) + 1))
    returns = sorted(
        episode["next", "reward"].double().sum().item()
        for env in range(number)
        for episode in episodes_of(steps[:, env])
    )
    assert sorted(row["return"] for row in rows) == pytest.approx(returns)
    observed, following = steps["observation"], steps["next", "observation"]
    goes_on = ~steps["next", "done"][:-1, :, 0]
    assert torch.equal(following[:-1][goes_on], observed[1:][goes_on])


def test_random_and_planned_episodes_at_the_same_time() -> None:
    steps, rows, _ = collected(30, num_envs=3, random_steps=14)
    pushed = (steps["action"] == 0.25).squeeze(-1)
    assert ((pushed.any(1)) & (~pushed).any(1)).any()  # both, at one step
    planned, begun = [], 0
    for env in range(3):
        for episode in episodes_of(steps[:, env]):
            flags = (episode["action"] == 0.25).flatten()
            assert flags.all() or not flags.any()
            planned.append(bool(flags.all()))
    assert sorted(1 - row["random"] for row in rows) == sorted(planned)
    # Random are those that begin before the random steps are over.
    for env in range(3):
        begun = 0
        for episode in episodes_of(steps[:, env]):
            is_random = begun * 3 < 14
            assert bool((episode["action"] == 0.25).all()) != is_random
            begun += len(episode)


def test_each_env_holds_its_random_actions() -> None:
    steps, _, _ = collected(40, num_envs=2, random_steps=1000, random_hold=3)
    firsts = []
    for env in range(2):
        episodes = episodes_of(steps[:, env])
        assert len({len(episode) for episode in episodes}) > 2
        for episode in episodes:
            actions = episode["action"].flatten()
            changes = (actions[1:] != actions[:-1]).nonzero().flatten() + 1
            assert changes.tolist() == list(range(3, len(actions), 3))
            firsts.append(float(actions[0]))
    assert len(set(firsts)) == len(firsts)


# Repeated actions -----------------------------------------------------------


@pytest.mark.parametrize("repeat", [2, 4])
@pytest.mark.parametrize("number", [1, 2])
def test_repeated_actions_are_steps_by_hand(repeat, number) -> None:
    steps, rows, _ = collected(24, num_envs=number, action_repeat=repeat, seed=3)
    by_hand = make_real_env(RAGGED, seed=3)
    seeds = by_hand.transform[0]
    for env in range(number):
        for index, episode in enumerate(episodes_of(steps[:, env])):
            seeds.episode = env + number * index
            now = by_hand.reset()
            for step in episode.unbind(0):
                assert torch.equal(step["observation"], now["observation"])
                total = torch.zeros(1)
                for _ in range(repeat):
                    now = by_hand.step(now.set("action", step["action"]))["next"]
                    total += now["reward"]
                    if now["done"]:
                        break
                torch.testing.assert_close(step["next", "reward"], total)
                assert torch.equal(step["next", "observation"], now["observation"])
                assert torch.equal(step["next", "done"], now["done"])
            assert now["done"]
            assert episode["next", "step_count"][-1] == len(episode)
    assert max(row["length"] for row in rows) <= -(-9 // repeat)


def test_the_time_limit_counts_repeated_actions_once() -> None:
    env = make_real_env("Pendulum-v1", max_episode_steps=7, action_repeat=3)
    episode = env.rollout(100)
    assert len(episode) == 7 and episode["next", "truncated"][-1]
    with pytest.raises(ValueError, match="action_repeat must be at least 1, got 0"):
        make_real_env("Pendulum-v1", action_repeat=0)


# Going on within episodes ------------------------------------------------------


NESTED = {"env": "_real_envs:make_nested_ragged"}


@pytest.mark.parametrize(
    "kind, settings, after",
    [
        (PETSTrainer, {**PETS, "num_envs": 2, "propagation": "tsinf", **NESTED}, 17),
        (PETSTrainer, {**PETS, "num_envs": 3, "planner": "cem"}, 14),
        (PETSTrainer, {**PETS, "propagation": "tsinf"}, 29),
        (MBPOTrainer, {**MBPO, "num_envs": 2, "action_repeat": 2}, 15),
        (MBPOTrainer, {**MBPO, "num_envs": 3, **NESTED}, 7),
    ],
    ids=["pets-2-nested", "pets-3", "pets-1", "mbpo-2-repeated", "mbpo-3-nested"],
)
def test_runs_go_on_in_the_midst_of_episodes(kind, settings, after, tmp_path) -> None:
    whole = kind(**settings)
    whole.train()
    interrupt(kind.start(tmp_path / "run", **settings), after)
    torch.manual_seed(99)
    again = kind.resume(tmp_path / "run")
    lengths = again.collector.episodes.lengths
    if settings.get("num_envs", 1) > 1:  # the episode of one ended, not that of others
        assert (lengths > 0).any() and (lengths == 0).any()
    again.train()
    assert_same(again, whole)
    # A second look at the first checkpoint that is left gives the same once more.
    first = int(RunFolder.open(tmp_path / "run").saved()[0].name.partition("-")[2])
    last = kind.resume(tmp_path / "run", checkpoint=first)
    last.train()
    assert_same(last, whole)


def test_a_run_that_had_reached_its_goal_goes_on_for_another(tmp_path) -> None:
    """One env, in the midst of an episode."""
    settings = {**MBPO, "evaluation_interval": 22}
    whole = MBPOTrainer(**settings)
    whole.train()
    MBPOTrainer.start(tmp_path / "run", **settings, stop_return=-1e6).train()
    again = MBPOTrainer.resume(tmp_path / "run")
    assert again.is_over and again.collected_frames == 22
    assert again.collector.episodes.lengths.item() > 0
    again = MBPOTrainer.resume(tmp_path / "run", stop_return=1e6)
    again.train()
    assert_same(again, whole)
    with pytest.raises(ValueError, match="stop_return=5.* before the 1000000"):
        MBPOTrainer.resume(tmp_path / "run", stop_return=5.0)
    last = MBPOTrainer.resume(tmp_path / "run", stop_return=None)
    assert last.config.stop_return is None


@pytest.mark.parametrize("env", ["InvertedPendulum-v5", "dm_control/cartpole/balance"])
def test_physics_repeat_themselves(env, tmp_path) -> None:
    pytest.importorskip("dm_control" if "dm" in env else "mujoco")
    settings = {**MBPO, "num_envs": 2, "env": env, "max_episode_steps": 14}
    settings.update(steps=50, evaluation_interval=17, random_hold=1)
    reached = {**settings, "stop_return": -1e6}  # in the midst of episodes
    whole = MBPOTrainer(**settings)
    whole.train()
    MBPOTrainer.start(tmp_path / "run", **reached).train()
    again = MBPOTrainer.resume(tmp_path / "run", stop_return=None)
    assert (again.collector.episodes.lengths > 0).any() and not again.is_over
    again.train()
    assert_same(again, whole)


def test_processes_give_what_one_process_gives(tmp_path) -> None:
    settings = {**MBPO, "num_envs": 2, "steps": 36, "evaluation_interval": 0}
    whole = MBPOTrainer(**settings)
    whole.train()
    settings["collector"] = "processes"
    interrupt(MBPOTrainer.start(tmp_path / "run", **settings), 14)
    again = MBPOTrainer.resume(tmp_path / "run")
    assert (again.collector.episodes.lengths > 0).any()
    again.train()
    assert_same(again, whole)


class Restless(Ragged):
    """It never does the same twice."""

    draws = 0

    def step(self, action):
        type(self).draws += 1
        self.place += 0.001 * type(self).draws
        return super().step(action)


@pytest.mark.parametrize("random_steps", [20, 60])
def test_an_env_that_does_not_repeat_itself(random_steps, tmp_path) -> None:
    settings = {**PETS, "num_envs": 2, "env": Restless, "random_steps": random_steps}
    interrupt(PETSTrainer.start(tmp_path / "run", **settings), 19)
    again = PETSTrainer.resume(tmp_path / "run", env=Restless)
    before = again.collector.episodes.finished.clone()
    were_random = again.collector.episodes.random.clone()
    steps = again.collected_frames
    with pytest.warns(UserWarning, match="(?s)does not repeat itself.*new ones begin"):
        again.train()
    assert again.is_over
    assert [row["step"] for row in again.metrics] == sorted(
        row["step"] for row in again.metrics
    )
    # New episodes, of numbers that no other has; random ones stay random.
    new = again.data[:][steps : steps + 2]
    numbers = [int(2 * (before[env] + 1) + env) for env in range(2)]
    env = make_real_env(Ragged, seed=0)
    for row, number in zip(new, numbers):
        env.transform[0].episode = number
        assert torch.equal(row["observation"], env.reset()["observation"])
    if random_steps == 60:
        assert were_random.all()
        assert not again.learner.steps or again.collected_frames > 60
    planned = [row for row in again.metrics if not row["random"]]
    assert len(planned) >= 6


class Uncopyable(Ragged):
    """It holds a lock."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


@pytest.mark.parametrize(
    "settings",
    [
        {"num_envs": 2},
        {"collector": "processes"},
        {"evaluation_interval": 20},
        {"film_interval": 20},
    ],
)
def test_an_env_that_cannot_be_copied(settings, tmp_path) -> None:
    with pytest.raises(ValueError, match="(?s)Uncopyable cannot be copied.*num_envs=1"):
        PETSTrainer.start(tmp_path / "run", **{**PETS, "env": Uncopyable(), **settings})
    assert not (tmp_path / "run").exists()  # nothing was begun
    alone = PETSTrainer(**{**PETS, "env": Uncopyable(), "trials": 1})
    alone.train()
    assert alone.is_over


@pytest.mark.parametrize("number", [1, 2])
def test_an_env_that_was_given_is_copied_and_left_alone(number) -> None:
    env = Ragged()
    trainer = PETSTrainer(**{**PETS, "env": env, "num_envs": number, "trials": 2})
    trainer.train()
    named = PETSTrainer(**{**PETS, "num_envs": number, "trials": 2})
    named.train()
    assert_same(trainer, named)
    assert hasattr(env, "left") == (number == 1)


def test_another_number_of_envs_does_not_fit(tmp_path) -> None:
    import json

    PETSTrainer.start(tmp_path / "run", **{**PETS, "num_envs": 2, "trials": 1}).train()
    file = tmp_path / "run" / "config.json"
    config = json.loads(file.read_text())
    config["config"]["num_envs"] = 3
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not fit.*2 envs, and the run 3"):
        PETSTrainer.resume(tmp_path / "run")


def test_actions_are_kept_for_no_longer_than_episodes_go_on() -> None:
    _, _, collector = collected(30, num_envs=2)
    state = collector.episodes.state_dict()
    lengths = collector.episodes.lengths
    assert state["steps"] == lengths.max() if lengths.any() else "steps" not in state


def test_a_dictionary_of_random_states_is_left_alone() -> None:
    """A reset seeds the env, and not what is drawn outside."""
    env = make_real_env(gymnasium.make("Pendulum-v1"), seed=3)
    state = torch.get_rng_state()
    env.reset()
    assert torch.equal(state, torch.get_rng_state())
    assert isinstance(env.reset(), TensorDict)
