"""A run's policy as a function of tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import nn
from torchrl.data import TensorSpec
from torchrl.envs import EnvBase, TensorDictPrimer
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_wm.modules.keys import as_tuple, is_next, strip_next, unique
from torchrl_wm.trainers.acting import prepared
from torchrl_wm.trainers.exporting.draws import Draw, draws_of, GivenDraws, rows_touched
from torchrl_wm.trainers.exporting.forms import bounds_of, Surroundings
from torchrl_wm.trainers.exporting.used_parameters import without_unused
from torchrl_wm.trainers.gym_actions import layers
from torchrl_wm.trainers.policies import HandedEnv

#: The name of the input that says where episodes begin, as that of the entry.
IS_INIT = "is_init"
#: Bounds beyond it are none.
_FAR = 1e6


@dataclass
class Port:
    """An input of an exported policy.

    Args:
        name: its name.
        kind: "observation", "carried" (what the policy hands on from step to step), "is_init"
            (where episodes begin), "uniform" or "normal" (draws).
        shape: the shape for each row of a batch.
        dtype: the dtype.
        key: the entry of the env or the policy.
        bounds: the least and the greatest values of an observation; None where there are none.
        first: what a carried entry is where an episode begins.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    key: NestedKey | None = None
    bounds: tuple[Any, Any] = (None, None)
    first: torch.Tensor | None = field(default=None, repr=False)

    @property
    def draw(self) -> Draw | None:
        """The draw that it stands for, if it is one."""
        is_draw = self.kind in ("uniform", "normal")
        return Draw(self.kind, self.shape, self.dtype) if is_draw else None


class PolicyProgram(nn.Module):
    """A policy on plain tensors: observations and what it carries, in; an action, out.

    Args:
        policy: the policy, on the CPU.
        env: the real env of the run.
        exploration: the exploration type of evaluations.

    Attributes:
        ports: the inputs, but for the draws.
        action_key: the key of the policy's action.
        surroundings: the transforms of the env, and the form of actions.
    """

    def __init__(
        self,
        policy: TensorDictModuleBase,
        env: EnvBase,
        exploration: ExplorationType,
    ) -> None:
        super().__init__()
        self.policy, self.surroundings = policy, Surroundings(env)
        self.action_key, self._exploration = env.action_key, exploration
        reads = unique(policy.in_keys)
        written = {strip_next(key): key for key in unique(policy.out_keys)}
        written.update(
            (strip_next(k), k) for k in unique(policy.out_keys) if is_next(k)
        )
        observed = _observed(env)
        #: Where the policy writes what it carries, by the key that it reads.
        self.carries = {
            key: written[key] for key in reads if key in written and key not in observed
        }
        if env.action_key in reads:
            self.carries[env.action_key] = env.action_key
        self._flags = [key for key in reads if as_tuple(key)[-1] == IS_INIT]
        self.ports = self._ports(env, reads)
        #: The input of each draw, in order; None where it does not matter.
        self.draws: list[Port | None] = self._given_draws()

    def _ports(self, env: EnvBase, reads: Sequence[NestedKey]) -> list[Port]:
        """Return the inputs, but for the draws."""
        around, self._names = self.surroundings, set()
        carried = [key for key in reads if key in self.carries]
        shown = around.entries
        keys = unique(shown.keys(True, True))
        if not around.inside:
            keys = [key for key in keys if key in reads]
        keys = [k for k in keys if k not in self._flags and k not in carried]
        ports = []
        for key in keys:
            spec = shown[key]
            port = self._port(_name(key), "observation", spec.shape, spec.dtype, key)
            port.bounds = bounds_of(spec)
            ports.append(port)
        seen = {p.key: torch.zeros(2, *p.shape, dtype=p.dtype) for p in ports}
        seen = around.observe(TensorDict(seen, batch_size=[2]))
        given = _first_of(env, self.policy) if carried else TensorDict()
        for key in carried:
            name, first = _name(key), given.get(key, None)
            if key == env.action_key:
                name, first = "last_action", env.full_action_spec_unbatched[key].zero()
            if first is None:
                raise ValueError(
                    f"The policy carries {key!r} from step to step, and nothing says what it is "
                    f"where an episode begins. Give the policy a make_tensordict_primer that has "
                    f"it."
                )
            port = self._port(name, "carried", first.shape, first.dtype, key)
            port.first = first
            ports.append(port)
        if carried or self._flags:
            ports.append(self._port(IS_INIT, "is_init", (), torch.bool))
        known = {*unique(seen.keys(True, True)), *carried, *self._flags}
        unknown = [key for key in reads if key not in known]
        if unknown:
            raise ValueError(
                f"The policy reads {unknown}, which the env does not observe and the policy does "
                f"not carry from step to step: nothing can give that to an exported policy. Let "
                f"the policy carry it (write what it reads, in the next step), or act by "
                f"load_policy(run).act(observation)."
            )
        return ports

    def _given_draws(self) -> list[Port | None]:
        """Return the inputs of the draws, in order.

        Draws that are never of use in the same row have one input: where an episode begins, a
        filter draws something else than where it goes on.
        """
        rows = 16
        inputs = self.example(rows)
        begins = inputs.get(IS_INIT, torch.zeros(rows, dtype=torch.bool))
        with torch.no_grad(), without_unused(self):
            found = draws_of(lambda: self._act(inputs), rows)
            touched = rows_touched(lambda: self._act(inputs), found, rows)
        made: list[tuple[Port, set[bool]]] = []
        ports: list[Port | None] = []
        for draw, where in zip(found, touched):
            places = {bool(begins[row]) for row in where.nonzero()}
            for port, taken in made if places else ():
                if port.draw == draw and not taken & places:
                    break
            else:
                if not places:
                    ports.append(None)
                    continue
                port = self._port(
                    f"draw_{len(made)}", draw.kind, draw.shape, draw.dtype
                )
                taken = set()
                made.append((port, taken))
            taken |= places
            ports.append(port)
        return ports

    def _port(
        self,
        name: str,
        kind: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        key: NestedKey | None = None,
    ) -> Port:
        while name in self._names or (name == IS_INIT and kind != IS_INIT):
            name += "_"
        self._names.add(name)
        return Port(name, kind, tuple(shape), dtype, key)

    @property
    def inputs(self) -> list[Port]:
        """All inputs, in order."""
        draws = {port.name: port for port in self.draws if port is not None}
        return [*self.ports, *draws.values()]

    @property
    def carried(self) -> dict[str, str]:
        """The outputs that are inputs of the next step, by the names of these inputs."""
        ports = (port for port in self.ports if port.kind == "carried")
        return {port.name: f"next_{port.name}" for port in ports}

    @property
    def outputs(self) -> list[str]:
        """The names of the outputs, in order."""
        return ["action", *self.carried.values()]

    def example(self, rows: int) -> dict[str, torch.Tensor]:
        """Return inputs, but for the draws, of a batch in which some episodes begin."""
        made = {}
        for port in self.ports:
            made[port.name] = torch.zeros(rows, *port.shape, dtype=port.dtype)
            if port.kind == "is_init":
                # Where all begin, or none, a filter does not do all that the program will do.
                made[port.name] = torch.arange(rows) % 2 == 0
            elif port.kind == "observation":
                made[port.name] = _drawn(self.surroundings.entries[port.key], rows)
        return made

    def forward(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the actions and what is carried, by the names of the outputs.

        Args:
            inputs: tensors ``[B, ...]`` by the names of the inputs.
        """
        left = iter(self.draws)

        def give(kind: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
            port = next(left)
            if port is None:
                return Draw(kind, (), dtype).middle(shape)
            return inputs[port.name]

        with GivenDraws(give):
            return self._act(inputs)

    def _act(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        size = next(iter(inputs.values())).shape[:1]
        td, kinds = TensorDict({}, batch_size=size), {}
        for port in self.ports:
            kinds.setdefault(port.kind, []).append(port)
        for port in kinds.get("observation", ()):
            td.set(port.key, inputs[port.name])
        td = self.surroundings.observe(td)
        begins = inputs.get(IS_INIT)
        for port in kinds.get("carried", ()):
            rows = begins.reshape(-1, *[1] * len(port.shape))
            value = torch.where(rows, port.first, inputs[port.name])
            td.set(port.key, value)
        for key in self._flags:
            td.set(key, begins.unsqueeze(-1))
        acted = self._acted(td)
        made = {"action": self.surroundings.act(acted)}
        for port in kinds.get("carried", ()):
            made[f"next_{port.name}"] = acted.get(self.carries[port.key])
        # No output may be an input.
        return {name: value.clone() for name, value in made.items()}

    def _acted(self, td: TensorDictBase) -> TensorDictBase:
        with set_exploration_type(self._exploration):
            return self.policy(td)


def _first_of(env: EnvBase, policy: TensorDictModuleBase) -> TensorDictBase:
    """Return what a policy is given where an episode begins; the env stays as it is."""
    handed = HandedEnv(env)
    handed.observation = handed.observation_spec.zero()
    return prepared(handed, policy).reset()


def _observed(env: EnvBase) -> set[NestedKey]:
    """Return the entries that the env itself shows at each step, those of primers apart."""
    transforms = chain.from_iterable(layers(env))
    primers = [each for each in transforms if isinstance(each, TensorDictPrimer)]
    primed = {key for each in primers for key in unique(each.primers.keys(True, True))}
    return {*unique(env.full_observation_spec_unbatched.keys(True, True))} - primed


def _drawn(spec: TensorSpec, rows: int) -> torch.Tensor:
    """Return values of a spec, ``[rows, ...]``: near a bound if the other one is far away."""
    value = torch.stack([spec.rand() for _ in range(rows)])
    low, high = bounds_of(spec)
    if not value.is_floating_point() or low is None:
        return value
    # Between infinite bounds nothing is drawn but NaN, of which a policy makes NaN.
    near = torch.randn_like(value)
    near = torch.where(high.abs() < _FAR, high - near.abs(), near)
    near = torch.where(low.abs() < _FAR, low + near.abs(), near)
    return torch.where((high - low).abs() < _FAR, value, near)


def _name(key: NestedKey) -> str:
    return re.sub(r"\W", "_", "_".join(as_tuple(key)))
