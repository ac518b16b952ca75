"""The spaces that planners search: sequences of actions with bounds, or of choices.

A planner works on *samples*: for a bounded action numbers from -1 (the lower bound) to 1 (the
upper one), for a choice the index of the option. A *plan* is the centre of a proposal, and zero
if nothing is preferred: for bounded actions the mean in those units, for a choice the
probability of each option less that of a uniform draw.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from tensordict import NestedKey
from torchrl.data import (
    Binary,
    Categorical,
    MultiCategorical,
    MultiOneHot,
    OneHot,
    TensorSpec,
)


class Proposal(NamedTuple):
    """A distribution over samples, independent from step to step.

    Args:
        plan: its centre, ``[B, H, *S]``.
        spread: the standard deviations, of the same shape; not used for choices.
    """

    plan: torch.Tensor
    spread: torch.Tensor


class ActionSpace(ABC):
    """The actions of one spec, as a planner searches them.

    Args:
        spec: the spec of one action, without batch dims, ``[*A]``.
    """

    #: The shape of one step's plan, ``[*S]``.
    plan_shape: torch.Size
    #: The dtype of plans.
    dtype: torch.dtype
    #: The shape of one step's sample, and its dtype.
    sample_shape: torch.Size
    sample_dtype: torch.dtype

    def __init__(self, spec: TensorSpec) -> None:
        self.spec = spec

    def proposal(self, plan: torch.Tensor, init_std: float) -> Proposal:
        """Return the proposal at the beginning of a search."""
        return Proposal(plan, torch.full_like(plan, init_std))

    @abstractmethod
    def noise(self, rows: int, number: int, horizon: int) -> torch.Tensor:
        """Draw the noise by which samples differ: ``[rows, number, horizon, *S]``."""

    @abstractmethod
    def sample(
        self,
        proposal: Proposal,
        noise: torch.Tensor,
        min_std: float,
        correlation: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return samples ``[B, N, H, ...]`` from a proposal.

        Args:
            proposal: ``[B, H, *S]``.
            noise: the noise that :meth:`noise` drew.
            min_std: for a choice, the share that is drawn uniformly.
            correlation: ``[H, H]``, the matrix that colours white noise over time.
        """

    @abstractmethod
    def fit(
        self, samples: torch.Tensor, weights: torch.Tensor, min_std: float
    ) -> Proposal:
        """Return the proposal that fits samples ``[B, K, H, ...]`` with weights ``[B, K]``."""

    @abstractmethod
    def mode(self, plan: torch.Tensor) -> torch.Tensor:
        """Return the most likely sample of a plan, ``[B, H, ...]``."""

    @abstractmethod
    def action(self, samples: torch.Tensor) -> torch.Tensor:
        """Turn samples into actions ``[..., *A]``, in the spec's dtype and bounds."""

    @abstractmethod
    def from_action(self, action: torch.Tensor) -> torch.Tensor:
        """Turn actions into samples."""


class BoundedSpace(ActionSpace):
    """Actions between bounds.

    Args:
        spec: a spec of floats.
        low: the lower bounds, ``[*A]``.
        high: the upper bounds, ``[*A]``.
    """

    def __init__(self, spec: TensorSpec, low: torch.Tensor, high: torch.Tensor) -> None:
        super().__init__(spec)
        self.plan_shape = self.sample_shape = spec.shape
        self.dtype = self.sample_dtype = spec.dtype
        self.low, self.high = low, high
        self.center, self.half = (high + low) / 2, (high - low) / 2
        self._is_unit = bool((low == -1).all() and (high == 1).all())

    def noise(self, rows: int, number: int, horizon: int) -> torch.Tensor:
        shape = (rows, number, horizon, *self.plan_shape)
        return torch.randn(shape, dtype=self.dtype, device=self.low.device)

    def sample(
        self,
        proposal: Proposal,
        noise: torch.Tensor,
        min_std: float,
        correlation: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if correlation is not None:
            flat = noise.reshape(*noise.shape[:3], self.plan_shape.numel())
            noise = torch.matmul(correlation, flat).reshape(noise.shape)
        plan, spread = (part.unsqueeze(1) for part in proposal)
        return (plan + spread * noise).clamp(-1.0, 1.0)

    def fit(
        self, samples: torch.Tensor, weights: torch.Tensor, min_std: float
    ) -> Proposal:
        weights = _beside(weights / weights.sum(1, keepdim=True), samples)
        mean = (weights * samples).sum(1)
        variance = (weights * (samples - mean.unsqueeze(1)).square()).sum(1)
        return Proposal(mean, variance.sqrt().clamp_min(min_std))

    def mode(self, plan: torch.Tensor) -> torch.Tensor:
        return plan.clamp(-1.0, 1.0)

    def action(self, samples: torch.Tensor) -> torch.Tensor:
        if self._is_unit:
            return samples
        action = self.center + self.half * samples
        # Rounding must not lead out of the bounds, nor stop the gradient at them.
        within = torch.clamp(action.detach(), self.low, self.high)
        if not action.requires_grad:
            return within
        return action + (within - action).detach()

    def from_action(self, action: torch.Tensor) -> torch.Tensor:
        half = self.half.clamp_min(torch.finfo(action.dtype).tiny)
        # Values that are not finite must not spread to the plan.
        samples = ((action - self.center) / half).nan_to_num(0.0)
        return samples.clamp(-1.0, 1.0)


class ChoiceSpace(ActionSpace):
    """Actions that are one of several options, or several such choices at once.

    Args:
        spec: a ``Categorical`` or ``OneHot`` spec.
        device: the device of plans.
    """

    def __init__(self, spec: OneHot | Categorical, device: torch.device | None) -> None:
        super().__init__(spec)
        self.device = device
        self.options = int(spec.space.n)
        self.one_hot = isinstance(spec, OneHot)
        self.sample_shape = spec.shape[:-1] if self.one_hot else spec.shape
        self.plan_shape = torch.Size((*self.sample_shape, self.options))
        self.dtype, self.sample_dtype = torch.get_default_dtype(), torch.int64

    def noise(self, rows: int, number: int, horizon: int) -> torch.Tensor:
        shape = (rows, number, horizon, *self.plan_shape)
        noise = torch.empty(shape, dtype=self.dtype, device=self.device)
        return noise.exponential_()

    def sample(
        self,
        proposal: Proposal,
        noise: torch.Tensor,
        min_std: float,
        correlation: torch.Tensor | None = None,
    ) -> torch.Tensor:
        uniform = 1.0 / self.options
        chances = (proposal.plan + uniform).clamp_min(0)
        chances = (1 - min_std) * chances + min_std * uniform
        # The largest of p / Exponential(1) is a draw from p.
        return (chances.unsqueeze(1) / noise).argmax(-1)

    def fit(
        self, samples: torch.Tensor, weights: torch.Tensor, min_std: float
    ) -> Proposal:
        chosen = self._one_hot(samples).to(weights.dtype)
        weights = _beside(weights / weights.sum(1, keepdim=True), chosen)
        plan = (weights * chosen).sum(1) - 1.0 / self.options
        return Proposal(plan, torch.zeros_like(plan))

    def _one_hot(self, samples: torch.Tensor) -> torch.Tensor:
        # torch's one_hot reads the values, and so waits for the device.
        options = torch.arange(self.options, device=samples.device)
        return samples.unsqueeze(-1) == options

    def mode(self, plan: torch.Tensor) -> torch.Tensor:
        return plan.argmax(-1)

    def action(self, samples: torch.Tensor) -> torch.Tensor:
        if self.one_hot:
            samples = self._one_hot(samples)
        return samples.to(self.spec.dtype)

    def from_action(self, action: torch.Tensor) -> torch.Tensor:
        return action.int().argmax(-1) if self.one_hot else action.long()


def action_space(
    spec: TensorSpec,
    key: NestedKey,
    action_range: tuple | None,
    device: torch.device | None,
) -> ActionSpace:
    """Return the space of an action.

    Args:
        spec: the spec of one action, without batch dims, ``[*A]``.
        key: the entry of the action, for messages.
        action_range: the bounds ``(low, high)``, or None for those of the spec.
        device: the device of plans.

    Raises:
        ValueError: if the spec has no bounds and no range is given, or if the
            range does not fit.
        TypeError: if planners cannot search actions of this kind.
    """
    several = isinstance(spec, (MultiOneHot, MultiCategorical, Binary))
    if isinstance(spec, (OneHot, Categorical)) and not several:
        if action_range is not None:
            raise ValueError(
                f"action_range bounds continuous actions, and {key!r} is a choice of "
                f"{int(spec.space.n)}: leave it out."
            )
        return ChoiceSpace(spec, device)
    if several or not spec.dtype.is_floating_point:
        raise TypeError(
            f"Planners search continuous, one-hot and categorical actions, and the spec of {key!r} "
            f"is a {type(spec).__name__} of {spec.dtype}. Wrap the env so that its action is of "
            f"one of these kinds: a choice among all combinations, for example."
        )
    low, high = _bounds(spec, key, action_range)
    return BoundedSpace(spec, low.to(device), high.to(device))


def finite_bounds(spec: TensorSpec) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the bounds of a spec of floats; None if it has none."""
    bounds = getattr(spec.space, "low", None), getattr(spec.space, "high", None)
    # Specs without bounds have the largest number of their dtype.
    most = torch.finfo(spec.dtype).max / 4
    if bounds[0] is None or not all(bound.abs().max() < most for bound in bounds):
        return None
    return bounds


def _bounds(
    spec: TensorSpec, key: NestedKey, action_range: tuple | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the bounds to search in, checked, ``[*A]`` each."""
    source = "action_range" if action_range is not None else "the action spec"
    if action_range is None:
        action_range = finite_bounds(spec)
    if action_range is None:
        raise ValueError(
            f"The action spec of {key!r} has no finite bounds, and a planner searches between "
            f"bounds. Pass action_range=(low, high), numbers or tensors of the shape "
            f"{tuple(spec.shape)}."
        )
    try:
        low, high = action_range
    except (TypeError, ValueError):
        raise ValueError(
            f"action_range must be a pair (low, high), got {action_range!r}."
        ) from None
    try:
        low, high = (
            torch.as_tensor(bound, dtype=spec.dtype).expand(spec.shape).clone()
            for bound in (low, high)
        )
    except RuntimeError as err:
        raise ValueError(
            f"action_range must be two numbers or two tensors that fit the action's shape "
            f"{tuple(spec.shape)}; {err}."
        ) from err
    if not (low.isfinite().all() and high.isfinite().all() and (low <= high).all()):
        raise ValueError(
            f"The bounds of {key!r} must be finite, the lower ones not above the upper ones; "
            f"{source} gives {low.tolist()} and {high.tolist()}."
        )
    _check_within(spec, key, low, high)
    return low, high


def _check_within(
    spec: TensorSpec, key: NestedKey, low: torch.Tensor, high: torch.Tensor
) -> None:
    """Refuse a range that leads out of the bounds of the spec."""
    # Each side separately: a spec may bound one side only, or some of the dims.
    least, most = getattr(spec.space, "low", None), getattr(spec.space, "high", None)
    below = least is not None and (low < least.to(low)).any()
    above = most is not None and (high > most.to(high)).any()
    if below or above:
        raise ValueError(
            f"action_range {low.tolist()} to {high.tolist()} leads out of the bounds of {key!r}, "
            f"{least.tolist()} to {most.tolist()}. Choose a range within them, or leave it out."
        )


def _beside(weights: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
    """Give weights ``[B, K]`` the dims of the samples ``[B, K, ...]`` that they multiply."""
    return weights.reshape(weights.shape + (1,) * (samples.ndim - weights.ndim))
