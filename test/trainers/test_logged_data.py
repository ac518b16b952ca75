"""Logged data in all its forms, and world models trained on them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _models import SpecEnv
from _real_envs import LastAction, make_reacher
from tensordict import TensorDict
from torchrl.data import (
    Bounded,
    Composite,
    LazyTensorStorage,
    ListStorage,
    ReplayBuffer,
    TensorDictReplayBuffer,
    Unbounded,
)
from torchrl.envs import GymEnv, GymWrapper, RenameTransform, TransformedEnv

from torchrl_wm import WorldModelEnv
from torchrl_wm.models import load_world_model, save_world_model
from torchrl_wm.trainers import load_transitions, RecordedEnv, train_world_model
from torchrl_wm.trainers.model_training import as_episodes

SMALL = {"steps": 20, "interval": 10, "members": 3, "hidden": (16,), "batch_size": 16}


def line(steps: int, start: float = 0.0) -> dict[str, np.ndarray]:
    """An episode in which each observation tells its time."""
    return {
        "observations": start + np.arange(steps + 1.0)[:, None],
        "actions": np.full((steps, 2), 0.5),
        "rewards": np.arange(steps, dtype=np.float64),
        "terminations": np.array([False] * (steps - 1) + [True]),
    }


def check_line(data) -> None:
    assert data["observation"].dtype is torch.float32
    torch.testing.assert_close(data["next", "observation"], data["observation"] + 1)
    assert data["next", "reward"].shape == (len(data), 1)
    assert data["next", "done"].dtype is torch.bool


# Arrays ----------------------------------------------------------------------------


def test_an_episode_with_its_last_observation() -> None:
    data = load_transitions(line(5))
    assert data.shape == (5,)
    check_line(data)
    assert data["next", "terminated"].flatten().tolist() == [False] * 4 + [True]
    assert not data["next", "truncated"].any()


def test_the_two_observations_of_a_file_have_memory_of_their_own(tmp_path) -> None:
    rows = {name: value.astype(np.float32) for name, value in line(4).items()}
    np.savez(tmp_path / "episode.npz", **rows)
    data = load_transitions(tmp_path / "episode.npz")
    data["observation"].mul_(10)
    assert data["next", "observation"].flatten().tolist() == [1, 2, 3, 4]


def test_episodes_that_are_cut_off_are_truncated_not_terminated() -> None:
    cut = {**line(4), "terminations": np.zeros(4, bool)}
    data = load_transitions([cut, line(3, 100.0)])
    check_line(data)
    assert data["next", "terminated"].flatten().tolist() == [False] * 6 + [True]
    assert data["next", "truncated"].flatten().nonzero().flatten().tolist() == [3]
    assert data["next", "done"].flatten().nonzero().flatten().tolist() == [3, 6]


def test_steps_with_their_next_observations() -> None:
    arrays = line(6)
    arrays["next_observations"] = arrays["observations"][1:]
    arrays["observations"] = arrays["observations"][:-1]
    arrays["truncations"] = np.array([False, True] + [False] * 4)
    data = load_transitions(arrays)
    check_line(data)
    assert data["next", "done"].flatten().nonzero().flatten().tolist() == [1, 5]


def test_observations_that_are_dictionaries(tmp_path) -> None:
    arrays = line(5)
    place = arrays.pop("observations")
    nested = {"place": place, "body": {"speed": place * 2}}
    data = load_transitions({**arrays, "observations": nested})
    assert data["next", "body", "speed"].flatten().tolist() == [2.0, 4, 6, 8, 10]
    flat = {"observations/place": place, "observations/body/speed": place * 2}
    np.savez(tmp_path / "data.npz", **arrays, **flat)
    assert (load_transitions(tmp_path / "data.npz") == data).all()
    world_model, _ = train_world_model(data, **SMALL)
    assert set(world_model.latent_keys) == {"place", ("body", "speed")}


@pytest.mark.parametrize(
    "name, other",
    [
        ("action", "env_action"),
        ("reward", "env_reward"),
        ("done", "env_done"),
        ("terminated", "env_terminated"),
        ("truncated", "env_truncated"),
        ("next", "env_next"),
        ("step_count", "env_step_count"),
        ("robot/action", "robot/env_action"),
        ("robot/done", "robot/env_done"),
        ("next/place", "env_next/place"),
    ],
)
def test_observations_called_as_something_else_are_refused(
    name, other, tmp_path
) -> None:
    arrays = line(5)
    place = arrays.pop("observations")

    def write(last: str) -> str:
        observations = {"observations/speed": place, f"observations/{last}": place * 3}
        np.savez(tmp_path / "data.npz", **arrays, **observations)
        return tmp_path / "data.npz"

    with pytest.raises(ValueError, match=f"'{name}'.*{other!r} for {name!r}"):
        load_transitions(write(name))
    data = load_transitions(write(other))
    key = tuple(other.split("/"))
    assert torch.equal(data["action"], torch.full((5, 2), 0.5))
    assert data.get(key).flatten().tolist() == [0.0, 3, 6, 9, 12]
    assert data.get(("next", *key)).flatten().tolist() == [3.0, 6, 9, 12, 15]
    observed = RecordedEnv(data).observation_spec.keys(True, True)
    assert {"speed", key[0] if len(key) == 1 else key} == set(observed)


def test_an_env_says_which_of_its_entries_are_observations() -> None:
    key = ("robot", "action")
    env = SpecEnv(observation=1, observation_key=key)
    arrays = line(5)
    arrays["observations"] = {"robot": {"action": arrays["observations"]}}
    data = load_transitions(arrays, env=env)
    assert data[key].flatten().tolist() == [0.0, 1, 2, 3, 4]
    rollout = data.exclude(("next", "action"))
    with pytest.raises(ValueError, match=r"\('next', 'robot', 'action'\) beside"):
        load_transitions(rollout)
    assert (load_transitions(rollout, env=env) == data).all()


def test_a_rollout_in_which_the_last_action_is_observed() -> None:
    env = GymWrapper(LastAction())
    with pytest.raises(ValueError, match=r"\('next', 'action'\).*RenameTransform"):
        load_transitions(env.rollout(6))
    with pytest.raises(ValueError, match="'action'.*RenameTransform.*'env_action'"):
        load_transitions(env.rollout(6), env=env)
    renamed = TransformedEnv(env, RenameTransform(["action"], ["env_action"]))
    data = load_transitions(renamed.rollout(6))
    torch.testing.assert_close(data["next", "env_action"], 5 + data["action"])
    assert "env_action" in RecordedEnv(data).observation_spec.keys()


def clocked(start: float = 1.7e9, steps: int = 120) -> list[dict[str, np.ndarray]]:
    """Episodes that observe the time, in seconds since 1970."""
    random, out = np.random.default_rng(0), []
    for number in range(8):
        time = start + (steps + 1) * number + np.arange(steps + 1.0)
        actions = random.uniform(-1, 1, (steps, 1))
        place = np.concatenate([[0.0], np.cumsum(0.1 * actions)])
        out.append(
            {
                "observations": {"body": {"time": time, "place": place}},
                "actions": actions,
                "rewards": random.normal(size=steps),
                "terminations": np.zeros(steps, bool),
            }
        )
    return out


def test_large_numbers_keep_the_digits_that_change() -> None:
    data = load_transitions(clocked())
    key = ("body", "time")
    assert data[key].dtype is data.get(("next", *key)).dtype is torch.float64
    assert torch.equal(data.get(("next", *key)), data[key] + 1)
    assert data["body", "place"].dtype is data["action"].dtype is torch.float32
    settings = {**SMALL, "steps": 150, "interval": 150, "hidden": (32, 32)}
    settings.update(batch_size=128, learning_rate=3e-3, seed=0)
    with pytest.warns(UserWarning, match=r"\('body', 'time'\) is too large"):
        model, metrics = train_world_model(data, **settings)
    since_start = clocked(start=0.0)
    _, small = train_world_model(since_start, **settings)
    assert metrics[-1]["held_out_error"] < 1.2 * small[-1]["held_out_error"] < 0.5
    env = WorldModelEnv(model, RecordedEnv(data), start_states=data[:3])
    imagined = env.imagine(4)
    torch.testing.assert_close(
        imagined.get(("next", *key)) - imagined[key],
        torch.ones(1, 4, 1, dtype=torch.float64).reshape(imagined[key].shape),
        atol=0.05,
        rtol=0,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_env_says_in_which_precision_large_numbers_stay(dtype, recwarn) -> None:
    env = SpecEnv(action_spec=Bounded(-1.0, 1.0, (1,)))
    extra = Composite(body={"place": Unbounded((1,)), "time": Unbounded((1,))})
    extra["body", "time"] = Unbounded((1,), dtype=dtype)
    env.observation_spec = extra
    data = load_transitions(clocked(), env=env)
    assert data["body", "time"].dtype is data["next", "body", "time"].dtype is dtype
    named = ["('body', 'time') is too large" in str(w.message) for w in recwarn]
    if dtype is torch.float64:
        steps = data["next", "body", "time"] - data["body", "time"]
        assert (steps == 1).all() and not any(named)
    else:
        assert any(named)


@pytest.mark.parametrize("dtype", [np.float16, np.int16])
def test_the_env_s_floats_are_made_of_other_numbers(dtype) -> None:
    log = line(6)
    log["actions"] = log["actions"].astype(np.float16)
    log["observations"] = log["observations"].astype(dtype)
    env = RecordedEnv(load_transitions(line(6)), action_bounds=(-1, 1))
    data = load_transitions(log, env=env)
    check_line(data)
    assert data["action"].dtype is torch.float32
    if dtype is np.float16:  # and without the env
        data = load_transitions(log)
        check_line(data)
        assert data["action"].dtype is torch.float32


def test_class_numbers_become_one_hot() -> None:
    env = GymEnv("CartPole-v1")
    torch.manual_seed(0)
    real = env.rollout(8)
    arrays = {
        "observations": torch.cat(
            [real["observation"], real["next", "observation"][-1:]]
        ),
        "actions": real["action"].argmax(-1).numpy(),
        "rewards": np.ones(len(real)),
        "terminations": real["next", "terminated"].numpy(),
    }
    data = load_transitions(arrays, env=env)
    assert torch.equal(data["action"], real["action"])
    alone = load_transitions(arrays)  # both of the options were chosen
    assert torch.equal(alone["action"], real["action"])
    world_model, _ = train_world_model(arrays, **SMALL)
    assert world_model.recipe.specs.actions[0].to_spec() == env.action_spec
    with pytest.raises(ValueError, match="from 0 to 7"):
        load_transitions({**arrays, "actions": np.arange(len(real)) % 8}, env=env)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"rewards": None}, KeyError, r"\['rewards'\] are missing"),
        (
            {"terminals": np.zeros(5)},
            ValueError,
            r"'terminals'\] of the data would all",
        ),
        ({"actions": np.zeros((4, 2))}, ValueError, "actions of the data has 4 rows"),
        ({"observations": np.zeros((4, 1))}, ValueError, "4 rows.*5 were expected"),
        ({"rewards": np.zeros((5, 3))}, ValueError, r"one number for each step"),
        ({"terminations": np.array([0, 1, 0, 0, 1])}, ValueError, "ends at step 1"),
        ({"next_observations": np.zeros((5, 2))}, ValueError, "observations"),
        ({"rewards": np.array(["a"] * 5)}, ValueError, "array of numbers"),
    ],
)
def test_arrays_that_do_not_fit(change, error, message) -> None:
    arrays = {k: v for k, v in {**line(5), **change}.items() if v is not None}
    with pytest.raises(error, match=message):
        load_transitions(arrays)


# TorchRL's forms ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def rollout() -> TensorDict:
    env = GymWrapper(make_reacher())
    env.set_seed(0)
    return env.rollout(60, break_when_any_done=False)


def test_rollouts_buffers_and_their_folders(rollout, tmp_path) -> None:
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(100), batch_size=8)
    buffer.extend(rollout)
    buffer.dumps(tmp_path / "buffer")
    rollout.memmap(tmp_path / "tensordict", copy_existing=True)
    expected = load_transitions(rollout)
    for source in (buffer, tmp_path / "buffer", str(tmp_path / "tensordict")):
        data = load_transitions(source)
        assert len(data) == 60
        for key in ("place", "speed", "action", ("next", "place"), ("next", "reward")):
            assert torch.equal(data[key], expected[key])


def test_padding_is_left_out(rollout) -> None:
    padded = rollout[:20].reshape(2, 10).clone()
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[1, 6:] = False
    padded.set(("collector", "mask"), mask)
    assert len(load_transitions(padded)) == 16


@pytest.mark.parametrize("place", [(), ("agents",)])
def test_what_says_that_episodes_end(place) -> None:
    """Any of the three is enough, and one must be there."""
    names = {
        name: ("next", *place, name) for name in ("done", "terminated", "truncated")
    }
    whole = cut_off(6, 0.0, place)
    for name, step in (("terminated", 1), ("truncated", 3)):
        whole[names[name]][step] = True
        whole[names["done"]][step] = True
    expected = load_transitions(whole)
    for absent in (["done"], ["terminated"], ["truncated"], ["truncated", "done"]):
        data = load_transitions(whole.exclude(*[names[name] for name in absent]))
        for name, key in names.items():
            same = torch.equal(data[key], expected[key])
            assert same or absent == ["truncated", "done"] and name != "terminated"
    assert [len(episode) for episode in as_episodes(data)] == [2, 4]
    ended = load_transitions(whole.exclude(names["terminated"], names["truncated"]))
    assert torch.equal(ended[names["done"]], expected[names["done"]])
    lacking = whole.exclude(*names.values())
    with pytest.raises(KeyError, match=r"lacks .*\('next', 'done'\)"):
        load_transitions(lacking)


# Where episodes end --------------------------------------------------------------------


def cut_off(steps: int, start: float = 0.0, place: tuple = ()) -> TensorDict:
    """A line ``[T]`` that goes on; ``place`` is where below "next" the ends stand."""
    before = start + torch.arange(float(steps)).unsqueeze(-1)
    data = TensorDict(
        {
            "observation": before,
            "action": torch.zeros(steps, 1),
            "next": {"observation": before + 1, "reward": torch.zeros(steps, 1)},
        },
        batch_size=[steps],
    )
    feature = (2, 1) if place else (1,)  # two agents
    for name in ("done", "terminated", "truncated"):
        flag = torch.zeros(steps, *feature, dtype=torch.bool)
        data.set(("next", *place, name), flag)
    return data


def lengths(data: TensorDict) -> list[int]:
    """The lengths of the episodes, each of which is one line."""
    episodes = as_episodes(data)
    for episode in episodes:
        now, following = episode["observation"], episode["next", "observation"]
        torch.testing.assert_close(now[1:], following[:-1])
    return [len(episode) for episode in episodes]


@pytest.mark.parametrize("place", [(), ("agents",)])
def test_rows_of_a_rollout_that_are_cut_off_are_truncated(place) -> None:
    rows = torch.stack([cut_off(5, 0.0, place), cut_off(5, 100.0, place)])
    rows[("next", *place, "done")][1, -1] = True
    rows[("next", *place, "terminated")][1, -1] = True
    given = rows.clone()
    data = load_transitions(rows)
    assert lengths(data) == [5, 5]
    for name, ends in (("done", [4, 9]), ("truncated", [4]), ("terminated", [9])):
        flags = data[("next", *place, name)].flatten(1)
        assert (flags.any(1) == flags.all(1)).all()
        assert flags.any(1).nonzero().flatten().tolist() == ends
    assert (rows == given).all()  # what was given is as it was
    rows["collector", "mask"] = torch.arange(5) < torch.tensor([[3], [5]])
    assert lengths(load_transitions(rows)) == [3, 5]


def test_steps_that_begin_an_episode_end_the_one_before() -> None:
    data = torch.cat([cut_off(3), cut_off(4, 100.0)])
    begins = torch.zeros(7, 1, dtype=torch.bool)
    begins[[0, 3]] = True
    assert lengths(load_transitions(data.clone().set("is_init", begins))) == [3, 4]
    below = data.clone().set(("agents", "is_init"), begins.unsqueeze(1).expand(7, 2, 1))
    assert lengths(load_transitions(below)) == [3, 4]
    numbered = data.clone().set(("collector", "traj_ids"), begins.squeeze(-1).cumsum(0))
    assert lengths(load_transitions(numbered)) == [3, 4]


def test_dictionaries_with_next_observations_are_episodes_of_their_own() -> None:
    arrays = []
    for start in (0.0, 100.0):
        one = {**line(5, start), "terminations": np.zeros(5, bool)}
        one["next_observations"] = one["observations"][1:]
        one["observations"] = one["observations"][:-1]
        arrays.append(one)
    data = load_transitions(arrays)
    assert lengths(data) == [5, 5]
    assert data["next", "truncated"].flatten().nonzero().flatten().tolist() == [4, 9]


@pytest.mark.parametrize("ndim", [1, 2])
def test_buffers_that_wrapped_are_read_from_their_oldest_step_on(
    ndim, tmp_path
) -> None:
    storage = LazyTensorStorage(10 * ndim, ndim=ndim)
    buffer = TensorDictReplayBuffer(storage=storage, batch_size=4)
    expected = []
    for parts in ((0, 7), (7, 13)):
        steps = cut_off(parts[1] - parts[0], parts[0])
        if ndim == 2:
            other = cut_off(parts[1] - parts[0], 100.0 + parts[0])
            steps = torch.stack([steps, other])
        buffer.extend(steps)
        first = max(0, parts[1] - 10)
        expected = [*range(first, parts[1])]
        if ndim == 2:
            expected += [100 + time for time in expected]
        folder = tmp_path / str(parts[1])
        buffer.dumps(folder)
        for source in (buffer, folder, folder / "storage"):
            data = load_transitions(source)
            assert data["observation"].flatten().tolist() == expected
            assert lengths(data) == [len(expected) // ndim] * ndim


def test_buffers_whose_items_are_trajectories(tmp_path) -> None:
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(5), batch_size=4)
    for parts in ((0, 2), (2, 5), (5, 7)):
        lines = [cut_off(5, 100.0 * number) for number in range(*parts)]
        buffer.extend(torch.stack(lines))
    buffer.dumps(tmp_path / "buffer")
    for source in (buffer, tmp_path / "buffer"):
        data = load_transitions(source)
        assert lengths(data) == [5] * 5
        assert data["observation"][::5, 0].tolist() == [200, 300, 400, 500, 600]


def test_sources_that_are_none(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no .*nowhere"):
        load_transitions(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is not an .npz"):
        load_transitions(tmp_path)
    with pytest.raises(ValueError, match="got int"):
        load_transitions(3)
    np.savez(tmp_path / "evil.npz", observations=np.array([object()]))
    with pytest.raises(ValueError, match="Arrays of objects are not"):
        load_transitions(tmp_path / "evil.npz")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(ValueError, match="cannot be read"):
        load_transitions(tmp_path / "cut.npz")
    with pytest.raises(KeyError, match="lacks"):
        load_transitions(TensorDict({"observation": torch.zeros(3, 1)}, [3]))
    with pytest.raises(KeyError, match="lacks.*'reward'"):
        load_transitions(cut_off(3).exclude(("next", "reward")))
    with pytest.raises(KeyError, match="lacks"):
        load_transitions(cut_off(3).exclude("next").set("reward", torch.zeros(3, 1)))


@pytest.mark.parametrize("storage", [LazyTensorStorage(9), ListStorage(9)])
def test_buffers_without_a_transition(storage) -> None:
    with pytest.raises(ValueError, match="no transition"):
        load_transitions(ReplayBuffer(storage=storage))
    with pytest.raises(ValueError, match="no transition"):
        load_transitions(cut_off(3)[:0])


def test_a_minari_dataset_on_disk(tmp_path, monkeypatch) -> None:
    minari = pytest.importorskip("minari")
    pytest.importorskip("h5py")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    import gymnasium
    from minari.data_collector import EpisodeBuffer

    env, buffers, lengths = gymnasium.make("CartPole-v1"), [], []
    env.action_space.seed(0)
    for seed in range(3):
        rows = {"observations": [env.reset(seed=seed)[0]]}
        over = False
        while not over:
            action = env.action_space.sample()
            observation, reward, terminated, truncated, _ = env.step(action)
            over = terminated or truncated
            rows["observations"].append(observation)
            for name, value in (
                ("actions", action),
                ("rewards", reward),
                ("terminations", terminated),
                ("truncations", truncated),
            ):
                rows.setdefault(name, []).append(value)
        lengths.append(len(rows["rewards"]))
        rows = {name: np.array(value) for name, value in rows.items()}
        buffers.append(EpisodeBuffer(id=seed, seed=seed, **rows))
    minari.create_dataset_from_buffers(
        "ours/cartpole-v0", buffers, env=env, description="three episodes"
    )
    data = load_transitions("minari:ours/cartpole-v0")
    assert len(data) == sum(lengths)
    assert data["action"].shape == (sum(lengths), 2)
    assert int(data["next", "terminated"].sum()) == 3
    folder = tmp_path / "ours" / "cartpole-v0"
    assert (load_transitions(folder) == data).all()
    with pytest.raises(FileNotFoundError, match="Nothing is downloaded"):
        load_transitions("minari:ours/other-v0")
    world_model, _ = train_world_model(data, **SMALL)
    assert world_model.done_head is not None


# Training ---------------------------------------------------------------------------------


def linear(episodes: int = 12, steps: int = 20) -> list[dict[str, np.ndarray]]:
    """Episodes of a world that a small network learns at once."""
    rng, out = np.random.default_rng(0), []
    for _ in range(episodes):
        place, places, actions = rng.normal(size=2), [], rng.uniform(-1, 1, (steps, 1))
        places.append(place)
        for action in actions:
            place = 0.9 * place + 0.5 * action
            places.append(place)
        observations = np.array(places)
        out.append(
            {
                "observations": observations,
                "actions": actions,
                "rewards": observations[:-1].sum(1),
                "terminations": np.zeros(steps, bool),
            }
        )
    return out


def test_it_learns_what_it_is_not_shown() -> None:
    settings = {"members": 3, "hidden": (32, 32), "batch_size": 64, "seed": 0}
    world_model, metrics = train_world_model(
        linear(), steps=300, interval=100, **settings
    )
    assert [row["step"] for row in metrics] == [100, 200, 300]
    assert metrics[-1]["held_out_error"] < 0.2
    assert metrics[-1]["held_out_reward_error"] < 0.3
    again, repeated = train_world_model(linear(), steps=300, interval=100, **settings)
    assert repeated == metrics


def test_the_model_imagines_and_is_saved(tmp_path) -> None:
    data = load_transitions(linear(3))
    world_model, _ = train_world_model(data, **SMALL)
    assert world_model.done_head is None  # no episode terminates
    env = WorldModelEnv(world_model, RecordedEnv(data), batch_size=[])
    imagined = env.imagine(
        4, tensordict=data[:5].exclude("next"), actions=torch.zeros(5, 4, 1)
    )
    assert imagined["next", "reward"].shape == (5, 4, 1)
    save_world_model(world_model, tmp_path / "model.pt")
    again = load_world_model(tmp_path / "model.pt")
    for mine, theirs in zip(again.parameters(), world_model.parameters()):
        assert torch.equal(mine, theirs)


def test_the_best_weights_are_kept() -> None:
    from torchrl_wm.trainers.model_training import held_out_errors, split_transitions

    data = load_transitions(linear(6))
    world_model, metrics = train_world_model(
        data, **{**SMALL, "steps": 60}, learning_rate=0.3, seed=1
    )
    _, test = split_transitions(data, 0.1, 1)
    best = min(row["held_out_error"] for row in metrics)
    assert held_out_errors(world_model, test)["held_out_error"] == pytest.approx(best)


def test_whole_episodes_are_held_out() -> None:
    from torchrl_wm.trainers.model_training import split_transitions

    data = load_transitions([line(4, 100.0 * n) for n in range(10)])
    train, test = split_transitions(data, 0.2, 0)
    assert (len(train), len(test)) == (32, 8)
    numbers = [
        set((part["observation"] // 100).flatten().tolist()) for part in (train, test)
    ]
    assert not numbers[0] & numbers[1]


def test_a_recorded_env_gives_starts_and_no_steps() -> None:
    env = RecordedEnv(load_transitions(linear(3)))
    start = env.reset()
    assert start["observation"].shape == (2,)
    with pytest.raises(RuntimeError, match="cannot be stepped"):
        env.step(env.rand_action(start))


@pytest.mark.parametrize(
    "settings", [{"steps": 0}, {"held_out": 0.0}, {"held_out": 1.0}, {"interval": 0}]
)
def test_bad_settings(settings) -> None:
    with pytest.raises(ValueError, match="steps and interval"):
        train_world_model(linear(2), **{**SMALL, **settings})
    with pytest.raises(ValueError, match="too few"):
        train_world_model(line(1), **SMALL)


@pytest.mark.parametrize("name", ["rewards", "actions", "observations"])
def test_numbers_that_are_none_are_named(name) -> None:
    episodes = linear(4)
    episodes[2][name][3] = np.nan
    key = {"rewards": r"\('next', 'reward'\)"}.get(name, name[:-1])
    with pytest.raises(ValueError, match=f"{key}.* NaN or infinite.*1 of 80.* 43"):
        train_world_model(episodes, **SMALL)


def test_nested_numbers_that_are_none_are_named_and_those_not_learnt_are_not() -> None:
    data = load_transitions(linear(4))
    for key in ("observation", ("next", "observation")):
        below = key if isinstance(key, tuple) else (key,)
        data.rename_key_(key, (*below[:-1], "body", "place"))
    data["debug"] = torch.full((80, 1), torch.nan)  # nothing of it is learnt
    train_world_model(data, **SMALL)
    data["next", "body", "place"][7] = torch.inf
    with pytest.raises(ValueError, match=r"\('next', 'body', 'place'\).* 7"):
        train_world_model(data, **SMALL)
