"""Where the episodes of a log end, why, in which order its rows are, and what is left out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _logs import check_successive, ends_of, following, ids_of, rows_of
from hypothesis import given, strategies as st
from tensordict import TensorDict

from torchrl_wm.trainers import load_transitions, train_world_model

SMALL = {"steps": 2, "interval": 2, "members": 2, "hidden": (8,), "batch_size": 8}


def places(data, name: str) -> list[int]:
    return data["next", name].flatten().nonzero().flatten().tolist()


# Without next observations -----------------------------------------------------------------


def test_the_last_row_of_each_episode_is_left_out_and_said_so() -> None:
    log = {**rows_of(3, 5), "terminations": ends_of(3, 5)}
    with pytest.warns(UserWarning, match="2 rows, with 2 terminations.*record next_o"):
        data = load_transitions(log)
    check_successive(data)
    assert len(data) == 6 and places(data, "truncated") == [1, 5]
    log["terminations"] = np.zeros(8)
    log["truncations"] = ends_of(3, 5)
    with pytest.warns(UserWarning, match="not recorded: 2 rows.$"):
        check_successive(load_transitions(log))


@pytest.mark.parametrize("nested", [False, True])
def test_a_row_with_the_observation_after_the_end_keeps_terminations(nested) -> None:
    """Whatever else it has; its id says that it is of the same episode."""
    log = rows_of(3, 5, last=True)
    log["terminations"] = np.zeros(10)
    log["terminations"][[2, 8]] = 1  # the rows before the last ones
    log["episodes"] = ids_of(4, 6)
    log["actions"][[3, 9]] = np.nan
    if nested:
        log["observations"] = {"arm": {"place": log["observations"]}}
    data = load_transitions(log)
    if nested:
        data.rename_key_(("arm", "place"), "observation")
        data.rename_key_(("next", "arm", "place"), ("next", "observation"))
    check_successive(data)
    assert len(data) == 8 and places(data, "terminated") == [2, 7]
    assert data["action"].isfinite().all()


@pytest.mark.parametrize("gap", [False, True])
def test_a_last_row_that_does_not_follow_the_end_is_not_of_its_episode(gap) -> None:
    """As ids are those of workers, which go on after an end, or as rows are missing between them."""
    log = rows_of(3, 2, 1) if not gap else rows_of(3, last=True)
    ends = np.array([0, 0, 1, 0, 1, 0] if not gap else [0, 0, 1, 0])
    log.update(terminations=ends, episodes=np.zeros(len(ends)))
    if gap:
        log["steps"] = np.array([0, 1, 2, 9])
    with pytest.warns(UserWarning, match="left out"):
        data = load_transitions(log)
    check_successive(data)
    assert data["observation"][:, 0].tolist() == [0, 1] + [100] * (not gap)
    assert not places(data, "terminated")


def test_rows_that_are_episodes_of_their_own_leave_nothing() -> None:
    log = {**rows_of(1, 1), "dones": np.ones(2)}
    with pytest.raises(
        ValueError, match="No transition remains.* 2 episodes have a si"
    ):
        load_transitions(log)


@given(
    lengths=st.lists(st.integers(2, 6), min_size=1, max_size=5),
    seed=st.integers(0, 999),
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_rows_in_any_order_make_the_same_transitions(lengths, seed) -> None:
    """With the ids of their episodes and the numbers of their steps."""
    log = {**rows_of(*lengths), "episodes": ids_of(*lengths)}
    log["steps"] = log["rewards"]
    data = load_transitions(log)
    check_successive(data)
    order = np.random.default_rng(seed).permutation(len(log["steps"]))
    mixed = load_transitions({name: value[order] for name, value in log.items()})
    check_successive(mixed)
    assert len(mixed) == len(data) == sum(lengths) - len(lengths)
    assert set(mixed["observation"][:, 0].tolist()) == set(
        data["observation"][:, 0].tolist()
    )


# Plain ends ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lengths, kind, note",
    [
        ((4, 4, 4), "truncated", "its 3 episodes end. Each has 4 steps.*'terminal'"),
        ((4, 2, 4), "terminated", "from 2 to 4 steps.*'timeout'.*2 of them have 4"),
        ((4,), "truncated", "its episode ends. It has 4 steps.*--dones terminal"),
    ],
)
def test_plain_ends_are_told_by_their_lengths(lengths, kind, note) -> None:
    log = {**following(rows_of(*lengths)), "dones": ends_of(*lengths)}
    with pytest.warns(UserWarning, match=note):
        data = load_transitions(log)
    check_successive(data)
    ends = (np.cumsum(lengths) - 1).tolist()
    assert places(data, kind) == ends
    for said, name in (("terminal", "terminated"), ("timeout", "truncated")):
        assert places(load_transitions(log, dones=said), name) == ends


def test_the_last_rows_of_a_log_say_nothing_of_lengths() -> None:
    log = {**following(rows_of(4, 4, 2)), "episodes": ids_of(4, 4, 2)}
    with pytest.warns(UserWarning, match="Each has 4 steps"):
        load_transitions(log)
    log = {**following(rows_of(4, 4, 2)), "dones": ends_of(4, 4, 3)[:10]}
    with pytest.warns(UserWarning, match="Each has 4 steps"):
        data = load_transitions(log)
    assert places(data, "truncated") == [3, 7, 9]


def test_plain_ends_of_several_logs_are_told_together() -> None:
    logs = [{**following(rows_of(n)), "dones": ends_of(n)} for n in (4, 4, 3)]
    with pytest.warns(UserWarning, match="its 3 episodes end. They have from 3 to 4"):
        data = load_transitions(logs)
    assert places(data, "terminated") == [3, 7, 10]
    for log in logs:  # each is an episode: they need no ends at all
        del log["dones"]
    assert places(load_transitions(logs, dones="terminal"), "terminated") == [3, 7, 10]


def test_plain_ends_of_tensordicts() -> None:
    steps = TensorDict(
        {
            "observation": torch.arange(8.0).reshape(2, 4, 1),
            "action": torch.rand(2, 4, 1),
            "next": {
                "observation": torch.arange(8.0).reshape(2, 4, 1) + 1,
                "reward": torch.zeros(2, 4, 1),
                "done": torch.tensor([[0, 0, 0, 1], [0, 0, 0, 1]]).unsqueeze(-1) > 0,
            },
        },
        batch_size=[2, 4],
    )
    with pytest.warns(UserWarning, match="Each has 4 steps"):
        assert places(load_transitions(steps), "truncated") == [3, 7]
    data = load_transitions(steps, dones="terminal")
    assert places(data, "terminated") == [3, 7] and not places(data, "truncated")


def test_dones_beside_one_of_both_give_the_other(recwarn) -> None:
    log, ends = following(rows_of(3, 4)), ends_of(3, 4)
    first = ends & (np.arange(7) < 5)
    for name, other in (("terminations", "truncated"), ("truncations", "terminated")):
        data = load_transitions({**log, "dones": ends, name: first})
        assert places(data, other) == [6]
        assert places(data, name.removesuffix("ions") + "ed") == [2]
    assert not recwarn
    with pytest.raises(ValueError, match="dones of the data must be where.*row 2"):
        load_transitions({**log, "dones": ends ^ first, "terminations": first})
    with pytest.warns(UserWarning, match="truncations and no terminations"):
        assert not places(load_transitions({**log, "truncations": ends}), "terminated")


@pytest.mark.parametrize(
    "change, dones, error, message",
    [
        ({"terminations": ends_of(3, 4)}, "terminal", ValueError, "Leave dones out"),
        ({"dones": ends_of(3, 4)}, "failure", ValueError, r"Unknown dones 'failure'"),
        ({}, None, KeyError, "Nothing in the data tells where an episode ends"),
        ({"dones": ends_of(3, 3)}, None, ValueError, "dones of the data has 6 rows"),
        ({"episodes": np.zeros(6)}, None, ValueError, "episodes or steps.* 6 rows"),
        (
            {"episodes": np.arange(8) % 2, "dones": ends_of(3, 4)},
            None,
            ValueError,
            "episodes or steps of the data has 8 rows, and there are 7",
        ),
    ],
)
def test_ends_that_do_not_fit(change, dones, error, message) -> None:
    with pytest.raises(error, match=message):
        load_transitions({**following(rows_of(3, 4)), **change}, dones=dones)


# Order ---------------------------------------------------------------------------------------


def test_rows_of_several_envs_in_turn_are_put_together() -> None:
    log = {**rows_of(3, 3), "episodes": np.array(["b", "b", "b", "a", "a", "a"])}
    turn = np.array([0, 3, 1, 4, 2, 5])
    log = {name: value[turn] for name, value in log.items()}
    with pytest.warns(UserWarning, match="2 episodes of the data are not next to each"):
        data = load_transitions(log)
    check_successive(data)
    assert data["observation"][:, 0].tolist() == [0, 1, 100, 101]


def test_numbers_of_steps_alone_tell_where_episodes_begin() -> None:
    log = {**following(rows_of(3, 5)), "t": rows_of(3, 5)["rewards"]}
    data = load_transitions(log, dones="terminal")
    check_successive(data)
    assert places(data, "terminated") == [2, 7]
    log["t"] = np.array([0.0, 1, 2, 0, 2, 1, 3, 4])
    with pytest.raises(ValueError, match="go back to 1 in row 5, and elsewhere to 0"):
        load_transitions(log)


def test_missing_rows_cut_an_episode_off() -> None:
    log = {**rows_of(6), "episodes": ids_of(6), "steps": np.arange(6)}
    log = {name: np.delete(value, 3, 0) for name, value in log.items()}
    with pytest.warns(UserWarning, match="missing in 1 places, first after row 2"):
        data = load_transitions(log)
    check_successive(data)
    assert data["observation"][:, 0].tolist() == [0, 1, 4]
    assert places(data, "truncated") == [1, 2]


def test_steps_that_are_uneven_times_in_whole_numbers_leave_no_row_out(recwarn) -> None:
    log = {**following(rows_of(6)), "terminations": ends_of(6), "episodes": ids_of(6)}
    log["steps"] = np.array([5, 105, 204, 305, 405, 506])  # milliseconds
    data = load_transitions(log)
    check_successive(data)
    assert places(data, "done") == [5] and not recwarn


@pytest.mark.parametrize(
    "change, message",
    [
        ({"steps": [0, 1, 1, 0, 1, 2, 3]}, "'?0'? of the data has the step 1 twice"),
        ({"steps": [0, 1, np.nan, 0, 1, 2, 3]}, "steps of the data is nan in row 2"),
        ({"episodes": [0, 0, None, 1, 1, 1, 1]}, "one id for each row.*none in row 2"),
        ({"episodes": np.zeros((7, 2))}, r"one id for each row.*shape \(7, 2\)"),
    ],
)
def test_orders_that_are_none(change, message) -> None:
    log = {**following(rows_of(3, 4)), "episodes": ids_of(3, 4), **change}
    with pytest.raises(ValueError, match=message):
        load_transitions(log)


# Training --------------------------------------------------------------------------------------


def test_one_episode_is_held_out_in_part_and_said_so() -> None:
    log = {**following(rows_of(20)), "terminations": np.zeros(20)}
    with pytest.warns(
        UserWarning, match="one episode: its last 2 of 20 steps are held"
    ):
        train_world_model(log, action_bounds=(-1, 1), **SMALL)
    log["dones"] = log.pop("terminations")
    log["dones"][[9, 19]] = 1
    world_model, _ = train_world_model(
        log, dones="terminal", action_bounds=(-1, 1), **SMALL
    )
    assert world_model.done_head is not None
