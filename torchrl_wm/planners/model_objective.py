"""Plans in a world model, imagined without tensordicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase

from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.envs.acting import ProgramActor
from torchrl_wm.envs.entries import fits, widened
from torchrl_wm.envs.layout import Layout, Specs
from torchrl_wm.envs.step import StepKernel
from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import (
    as_tuple,
    join,
    leaf_keys,
    missing_from,
    strip_next,
    unique,
)
from torchrl_wm.modules.world_model.flat import (
    FlatTensors,
    Placement,
    to_flat,
    to_tensordict,
    where,
)
from torchrl_wm.modules.world_model.program import Program
from torchrl_wm.modules.world_model.wiring import written_keys
from torchrl_wm.planners.checks import check_start
from torchrl_wm.planners.objective import Objective, Step
from torchrl_wm.planners.scores import Score


class ModelObjective(Objective):
    """Predicts without tensordicts, by the step kernel of a :class:`~torchrl_wm.WorldModelEnv`."""

    env: WorldModelEnv
    kernel: StepKernel
    #: The terminal value and the policy, as programs.
    value: Program | None = None
    program: Program | None = None
    #: The networks of a step whose outputs somebody reads; None if all are read.
    needed: Program | None = None
    _needed_for: tuple = ()

    def __getstate__(self) -> dict[str, Any]:
        # These hold on to networks: a copy makes its own.
        held = ("kernel", "value", "program", "needed", "_needed_for")
        return {k: v for k, v in self.__dict__.items() if k not in held}

    def prepare(self) -> tuple:
        """Look at the components, the policy and the value as they are now."""
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
        self._leave_out(kernel)
        programs = (kernel.program, self.value, self.program, self.needed)
        return (kernel, *programs, *super().prepare())

    def _leave_out(self, kernel: StepKernel) -> None:
        """Leave out the networks that nobody reads: a reward head, say, where no score reads it."""
        scores, layout = self._scores(), kernel.layout
        if self._needed_for == (kernel.program, scores):
            return
        self._needed_for, self.needed = (kernel.program, scores), None
        if any(score.in_keys is None for score in scores):
            return
        endings = [*layout.endings.bool_keys, *layout.endings.logit_keys]
        moving = (*layout.latent, *layout.memory)
        read = {join("next", key) for key in (*moving, *endings)}
        read.update(key for score in scores for key in score.in_keys)
        part = kernel.program.part(read)
        self.needed = None if part is kernel.program else part

    def start(self, tensordict: TensorDictBase) -> FlatTensors:
        env = self.env
        kernel = self.kernel
        observed = self._read_observations(kernel.layout, of_start=True)
        specs = {**kernel.layout.state, **observed}
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
        state = {
            key: value.reshape(-1, *value.shape[dims:]).to(env.device)
            for key, value in values.items()
        }
        state.update(self.start_entries(tensordict, state))
        for key, value in self._memory(tensordict).items():
            state[key] = value.reshape(-1, *value.shape[dims:]).to(env.device)
        return state

    def _memory(self, tensordict: TensorDictBase) -> FlatTensors:
        """Return the memory of a start: given, left by the observer before the planner, or anew."""
        model, layout = self.env.world_model, self.kernel.layout
        if not layout.memory:
            return {}
        memory = model.filter.given_memory(tensordict)
        if memory is None and model.observed_memory is not None:
            if not missing_from(tensordict, layout.latent):
                latents = to_flat(tensordict, layout.latent)
                memory = model.observed_memory.find(latents)
        if memory is None:
            size, device = tensordict.batch_size, self.env.device
            memory = model.filter.initial_memory(size, device)
        return memory

    def shown(self, start: TensorDictBase) -> list[NestedKey]:
        """Return the entries that an imagined env keeps: no observations, no notes of real steps."""
        dropped, shown = self.env.imaginer.starts.dropped, super().shown(start)
        return [key for key in shown if dropped.isdisjoint((key, as_tuple(key)[0]))]

    def encode(
        self,
        tensordict: TensorDictBase,
        observations: Mapping[NestedKey, NestedKey],
    ) -> FlatTensors:
        """Return the latents of observations that stand under other keys, ``[*B, ...]``."""
        env, layout = self.env, self.kernel.layout
        inputs = unique(env.world_model.encoder.in_keys)
        if set(inputs) != set(observations):
            raise ValueError(
                f"The encoder reads {inputs}, and the goal says where {list(observations)} stand: "
                f"goal={{{inputs[0]!r}: ..., ...}}, with all of them."
            )
        if missing := missing_from(tensordict, observations.values()):
            raise MissingEntryError(
                f"The goal observations {missing} are not in the tensordict, which has "
                f"{leaf_keys(tensordict)}. Set them beside the state: "
                f"tensordict[{missing[0]!r}] = ..."
            )
        size = tensordict.batch_size
        given = TensorDict({}, size, device=env.device)
        for key, entry in observations.items():
            value, spec = tensordict.get(entry), layout.observed.get(key)
            if spec is not None and not fits(value, spec, size):
                raise ValueError(
                    f"The goal observation {entry!r} has the shape "
                    f"{tuple(value.shape[len(size):])} and {value.dtype}; the encoder's {key!r} "
                    f"is of {tuple(spec.shape)} and {spec.dtype}. Give it as the env observes it: "
                    f"[*B, {', '.join(map(str, spec.shape))}] in {spec.dtype}."
                )
            given.set(key, value)
        encoded = env.world_model.encode(given)
        written = unique([*written_keys(env.world_model.encoder), *layout.latent])
        return {key: encoded.get(key) for key in written if key in encoded.keys(True)}

    def _read_observations(self, layout: Layout, of_start: bool) -> Specs:
        """Return the decoded observations that policy, value or a score read; or those of a start."""
        modules = [self.policy, self.terminal_value, *self._scores()]
        keys = unique(k for m in modules for k in getattr(m, "in_keys", None) or ())
        if of_start:
            return {k: spec for k, spec in layout.decoded.items() if k in keys}
        if any(score.in_keys is None for score in self._scores()):
            return layout.decoded
        read = {strip_next(key) for key in keys}
        return {key: spec for key, spec in layout.decoded.items() if key in read}

    def _scores(self) -> list[Score]:
        return [score for _, score in self.score.terms]

    def repeat(self, state: FlatTensors, times: int) -> FlatTensors:
        # Always copies: a model may work in place. The plans of one state share its memory.
        rows = {
            key: _shared(value, times)
            if key in self.kernel.layout.memory
            else value.repeat_interleave(times, 0)
            for key, value in state.items()
        }
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
        endings, outputs = layout.endings, kernel.outputs
        at = self._at(state)
        observed = list(self._read_observations(layout, of_start=False))
        moving = [*layout.latent, *layout.memory, *observed, *layout.counter]
        options = (endings.never(at), bool(observed), False, False, self.needed)
        first, later = kernel.stages(at, *options), None

        def advance(state: FlatTensors, action: torch.Tensor, step: int) -> tuple:
            nonlocal later
            values = {**state, self.action_key: action}
            made = dict(values)
            if step and later is None:
                later = kernel.stages(at._replace(trusted=True), *options)
            for stage in later if step else first:
                stage(made, at)
            for key in moving:
                values[key] = made[outputs[key]]
            ended = terminated = None
            if endings.can_end:
                # As in TorchRL's planners: one of several groups ends it.
                flags = {key: made[outputs[key]] for key in endings.keys}
                ended, terminated = (
                    endings.ended(flags, at, name, any_group=True)
                    for name in ("done", "terminated")
                )
            return values, made, ended, terminated

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
        memory = self.kernel.layout.memory  # which no value reads
        old = {key: value for key, value in old.items() if key not in memory}
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


def _shared(memory: torch.Tensor, times: int) -> torch.Tensor:
    """Return memory for ``times`` plans of each row: that of a single row is not copied."""
    if len(memory) == 1 and times > 1:
        return memory.expand(times, *memory.shape[1:])
    return memory.repeat_interleave(times, 0)
