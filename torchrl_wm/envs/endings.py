"""How imagined episodes end: the done entries of a step, from a model's heads and the time limit.

Whatever a model's heads write (logits, continue logits, bools, only some of
them), every step of the env carries ``terminated``, ``truncated`` where it can
be true, and ``done == terminated | truncated``. The time limit itself is counted in
:mod:`torchrl_wm.envs.time_limit`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from tensordict import NestedKey
from torchrl.data import Categorical, Composite

from torchrl_wm.modules.keys import as_tuple, join, unique
from torchrl_wm.modules.world_model.flat import FlatTensors, Placement

#: What a head may write to say how a step ended, below "next".
ENDING_NAMES = (
    "terminated_logits",
    "continue_pred",
    "terminated",
    "truncated",
    "done",
)
_BOOL_NAMES = ("terminated", "truncated", "done")
_LOGIT_NAMES = ("terminated_logits", "continue_pred")

#: ``(terminated, truncated)``; None where nothing decides it.
Decision = tuple[torch.Tensor | None, torch.Tensor | None]


@dataclass(frozen=True)
class EndingGroup:
    """The done entries at one place of the tree, and what decides them.

    Args:
        prefix: where the entries stand: ``()`` at the root, ``("agents",)``
            for the agents of a multi-agent env.
        shape: their feature shape, ``(1,)`` or ``(n_agents, 1)``.
        written: which of :data:`ENDING_NAMES` the model writes there.
        truncates: whether the group has a ``truncated`` entry.
    """

    prefix: tuple[str, ...]
    shape: torch.Size
    written: frozenset[str]
    truncates: bool
    #: Where the entries stand below "next", by their names.
    below_next: dict[str, NestedKey] = field(init=False)

    def __post_init__(self) -> None:
        # Not on demand: graphs look them up, too.
        keys = {name: join(*self.prefix, name) for name in ENDING_NAMES}
        below = {name: join("next", key) for name, key in keys.items()}
        predicted = {n: key for n, key in below.items() if n in self.written}
        vars(self).update(_keys=keys, below_next=below, _predicted=predicted)

    def key(self, name: str) -> NestedKey:
        """Return the key of the group's entry called ``name``."""
        return self._keys[name]

    def keys(self) -> list[NestedKey]:
        """Return the keys of the entries that the env carries for this group."""
        names = ("done", "terminated", "truncated")
        return [
            self.key(name) for name in names if name != "truncated" or self.truncates
        ]

    def read(self, predicted: Mapping[NestedKey, torch.Tensor]) -> Decision:
        """Return what the model says."""
        written = self.written
        entry = {name: predicted[key] for name, key in self._predicted.items()}
        truncated, done = entry.get("truncated"), entry.get("done")
        if "terminated" in written:
            terminated = entry["terminated"]
        elif "terminated_logits" in written:
            terminated = entry["terminated_logits"] > 0
        elif "continue_pred" in written:
            # The logit of going on: its sign says the opposite.
            terminated = entry["continue_pred"] < 0
        elif done is not None:
            # A lone done is a termination, except where it is a truncation.
            return (done if truncated is None else done & ~truncated), truncated
        else:
            return None, truncated
        if done is not None:
            only_done = done & ~terminated
            truncated = only_done if truncated is None else truncated | only_done
        return terminated, truncated


class Endings:
    """The done entries of an env: their spec, and their values at each step.

    Args:
        reference_spec: the reference env's full done spec, without batch dims.
        written: the root keys that the model's step writes below "next".
        time_limit: whether the env truncates after a number of steps.
    """

    def __init__(
        self,
        reference_spec: Composite,
        written: Iterable[NestedKey],
        *,
        time_limit: bool,
    ) -> None:
        written = set(unique(written))
        self.time_limit = time_limit
        groups = [
            _make_group(prefix, node, written, time_limit)
            for prefix, node in _done_nodes(reference_spec)
        ]
        # A truncation above or below reaches the groups that have no head of
        # their own, and needs an entry there to be told from a termination.
        for i, group in enumerate(groups):
            related = [other for other in groups if _related(group, other)]
            if not group.written and any(other.truncates for other in related):
                groups[i] = replace(group, truncates=True)
        self._set_groups(groups)

    def _set_groups(self, groups: Sequence[EndingGroup]) -> None:
        #: Parents first: a group without a head follows its nearest ancestor.
        self.groups = tuple(sorted(groups, key=lambda group: len(group.prefix)))
        # The rest is looked up at every rollout.
        #: Whether an episode can end, by a head or by time.
        self.can_end = self.time_limit or any(group.written for group in self.groups)
        #: Whether there is one group of done entries, at the root.
        self.at_root = [group.prefix for group in self.groups] == [()]
        #: The done entries of all groups.
        self.keys = tuple(key for group in self.groups for key in group.keys())
        #: The done entries of an env that cannot end; none if it can.
        self.never_keys = frozenset(() if self.can_end else self.keys)

    def with_truncated(self) -> Endings:
        """Return the same endings with a ``truncated`` entry in every group."""
        other = copy.copy(self)
        other._set_groups([replace(group, truncates=True) for group in self.groups])
        return other

    @property
    def bool_keys(self) -> list[NestedKey]:
        """The bool done entries that the model itself writes."""
        return self._written(_BOOL_NAMES)

    @property
    def logit_keys(self) -> list[NestedKey]:
        """The entries that the model writes as logits."""
        return self._written(_LOGIT_NAMES)

    def _written(self, names: Iterable[str]) -> list[NestedKey]:
        return [g.key(name) for g in self.groups for name in names if name in g.written]

    def spec(self, reference_spec: Composite) -> Composite:
        """Return the done spec without batch dims, with the entries that are missing added."""
        spec = reference_spec.clone()
        for group in self.groups:
            node = spec[group.prefix] if group.prefix else spec
            leaf = next(node[n] for n in _BOOL_NAMES if n in node.keys())
            for key in group.keys():
                name = as_tuple(key)[-1]
                if name not in node.keys():
                    node[name] = Categorical(
                        2, shape=leaf.shape, dtype=torch.bool, device=leaf.device
                    )
        return spec

    def read(
        self,
        predicted: Mapping[NestedKey, torch.Tensor],
        at: Placement,
        time_is_up: torch.Tensor | None = None,
    ) -> FlatTensors:
        """Return the done entries of one step.

        Args:
            predicted: what the model predicted, by ``("next", key)``.
            at: the batch size ``*B``, and the device of the flags that nothing predicts.
            time_is_up: ``[*B, 1]`` bool, where the time limit is reached; None
                without one.

        Returns:
            Bools by ``("next", key)``, of shape ``[*B, *feature]``; no two alias each other.
        """
        decided = {group.prefix: group.read(predicted) for group in self.groups}
        for group in self.groups:
            if not group.written:
                decided[group.prefix] = self._inherit(group, decided, at)
        out: FlatTensors = {}
        for group in self.groups:
            terminated, truncated = decided[group.prefix]
            shape = (*at.batch_size, *group.shape)
            if terminated is None:
                terminated = torch.zeros(shape, dtype=torch.bool, device=at.device)
            if time_is_up is not None:
                limit = _expand_to(time_is_up, at.batch_size, shape)
                truncated = limit.clone() if truncated is None else truncated | limit
            if truncated is None:
                done = terminated.clone()
            else:
                done = terminated | truncated
            below = group.below_next
            out[below["done"]] = done
            out[below["terminated"]] = terminated
            if group.truncates:
                out[below["truncated"]] = (
                    torch.zeros_like(terminated) if truncated is None else truncated
                )
        return out

    def none(self, at: Placement) -> FlatTensors:
        """Return all done entries, False, as after a reset."""
        return {
            key: torch.zeros(
                (*at.batch_size, *group.shape), dtype=torch.bool, device=at.device
            )
            for group in self.groups
            for key in group.keys()
        }

    def never(self, at: Placement) -> FlatTensors | None:
        """Return the done entries of every step of an env that cannot end; None if it can."""
        return None if self.can_end else self.none(at)

    def ended(
        self,
        flags: Mapping[NestedKey, torch.Tensor],
        at: Placement,
        name: str = "done",
        *,
        any_group: bool = False,
    ) -> torch.Tensor:
        """Return whether whole trajectories have ended, ``[*B]`` bool; or terminated, by ``name``.

        A group that has an ancestor is heard only through it, as in TorchRL;
        of groups side by side all must have ended, or with ``any_group`` one.
        """
        top = [
            group
            for group in self.groups
            if not any(_is_above(other, group) for other in self.groups)
        ]
        dims = len(at.batch_size)
        done = [flags[group.key(name)].flatten(dims).all(-1) for group in top]
        if len(done) == 1:
            return done[0]
        ended = torch.stack(done, -1)
        return ended.any(-1) if any_group else ended.all(-1)

    def _inherit(
        self,
        group: EndingGroup,
        decided: Mapping[tuple[str, ...], Decision],
        at: Placement,
    ) -> Decision:
        """Return what a group without a head takes from its nearest ancestor, else from below."""
        batch_size = at.batch_size
        shape = (*batch_size, *group.shape)
        above = [other for other in self.groups if _is_above(other, group)]
        if above and decided[above[-1].prefix] != (None, None):
            return tuple(
                None if flag is None else _expand_to(flag, batch_size, shape).clone()
                for flag in decided[above[-1].prefix]
            )
        below = [
            decided[other.prefix]
            for other in self.groups
            if other.written and _is_above(group, other)
        ]
        if not below:
            return None, None
        # The whole has ended when every part has; as a termination only where
        # every part terminated.
        dims = len(batch_size)
        terminated, ended = [], []
        for flags in below:
            known = next(flag for flag in flags if flag is not None)
            parts = [torch.zeros_like(known) if f is None else f for f in flags]
            terminated.append(_whole(parts[0], dims))
            ended.append(_whole(parts[0] | parts[1], dims))
        all_terminated = torch.stack(terminated).all(0)
        all_ended = torch.stack(ended).all(0)
        if not group.truncates:
            return _expand_to(all_ended, batch_size, shape).clone(), None
        return (
            _expand_to(all_terminated, batch_size, shape).clone(),
            _expand_to(all_ended & ~all_terminated, batch_size, shape).clone(),
        )


def _make_group(
    prefix: tuple[str, ...], node: Composite, written: set[NestedKey], time_limit: bool
) -> EndingGroup:
    names = frozenset(n for n in ENDING_NAMES if join(*prefix, n) in written)
    leaf = next(node[n] for n in _BOOL_NAMES if n in node.keys())
    # A done entry beside a termination is a truncation where only it is True.
    truncates = (
        time_limit
        or "truncated" in node.keys()
        or "truncated" in names
        or ("done" in names and bool(names & {"terminated", *_LOGIT_NAMES}))
    )
    return EndingGroup(prefix, leaf.shape, names, truncates)


def _is_above(upper: EndingGroup, lower: EndingGroup) -> bool:
    depth = len(upper.prefix)
    return depth < len(lower.prefix) and lower.prefix[:depth] == upper.prefix


def _related(one: EndingGroup, other: EndingGroup) -> bool:
    return _is_above(one, other) or _is_above(other, one)


def _done_nodes(
    spec: Composite, prefix: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Composite]]:
    """Yield the places of a done spec that hold done entries, with their prefixes."""
    if any(name in spec.keys() for name in _BOOL_NAMES):
        yield prefix, spec
    for name, child in spec.items():
        if isinstance(child, Composite):
            yield from _done_nodes(child, (*prefix, name))


def _whole(flag: torch.Tensor, dims: int) -> torch.Tensor:
    """Return whether all of ``[*B, n_agents, 1]`` are set, ``[*B, 1]``."""
    return flag.flatten(dims).all(-1, keepdim=True)


def _expand_to(
    flag: torch.Tensor, batch_size: torch.Size, shape: tuple[int, ...]
) -> torch.Tensor:
    """Repeat ``[*B, 1]`` or ``[*B, *shorter]`` over the feature dims of ``shape``."""
    dims = len(batch_size)
    flag = _whole(flag, dims) if flag.shape[dims:].numel() == 1 else flag
    lead = (1,) * (len(shape) - flag.ndim)
    return flag.reshape(*flag.shape[:dims], *lead, *flag.shape[dims:]).expand(shape)
