"""What a plan is worth: the return that a model, or any env, predicts for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.data import TensorSpec
from torchrl.envs import EnvBase

from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.envs.acting import ProgramActor
from torchrl_wm.envs.entries import fits, widened
from torchrl_wm.envs.layout import Layout
from torchrl_wm.envs.step import StepKernel
from torchrl_wm.modules.keys import (
    as_tuple,
    join,
    missing_from,
    sibling,
    strip_next,
    unique,
)
from torchrl_wm.modules.world_model.flat import (
    FlatTensors,
    Placement,
    to_tensordict,
    where,
)
from torchrl_wm.modules.world_model.program import Program
from torchrl_wm.planners.checks import check_start

#: The names under which TorchRL's modules write values.
_VALUE_NAMES = ("state_value", "state_action_value", "chosen_action_value")

#: The rows of a state, an action and the number of the step, to the next state, the
#: reward, and where trajectories ended and terminated, ``[R]``; None if they cannot.
Step = Callable[[Any, torch.Tensor, int], tuple]


class Objective(ABC):
    """Predicts returns: the sum of rewards up to the first end, and what is worth what remains.

    Args:
        env: what predicts.
        action_key: the action that is planned.
        reward_key: the reward, below "next".
        discount: the factor per step.
        terminal_value: writes the value of the states at the horizon.
        policy: proposes actions.
    """

    def __init__(
        self,
        env: EnvBase,
        action_key: NestedKey,
        reward_key: NestedKey,
        discount: float,
        terminal_value: TensorDictModuleBase | None,
        policy: Callable | None,
    ) -> None:
        self.env = env
        self.action_key = action_key
        self.reward_key = reward_key
        self.discount = discount
        self.terminal_value = terminal_value
        self.policy = policy
        self.value_key = None if terminal_value is None else value_key(terminal_value)

    def update(self, **settings: Any) -> None:
        """Take over the planner's settings, which may have been replaced."""
        if settings["terminal_value"] is not self.terminal_value:
            value = settings["terminal_value"]
            self.value_key = None if value is None else value_key(value)
        self.__dict__.update(settings)

    def prepare(self) -> tuple:
        """Look at what predicts as it is now; all that a compiled plan depends on."""
        return ()

    @abstractmethod
    def start(self, tensordict: TensorDictBase) -> Any:
        """Return the states that plans begin from, as rows ``[B]``, in a form that :meth:`repeat` takes."""

    @abstractmethod
    def repeat(self, state: Any, times: int) -> Any:
        """Each row ``times`` times in a row, ``[B * times]``."""

    @abstractmethod
    def stepper(self, state: Any) -> Step:
        """Return the function that makes one step after the other, from the rows of ``state`` on."""

    @abstractmethod
    def actor(self, state: Any) -> Callable[[Any, int], Any]:
        """Return the function that lets the policy act on rows of a state, given the number of the step."""

    @abstractmethod
    def select(self, rows: torch.Tensor, new: Any, old: Any) -> Any:
        """Return ``new`` in the ``rows``, ``[R]`` bool, else ``old``."""

    @abstractmethod
    def evaluate(self, state: Any) -> torch.Tensor:
        """Return the terminal value of states, ``[R, 1]``."""

    def returns(self, state: Any, actions: torch.Tensor) -> torch.Tensor:
        """Return the returns ``[R]`` of the actions ``[R, H, *A]`` from the rows of ``state``."""
        advance = self.stepper(state)
        value = None if self.terminal_value is None else _Value(self)
        total = going = None
        scale = 1.0
        for step, action in enumerate(actions.unbind(1)):
            state, reward, ended, terminated = advance(state, action, step)
            reward = _scaled(_per_row(reward), scale)
            scale *= self.discount
            if going is not None:
                # Not a product: what follows an end may be NaN.
                reward = torch.where(going, reward, torch.zeros_like(reward))
            total = reward if total is None else total + reward
            if value is not None:
                value.step(state, scale, going, terminated)
            if ended is not None:
                going = ~ended if going is None else going & ~ended
        return total if value is None else total + value()

    def proposed(self, state: Any, horizon: int) -> torch.Tensor:
        """Return the actions of the policy from the rows of ``state`` on, ``[R, H, *A]``."""
        advance, act, actions = self.stepper(state), self.actor(state), []
        for step in range(horizon):
            state = act(state, step)
            action = state.get(self.action_key)
            actions.append(action)
            state = advance(state, action, step)[0]
        return torch.stack(actions, 1)

    @abstractmethod
    def imagine(self, state: Any, actions: torch.Tensor) -> TensorDictBase:
        """Return the whole trajectories ``[R, H]`` of the actions ``[R, H, *A]``."""


class ModelObjective(Objective):
    """Predicts on tensors alone, by the step kernel of a :class:`~torchrl_wm.WorldModelEnv`."""

    env: WorldModelEnv
    kernel: StepKernel
    #: The terminal value and the policy, as programs.
    value: Program | None = None
    program: Program | None = None

    def __getstate__(self) -> dict[str, Any]:
        # These hold on to networks: a copy makes its own.
        held = ("kernel", "value", "program")
        return {k: v for k, v in self.__dict__.items() if k not in held}

    def prepare(self) -> tuple:
        self.kernel = kernel = self.env.step_kernel
        if self.terminal_value is not None:
            if self.value is None or not self.value.is_for(self.terminal_value):
                self.value = Program([self.terminal_value])
        if self.policy is not None:
            act = self.env.actor(self.policy, torch.Size([1]))
            program = getattr(act, "program", None)
            # The one at hand stays as long as it is true: graphs are made for it.
            if program is None or self.program is None:
                self.program = program
            elif not self.program.is_for(self.policy):
                self.program = program
        return (kernel, kernel.program, self.value, self.program)

    def start(self, tensordict: TensorDictBase) -> FlatTensors:
        env = self.env
        kernel = self.kernel
        specs = {**kernel.layout.state, **self._read_observations(kernel.layout)}
        needed = list(specs)
        missing = missing_from(tensordict, needed)
        state = tensordict
        if missing:
            inputs = unique(env.world_model.encoder.in_keys)
            recurrent = env.world_model.is_recurrent
            if not recurrent and not missing_from(tensordict, inputs):
                state = env.world_model.encode(tensordict.copy())
            check_start(
                env.world_model, kernel.layout, tensordict, missing_from(state, needed)
            )
        values = {key: state.get(key) for key in needed}
        for key in kernel.layout.counter:
            count = tensordict.get(key, None)
            if count is not None:
                values[key] = count
        dims, batch_size = tensordict.batch_dims, tensordict.batch_size
        for key, spec in specs.items():
            values[key] = widened(values[key], spec.dtype)
            if not fits(values[key], spec, batch_size):
                raise ValueError(
                    f"The planner's {key!r} has the shape {tuple(values[key].shape)} and "
                    f"{values[key].dtype}; the tensordict's batch size {tuple(batch_size)} and "
                    f"the env's spec ask for {(*batch_size, *spec.shape)} and {spec.dtype}."
                )
        return {
            key: value.reshape(-1, *value.shape[dims:]).to(env.device)
            for key, value in values.items()
        }

    def _read_observations(self, layout: Layout) -> dict[NestedKey, TensorSpec]:
        """Return the decoded observations that the policy or the terminal value read."""
        modules = (self.policy, self.terminal_value)
        read = {key for m in modules for key in unique(getattr(m, "in_keys", []))}
        return {key: spec for key, spec in layout.decoded.items() if key in read}

    def repeat(self, state: FlatTensors, times: int) -> FlatTensors:
        # Always copies: a model may work in place.
        rows = {key: value.repeat_interleave(times, 0) for key, value in state.items()}
        if times == 1:
            return rows
        # In an ensemble of which each trajectory follows a member (TSinf), each follows
        # its own: a plan must please all of them.
        dynamics = self.env.world_model.dynamics
        member = getattr(dynamics, "member_key", None)
        if member in rows:
            elites = dynamics.elites
            drawn = torch.randint(len(elites), rows[member].shape, device=elites.device)
            rows[member] = elites[drawn]
        return rows

    def stepper(self, state: FlatTensors) -> Step:
        kernel, layout = self.kernel, self.kernel.layout
        endings = layout.endings
        at = self._at(state)
        trusted, never = at._replace(trusted=True), endings.never(at)
        place = strip_next(self.reward_key)
        observed = list(self._read_observations(layout))
        moving = [*layout.latent, *observed, *layout.counter]

        def advance(state: FlatTensors, action: torch.Tensor, step: int) -> tuple:
            values = {**state, self.action_key: action}
            predicted = kernel.predict(
                values,
                trusted if step else at,
                never,
                decode=bool(observed),
                check_finite=False,
            )
            for key in moving:
                values[key] = predicted[key]
            ended = terminated = None
            if endings.can_end:
                # As in TorchRL's planners: one of several groups ends it.
                ended, terminated = (
                    endings.ended(predicted, at, name, any_group=True)
                    for name in ("done", "terminated")
                )
            return values, predicted[place], ended, terminated

        return advance

    def actor(self, state: FlatTensors) -> Callable[[FlatTensors, int], FlatTensors]:
        at = self._at(state)
        if self.program is not None:
            write = ProgramActor(self.program, at)
        else:
            write = self.env.actor(self.policy, at.batch_size)

        def act(state: FlatTensors, step: int) -> FlatTensors:
            values = dict(state)
            write(values, step)
            return values

        return act

    def select(
        self, rows: torch.Tensor, new: FlatTensors, old: FlatTensors
    ) -> FlatTensors:
        return where(rows, new, old)

    def evaluate(self, state: FlatTensors) -> torch.Tensor:
        values = dict(state)
        self.value(values, self._at(state))
        return values[self.value_key]

    def imagine(self, state: FlatTensors, actions: torch.Tensor) -> TensorDictBase:
        start = to_tensordict(state, self._at(state))
        return self.env.imagine(actions.shape[1], tensordict=start, actions=actions)

    def _at(self, state: FlatTensors) -> Placement:
        """Return the number of rows of a state, ``[R]``, and its device."""
        return Placement(next(iter(state.values())).shape[:1], self.env.device)


class _Value:
    """The value of where each trajectory is when it ends or reaches the horizon.

    A termination is worth nothing; a truncation is worth its state.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.state: Any = None
        self.scale: torch.Tensor | float = 1.0
        self.worth: torch.Tensor | None = None

    def step(
        self,
        state: Any,
        scale: float,
        going: torch.Tensor | None,
        terminated: torch.Tensor | None,
    ) -> None:
        """Follow the trajectories that were still ``going`` before this step."""
        if going is None:
            self.state, self.scale = state, scale
        else:
            self.state = self.objective.select(going, state, self.state)
            before = torch.as_tensor(self.scale, device=going.device)
            self.scale = torch.where(going, scale, before)
        if terminated is not None:
            ended = terminated if going is None else terminated & going
            self.worth = ~ended if self.worth is None else self.worth & ~ended

    def __call__(self) -> torch.Tensor:
        value = self.scale * _per_row(self.objective.evaluate(self.state))
        if self.worth is None:
            return value
        return torch.where(self.worth, value, torch.zeros_like(value))


class EnvObjective(Objective):
    """Predicts by stepping an env that takes tensordicts of any batch size."""

    #: What is in the tensordict for the planner alone.
    ignored: Sequence[NestedKey] = ()

    def start(self, tensordict: TensorDictBase) -> TensorDictBase:
        state = tensordict.exclude("next", self.action_key, *self.ignored).reshape(-1)
        if self.env.device is not None:
            state = state.to(self.env.device)
        return state

    def repeat(self, state: TensorDictBase, times: int) -> TensorDictBase:
        rows = state.unsqueeze(1).expand(state.shape[0], times)
        return rows.reshape(-1)

    def stepper(self, state: TensorDictBase) -> Step:
        def advance(state: TensorDictBase, action: torch.Tensor, step: int) -> tuple:
            made = self.env.step(state.copy().set(self.action_key, action))
            return (
                self.env.step_mdp(made),
                made.get(self.reward_key),
                self._ended(made, "done"),
                self._ended(made, "terminated"),
            )

        return advance

    def actor(
        self, state: TensorDictBase
    ) -> Callable[[TensorDictBase, int], TensorDictBase]:
        return lambda state, step: self.policy(state.copy())

    def select(
        self, rows: torch.Tensor, new: TensorDictBase, old: TensorDictBase
    ) -> TensorDictBase:
        return torch.where(rows, new, old)

    def evaluate(self, state: TensorDictBase) -> torch.Tensor:
        return self.terminal_value(state.copy()).get(self.value_key)

    def _ended(self, step: TensorDictBase, name: str) -> torch.Tensor:
        ended = torch.zeros(step.batch_size, dtype=torch.bool, device=step.device)
        for key in done_keys(self.env):
            flag = step.get(sibling(key, name), None)
            if flag is not None:
                ended = ended | flag.flatten(1).all(-1)
        return ended

    def imagine(self, state: TensorDictBase, actions: torch.Tensor) -> TensorDictBase:
        steps = []
        for action in actions.unbind(1):
            step = self.env.step(state.copy().set(self.action_key, action))
            steps.append(step)
            state = self.env.step_mdp(step)
        return torch.stack(steps, 1).refine_names(..., "time")


def done_keys(env: EnvBase) -> list[NestedKey]:
    """Return the ``done`` entries of a step that end a trajectory, as TorchRL's planners do.

    A group of done entries that has an ancestor is heard only through it.
    """
    keys = [key for key in map(as_tuple, env.done_keys) if key[-1] == "done"]
    groups = [key[:-1] for key in keys]

    def has_ancestor(group: tuple[str, ...]) -> bool:
        return any(len(o) < len(group) and group[: len(o)] == o for o in groups)

    return [join("next", key) for key in keys if not has_ancestor(key[:-1])]


def rewards_until_end(
    steps: TensorDictBase, reward_key: NestedKey, done_keys: Sequence[NestedKey]
) -> torch.Tensor:
    """Return the rewards of steps ``[R, T]``, with zeros after the step that ended each row."""
    reward = steps.get(reward_key)
    if not done_keys:
        return reward
    done = torch.stack([steps[key].expand_as(reward) for key in done_keys]).any(0)
    return torch.where(done.cumsum(1) > done, torch.zeros_like(reward), reward)


def value_key(module: TensorDictModuleBase) -> NestedKey:
    """Where a value module writes.

    Raises:
        ValueError: if that is not clear from its keys.
    """
    keys = unique(module.out_keys)
    for name in _VALUE_NAMES:
        named = [key for key in keys if key == name or key[-1] == name]
        if len(named) == 1:
            return named[0]
    if len(keys) == 1:
        return keys[0]
    raise ValueError(
        f"terminal_value writes {keys}, and it is not clear which is the value: let it write one "
        f"of {list(_VALUE_NAMES)}, or nothing else."
    )


def _scaled(reward: torch.Tensor, scale: float) -> torch.Tensor:
    return reward if scale == 1.0 else scale * reward


def _per_row(entry: torch.Tensor) -> torch.Tensor:
    """``[R, ...]`` as ``[R]``; the rewards of several agents add up."""
    return (
        entry.squeeze(-1)
        if entry.ndim == 2 and entry.shape[1] == 1
        else entry.flatten(1).sum(-1)
    )
