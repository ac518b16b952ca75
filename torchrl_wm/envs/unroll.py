"""Many imagined steps at once, without the cost of many tensordicts.

Entries live in a flat dictionary while the steps are made, are collected by key, and become
one tensordict at the end: what ``EnvBase.rollout`` returns, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tensordict import (
    is_leaf_nontensor,
    NestedKey,
    TensorDict,
    TensorDictBase,
    unravel_key,
)

from torchrl_wm import _upstream
from torchrl_wm.envs.endings import Endings
from torchrl_wm.envs.step import autocasts, StepKernel
from torchrl_wm.modules.keys import is_next, join, strip_next
from torchrl_wm.modules.world_model.flat import FlatTensors, Placement
from torchrl_wm.modules.world_model.program import Program

#: Writes actions into the values of a step, given its number.
Act = Callable[[FlatTensors, int], None]


@dataclass
class Trace:
    """The entries of the steps made: by flat key, a list in the order of time.

    Args:
        root: what each step started from, with what the policy wrote.
        next: what was predicted.
    """

    root: dict[NestedKey, list[torch.Tensor]]
    next: dict[NestedKey, list[torch.Tensor]]

    @classmethod
    def of(cls, root: FlatTensors, next_: FlatTensors) -> Trace:
        """The trace of one step, which has the keys of all that follow."""
        return cls(
            {key: [value] for key, value in root.items()},
            {key: [value] for key, value in next_.items()},
        )

    def append(self, root: FlatTensors, next_: FlatTensors) -> None:
        """Add a step."""
        for columns, values in ((self.root, root), (self.next, next_)):
            for key, column in columns.items():
                column.append(values[key])

    def __len__(self) -> int:
        return len(next(iter(self.next.values())))


def unroll(
    kernel: StepKernel,
    act: Act,
    values: FlatTensors,
    steps: int,
    batch_size: torch.Size,
    device: torch.device | None,
    stop: Callable[[FlatTensors], bool] | None = None,
) -> Trace:
    """Make ``steps`` steps, or fewer if ``stop`` says so.

    Args:
        kernel: predicts a step.
        act: writes actions into the values it is given.
        values: where to start: all root entries, by flat key. Done entries that
            are never True may be missing, if nobody reads them. It is used up.
        steps: how many steps to make at most.
        batch_size: ``*B``.
        device: where the state is.
        stop: looks at the done entries after each step but the last.
    """
    moving = [key for key in moving_keys(kernel) if key in values]
    never = kernel.layout.endings.never_keys
    if not never:
        endings = None  # the model or the time says how a step ends
    elif never.isdisjoint(moving):
        endings = {}
    else:
        endings = kernel.layout.endings.none(batch_size, device)
    given = set(values)
    act(values, 0)
    # A step hands on no rewards and no predictions, and so none that the policy wrote.
    left = kernel.layout.reward_keys
    left = [key for key in values.keys() - given if is_next(key) or key in left]
    kernel.check_actions(values, batch_size)
    at = Placement(batch_size, device)
    predicted = kernel.predict(values, at, endings)
    at = at._replace(trusted=True)
    trace = Trace.of(values, predicted)
    straight = kernel.is_straight and not autocasts(device)
    if straight and not left and getattr(act, "is_straight", False):
        return _go_on(
            kernel, act.program, trace, values, moving, steps, batch_size, device, stop
        )
    for step in range(1, steps):
        if stop is not None and stop(predicted):
            break
        for key in moving:
            values[key] = predicted[key]
        for key in left:
            del values[key]
        act(values, step)
        predicted = kernel.predict(values, at, endings)
        trace.append(values, predicted)
    return trace


def _go_on(
    kernel: StepKernel,
    policy: Program,
    trace: Trace,
    values: FlatTensors,
    moving: list[NestedKey],
    steps: int,
    batch_size: torch.Size,
    device: torch.device | None,
    stop: Callable[[FlatTensors], bool] | None,
) -> Trace:
    """The steps after the first, where they are networks and nothing else.

    Root and "next" entries share one dictionary, and nothing is copied on the way.
    """
    endings = kernel.layout.endings
    runs = (*policy.trusted, *kernel.program.trusted)
    at = Placement(batch_size, device, trusted=True)
    places = {
        key: key if key in kernel.layout.context else join("next", key)
        for key in trace.next
    }
    moves = [(key, places[key]) for key in moving if key not in kernel.layout.context]
    flags = {key: column[0] for key, column in trace.next.items()}
    values.update({places[key]: value for key, value in flags.items()})
    columns = [(column, key) for key, column in trace.root.items()]
    columns += [(column, places[key]) for key, column in trace.next.items()]
    for _ in range(1, steps):
        if stop is not None and stop(flags):
            break
        for key, place in moves:
            values[key] = values[place]
        for run in runs:
            run(values, at)
        if endings.can_end:
            flags = endings.read(values, batch_size, device, None)
            for key, flag in flags.items():
                values[places[key]] = flag
        for column, key in columns:
            column.append(values[key])
    return trace


def moving_keys(kernel: StepKernel) -> list[NestedKey]:
    """What a step hands on to the next one."""
    layout = kernel.layout
    counter = [] if kernel.counter_key is None else [kernel.counter_key]
    carried = (*layout.state, *layout.decoded, *layout.predicted)
    return [*carried, *counter, *layout.endings.keys]


class ProgramActor:
    """A policy that runs as a program."""

    def __init__(
        self, program: Program, batch_size: torch.Size, device: torch.device | None
    ) -> None:
        self.program, self.batch_size, self.device = program, batch_size, device

    @property
    def is_straight(self) -> bool:
        """Whether it sees and writes nothing but its keys, and reads no predictions."""
        program = self.program
        return program.is_known and not any(is_next(key) for key in program.reads)

    def __call__(self, values: FlatTensors, step: int) -> None:
        self.program(values, Placement(self.batch_size, self.device, step > 0))


def replay(actions: FlatTensors, dim: int) -> Act:
    """What takes given actions, ``[*B, H, ...]`` by key, one after the other."""
    sequences = {key: value.unbind(dim) for key, value in actions.items()}

    def act(values: FlatTensors, step: int) -> None:
        for key, sequence in sequences.items():
            values[key] = sequence[step]

    return act


def imagined(
    kernel: StepKernel,
    act: Act | None,
    horizon: int,
    batch_size: torch.Size,
    device: torch.device | None,
    values: FlatTensors,
    actions: FlatTensors | None,
) -> tuple[FlatTensors, FlatTensors, torch.Tensor]:
    """A full horizon on tensors alone, which compiles to one graph.

    Args:
        kernel: predicts a step.
        act: acts; or None, with ``actions``.
        horizon: the number of steps ``H``.
        batch_size: ``*B``.
        device: where the state is.
        values: where to start.
        actions: what to do, ``[*B, H, ...]`` by key.

    Returns:
        Root and "next" entries, ``[*B, H, ...]`` by flat key, and where
        trajectories have not ended before, ``[*B, H]`` bool.
    """
    dim = len(batch_size)
    if act is None:
        act = replay(actions, dim)
    trace = unroll(kernel, act, dict(values), horizon, batch_size, device)
    endings = kernel.layout.endings
    if endings.can_end:
        ended = torch.zeros(batch_size, dtype=torch.bool, device=device)
        valid = []
        for step in range(len(trace)):
            flags = {key: trace.next[key][step] for key in endings.keys}
            valid.append(~ended)
            ended = ended | endings.ended(flags, batch_size)
        mask = torch.stack(valid, dim)
    else:
        mask = torch.ones((*batch_size, horizon), dtype=torch.bool, device=device)
    return *stacked(trace, endings, batch_size, device), mask


def stacked(
    trace: Trace,
    endings: Endings,
    batch_size: torch.Size,
    device: torch.device | None,
) -> tuple[FlatTensors, FlatTensors]:
    """Root and "next" entries of all steps, ``[*B, T, ...]`` by flat key.

    Done entries that are never True and were left out on the way are added.
    """
    dim, size = len(batch_size), (*batch_size, len(trace))
    both = []
    for columns in (trace.root, trace.next):
        flat = {key: torch.stack(column, dim) for key, column in columns.items()}
        if any(key not in flat for key in endings.never_keys):
            flat = {**endings.none(size, device), **flat}
        both.append(flat)
    return both[0], both[1]


def assemble(
    root: FlatTensors,
    next_: FlatTensors,
    start: TensorDictBase | None,
    kernel: StepKernel,
    batch_size: torch.Size,
    device: torch.device | None,
) -> TensorDict:
    """The tensordict ``[*B, T]`` of stacked entries, its last dim named "time".

    Args:
        root: what each step started from, with what the policy wrote.
        next_: what was predicted.
        start: the tensordict that the first step started from, whose nested
            tensordicts say which dims theirs have; None if it has none.
        kernel: what made the steps.
        batch_size: ``*B``.
        device: where the state is.
    """
    dim = len(batch_size)
    nodes = {} if start is None else _nodes(start)
    nested = {key: node.batch_size[dim:] for key, node in nodes.items()}
    nested.update(
        {unravel_key(key): dims for key, dims in kernel.layout.nested.items()}
    )
    size = torch.Size((*batch_size, next(iter(next_.values())).shape[dim]))
    for key in [key for key in root if is_next(key)]:  # a policy's
        next_.setdefault(strip_next(key), root.pop(key))
    names = [None] * dim + ["time"]
    below = _build(next_, size, device, names, nested)
    return _build(root, size, device, names, nested, next=below)


def _build(
    flat: FlatTensors,
    size: torch.Size,
    device: torch.device | None,
    names: list[str | None],
    nested: dict[NestedKey, torch.Size],
    prefix: tuple[str, ...] = (),
    **nodes: TensorDict,
) -> TensorDict:
    """A tensordict of stacked entries, which are known to fit: nothing is checked again.

    Args:
        flat: the entries.
        size: its batch size.
        device: its device.
        names: the names of its dims.
        nested: dims that nested tensordicts have of their own, by their keys.
        prefix: where it will stand.
        nodes: nested tensordicts that are there already.
    """
    source: dict[str, torch.Tensor | TensorDict] = {}
    below: dict[str, FlatTensors] = {}
    for key, value in flat.items():
        if isinstance(key, str):
            source[key] = value
            continue
        name, *rest = key
        below.setdefault(name, {})[unravel_key(tuple(rest))] = value
        source.setdefault(name, None)  # keeps the order of the keys
    for name, entries in below.items():
        path = (*prefix, name)
        if source[name] is not None:
            both = unravel_key(path)
            raise KeyError(
                f"{both!r} is a tensor and has {sorted(entries, key=str)} below it. One of them "
                f"was written by the policy: give it another key."
            )
        dims = nested.get(unravel_key(path), ())
        source[name] = _build(
            entries,
            size + torch.Size(dims),
            device,
            [*names, *[None] * len(dims)],
            nested,
            path,
        )
    source.update(nodes)
    return _upstream.new_tensordict(source, size, device, names)


def _is_no_tensordict(kind: type) -> bool:
    """Whether entries of this kind count as leaves: else no tensors and tensorclasses go unseen."""
    return is_leaf_nontensor(kind) or not issubclass(kind, TensorDictBase)


def _nodes(
    tensordict: TensorDictBase, prefix: tuple[str, ...] = ()
) -> dict[NestedKey, TensorDictBase]:
    """The nested tensordicts, by key."""
    found = {}
    for name, value in tensordict.items():
        if isinstance(value, TensorDictBase):
            path = (*prefix, name)
            found[join(*path)] = value
            found.update(_nodes(value, path))
    return found


def flat_values(tensordict: TensorDictBase) -> FlatTensors | None:
    """The entries by flat key; None if some are no tensors, or the container is special."""
    if type(tensordict) is not TensorDict or tensordict.is_locked:
        return None
    values: FlatTensors = {}
    for key, value in tensordict.items(True, True, is_leaf=_is_no_tensordict):
        if not isinstance(value, torch.Tensor):
            return None
        values[key] = value
    for node in _nodes(tensordict).values():
        if type(node) is not TensorDict or node.is_empty():
            return None
    return values
