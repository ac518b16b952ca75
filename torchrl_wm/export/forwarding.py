"""Methods and attributes that libraries ask of single envs, of many that are one batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from torchrl_wm.export.isolation import Isolation
from torchrl_wm.export.signatures import bind
from torchrl_wm.export.trees import snapshot, to_numpy

#: What a vector env does itself, in forms of its own.
_ITS_OWN = ("reset", "step", "close")
#: What libraries call, and what they take it to be.
_KNOWN = {
    "compute_reward": (
        "Hindsight replay calls compute_reward(achieved_goal, desired_goal, infos) on M rows, "
        "[M, ...], and takes the rewards, [M]"
    ),
    "action_masks": (
        "sb3-contrib's MaskablePPO calls action_masks(), and takes [N, n_actions] bool, which "
        "actions are valid in each env"
    ),
}


def find(env: Any, name: str) -> tuple[Any, Any]:
    """Return an attribute of a vector env, else of its model, and which of them has it.

    Raises:
        AttributeError: if neither has it; the message says how they may.
    """
    model = env.world_model
    for owner in (env, model):
        try:
            return getattr(owner, name), owner
        except AttributeError:
            pass
    what = _KNOWN.get(
        name, "A method is called once, and returns a row for each env, [N, ...]"
    )
    raise AttributeError(
        f"Neither {type(env).__name__} nor its model {type(model).__name__} has {name!r}, and the "
        f"envs are one batch: there is none of a single one. {what}. Give the model such a "
        f"method, or the vector env a function: env.{name} = function (of an SB3VecEnv, "
        f"env.env.{name}). A parameter 'state' or 'obs' gets those of all envs."
    )


def attribute_of_each(env: Any, name: str) -> tuple[Any, ...]:
    """Return an attribute once for each env; a value of ``N`` rows is taken apart."""
    value, _ = find(env, name)
    if isinstance(value, (np.ndarray, torch.Tensor)):
        if value.shape[:1] == (env.num_envs,):
            return tuple(value)
    return (value,) * env.num_envs


def call_for_each(
    env: Any,
    isolation: Isolation,
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Any, ...]:
    """Call a method of the vector env or of its model, once for all envs.

    Args:
        env: the vector env.
        isolation: what the model runs in.
        name: the method.
        args, kwargs: what it is called with. Arguments with rows of their own (arrays,
            lists) are what the result is about, and each env has all of it, as if it had
            been called itself.

    Returns:
        What it returns, as numpy; without such arguments the row of each env.
    """
    if name in _ITS_OWN:
        raise NotImplementedError(
            f"The envs are one batch: there is no {name!r} of a single one. Call it for all: "
            f"env.{name}(...)."
        )
    function, owner = find(env, name)
    if not callable(function):
        raise TypeError(
            f"{name!r} of {type(owner).__name__} is no method but {type(function).__name__}: "
            f"get_attr({name!r})."
        )
    if not args and not kwargs:
        args, kwargs = _asked(env, function, name)
        rows = False
    else:
        rows = any(map(_has_rows, (*args, *kwargs.values())))
    if owner is env:
        out = function(*args, **kwargs)
    else:
        with isolation.apart():  # as everything else of the model's
            out = function(*args, **kwargs)
    out = to_numpy(out)
    if rows:
        return (out,) * env.num_envs
    return tuple(_row(out, i, env.num_envs, name) for i in range(env.num_envs))


def _asked(
    env: Any, function: Callable, name: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the state and the observations, if a method takes them."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin
        return (), {}
    fixed = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if all(p.default is not p.empty or p.kind in fixed for p in parameters):
        return (), {}
    bound = bind(function, ("state", "obs"), name)
    given = {"state": env.state, "obs": env.observation}
    if given["obs"] is None:
        raise RuntimeError(f"Call reset() before {name}().")
    keywords = {key: given[role] for key, role in bound.keywords.items()}
    return tuple(given[role] for role in bound.positional), keywords


def _has_rows(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_rows, value.values()))
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return value.ndim > 0
    return isinstance(value, (list, tuple))


def _row(value: Any, index: int, count: int, name: str) -> Any:
    """Return the row of one env; a value without rows holds for all."""
    if isinstance(value, dict):
        return {key: _row(entry, index, count, name) for key, entry in value.items()}
    if isinstance(value, np.ndarray) and value.ndim or isinstance(value, (list, tuple)):
        if len(value) != count:
            got = (
                value.shape
                if isinstance(value, np.ndarray)
                else f"{len(value)} entries"
            )
            raise ValueError(
                f"{name!r} returned {got}, and there are {count} envs: it is called once for all, "
                f"and returns a row for each, [{count}, ...], or one value for all."
            )
        return value[index]
    return snapshot(value)
