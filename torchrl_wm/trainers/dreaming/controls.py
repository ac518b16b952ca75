"""What one sets an action with: a slider for each number, buttons for each choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import Literal

import torch
from tensordict import NestedKey, TensorDictBase
from torchrl.data import Binary, TensorSpec

from torchrl_wm.diagnostics.drawing import choose_dims, name_of
from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.export.choices import from_numbers, is_choice, number_shape, to_numbers
from torchrl_wm.modules.keys import unique


@dataclass(frozen=True)
class Control:
    """What sets one number of an action.

    Args:
        name: the entry, with the place in it.
        kind: a number within bounds, or one of several options.
        low, high: the bounds, both included; None where there is none.
        options: how many options there are; they are numbered from 0.
        whole: whether only whole numbers are valid.
    """

    name: str
    kind: Literal["number", "choice"]
    low: float | None = None
    high: float | None = None
    options: int = 0
    whole: bool = False

    def check(self, value: float) -> None:
        """Refuse a number that is not valid.

        Raises:
            ValueError: if it is not finite, out of bounds, or no option.
        """
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{self.name} must be a number, got {value!r}.")
        try:
            value = float(value)
        except OverflowError:  # an int of more than 308 digits
            value = inf if value > 0 else -inf
        low, high, whole = self.low, self.high, self.whole
        if self.kind == "choice":
            low, high, whole = 0, self.options - 1, True
        # Bounds are float32: 0.1 is a little more there.
        slack = 1e-6 * max(1.0, abs(value))
        below = low is not None and value < low - slack
        above = high is not None and value > high + slack
        if not isfinite(value) or below or above or (whole and value != int(value)):
            kind = "a whole number" if whole else "a number"
            least = "" if low is None else f" from {low:g}"
            most = "" if high is None else f" up to {high:g}"
            raise ValueError(f"{self.name} must be {kind}{least}{most}, got {value:g}.")


class Controls:
    """All controls of the actions of an imagined env, in the order of its action entries.

    Args:
        env: the imagined env.

    Attributes:
        all: the controls.

    Examples:
        >>> from torchrl.envs import GymEnv
        >>> from torchrl_wm import WorldModelEnv
        >>> from torchrl_wm.models import make_ensemble_world_model
        >>> from torchrl_wm.trainers.dreaming.controls import Controls
        >>> real_env = GymEnv("CartPole-v1")
        >>> world_model, _ = make_ensemble_world_model(real_env, hidden=(8,), normalize=False)
        >>> controls = Controls(WorldModelEnv(world_model, real_env))
        >>> controls.all
        [Control(name='action', kind='choice', low=None, high=None, options=2, whole=False)]
        >>> controls.actions([1])["action"]
        tensor([[0, 1]])
    """

    def __init__(self, env: WorldModelEnv) -> None:
        self._full = env.full_action_spec_unbatched
        self._specs = {key: self._full[key] for key in unique(env.action_keys)}
        self._device = env.device
        self._parts = {key: _controls(key, spec) for key, spec in self._specs.items()}
        self.all = [control for part in self._parts.values() for control in part]

    def actions(self, numbers: Sequence[float]) -> TensorDictBase:
        """Return numbers, one for each control, as actions of batch size ``[1]``.

        Raises:
            ValueError: if there is another number of them, or one is not valid.
        """
        names = [control.name for control in self.all]
        if not isinstance(numbers, (list, tuple)) or len(numbers) != len(names):
            raise ValueError(
                f"An action is a list of {len(names)} numbers, for {names}; got {numbers!r}."
            )
        for control, value in zip(self.all, numbers):
            control.check(value)
        out, left = self._full.expand(1, *self._full.shape).zero(), list(numbers)
        for key, spec in self._specs.items():
            values = [left.pop(0) for _ in self._parts[key]]
            out.set(key, _entry(key, spec, values, self._device))
        return out

    def numbers(self, actions: TensorDictBase) -> list[float]:
        """Return what :meth:`actions` makes these actions of, of batch size ``[1]``."""
        out = []
        for key, spec in self._specs.items():
            value = actions.get(key).detach().cpu()
            if is_choice(spec):
                value = to_numbers(value, spec.cpu(), _number_shape(spec))
            out += value.flatten().tolist()
        return [float(value) for value in out]

    def random(self) -> TensorDictBase:
        """Return actions that are drawn by their specs, of batch size ``[1]``."""
        return self._full.expand(1, *self._full.shape).rand()


def _number_shape(spec: TensorSpec) -> torch.Size:
    """Return the shape of the numbers of options that an entry stands for."""
    shape = number_shape(spec)
    return torch.Size(spec.shape) if shape is None else shape


def _controls(key: NestedKey, spec: TensorSpec) -> list[Control]:
    if isinstance(spec, Binary):
        labels = _labels(key, spec.shape)
        return [Control(name, "choice", options=2) for name in labels]
    if is_choice(spec):
        labels = _labels(key, _number_shape(spec))
        counts = getattr(spec, "nvec", None)
        if counts is None:
            counts = torch.tensor(int(spec.space.n))
        counts = torch.as_tensor(counts).flatten().tolist()
        counts = [int(n) for n in counts] * (len(labels) // len(counts))
        return [Control(n, "choice", options=o) for n, o in zip(labels, counts)]
    lows, highs = (_bounds(spec, side) for side in ("low", "high"))
    whole = not spec.dtype.is_floating_point
    return [
        Control(name, "number", low, high, whole=whole)
        for name, low, high in zip(_labels(key, spec.shape), lows, highs)
    ]


def _labels(key: NestedKey, shape: Sequence[int]) -> list[str]:
    if not torch.Size(shape).numel():
        raise ValueError(f"The action {name_of(key)!r} has no dims: {tuple(shape)}.")
    return choose_dims(key, shape, None, None, torch.Size(shape).numel()).labels


def _bounds(spec: TensorSpec, side: str) -> list[float | None]:
    """Return the bounds of each dim; None where there is none."""
    count = torch.Size(spec.shape).numel()
    bound = getattr(spec.space, side, None)
    if bound is None:
        return [None] * count
    values = bound.expand(spec.shape).flatten().tolist()
    # Without bounds, float32's largest number stands there.
    most = torch.finfo(torch.float32).max
    return [float(v) if isfinite(v) and abs(v) < most else None for v in values]


def _entry(
    key: NestedKey,
    spec: TensorSpec,
    values: Sequence[float],
    device: torch.device | None,
) -> torch.Tensor:
    """Return the numbers of one entry as the entry, ``[1, *A]``."""
    numbers = torch.tensor([values], dtype=torch.float64, device=device)
    if is_choice(spec):
        numbers = numbers.long().reshape(1, *_number_shape(spec))
        return from_numbers(numbers, spec, 1, key)
    return numbers.to(spec.dtype).reshape(1, *spec.shape)
