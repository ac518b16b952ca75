"""Gymnasium spaces: made from TorchRL's specs, and checks of values and actions."""

from __future__ import annotations

import copy
import warnings
from math import isfinite
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from tensordict import TensorDictBase
from torchrl.data import (
    Binary,
    Bounded,
    Categorical,
    MultiCategorical,
    MultiOneHot,
    OneHot,
    TensorSpec,
    Unbounded,
)
from torchrl.data.utils import numpy_to_torch_dtype_dict

from torchrl_wm.export.trees import tensor_to_numpy

_TORCH_TO_NUMPY = {v: np.dtype(k) for k, v in numpy_to_torch_dtype_dict.items()}
_CONTAINERS = (spaces.Dict, spaces.Tuple)
_LEAVES = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
#: How far an action may be outside of its bounds by rounding, as a share of their width.
_TOLERANCE = 1e-5


def checked_space(space: Any, name: str) -> spaces.Space:
    """Return a copy of a space, if the env can serve it.

    Raises:
        TypeError: if it is not a Gymnasium space, or of an unsupported kind.
        ValueError: if it is empty, or its bounds are in the wrong order.
    """
    if not isinstance(space, spaces.Space):
        raise TypeError(
            f"{name} must be a gymnasium.Space, got {type(space).__module__}."
            f"{type(space).__name__}. For example gymnasium.spaces.Box(-1, 1, (3,))."
        )
    for path, leaf in leaves_of(space):
        if not isinstance(leaf, _LEAVES):
            raise TypeError(
                f"{name}{path} is a {type(leaf).__name__}; supported are Box, Discrete, "
                f"MultiDiscrete, MultiBinary, and Dict and Tuple of these."
            )
        if 0 in leaf.shape:
            raise ValueError(f"{name}{path} is empty: its shape is {leaf.shape}.")
        if isinstance(leaf, spaces.Box) and bool(np.any(leaf.low > leaf.high)):
            raise ValueError(f"{name}{path} has low > high: {leaf}.")
    if isinstance(space, _CONTAINERS) and not len(space.spaces):
        raise ValueError(f"{name} is an empty {type(space).__name__}.")
    # A copy: seeding the caller's would rewind it, and envs would share one.
    return copy.deepcopy(space)


def leaves_of(space: spaces.Space, path: str = "") -> list[tuple[str, spaces.Space]]:
    """Return the leaf spaces, each with its path as Python writes it."""
    if isinstance(space, spaces.Dict):
        children = [(f"{path}[{key!r}]", child) for key, child in space.spaces.items()]
    elif isinstance(space, spaces.Tuple):
        children = [(f"{path}[{i}]", child) for i, child in enumerate(space.spaces)]
    else:
        return [(path, space)]
    return [leaf for place, child in children for leaf in leaves_of(child, place)]


def space_of_spec(spec: TensorSpec) -> spaces.Space:
    """Return the space of a spec without batch dims.

    Unlike TorchRL's own conversion, this one keeps dtypes and the shape of discrete specs, and
    gives an unbounded entry no bounds.

    Raises:
        NotImplementedError: if no space holds the values of the spec.
    """
    if isinstance(spec, (MultiCategorical, MultiOneHot)):
        return spaces.MultiDiscrete([int(n) for n in spec.nvec])
    is_option = isinstance(spec, (OneHot, Categorical)) and not isinstance(spec, Binary)
    if isinstance(spec, Binary) or (spec.dtype is torch.bool and not is_option):
        shape = tuple(spec.shape)
        return spaces.MultiBinary(shape[0] if len(shape) == 1 else shape)
    if is_option:
        shape = spec.shape[:-1] if isinstance(spec, OneHot) else spec.shape
        if shape.numel() > 1:
            return spaces.MultiDiscrete(np.full(tuple(shape), spec.space.n))
        return spaces.Discrete(int(spec.space.n))
    if not isinstance(spec, (Bounded, Unbounded)):
        raise NotImplementedError(
            f"There is no Gymnasium space for a {type(spec).__name__}; there is one for Bounded, "
            f"Unbounded, Binary, Categorical and OneHot, and MultiCategorical and MultiOneHot."
        )
    low, high = spec.space.low, spec.space.high
    if spec.dtype.is_floating_point:
        end = torch.finfo(spec.dtype).max
        low, high = (
            torch.where(bound.abs() >= end, bound.sign() * torch.inf, bound)
            for bound in (low, high)
        )
    if spec.dtype is torch.bfloat16:  # which numpy lacks
        low, high = low.float(), high.float()
    dtype = _TORCH_TO_NUMPY.get(spec.dtype, np.dtype(np.float32))
    low, high = (
        np.broadcast_to(bound.numpy(force=True), tuple(spec.shape)).astype(dtype)
        for bound in (low, high)
    )
    return spaces.Box(low, high, dtype=dtype.type)


class _LeafByLeaf:
    """A check of values against a space, leaf by leaf.

    Args:
        space: the space of one env.
        rows: the number of envs ``N`` in a value, as a first dim; None for one env without it.
        name: the name of the value, for messages.
        settings: further arguments of the class, for the parts of the space.
    """

    def __init__(
        self, space: spaces.Space, rows: int | None, name: str, **settings: Any
    ) -> None:
        self.space, self.rows, self.name = space, rows, name
        kind = type(self)
        #: The checks of the parts of a Dict or a Tuple; None for a leaf.
        self.parts: Any = None
        if isinstance(space, spaces.Dict):
            self.parts = {
                key: kind(child, rows, f"{name}[{key!r}]", **settings)
                for key, child in space.spaces.items()
            }
        elif isinstance(space, spaces.Tuple):
            self.parts = [
                kind(child, rows, f"{name}[{i}]", **settings)
                for i, child in enumerate(space.spaces)
            ]
        else:
            self.dtype = np.dtype(space.dtype)
            self.shape = space.shape if rows is None else (rows, *space.shape)
            self.low, self.high = _bounds(space)
            self._inside = _Inside(self.low, self.high, self.shape)

    def _of_parts(self, value: Any) -> Any:
        """Apply the checks of the parts to those of a value."""
        if isinstance(self.parts, dict):
            if not _is_mapping(value) or set(value.keys()) != set(self.parts):
                keys = sorted(self.parts)
                raise self._refused(value, f"a dictionary with the keys {keys}")
            return {key: part(value[key]) for key, part in self.parts.items()}
        if not isinstance(value, (tuple, list)) or len(value) != len(self.parts):
            raise self._refused(value, f"a tuple of {len(self.parts)}")
        return tuple(part(one) for part, one in zip(self.parts, value))

    def _refused(self, value: Any, expected: str) -> ValueError:
        got = f"{value!r:.80}"
        if _is_mapping(value):
            got = str(sorted(value.keys(), key=str))
        return ValueError(f"{self.name} must be {expected}, got {got}.")


class Reader(_LeafByLeaf):
    """A conversion of a model's outputs to values of a space, as new arrays.

    Args:
        space: the space of one env.
        rows: the number of envs ``N`` that are given at once, as a first dim; None
            for one env without it.
        name: the name of the value, for messages.
        clip: clip to the bounds. By default values outside are let through, since a
            model's predictions are seldom exact, and a warning says so once.
    """

    def __init__(
        self, space: spaces.Space, rows: int | None, name: str, clip: bool = False
    ) -> None:
        super().__init__(space, rows, name, clip=clip)
        self.clip = clip
        self._castable: dict[np.dtype, bool] = {}
        self._warned = False

    def __call__(self, value: Any) -> Any:
        """Return a value as arrays that share no memory with it.

        Raises:
            ValueError: if shape, dtype or keys do not fit the space.
            FloatingPointError: if it is NaN or infinite.
        """
        if self.parts is not None:
            return self._of_parts(value)
        array = _as_array(value)
        if array.shape != self.shape:
            raise ValueError(self._shape_message(array.shape))
        if array.dtype != self.dtype and not self._can_cast(array.dtype):
            raise ValueError(
                f"{self.name} is {array.dtype}, but its space holds {self.dtype}. Convert it in "
                f"the model or its adapter, e.g. an image in [0, 1] by (255 * x).round()."
                f"clamp(0, 255).to(torch.uint8); or declare a space of dtype {array.dtype}."
            )
        out = array.astype(self.dtype)
        # The uncast array: in the cast one, integers have wrapped around.
        if not self._inside(array):
            out = self._out_of_bounds(out, array)
        return out if out.ndim else out[()]

    def fits(self, value: Any) -> bool:
        """Return whether a value has the structure, shapes and kinds of dtype of the space."""
        if isinstance(self.parts, dict):
            return (
                _is_mapping(value)
                and set(value.keys()) == set(self.parts)
                and all(part.fits(value[key]) for key, part in self.parts.items())
            )
        if self.parts is not None:
            return (
                isinstance(value, tuple)
                and len(value) == len(self.parts)
                and all(part.fits(one) for part, one in zip(self.parts, value))
            )
        if value is None or _is_mapping(value) or isinstance(value, (tuple, str)):
            return False
        try:
            array = _as_array(value)
        except (TypeError, ValueError):
            return False
        return array.shape == self.shape and self._can_cast(array.dtype)

    def misfit(self, value: Any) -> str:
        """Return why a value does not fit, for messages."""
        try:
            self(value)
        except (ValueError, TypeError, FloatingPointError) as err:
            return str(err)
        return f"{self.name} does not fit."

    def describe(self) -> str:
        """Return the structure, shapes and dtypes that fit, for messages."""
        if isinstance(self.parts, dict):
            inner = ", ".join(f"{k!r}: {p.describe()}" for k, p in self.parts.items())
            return f"a dictionary {{{inner}}}"
        if self.parts is not None:
            return f"a tuple ({', '.join(part.describe() for part in self.parts)})"
        return f"{self.shape} {self.dtype}"

    def _can_cast(self, dtype: np.dtype) -> bool:
        known = self._castable.get(dtype)
        if known is None:
            known = dtype != object and np.can_cast(dtype, self.dtype, "same_kind")
            # The values of integers of another width are checked later.
            known = known or {dtype.kind, self.dtype.kind} <= {"i", "u"}
            self._castable[dtype] = known
        return known

    def _out_of_bounds(self, out: np.ndarray, given: np.ndarray) -> np.ndarray:
        if out.dtype.kind == "f":
            bad = ~np.isfinite(out)
            if bad.any():
                raise FloatingPointError(
                    f"{self.name} is NaN or infinite{self._where(bad)}. The model diverged: look "
                    f"at its training, or shorten episodes with max_episode_steps."
                )
        bad = (given < self.low) | (given > self.high)
        if not isinstance(self.space, spaces.Box) or out.dtype.kind != "f":
            raise ValueError(
                f"{self.name} is outside of {self.space}{self._where(bad)}: got {given[bad][:3]}."
            )
        if self.clip:
            return np.clip(out, self.space.low, self.space.high)
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{self.name} is outside of the bounds of its space{self._where(bad)}, e.g. "
                f"{out[bad][0]}. It is handed out as the model predicts it; pass "
                f"clip_observations=True to clip it. This warning appears once.",
                stacklevel=4,
            )
        return out

    def _where(self, bad: np.ndarray) -> str:
        if self.rows is None:
            return ""
        rows = np.flatnonzero(bad.reshape(self.rows, -1).any(-1))
        return f" in env {rows[:5].tolist()}{'...' if len(rows) > 5 else ''}"

    def _shape_message(self, shape: tuple[int, ...]) -> str:
        hint = ""
        if shape == (1, *self.shape):
            hint = " The model keeps a batch dim of 1: remove it with squeeze(0)."
        elif self.rows is not None and shape == self.shape[1:]:
            hint = f" A vector env's model works on {self.rows} rows at once."
        return (
            f"{self.name} has the shape {shape}; its space asks for {self.shape}.{hint}"
        )


class Checker(_LeafByLeaf):
    """A check of actions against a space, which copies them.

    Args:
        space: the space of one env.
        rows: the number of envs ``N`` that act at once; None for one.
        name: the name of the action, for messages.
    """

    def __init__(
        self, space: spaces.Space, rows: int | None, name: str = "action"
    ) -> None:
        super().__init__(space, rows, name)

    def __call__(self, action: Any) -> Any:
        """Return the action as new arrays, in the space's dtype.

        Raises:
            ValueError: if it is outside of the space. An action that is outside of a Box
                by rounding is clipped instead.
        """
        if self.parts is not None:
            return self._of_parts(action)
        try:
            array = _as_array(action)
        except (TypeError, ValueError):
            raise self._refused(action, f"an array of shape {self.shape}") from None
        if array.shape != self.shape:
            raise self._refused(action, f"the shape {self.shape}", array.shape)
        kinds = "fiu" if self.dtype.kind == "f" else "iub"
        if array.dtype.kind not in kinds:
            raise self._refused(action, f"the dtype {self.dtype}", array.dtype)
        out = array.astype(self.dtype)
        if not self._inside(array):
            out = self._settle(action, out)
        return out

    def _settle(self, action: Any, out: np.ndarray) -> np.ndarray:
        """Clip an action that is outside by rounding; refuse others."""
        if self.dtype.kind == "f" and not np.isnan(out).any():
            low, high = self.space.low, self.space.high
            with np.errstate(invalid="ignore"):
                width = np.nan_to_num(high - low, posinf=0)
            clipped = np.clip(out, low, high)
            if (np.abs(out - clipped) <= _TOLERANCE * width).all():
                return clipped
        raise self._refused(action, f"a value in {self.space}")

    def _refused(self, value: Any, expected: str, got: Any = "") -> ValueError:
        rows = "" if self.rows is None else f" for each of {self.rows} envs"
        return ValueError(
            f"{self.name} must be {expected}{rows}, got {got} {value!r:.120}. "
            f"env.action_space.sample() gives one that fits; gymnasium.wrappers.ClipAction and "
            f"RescaleAction bring others into the bounds."
        )


class _Inside:
    """A test of whether all of an array is within bounds; NaN is not.

    Args:
        low, high: the bounds of one env.
        shape: the shape of the arrays, which may begin with the number of envs.
    """

    def __init__(
        self, low: np.ndarray, high: np.ndarray, shape: tuple[int, ...]
    ) -> None:
        self.low, self.high = low, high
        self.pairs: list[tuple[float, float]] | None = None
        kind = low.dtype
        self.is_unbounded = kind.kind == "f" and bool(
            ((low == -np.finfo(kind).max) & (high == np.finfo(kind).max)).all()
        )
        if np.prod(shape) <= 16:  # Python's own loop is faster then
            bounds = (np.broadcast_to(bound, shape).ravel() for bound in (low, high))
            self.pairs = list(zip(*(bound.tolist() for bound in bounds)))

    def __call__(self, array: np.ndarray) -> bool:
        if self.pairs is not None:
            for value, (low, high) in zip(array.ravel().tolist(), self.pairs):
                if not low <= value <= high:
                    return False
            return True
        if self.is_unbounded and array.dtype == self.low.dtype:
            # All numbers are finite if their squares are; if these overflow, the bounds tell.
            flat = array.ravel()
            if isfinite(flat.dot(flat)):
                return True
        return bool(((array >= self.low) & (array <= self.high)).all())


def _as_array(value: Any) -> np.ndarray:
    if type(value) is np.ndarray:
        return value
    if isinstance(value, torch.Tensor):
        return tensor_to_numpy(value)
    return np.asarray(value)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, (dict, TensorDictBase)) or (
        hasattr(value, "keys") and hasattr(value, "__getitem__")
    )


def _bounds(space: spaces.Space) -> tuple[np.ndarray, np.ndarray]:
    """Return the least and greatest values, between which no NaN or infinity lies."""
    if isinstance(space, spaces.Box):
        if np.dtype(space.dtype).kind != "f":
            return space.low, space.high
        end = np.finfo(space.dtype).max
        return np.maximum(space.low, -end), np.minimum(space.high, end)
    if isinstance(space, spaces.Discrete):
        return np.asarray(space.start), np.asarray(space.start + space.n - 1)
    if isinstance(space, spaces.MultiDiscrete):
        return space.start, space.start + space.nvec - 1
    return np.zeros(space.shape, space.dtype), np.ones(space.shape, space.dtype)


def sample_start(space: spaces.Space, seed: int) -> Any:
    """Return a sample of a space, drawn with its own seed."""
    drawn = copy.deepcopy(space)
    drawn.seed(seed)
    return drawn.sample()


def batched(space: spaces.Space, rows: int) -> spaces.Space:
    """Return the space of ``rows`` envs at once."""
    return gymnasium.vector.utils.batch_space(space, rows)
