"""What recorded actions are: of every source, without an env and with one, through the file."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from tensordict import TensorDict
from torchrl.data import (
    Binary,
    Bounded,
    Categorical,
    Composite,
    LazyTensorStorage,
    MultiCategorical,
    MultiOneHot,
    OneHot,
    TensorDictReplayBuffer,
    Unbounded,
)
from torchrl.envs import GymWrapper, TransformedEnv
from torchrl.envs.transforms import RewardSum

from torchrl_wm import GymWorldModelEnv, WorldModelEnv
from torchrl_wm.cli.main import main
from torchrl_wm.models import load_world_model, save_world_model
from torchrl_wm.trainers import load_transitions, RecordedEnv, train_world_model

SMALL = {"steps": 4, "interval": 4, "members": 2, "hidden": (8,), "batch_size": 16}
#: As ``GymEnv`` has choices.
FORM = {"dtype": torch.int64}


class Line(gymnasium.Env):
    """A place on a line, and actions of any space."""

    observation_space = spaces.Box(-9.0, 9.0, (2,), np.float32)

    def __init__(self, action_space: spaces.Space) -> None:
        self.action_space = action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.normal(size=2).astype(np.float32)
        return self.place, {}

    def step(self, action):
        self.place = self.place * 0.9 + np.float32(np.mean(action)) * 0.1
        return self.place, float(self.place[0]), False, False, {}


def recorded(space: spaces.Space, steps: int = 40, **settings) -> TensorDict:
    env = GymWrapper(Line(space), **settings)
    env.set_seed(0)
    torch.manual_seed(0)
    return env.rollout(steps)


def arrays(actions: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of an episode with these actions."""
    steps = len(actions)
    observations = np.random.default_rng(0).normal(size=(steps + 1, 2))
    return {
        "observations": observations.astype(np.float32),
        "actions": actions,
        "rewards": np.zeros(steps, np.float32),
        "terminations": np.zeros(steps, bool),
    }


def below(data: TensorDict, key: tuple) -> TensorDict:
    return data.clone().rename_key_("action", key)


# Without an env ------------------------------------------------------------------------

KINDS = {
    "one-hot": (spaces.Discrete(5), OneHot(5, **FORM), spaces.Discrete(5)),
    "multi-one-hot": (
        spaces.MultiDiscrete([2, 4, 3]),
        MultiOneHot([2, 4, 3], **FORM),
        spaces.MultiDiscrete([2, 4, 3]),
    ),
    "two of one kind": (
        spaces.MultiDiscrete([3, 3]),
        OneHot(3, shape=(2, 3), **FORM),
        spaces.MultiDiscrete([3, 3]),
    ),
    "binary": (spaces.MultiBinary(4), Binary(4), spaces.MultiBinary(4)),
}


@pytest.mark.parametrize("key", ["action", ("robot", "action")])
@pytest.mark.parametrize("kind", KINDS)
def test_rollouts_tell_what_their_actions_are(kind, key, tmp_path) -> None:
    """Imagined actions are such, and the saved model has the space of the real env."""
    space, spec, exported = KINDS[kind]
    data = below(recorded(space), key)
    env = RecordedEnv(load_transitions(data))
    assert env.full_action_spec[key] == spec
    world_model, _ = train_world_model(data, seed=0, **SMALL)
    imagined = WorldModelEnv(world_model, env, start_states=env).imagine(30)
    assert spec.is_in(imagined[key])
    assert imagined[key].flatten(0, -2).amax(0).eq(1).all()  # all of them come up
    save_world_model(world_model, tmp_path / "model.pt")
    again = load_world_model(tmp_path / "model.pt")
    assert again.recipe.specs.reference_env().full_action_spec[key] == spec
    gym_env = GymWorldModelEnv(WorldModelEnv(again, env, start_states=env))
    assert gym_env.action_space == exported


@pytest.mark.parametrize("source", ["buffer", "folder", "npz", "arrays"])
def test_the_actions_of_every_source(source, tmp_path) -> None:
    rows = recorded(spaces.MultiDiscrete([3, 2]))
    if source in ("buffer", "folder"):
        data = TensorDictReplayBuffer(storage=LazyTensorStorage(50), batch_size=4)
        data.extend(rows)
        if source == "folder":
            data.dumps(tmp_path / "data")
            data = tmp_path / "data"
    else:
        data = arrays(rows["action"].numpy())
        if source == "npz":
            np.savez(tmp_path / "data.npz", **data)
            data = tmp_path / "data.npz"
    read = load_transitions(data)
    assert torch.equal(read["action"], rows["action"])
    assert RecordedEnv(read).action_spec == MultiOneHot([3, 2], **FORM)


@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.int32])
def test_class_numbers_in_arrays_become_one_hot(dtype, column) -> None:
    numbers = np.random.default_rng(0).integers(0, 4, 30).astype(dtype)
    given = numbers[:, None] if column else numbers
    data = load_transitions(arrays(given))
    assert torch.equal(data["action"], torch.eye(4, **FORM)[numbers.astype(int)])
    assert RecordedEnv(data).action_spec == OneHot(4, **FORM)


def test_vectors_of_class_numbers_in_arrays_become_one_hot_blocks() -> None:
    numbers = np.random.default_rng(0).integers(0, [3, 2, 4], (50, 3))
    data = load_transitions(arrays(numbers))
    spec = RecordedEnv(data).action_spec
    assert spec == MultiOneHot([3, 2, 4], **FORM)
    blocks = data["action"].split([3, 2, 4], -1)
    for block, column in zip(blocks, numbers.T):
        assert block.argmax(-1).tolist() == column.tolist()


@pytest.mark.parametrize("dtype", [bool, np.int8, np.int64, np.float64])
def test_rows_of_zeros_and_ones(dtype) -> None:
    """They stay as they are; floats are one-hot only where nothing else can be."""
    rng = np.random.default_rng(0)
    one_hot = np.eye(3)[rng.integers(0, 3, 20)].astype(dtype)
    data = load_transitions(arrays(one_hot))
    assert data["action"].tolist() == one_hot.tolist()
    spec = RecordedEnv(data).action_spec
    assert isinstance(spec, OneHot) and spec.shape == (3,)
    assert spec.dtype == data["action"].dtype
    binary = rng.integers(0, 2, (20, 3)).astype(dtype)
    data = load_transitions(arrays(binary))
    assert data["action"].tolist() == binary.tolist()
    kind = Bounded if dtype is np.float64 else Binary
    assert isinstance(RecordedEnv(data).action_spec, kind)


def test_floats_are_quantities() -> None:
    for actions in (
        np.full((9, 2), 0.5),
        np.tile([1.0, 0.0], (9, 1)),  # always the same
        np.zeros((9, 1)),
        np.arange(9.0),
    ):
        env = RecordedEnv(load_transitions(arrays(actions)))
        assert isinstance(env.action_spec, Bounded)
        assert env.action_spec.dtype is torch.float32


def test_an_option_at_an_end_that_was_never_chosen_needs_the_spec() -> None:
    """One block may be longer and the other shorter."""
    spec = MultiOneHot([3, 4], **FORM)
    numbers = torch.tensor([[0, 1], [1, 3], [0, 2], [1, 0]] * 3)  # never 2 of the first
    rows = torch.cat([torch.eye(3)[numbers[:, 0]], torch.eye(4)[numbers[:, 1]]], -1)
    source = arrays(rows.long().numpy())
    with pytest.raises(
        ValueError, match="2 ones in each of 12 rows.*action_spec=.*--env"
    ):
        train_world_model(source, **SMALL)
    data = load_transitions(source, action_spec=spec)
    assert RecordedEnv(data, action_spec=spec).action_spec == spec
    world_model, _ = train_world_model(source, action_spec=spec, **SMALL)
    assert world_model.recipe.specs.actions[0].sizes == (3, 4)
    # An option in the middle does no harm, and the numbers alone say nothing of the last.
    data = load_transitions(arrays(numbers.numpy()))
    assert RecordedEnv(data).action_spec == MultiOneHot([2, 4], **FORM)


@pytest.mark.parametrize(
    "actions, message",
    [
        (np.array([-1, 0, 1, 0]), r"from -1 to 1.*start.*action_spec="),
        (np.array([[3, -2], [0, 1]]), r"from -2 to 3.*action_spec="),
        (np.array([0, 70_000]), r"up to 70000.*float32.*action_spec="),
        (np.zeros(5, int), r"0 at every step.*action_spec="),
        (np.array([[0, 2], [0, 1]]), r"0 at every step.*action_spec="),
        (np.full((3, 2, 2), 5), r"up to 5 of the shape \(2, 2\).*action_spec="),
    ],
)
def test_integers_that_do_not_tell_the_choices_are_named(actions, message) -> None:
    with pytest.raises(ValueError, match=f"actions 'action' are .*{message}"):
        load_transitions(arrays(actions))


def test_a_spec_makes_quantities_of_integers() -> None:
    source = arrays(np.array([[-40, 3], [2, 90_000], [7, 7]]))
    spec = Unbounded((2,), dtype=torch.int64)
    data = load_transitions(source, action_spec=spec)
    assert data["action"].tolist() == source["actions"].tolist()
    assert RecordedEnv(data, action_spec=spec).action_spec == spec
    floats = Bounded(-1e6, 1e6, (2,))
    data = load_transitions(source, action_spec=floats)
    assert data["action"].dtype is torch.float32
    with pytest.raises(ValueError, match=r"action_spec says torch.int64 \(2,\)"):
        RecordedEnv(data, action_spec=spec)


@pytest.mark.parametrize(
    "settings, error, message",
    [
        (
            {"action_spec": OneHot(3)},
            ValueError,
            "class numbers from 0 to 3.*3 actions",
        ),
        (
            {"action_spec": OneHot(1)},
            ValueError,
            "class numbers from 0 to 3.*1 actions",
        ),
        ({"action_spec": Binary(2)}, ValueError, r"shape \(\).*\(2,\) \(Binary\)"),
        ({"action_spec": spaces.Discrete(4)}, TypeError, "torchrl.data, got Discrete"),
        ({"action_spec": Composite(move=OneHot(4))}, ValueError, r"\['move'\]"),
        (
            {"action_spec": OneHot(4), "env": GymWrapper(Line(spaces.Discrete(4)))},
            ValueError,
            "env or action_spec",
        ),
    ],
)
def test_specs_that_do_not_fit(settings, error, message) -> None:
    with pytest.raises(error, match=message):
        load_transitions(arrays(np.arange(4)), **settings)


def test_vectors_that_are_not_one_hot_where_the_env_s_are() -> None:
    rows = recorded(spaces.MultiDiscrete([2, 3]))
    rows["action"][7, 4] = 1 - rows["action"][7, 4]
    env = GymWrapper(Line(spaces.MultiDiscrete([2, 3])))
    with pytest.raises(
        ValueError, match=r"'action' are one-hot in the env.*\[2, 3\].*are not"
    ):
        load_transitions(rows, env=env)
    binary = GymWrapper(Line(spaces.MultiBinary(5)))
    rows["action"][7, 4] = 2
    with pytest.raises(
        ValueError, match="'action' are 0 or 1 in the env.* from 0 to 2"
    ):
        load_transitions(rows, env=binary)


# Categorical actions ---------------------------------------------------------------------


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("key", ["action", ("robot", "action")])
@pytest.mark.parametrize(
    "space, spec",
    [
        (spaces.Discrete(3), Categorical(3)),
        (spaces.MultiDiscrete([3, 4]), MultiCategorical([3, 4])),
    ],
)
def test_class_numbers_of_rollouts_stay_class_numbers(space, spec, key, named) -> None:
    rows = below(recorded(space, categorical_action_encoding=True), key)
    env = None
    if named and key == "action":
        env = GymWrapper(Line(space), categorical_action_encoding=True)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(50), batch_size=4)
    buffer.extend(rows)
    for source in (rows, buffer):
        data = load_transitions(source, env=env)
        assert torch.equal(data[key], rows[key])
    reference = RecordedEnv(data)
    assert reference.full_action_spec[key] == spec
    world_model, _ = train_world_model(rows, env=env, **SMALL)
    assert world_model.dynamics.ensemble.network.in_features == 2 + sum(
        space.nvec if isinstance(space, spaces.MultiDiscrete) else [3]
    )
    imagined = WorldModelEnv(
        world_model, env or reference, start_states=reference
    ).imagine(20)
    assert spec.is_in(imagined[key])


@pytest.mark.parametrize("column", [False, True])
def test_a_column_of_class_numbers(column) -> None:
    """``[N]`` and ``[N, 1]`` are the same to an env, whichever of both it has."""
    rows = recorded(spaces.Discrete(4), categorical_action_encoding=True)
    numbers = rows["action"]
    env = GymWrapper(Line(spaces.Discrete(4)), categorical_action_encoding=True)
    given = numbers.unsqueeze(-1) if column else numbers
    for source in (rows.clone().set("action", given), arrays(given.numpy())):
        data = load_transitions(source, env=env)
        assert torch.equal(data["action"], numbers)
        data = load_transitions(source, action_spec=Categorical(4, shape=(1,)))
        assert torch.equal(data["action"], numbers.unsqueeze(-1))
    alone = rows.clone().set("action", given)
    spec = RecordedEnv(load_transitions(alone)).action_spec
    assert spec == Categorical(4, shape=given.shape[1:])
    train_world_model(alone, **SMALL)


@pytest.mark.parametrize("categorical", [False, True])
@pytest.mark.parametrize(
    "space",
    [spaces.Discrete(4), spaces.MultiDiscrete([2, 3]), spaces.MultiDiscrete([3, 3])],
)
def test_one_encoding_of_choices_becomes_the_env_s(space, categorical) -> None:
    """Of the same actions, recorded as class numbers and as one-hot vectors."""
    own = recorded(space, categorical_action_encoding=categorical)
    env = GymWrapper(Line(space), categorical_action_encoding=categorical)
    spec = env.action_spec
    data = load_transitions(own, env=env)
    assert torch.equal(data["action"], own["action"])
    other = GymWrapper(Line(space), categorical_action_encoding=not categorical)
    there = load_transitions(own, env=other)
    assert other.action_spec.is_in(there["action"])
    back = load_transitions(there, env=env)
    assert spec.is_in(back["action"]) and torch.equal(back["action"], own["action"])


@pytest.mark.parametrize("start", [-1, 2])
@pytest.mark.parametrize("categorical", [False, True])
def test_arrays_are_numbered_as_the_env_s_space(categorical, start) -> None:
    space = spaces.Discrete(3, start=start)
    env = GymWrapper(Line(space), categorical_action_encoding=categorical)
    env = TransformedEnv(env, RewardSum())
    numbers = np.array([0, 2, 1, 1, 0])
    data = load_transitions(arrays(numbers + start), env=env)
    found = data["action"] if categorical else data["action"].argmax(-1)
    assert found.tolist() == numbers.tolist()
    with pytest.raises(ValueError, match=f"3 actions, numbered from {start}"):
        load_transitions(arrays(numbers + start + 1), env=env)


# Minari ----------------------------------------------------------------------------------


@pytest.fixture
def minari_dataset(tmp_path, monkeypatch):
    """Makes a dataset of random actions of a space."""
    minari = pytest.importorskip("minari")
    pytest.importorskip("h5py")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    from minari.data_collector import EpisodeBuffer

    def make(space: spaces.Space, low: int = 0) -> tuple[str, np.ndarray]:
        buffers, taken = [], []
        space.seed(0)
        for number in range(3):
            actions = np.stack([space.sample() for _ in range(20)])
            taken.append(actions)
            rows = {**arrays(actions), "truncations": np.zeros(20, bool)}
            buffers.append(EpisodeBuffer(id=number, seed=number, **rows))
        minari.create_dataset_from_buffers(
            "ours/line-v0",
            buffers,
            action_space=space,
            observation_space=Line.observation_space,
            description="random actions",
        )
        return "minari:ours/line-v0", np.concatenate(taken)

    return make


MINARI = {
    "from 1 on": (spaces.Discrete(3, start=1), OneHot(3, **FORM)),
    "from -1 on": (spaces.Discrete(3, start=-1), OneHot(3, **FORM)),
    "several": (spaces.MultiDiscrete([4, 2]), MultiOneHot([4, 2], **FORM)),
    "several from 1 on": (
        spaces.MultiDiscrete([4, 2], start=[1, 5]),
        MultiOneHot([4, 2], **FORM),
    ),
    "binary": (spaces.MultiBinary(5), Binary(5)),
    "integers": (
        spaces.Box(-3, 9, (2,), np.int64),
        Bounded(torch.tensor([-3.0, -3.0]), torch.tensor([9.0, 9.0])),
    ),
    "floats": (
        spaces.Box(-1.0, 1.0, (2,), np.float32),
        Bounded(torch.tensor([-1.0, -1.0]), torch.tensor([1.0, 1.0])),
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", MINARI)
def test_minari_says_what_the_actions_are(kind, minari_dataset) -> None:
    space, spec = MINARI[kind]
    name, taken = minari_dataset(space)
    data = load_transitions(name)
    start = np.asarray(getattr(space, "start", 0))
    expected = taken
    if isinstance(spec, MultiOneHot):  # which is a OneHot, too
        first, second = (taken - start).T
        expected = np.concatenate([np.eye(4)[first], np.eye(2)[second]], -1)
    elif isinstance(spec, OneHot):
        expected = np.eye(3)[taken - start]
    assert data["action"].dtype is spec.dtype
    assert data["action"].tolist() == expected.tolist()
    world_model, _ = train_world_model(name, **SMALL)
    assert world_model.recipe.specs.actions[0].to_spec() == spec
    inferred = RecordedEnv(data).action_spec
    assert inferred == spec or isinstance(spec, Bounded)
    assert inferred.shape == spec.shape and inferred.dtype is spec.dtype


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("categorical", [False, True])
def test_minari_with_the_env(categorical, minari_dataset) -> None:
    space = spaces.Discrete(4, start=3)
    name, taken = minari_dataset(space)
    env = GymWrapper(Line(space), categorical_action_encoding=categorical)
    data = load_transitions(name, env=env)
    found = data["action"] if categorical else data["action"].argmax(-1)
    assert env.action_spec.is_in(data["action"])
    assert found.tolist() == (taken - 3).tolist()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_minari_spaces_of_several_dims_are_named(minari_dataset) -> None:
    name, _ = minari_dataset(spaces.MultiDiscrete([[2, 3], [4, 5]]))
    with pytest.raises(ValueError, match=r"MultiDiscrete space of the shape \(2, 2\)"):
        load_transitions(name)


# The command line --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["class numbers", "one-hot", "binary"])
def test_train_model_from_a_file(kind, tmp_path, capsys) -> None:
    rng = np.random.default_rng(0)
    episodes = rng.integers(0, 3, 60)
    actions = {
        "class numbers": episodes,
        "one-hot": np.eye(3)[episodes],
        "binary": rng.integers(0, 2, (60, 3)),
    }[kind]
    rows = arrays(actions)
    rows["next_observations"] = rows["observations"][1:]
    rows["observations"] = rows["observations"][:-1]
    rows["truncations"] = np.arange(1, 61) % 20 == 0
    np.savez(tmp_path / "data.npz", **rows)
    run = str(tmp_path / "run")
    options = ["--steps", "4", "--members", "2", "--hidden", "8"]
    options += [] if kind == "binary" else ["--no-report"]
    main(
        ["train", "model", "--data", str(tmp_path / "data.npz"), "--run", run, *options]
    )
    capsys.readouterr()
    assert (tmp_path / "run" / "report.html").exists() == (kind == "binary")
    world_model = load_world_model(tmp_path / "run" / "model.pt")
    env = world_model.recipe.specs.reference_env()
    gym_env = GymWorldModelEnv(
        WorldModelEnv(world_model, env, start_states=load_transitions(rows))
    )
    binary = kind == "binary"
    expected = spaces.MultiBinary(3) if binary else spaces.Discrete(3)
    assert gym_env.action_space == expected
    gym_env.reset(seed=0)
    for _ in range(5):
        observation, *_ = gym_env.step(gym_env.action_space.sample())
        assert np.isfinite(observation).all()


# Ends --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["terminations", "truncations"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 0.5, 2.0, -1.0])
def test_ends_that_are_neither_yes_nor_no_are_named(name, value) -> None:
    rows = {**arrays(np.zeros((6, 1))), "truncations": np.zeros(6)}
    rows[name] = np.array([0, 0, 0, value, 0, 0])
    with pytest.raises(ValueError, match=f"{name} of episode 1 must be 0 or 1.* row 3"):
        load_transitions([arrays(np.zeros((4, 1))), rows])
    rows[name] = np.array([0.0, 0, 0, 0, 0, 1])
    ended = load_transitions(rows)["next", name.removesuffix("ions") + "ed"]
    assert ended.flatten().tolist() == [False] * 5 + [True]


@pytest.mark.parametrize("place", [(), ("agents",)])
@pytest.mark.parametrize("name", ["done", "terminated", "truncated"])
def test_ends_in_tensordicts_are_named(name, place) -> None:
    rows = recorded(spaces.Box(-1.0, 1.0, (1,)), 8).reshape(2, 4)
    shape = (2, 4, 2, 1) if place else (2, 4, 1)
    rows["next"] = rows["next"].select("observation", "reward")
    for each in ("done", "terminated", "truncated"):
        rows[("next", *place, each)] = torch.zeros(shape)
    key = ("next", *place, name)
    rows[key][1, 2] = torch.nan
    with pytest.raises(ValueError, match=f"'{name}'.* must be 0 or 1.* nan.* row 6"):
        load_transitions(rows)
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[1, 2:] = False
    data = load_transitions(
        rows.set(("collector", "mask"), mask)
    )  # padding may be anything
    assert len(data) == 6 and data[key].dtype is torch.bool
