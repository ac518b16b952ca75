"""Specs of logged actions, choices or quantities, from an env, a space or the data."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tensordict import NestedKey, TensorDictBase
from torch.nn.functional import one_hot
from torchrl.data import (
    Binary,
    Categorical,
    Composite,
    MultiCategorical,
    MultiOneHot,
    OneHot,
    TensorSpec,
)
from torchrl.envs import EnvBase

from torchrl_wm.modules.keys import as_tuple, leaf_keys, unique
from torchrl_wm.trainers.gym_actions import wrapped_env
from torchrl_wm.trainers.logged_bounds import (
    ActionBounds,
    given_bounds,
    observed_bounds,
)

#: More options than this are quantities rather than choices.
_MOST_OPTIONS = 1000
_CHOICES = (OneHot, MultiOneHot, Categorical, MultiCategorical)
_SAY = (
    "Say what they are: action_spec=..., a spec of torchrl.data such as OneHot(4), "
    "MultiOneHot([3, 4]), Binary(5), Categorical(4) or Bounded(-1, 1, (2,)); or name the env "
    "that was recorded: env=GymEnv(...), on the command line --env."
)


# Specs from the data -------------------------------------------------------------------


def inferred_spec(
    key: NestedKey, value: torch.Tensor, *, stacklevel: int = 1
) -> TensorSpec:
    """Return the spec that the values of actions suggest.

    - One integer for each step is the number of an option; there are as many options as the
      greatest number plus one.
    - Rows of 0 and 1 are a one-hot choice if each has a single 1; several such choices side by
      side if all rows fall into the same blocks with a single 1 each; otherwise a binary vector.
    - Other integers are the numbers of options of several choices.
    - Floats are quantities with the bounds of :func:`observed_bounds`, unless all rows are
      one-hot and some differ.

    Args:
        key: the key of the entry, for messages.
        value: ``[N, *A]``.

    Keyword Args:
        stacklevel: whose line the warning of bounds names, 1 for that of the caller.

    Returns:
        The spec, of the shape ``A`` and the dtype of ``value``.

    Raises:
        ValueError: if they may be of several kinds.
    """
    form = {"shape": value.shape[1:], "dtype": value.dtype}
    size = value.shape[-1] if value.ndim > 1 else 1
    several = value.shape[1:].numel() > 1 and size > 1
    if value.is_floating_point():
        if several and _is_one_hot(value) and bool((value != value[:1]).any()):
            return OneHot(size, **form)
        return observed_bounds(key, value, stacklevel=1 + stacklevel)
    numbers = _checked(key, value)
    if value.shape[1:].numel() == 1:
        return Categorical(*_options(key, value).flatten().tolist(), **form)
    if not several or int(numbers.max()) > 1:
        return MultiCategorical(_options(key, value), **form)
    if _is_one_hot(value):
        return OneHot(size, **form)
    blocks = _blocks(key, numbers.reshape(-1, size))
    return Binary(size, **form) if blocks is None else MultiOneHot(blocks, **form)


def as_choices(key: NestedKey, value: torch.Tensor) -> torch.Tensor:
    """Return actions of arrays as ``GymEnv`` has them: numbers of options become one-hot.

    Args:
        key: the key of the entry, for messages.
        value: ``[N, *A]``.

    Raises:
        ValueError: if there are integers that cannot be numbers of options.
    """
    if value.is_floating_point():
        return value
    numbers = _checked(key, value)
    if value.shape[1:].numel() == 1:
        options = _options(key, value).flatten().tolist()
        spec: TensorSpec = OneHot(*options, dtype=torch.int64)
    elif int(numbers.max()) <= 1:
        return value  # one-hot or binary as they are
    elif value.ndim == 2:
        spec = MultiOneHot(_options(key, value).tolist(), dtype=torch.int64)
    else:
        raise ValueError(
            f"The actions {key!r} are integers up to {int(numbers.max())} of the shape "
            f"{tuple(value.shape[1:])} per step: choices are one number, or a vector of them. "
            f"{_SAY}"
        )
    return as_spec(key, numbers, spec, "the data")


def _options(key: NestedKey, value: torch.Tensor) -> torch.Tensor:
    """Return how many options each of the choices ``[N, *A]`` has, ``[*A]``: the greatest plus one."""
    if value.dtype is torch.bool:
        return torch.full(value.shape[1:], 2)
    options = value.long().amax(0) + 1
    if (options < 2).any():
        raise ValueError(
            f"The actions {key!r} are class numbers, and some are 0 at every step, so that "
            f"the data does not tell how many options there are. {_SAY}"
        )
    return options


def _checked(key: NestedKey, value: torch.Tensor) -> torch.Tensor:
    """Return the integers; refuse those that cannot be numbers of options."""
    numbers = value.long()
    least, most = int(numbers.min()), int(numbers.max())
    if least < 0:
        raise ValueError(
            f"The actions {key!r} are integers from {least} to {most}, and class numbers begin "
            f"at 0. Subtract what they begin at (the start of a gymnasium.spaces.Discrete), or "
            f"make quantities of them: actions.astype(np.float32). {_SAY}"
        )
    if most >= _MOST_OPTIONS:
        raise ValueError(
            f"The actions {key!r} are integers up to {most}: too many options for "
            f"choices. Quantities are floats: actions.astype(np.float32). {_SAY}"
        )
    return numbers


def _is_one_hot(value: torch.Tensor) -> bool:
    """Return whether each row, along the last dim, is one 1 among zeros."""
    ones, zeros = value == 1, value == 0
    return bool((ones | zeros).all()) and bool((ones.sum(-1) == 1).all())


def _blocks(key: NestedKey, rows: torch.Tensor) -> list[int] | None:
    """Return the sizes of the one-hot blocks that rows ``[N, A]`` of 0 and 1 fall into; None if they do not.

    A block ends where all rows have had the same number of ones.
    """
    ones = rows.cumsum(-1)
    same = (ones == ones[:1]).all(0)
    choices = int(ones[0, -1])
    if not same[-1] or not choices:
        return None
    ends = [
        (same & (ones[0] == number)).nonzero().flatten().tolist()
        for number in range(1, choices)
    ]
    if not all(ends):
        return None
    ends.append([rows.shape[-1] - 1])
    sizes = [b[0] - a[0] for a, b in zip([[-1], *ends], ends)]
    if any(len(places) > 1 for places in ends) or min(sizes) < 2:
        raise ValueError(
            f"The actions {key!r} have {choices} ones in each of {len(rows)} rows of "
            f"{rows.shape[-1]}, and do not tell whether they are {choices} choices side by side, "
            f"of how many options each, or binary: some options were never chosen, or always. "
            f"{_SAY}"
        )
    return sizes


# Specs of an env ------------------------------------------------------------------------


def start_of(env: EnvBase) -> Any:
    """Return the number of the first option in an env's Gymnasium space; TorchRL's is 0."""
    return start_of_space(getattr(wrapped_env(env), "action_space", None))


def start_of_space(space: Any) -> Any:
    """Return the number of the first option in a space; one for each of several choices."""
    start = getattr(space, "start", 0)
    return np.asarray(start) if np.any(start) else 0


# In the form of a spec -------------------------------------------------------------------


def as_spec(
    key: NestedKey, value: torch.Tensor, spec: TensorSpec, whose: str, *, start: Any = 0
) -> torch.Tensor:
    """Return actions in the form of a spec: choices become class numbers or one-hot.

    Args:
        key: the key of the entry, for messages.
        value: ``[N, *A]``.
        spec: the spec, without batch dims.
        whose: what has the spec, for messages.
        start: the number of the first option, if actions are numbers.

    Returns:
        ``[N, *spec.shape]`` of the spec's dtype.

    Raises:
        ValueError: if the shape differs, or there is no such option.
    """
    if isinstance(spec, _CHOICES) and not isinstance(spec, Binary):
        return _as_choices(key, value, spec, whose, start)
    if (
        value.shape[1:].numel() == spec.shape.numel() == 1
    ):  # [N] and [N, 1] are the same
        value = value.reshape(-1, *spec.shape)
    if value.shape[1:] != spec.shape:
        raise _other_shape(key, value, spec, whose)
    if isinstance(spec, Binary) and not ((value == 0) | (value == 1)).all():
        raise ValueError(
            f"The actions {key!r} are 0 or 1 in {whose}, and reach from {value.min().item()} to "
            f"{value.max().item()} in the data."
        )
    return _exactly(key, value, spec.dtype)


def _as_choices(
    key: NestedKey, value: torch.Tensor, spec: TensorSpec, whose: str, start: Any
) -> torch.Tensor:
    """Return choices in the form of a spec, ``K`` in a row whatever the shape; see :func:`as_spec`."""
    is_vector = isinstance(spec, (OneHot, MultiOneHot))
    counts = _counts(spec)
    flat = value.flatten(1) if value.ndim > 1 else value.unsqueeze(-1)
    numbers = None
    if flat.shape[1] == sum(counts):
        blocks = flat.split(counts, -1)
        if all(map(_is_one_hot, blocks)):
            numbers = torch.stack([block.float().argmax(-1) for block in blocks], -1)
    if numbers is None:
        shape = spec.shape if not is_vector else spec.shape[:-1]
        if isinstance(spec, MultiOneHot):
            shape = (*shape, len(spec.nvec))
        if is_vector and value.shape[1:] == spec.shape:
            raise ValueError(
                f"The actions {key!r} are one-hot in {whose}, a single 1 for each of "
                f"{counts} options, and some of the {len(value)} rows in the data are not."
            )
        # [N] and [N, 1] are the same numbers.
        if [n for n in value.shape[1:] if n != 1] != [n for n in shape if n != 1]:
            raise _other_shape(key, value, spec, whose)
        first = torch.as_tensor(start, device=flat.device)
        numbers = _exactly(key, flat, torch.int64) - first
        most = torch.tensor(counts, device=flat.device)
        if bool(((numbers < 0) | (numbers >= most)).any()):
            how_many = counts if len(set(counts)) > 1 else counts[0]
            raise ValueError(
                f"The actions {key!r} are class numbers from {int(flat.min())} to "
                f"{int(flat.max())}, and {whose} has {how_many} actions, numbered from "
                f"{first.tolist()}."
            )
    if is_vector:
        parts = zip(numbers.unbind(-1), counts)
        numbers = torch.cat([one_hot(part, n) for part, n in parts], -1)
    return numbers.to(spec.dtype).reshape(-1, *spec.shape)


def _counts(spec: TensorSpec) -> list[int]:
    """Return how many options each choice has."""
    if isinstance(spec, MultiOneHot):
        return [int(n) for n in spec.nvec] * spec.shape[:-1].numel()
    if isinstance(spec, MultiCategorical):
        return spec.nvec.expand(spec.shape).flatten().tolist()
    lead = spec.shape[:-1] if isinstance(spec, OneHot) else spec.shape
    return [int(spec.space.n)] * lead.numel()


def _exactly(key: NestedKey, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor in another dtype; refuse to round floats."""
    if value.is_floating_point() and not dtype.is_floating_point:
        wrong = value != value.round()  # which NaN is
        if wrong.any():
            raise ValueError(
                f"The actions {key!r} are integers, and the data has {value[wrong][0].item()}."
            )
    return value.to(dtype)


def _other_shape(
    key: NestedKey, value: torch.Tensor, spec: TensorSpec, whose: str
) -> ValueError:
    return ValueError(
        f"{key!r} has the shape {tuple(value.shape[1:])} per step in the data, and "
        f"{tuple(spec.shape)} ({type(spec).__name__}) in {whose}."
    )


def action_keys(data: TensorDictBase) -> list[NestedKey]:
    """Return the keys of recorded actions."""
    keys = unique(key for key in leaf_keys(data) if as_tuple(key)[0] != "next")
    return [key for key in keys if as_tuple(key)[-1] == "action"]


def bounded_specs(data: TensorDictBase, bounds: ActionBounds) -> Composite:
    """Return the specs of recorded actions between given bounds."""
    specs = {key: given_bounds(key, data.get(key), bounds) for key in action_keys(data)}
    out = Composite(shape=())
    for key, spec in specs.items():
        out[key] = spec
    return out


def action_specs(
    data: TensorDictBase,
    given: TensorSpec | None = None,
    bounds: ActionBounds | None = None,
    *,
    stacklevel: int = 1,
) -> Composite:
    """Return the specs of recorded actions.

    Args:
        data: transitions ``[N]``.
        given: known specs: a composite for all keys, or the spec of the only key.
        bounds: the bounds of actions that are quantities.

    Keyword Args:
        stacklevel: whose line the warning of bounds names, 1 for that of the caller.

    Raises:
        ValueError: if the actions do not fit the given spec, or no spec can be inferred.
    """
    check_one_source(action_spec=given, action_bounds=bounds)
    keys = action_keys(data)
    how = "action_spec" if bounds is None else "action_bounds"
    known = by_key(given if bounds is None else bounded_specs(data, bounds), keys)
    out = Composite(shape=())
    for key in keys:
        value = data.get(key)
        spec = known.get(key)
        if spec is None:
            spec = inferred_spec(key, value, stacklevel=1 + stacklevel)
        elif value.shape[1:] != spec.shape or value.dtype != spec.dtype:
            raise ValueError(
                f"{key!r} is {value.dtype} of the shape {tuple(value.shape[1:])} per step, and "
                f"{how} says {spec.dtype} {tuple(spec.shape)}. Load the data as it says: "
                f"load_transitions(source, {how}=...)."
            )
        else:
            as_spec(key, value, spec, "action_spec")
        out[key] = spec
    return out if data.device is None else out.to(data.device)


def check_one_source(**given: Any) -> None:
    """Refuse several statements of what actions are.

    Raises:
        ValueError: if more than one of the arguments is not None.
    """
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(
            f"Give one of {' or '.join(given)}, got {' and '.join(names)}: each says by itself "
            f"what the actions are."
        )


def by_key(
    given: TensorSpec | None, keys: list[NestedKey]
) -> dict[NestedKey, TensorSpec]:
    """Return one or several specs of actions by their keys.

    Raises:
        ValueError: if it has other keys, or is one spec for several actions.
    """
    if given is None:
        return {}
    if not isinstance(given, TensorSpec):
        raise TypeError(
            f"action_spec must be a spec of torchrl.data, got {type(given).__name__}. {_SAY}"
        )
    if not isinstance(given, Composite):
        if len(keys) != 1:
            raise ValueError(
                f"action_spec is one spec, and the data's actions are {keys}. Give a "
                f"torchrl.data.Composite of all of them."
            )
        return {keys[0]: given}
    found = {key: given[key] for key in unique(given.keys(True, True))}
    if set(found) != set(keys):
        raise ValueError(
            f"action_spec has {list(found)}, and the data's actions are {keys}."
        )
    return found
