"""The forms in which models may return the results of resets and steps, and their recognition.

A form that could be read in two ways is an error: a wrong guess would silently train a policy
on wrong numbers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase

from torchrl_wm.export.spaces import Reader
from torchrl_wm.export.trees import tensor_to_numpy


class _Missing:
    """The mark of a part that a model did not return."""

    def __repr__(self) -> str:
        return "missing"

    def __reduce__(self) -> str:
        return "MISSING"  # the same object in copies


MISSING = _Missing()

#: The names of observations in a mapping; those of the next step come first.
_NEXT_OBSERVATIONS = ("next_observation", "next_obs")
_OBSERVATIONS = ("observation", "obs", "image", "pixels")

RESET_FORMS = (
    "observation; (observation, info); (state, observation); (state, observation, info); or a "
    "mapping with 'observation' (or 'obs', 'image', 'pixels', 'next_observation', 'next_obs') "
    "and, optionally, 'state' and 'info'"
)
STEP_FORMS = (
    "(observation, reward, terminated, truncated, info); (observation, reward, done, info); "
    "(state, observation, reward); (state, observation, reward, terminated, truncated, info); or "
    "a mapping with 'state' or 'next_state', 'observation' (or 'obs', 'image', 'pixels', "
    "'next_observation', 'next_obs'), and, optionally, 'reward', 'terminated' or 'done', "
    "'truncated' and 'info'"
)


@dataclass(slots=True)
class Outcome:
    """The parts of the result of a reset or a step."""

    observation: Any
    state: Any = MISSING
    reward: Any = MISSING
    terminated: Any = MISSING
    truncated: Any = MISSING
    info: Any = MISSING
    #: Terminated or truncated, if the model does not say which.
    done: Any = MISSING


class _Form:
    """A reader of results; the first one decides which form all have.

    Args:
        reader: the reader of observations, which tells what fits the observation space.
        name: the name of the function that returned the results, for messages.
    """

    accepted: str

    def __init__(self, reader: Reader, name: str) -> None:
        self.reader, self.name = reader, name
        self._form: str | None = None

    def _refused(self, value: Any, why: str = "") -> TypeError:
        return TypeError(
            f"{self.name} returned {described(value)}.{why} Accepted are {self.accepted}. An "
            f"observation is {self.reader.describe()}."
        )


class ResetForm(_Form):
    """A reader of the results of resets."""

    accepted = RESET_FORMS

    def __call__(self, value: Any) -> Outcome:
        """Return the parts of a result.

        Raises:
            TypeError: if the form is not accepted, or not that of the first result.
            ValueError: if it could be one of two forms.
        """
        value = as_mapping(value)
        form = _same_form(self._form, self._form_of(value), self.name)
        self._form = form
        if form == "observation":
            return Outcome(value)
        if form == "mapping":
            return _from_mapping(value, {"state", "info"}, self.name, RESET_FORMS)
        if form == "(state, observation, info)":
            state, observation, info = value
            return Outcome(observation, state=state, info=info)
        first, second = value
        if form == "(observation, info)":
            return Outcome(first, info=second)
        return Outcome(second, state=first)

    def _form_of(self, value: Any) -> str:
        fits = self.reader.fits
        if is_mapping(value):
            named = _observation_key(value, self.name) if not fits(value) else None
            if fits(value):
                inner = [
                    k for k in _OBSERVATIONS if k in value.keys() and fits(value[k])
                ]
                if inner:
                    raise self._ambiguous(
                        value, f"a mapping with {inner}", "an observation"
                    )
                return "observation"
            if named is None:
                raise self._refused(value)
            return "mapping"
        if not isinstance(value, tuple):
            if fits(value) or not isinstance(value, list):
                return "observation"
            raise self._refused(value)
        if fits(value) and len(value) != 2:
            return "observation"
        if len(value) == 3:
            return "(state, observation, info)"
        if len(value) != 2:
            raise self._refused(value)
        first, second = value
        could_be_info = second is None or is_mapping(second)
        if fits(second) and not (fits(first) and could_be_info):
            return "(state, observation)"
        if could_be_info and not fits(second):
            return "(observation, info)"
        if self._form is not None:
            return self._form
        if could_be_info:
            raise self._ambiguous(value, "(state, observation)", "(observation, info)")
        return "(state, observation)"  # reading it will raise the error

    def _ambiguous(self, value: Any, one: str, other: str) -> ValueError:
        return ValueError(
            f"{self.name} returned {described(value)}, which could be {one} or {other}. Say which: "
            f"return {{'state': ..., 'observation': ...}} or (state, observation, info)."
        )


class StepForm(_Form):
    """A reader of the results of steps."""

    accepted = STEP_FORMS
    _length: int | None = None

    def __call__(self, value: Any) -> Outcome:
        """Return the parts of a result.

        Raises:
            TypeError: if the form is not accepted, or not that of the first result.
        """
        if type(value) is not tuple or len(value) != self._length:
            value = as_mapping(value)
            self._form = _same_form(self._form, self._form_of(value), self.name)
            # For tuples, the length identifies the form from now on.
            self._length = len(value) if self._form != "mapping" else None
        if self._length is None:
            extra = {"reward", "terminated", "done", "truncated", "info"}
            if "next" in value.keys():
                value = self._from_next(value)
            known = {"state", "next_state", *extra}
            return _from_mapping(value, known, self.name, STEP_FORMS)
        if len(value) == 5:
            observation, reward, terminated, truncated, info = value
            return Outcome(observation, MISSING, reward, terminated, truncated, info)
        if len(value) == 4:
            observation, reward, done, info = value
            # With four outputs, Gym told truncations by this entry.
            limit = info.get("TimeLimit.truncated") if is_mapping(info) else None
            if limit is not None:
                return Outcome(
                    observation, MISSING, reward, truncated=limit, info=info, done=done
                )
            return Outcome(observation, MISSING, reward, done, info=info)
        if len(value) == 3:
            state, observation, reward = value
            return Outcome(observation, state, reward)
        state, observation, reward, terminated, truncated, info = value
        return Outcome(observation, state, reward, terminated, truncated, info)

    def _form_of(self, value: Any) -> str:
        if is_mapping(value):
            inner = value["next"] if "next" in value.keys() else value
            if not is_mapping(inner) or _observation_key(inner, self.name) is None:
                raise self._refused(value)
            return "mapping"
        if not isinstance(value, tuple) or len(value) not in (3, 4, 5, 6):
            raise self._refused(value)
        if len(value) == 3 and _is_bool(value[2]):
            raise self._refused(
                value, " (observation, reward, done) is not accepted: add an info, {}."
            )
        place = {3: 1, 4: 0, 5: 0, 6: 1}[len(value)]
        has_info = len(value) > 3
        if has_info and not (value[-1] is None or is_mapping(value[-1])):
            raise self._refused(value, " The last of these must be an info dictionary.")
        if len(value) in (3, 4) and not self.reader.fits(value[place]):
            # (observation, reward, done) and (state, observation, reward, done) end here.
            raise self._refused(value, f" {self.reader.misfit(value[place])}")
        return f"tuple of {len(value)}"

    def _from_next(self, value: Any) -> dict:
        """Return the entries below "next", as in a tensordict; those beside it are the past."""
        past = {"state", "action", *_OBSERVATIONS}
        beside = sorted(set(value.keys()) - past - {"next"}, key=str)
        if beside:
            raise TypeError(
                f"{self.name} returned 'next' and, beside it, {beside}: it is not clear which "
                f"counts. Put all predictions of the step below 'next'."
            )
        inner = value["next"]
        return {key: inner[key] for key in inner.keys()}


def _same_form(known: str | None, form: str, name: str) -> str:
    if known is not None and form != known:
        raise TypeError(
            f"{name} returned a {form}, and a {known} before. Keep to one form."
        )
    return form


def _from_mapping(value: Any, others: set[str], name: str, forms: str) -> Outcome:
    key = _observation_key(value, name)
    if key is None:
        raise TypeError(f"{name} returned {described(value)}. Accepted are {forms}.")
    known = {*others, *_OBSERVATIONS, *_NEXT_OBSERVATIONS}
    unknown = sorted(set(value.keys()) - known, key=str)
    if unknown:
        raise TypeError(
            f"{name} returned a mapping with the unknown keys {unknown}, which nothing would "
            f"read. Accepted are {forms}. Put other outputs into 'info'."
        )

    def get(entry: str) -> Any:
        return value[entry] if entry in value.keys() else MISSING

    state = get("next_state")
    terminated = get("terminated")
    truncated = get("truncated")
    done = get("done")
    if terminated is MISSING or terminated is None:
        terminated, done = done, MISSING
    return Outcome(
        value[key],
        state=get("state") if state is MISSING else state,
        reward=get("reward"),
        terminated=terminated,
        truncated=truncated,
        info=get("info"),
        done=done,
    )


def _observation_key(value: Any, name: str) -> str | None:
    keys = value.keys()
    for names in (_NEXT_OBSERVATIONS, _OBSERVATIONS):
        there = [key for key in names if key in keys]
        if len(there) > 1:
            raise TypeError(
                f"{name} returned several observations, {there}: return one of them. Several "
                f"entries of one observation are a dictionary under 'observation'."
            )
        if there:
            return there[0]
    return None


def is_mapping(value: Any) -> bool:
    """Return whether a value is a mapping or a tensordict."""
    return isinstance(value, (Mapping, TensorDictBase))


def as_mapping(value: Any) -> Any:
    """Turn a named tuple or a dataclass into a mapping, if its fields have the accepted names."""
    names = {*_OBSERVATIONS, *_NEXT_OBSERVATIONS}
    if isinstance(value, tuple) and names & set(getattr(value, "_fields", ())):
        return value._asdict()
    if dataclasses.is_dataclass(value) and not isinstance(
        value, (type, TensorDictBase)
    ):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return fields if names & set(fields) else value
    return value


# Scalars ---------------------------------------------------------------------


def read_reward(value: Any, rows: int | None, name: str) -> Any:
    """Return a reward as a float, or as ``[N]`` float64.

    Raises:
        ValueError: if it has another shape, or is no number.
        FloatingPointError: if it is NaN or infinite.
    """
    kind = type(value)
    is_one = kind is float or (
        kind is torch.Tensor and value.numel() == 1 and value.is_floating_point()
    )
    if rows is None and is_one:
        out = float(value)
        finite = math.isfinite(out)
    else:
        array = _flat(value, rows, name)
        if array.dtype.kind not in "fiu":
            raise ValueError(
                f"{name} must be a number, got {array.dtype}: {value!r:.80}."
            )
        out = array.astype(np.float64)
        finite = np.isfinite(out).all()
        if rows is None:
            out = float(out)
    if not finite:
        where = (
            "" if rows is None else f" in env {np.flatnonzero(~np.isfinite(out))[:5]}"
        )
        raise FloatingPointError(
            f"{name} is NaN or infinite{where}: {value!r:.80}. Look at the model's reward head, "
            f"and at its training."
        )
    return out


def read_flag(value: Any, rows: int | None, name: str) -> Any:
    """Return a flag as a bool, or as ``[N]`` bool.

    Raises:
        ValueError: if it has another shape, or is not a bool: a probability is not a flag.
    """
    if type(value) is bool and rows is None:
        return value
    array = _flat(value, rows, name)
    is_flag = array.dtype == bool or (
        array.dtype.kind in "iu" and bool(((array == 0) | (array == 1)).all())
    )
    if not is_flag:
        raise ValueError(
            f"{name} must be a bool, got {array.dtype}: {value!r:.80}. In place of a probability "
            f"or a logit, return probability > 0.5 or logit > 0."
        )
    out = array.astype(bool)
    return bool(out) if rows is None else out


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or getattr(value, "dtype", None) in (
        torch.bool,
        np.dtype(bool),
    )


def _flat(value: Any, rows: int | None, name: str) -> np.ndarray:
    """Return one number, or one for each row, without trailing dims of 1."""
    if isinstance(value, torch.Tensor):
        array = tensor_to_numpy(value)
    else:
        array = np.asarray(value)
    if rows is None:
        if array.size != 1:
            raise ValueError(
                f"{name} must be one number, got the shape {array.shape}: {value!r:.80}. For "
                f"several envs at once, make a GymWorldModelVectorEnv."
            )
        return array.reshape(())
    if array.shape not in ((rows,), (rows, 1)):
        raise ValueError(
            f"{name} must be [{rows}] or [{rows}, 1], one for each env, got {array.shape}."
        )
    return array.reshape(rows)


def described(value: Any) -> str:
    """Return the form of a value, for messages."""
    if is_mapping(value):
        return f"a {type(value).__name__} with the keys {sorted(value.keys(), key=str)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} ({', '.join(_part(one) for one in value)})"
    return _part(value)


def _part(value: Any) -> str:
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return f"{tuple(value.shape)} {value.dtype}"
    if is_mapping(value):
        return f"{type(value).__name__} with {sorted(value.keys(), key=str)}"
    return type(value).__name__
