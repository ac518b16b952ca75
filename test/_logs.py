"""Small logs, of episodes whose observations tell their place: 100 for each episode, 1 for each step."""

from __future__ import annotations

import numpy as np


def rows_of(*lengths: int, last: bool = False) -> dict[str, np.ndarray]:
    """Return the arrays of rows without next observations; with ``last``, a row more each.

    The actions are between -1 and 1, the rewards are the numbers of the steps.
    """
    places = [100.0 * n + np.arange(length + last) for n, length in enumerate(lengths)]
    place = np.concatenate(places)
    return {
        "observations": np.stack([place, -place], -1),
        "actions": np.linspace(-1, 1, len(place))[:, None],
        "rewards": place % 100,
    }


def ends_of(*lengths: int) -> np.ndarray:
    """Return the last row of each episode, ``[N]`` bool."""
    return np.concatenate([np.arange(n) == n - 1 for n in lengths])


def ids_of(*lengths: int) -> np.ndarray:
    """Return the number of each row's episode, ``[N]``."""
    return np.repeat(np.arange(len(lengths)), lengths)


def following(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the rows with their next observations."""
    step = np.array([1.0, -1.0])
    return {**rows, "next_observations": rows["observations"] + step}


def check_successive(data) -> None:
    """Check that each next observation is the one after, and that dones are where episodes end."""
    place, after = data["observation"][:, 0], data["next", "observation"][:, 0]
    assert (after == place + 1).all()
    assert (data["observation"][:, 1] == -place).all()
    assert (data["next", "reward"].flatten() == place % 100).all()
    goes_on = (place[1:] == after[:-1]) & (place[1:] // 100 == place[:-1] // 100)
    done = data["next", "done"].flatten()
    assert (done[:-1] == ~goes_on).all() and done[-1]
    either = data["next", "terminated"] | data["next", "truncated"]
    assert (either.flatten() == done).all()
    assert not (data["next", "terminated"] & data["next", "truncated"]).any()
