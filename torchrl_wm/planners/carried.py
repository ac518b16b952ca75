"""The entries in which a plan travels from one step to the next: to begin with it, or to act on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torchrl.data import Composite, Unbounded
from torchrl.envs import TensorDictPrimer
from torchrl.modules import MPCPlannerBase

from torchrl_wm.modules.keys import join, suffixed
from torchrl_wm.modules.world_model.filtering import IS_INIT
from torchrl_wm.planners.actions import ActionSpace
from torchrl_wm.planners.search import Search

#: The plan, and the entries that a subclass adds, ``[B, ...]``.
Carried = dict[NestedKey, torch.Tensor]
#: Their shapes, without batch dims, and their dtypes.
CarriedSpecs = Mapping[NestedKey, tuple[torch.Size, torch.dtype]]


class CarryingPlanner(MPCPlannerBase):
    """The part of a planner that hands its plan from one step to the next.

    Attributes:
        warm_start: whether plans travel; None if they do where the tensordict has one.
        plan_key: the entry in which the plan travels.
        planning_horizon: the number of actions of a plan.
        execute: the number of actions that are taken before the next plan is made.
        action_block: the number of steps that each action is held for.
        space: the space of the action.
    """

    warm_start: bool | None
    plan_key: NestedKey
    planning_horizon: int
    execute: int
    action_block: int
    space: ActionSpace

    def carried_shapes(self) -> dict[NestedKey, tuple[int, ...]]:
        """Return the shapes of the entries that travel beside the plan, without batch dims."""
        return {}

    def carry(self, search: Search) -> Carried:
        """Return the plan, and what travels beside it, moved on to where the next search begins."""
        return {self.plan_key: moved(search.proposal.plan, self.execute, 1)}

    def carried_specs(self) -> CarriedSpecs:
        """Return the shapes, without batch dims, and dtypes of the entries that travel."""
        plan = (self.planning_horizon, *self.space.plan_shape)
        dtype = self.space.dtype
        specs = {self.plan_key: (torch.Size(plan), dtype)}
        for key, shape in self.carried_shapes().items():
            specs[key] = (torch.Size(shape), self.space.sample_dtype)
        return specs

    # Acting on one plan for several steps

    @property
    def steps_per_plan(self) -> int:
        """The number of steps from one plan to the next."""
        return self.execute * self.action_block

    @property
    def actions_key(self) -> NestedKey:
        """The entry in which the actions travel that are taken one after the other."""
        return suffixed(self.plan_key, "_actions")

    @property
    def step_key(self) -> NestedKey:
        """The entry that counts the steps since the plan was made; 0 where one is to be made."""
        return suffixed(self.plan_key, "_step")

    def executed_specs(self) -> CarriedSpecs:
        """Return the shapes and dtypes of what travels to act on; none if each step has its plan."""
        if self.steps_per_plan == 1:
            return {}
        actions = torch.Size((self.execute, *self.space.sample_shape))
        return {
            self.actions_key: (actions, self.space.sample_dtype),
            self.step_key: (torch.Size([1]), torch.int64),
        }

    def executed(self, tensordict: TensorDictBase) -> Carried:
        """Return the actions that are taken and the number of the step, ``[B, ...]``."""
        specs = self.executed_specs()
        return read_carried(tensordict, specs, self.env.device, warm=True)

    @property
    def always_carried(self) -> list[NestedKey]:
        """The entries that travel in any env, whether it has a primer for them or not."""
        plan = list(self.carried_specs()) if self.warm_start else []
        return [*plan, *self.executed_specs()]

    @property
    def carried_keys(self) -> list[NestedKey]:
        """All entries that may travel; not the plan with ``warm_start=False``."""
        plan = [] if self.warm_start is False else list(self.carried_specs())
        return [*plan, *self.executed_specs()]

    def is_warm(self, tensordict: TensorDictBase) -> bool:
        """Return whether a search from ``tensordict`` begins with the plan that it holds."""
        if self.warm_start is None:
            return tensordict.get(self.plan_key, None) is not None
        return self.warm_start

    def carried(self, tensordict: TensorDictBase) -> Carried:
        """Return the plan of the step before and what travels beside it, ``[B, ...]``."""
        specs, warm = self.carried_specs(), self.is_warm(tensordict)
        return read_carried(tensordict, specs, self.env.device, warm=warm)

    def make_tensordict_primer(self, **kwargs: Any) -> TensorDictPrimer:
        """Make a transform that gives an env the entries in which the plan travels.

        They are zero at a reset: a search then begins without a plan. Collectors and
        batched envs, which must know all entries beforehand, need it.

        Args:
            kwargs: for :class:`~torchrl.envs.TensorDictPrimer`, such as
                ``reset_key``.

        Raises:
            RuntimeError: if the planner carries nothing (``warm_start=False`` and a plan for
                each step).
        """
        if not self.carried_keys:
            raise RuntimeError(
                "The planner carries no plan from step to step: pass warm_start=True, or leave "
                "the primer out."
            )
        spec = Composite(shape=())
        specs = {**self.carried_specs(), **self.executed_specs()}
        for key, (shape, dtype) in specs.items():
            if key not in self.carried_keys:
                continue
            spec[key] = Unbounded(shape, dtype=dtype, device=self.env.device)
        return TensorDictPrimer(spec, default_value=0.0, expand_specs=True, **kwargs)


def read_carried(
    tensordict: TensorDictBase,
    specs: CarriedSpecs,
    device: torch.device | None,
    *,
    warm: bool,
) -> Carried:
    """Read the entries that travel, ``[*B, ...]``, as rows ``[B, ...]``.

    They are zero in rows in which an episode begins, if the tensordict lacks them, and without
    a warm start.

    Raises:
        ValueError: if an entry has the shape of another planner's.
    """
    size = tensordict.batch_size
    begins = tensordict.get(IS_INIT, None) if warm else None
    if begins is not None:
        begins = begins.reshape(size.numel(), -1).all(-1).to(device)
    out: Carried = {}
    for key, (shape, dtype) in specs.items():
        value = tensordict.get(key, None) if warm else None
        if value is None:
            out[key] = torch.zeros(size.numel(), *shape, dtype=dtype, device=device)
            continue
        if tuple(value.shape) != (*size, *shape):
            raise ValueError(
                f"{key!r} has the shape {tuple(value.shape)}, and this planner carries "
                f"{(*size, *shape)} there. If it is another planner's, give each its own: "
                f"plan_key=..."
            )
        value = value.reshape(-1, *shape).to(device)
        if begins is not None:
            rows = begins.reshape(-1, *(1,) * len(shape))
            value = torch.where(rows, torch.zeros_like(value), value)
        out[key] = value
    return out


def write_carried(
    tensordict: TensorDictBase, carried: Carried, size: torch.Size
) -> None:
    """Write the entries that travel, rows ``[B, ...]``, into a tensordict, as ``[*B, ...]``."""
    for key, value in carried.items():
        value = value.reshape(*size, *value.shape[1:])
        tensordict.set(join("next", key), value)
        # Rollouts in an env without the entry keep the one at the root.
        tensordict.set(key, value.clone())


def moved(steps: torch.Tensor, by: int, dim: int) -> torch.Tensor:
    """Return a plan some steps later: without the first ones, and with zeros as the last."""
    later = steps.narrow(dim, by, steps.shape[dim] - by)
    return torch.cat([later, torch.zeros_like(steps.narrow(dim, 0, by))], dim)


def where_rows(rows: torch.Tensor, new: Carried, old: Carried) -> Carried:
    """Return the entries of ``new`` in ``rows``, ``[B]`` bool, else those of ``old``."""
    return {
        key: torch.where(rows.reshape(-1, *(1,) * (value.ndim - 1)), value, old[key])
        for key, value in new.items()
    }
