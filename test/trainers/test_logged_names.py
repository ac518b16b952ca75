"""The names of arrays and columns: ours, common ones, and those that are mapped."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _logs import check_successive, ends_of, following, rows_of

from torchrl_wm.trainers import load_transitions, start_run, train_world_model

SMALL = {"steps": 2, "interval": 2, "members": 2, "hidden": (8,), "batch_size": 8}


@pytest.fixture
def log() -> dict[str, np.ndarray]:
    return {**following(rows_of(3, 4)), "terminations": ends_of(3, 4)}


def renamed(log: dict, **names: str) -> dict:
    return {names.get(name, name): value for name, value in log.items()}


@pytest.mark.parametrize(
    "names",
    [
        {"observations": "obs", "next_observations": "next_obs"},
        {"observations": "observation", "next_observations": "next_observation"},
        {"actions": "action", "rewards": "reward", "terminations": "terminal"},
        {"actions": "act", "terminations": "terminated"},
        {"actions": "Action", "rewards": "REWARD"},
    ],
)
def test_common_names_are_known(names, log, recwarn) -> None:
    data = load_transitions(renamed(log, **names))
    assert not recwarn
    assert (data == load_transitions(log)).all()


@pytest.mark.parametrize("kind", ["npz", "hdf5", "dictionary"])
def test_the_arrays_of_d4rl(kind, log, tmp_path) -> None:
    arrays = renamed(log, terminations="terminals")
    arrays["terminals"] = np.arange(7) == 2
    arrays["timeouts"] = np.arange(7) == 6
    arrays |= {"infos/qpos": np.zeros((7, 2)), "metadata/algorithm": np.array("SAC")}
    source = arrays
    if kind == "npz":
        source = tmp_path / "log.npz"
        np.savez(source, **arrays)
    elif kind == "hdf5":
        h5py = pytest.importorskip("h5py")
        source = tmp_path / "log.hdf5"
        arrays["metadata/algorithm"] = "SAC"
        with h5py.File(source, "w") as file:
            for name, value in arrays.items():
                file[name] = value
    with pytest.warns(UserWarning, match=r"Not read.*\['infos/qpos', 'metadata/algo"):
        data = load_transitions(source)
    check_successive(data)
    assert data["next", "terminated"].flatten().nonzero().tolist() == [[2]]
    assert data["next", "truncated"].flatten().nonzero().tolist() == [[6]]


def test_a_broken_hdf5_file_is_named(tmp_path) -> None:
    pytest.importorskip("h5py")
    (tmp_path / "log.h5").write_bytes(b"no HDF5")
    with pytest.raises(ValueError, match="log.h5' cannot be read as HDF5"):
        load_transitions(tmp_path / "log.h5")


@pytest.mark.parametrize(
    "names",
    [
        {"observations": "state", "actions": "u"},
        {"state": "observations", "u": "actions"},  # tell themselves apart
        "state=observations, u=actions",
    ],
)
def test_names_are_mapped_either_way_round(names, log) -> None:
    """And with the state the next state."""
    other = renamed(
        log, observations="state", next_observations="next_state", actions="u"
    )
    assert (load_transitions(other, names=names) == load_transitions(log)).all()
    with pytest.raises(
        KeyError, match=r"'observations', 'actions'\] are missing.*names="
    ):
        load_transitions(other)


def test_several_arrays_make_one_vector_in_the_order_of_the_names(log) -> None:
    table = {
        "height": log["observations"][:, 1],
        "place": log["observations"][:, 0],
        "next_place": log["next_observations"][:, 0],
        "next_height": log["next_observations"][:, 1],
        "thrust": log["actions"][:, 0],
        "steer": log["actions"],
        "rewards": log["rewards"],
        "dones": log["terminations"],
    }
    names = {"observations": ["place", "height"], "actions": ["thrust", "steer"]}
    data = load_transitions(table, names=names, dones="terminal")
    check_successive(data)
    assert torch.equal(data["action"], data["action"][:, :1].expand(-1, 2))
    train_world_model(
        table, names=names, dones="terminal", action_bounds=(-1, 1), **SMALL
    )


def test_names_make_entries_of_dictionaries(log) -> None:
    other = renamed(log, observations="arm", next_observations="next_arm")
    data = load_transitions(other, names={"observations/robot/arm": "arm"})
    assert data["robot", "arm"].tolist() == log["observations"].tolist()
    assert data["next", "robot", "arm"].tolist() == log["next_observations"].tolist()


def test_what_is_mapped_replaces_what_would_be_read(log) -> None:
    log["reward"] = log.pop("rewards")
    log["cost"] = -log["reward"]
    with pytest.warns(UserWarning, match=r"Not read.*\['reward'\]"):
        data = load_transitions(log, names={"rewards": "cost"})
    assert (data["next", "reward"].flatten().numpy() == log["cost"]).all()


@pytest.mark.parametrize(
    "names, error, message",
    [
        ({"observations": "none"}, KeyError, r"names maps \['none'\], which the data"),
        ({"state": "obs"}, ValueError, "neither of them is ours"),
        ({"rewards": "actions"}, ValueError, "both of them are ours"),
        ("state", ValueError, "written like state=observations"),
        ("a=rewards,a=actions", ValueError, r"maps \['a'\] more than once"),
        (["state"], ValueError, "must be a dictionary such as"),
    ],
)
def test_names_that_map_nothing(names, error, message, log) -> None:
    with pytest.raises(error, match=message):
        load_transitions(log, names=names)


def test_two_arrays_of_one_meaning_are_refused(log) -> None:
    log["obs"] = log["observations"]
    with pytest.raises(ValueError, match="'obs'.* would all be read as observations"):
        load_transitions(log)
    assert len(load_transitions(log, names={"observations": "obs"})) == 7


def test_a_capital_t_is_no_number_of_steps(log) -> None:
    with pytest.warns(UserWarning, match=r"Not read.*\['T'\]"):
        data = load_transitions({**log, "T": np.array([20, 21, 19, 20, 24, 20, 21])})
    assert (data == load_transitions(log)).all()


def test_names_are_not_for_tensordicts(log) -> None:
    data = load_transitions(log)
    with pytest.raises(ValueError, match="rename_key_"):
        load_transitions(data, names={"observations": "state"})


def test_a_run_has_names_and_goes_on_with_them(log, tmp_path) -> None:
    np.savez(tmp_path / "log.npz", **renamed(log, observations="state", actions="u"))
    names = {"observations": "state", "actions": "u"}
    settings = {"hidden": (8,), "members": 2, "interval": 2, "steps": 2}
    trainer = start_run(
        "model",
        tmp_path / "run",
        data=str(tmp_path / "log.npz"),
        names=names,
        action_bounds=(-1, 1),
        logger="csv",
        **settings,
    )
    trainer.train()
    assert trainer.config.names == "state=observations,u=actions"
    with pytest.raises(ValueError, match="neither of them is ours"):
        start_run("model", tmp_path / "other", data="log.npz", names="a=b")
