"""What acts in imagination, on flat tensors: policies, random and given actions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from tensordict import NestedKey, TensorDictBase
from torchrl.data import Composite

from torchrl_wm.envs.flattening import only_tensors
from torchrl_wm.envs.layout import Layout
from torchrl_wm.modules import WorldModel
from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import leaf_keys, unique
from torchrl_wm.modules.world_model.flat import FlatTensors, Placement, to_tensordict
from torchrl_wm.modules.world_model.program import Program


class Policy(NamedTuple):
    """A policy, as a caller gives it and as imagination takes it.

    Args:
        given: what the caller gives; None for random actions.
        callable: what takes tensordicts: the same, or what wraps it.
        program: the same as a program; None if it is not made of TensorDict modules.
    """

    given: Callable | None
    callable: Callable | None
    program: Program | None

    @property
    def is_known(self) -> bool:
        """Whether it reads and writes nothing but its keys."""
        program = self.program
        return self.given is None if program is None else program.is_known

    def may_read(self, keys: Iterable[NestedKey]) -> bool:
        """Return whether it may look at one of these entries."""
        if self.program is None or not self.is_known:
            return self.given is not None
        return not self.program.reads.isdisjoint(keys)

    def reads_nested(self, layout: Layout, start: TensorDictBase | None) -> bool:
        """Return whether it takes nested tensordicts, the env's or the start's, as such.

        Flat tensors do not have them.
        """
        if self.program is None:
            return False
        reads, start = self.program.reads, {} if start is None else start
        return not reads.isdisjoint(layout.nodes) or any(
            isinstance(value, TensorDictBase) and key in reads
            for key, value in start.items()
        )

    def actor(
        self, layout: Layout, at: Placement, start: TensorDictBase | None = None
    ) -> ProgramActor | TensorDictActor:
        """Return what lets it act on flat tensors from the tensordict ``start`` on."""
        if (
            self.program is None
            or not self.is_known
            or self.reads_nested(layout, start)
        ):
            return TensorDictActor(self.callable, layout, at)
        return ProgramActor(self.program, at)


class ProgramActor:
    """A policy of networks and distributions, which runs as a program."""

    def __init__(self, program: Program, at: Placement) -> None:
        self.program, self.at = program, at
        self.trusted = at._replace(trusted=True)

    def __call__(self, values: FlatTensors, step: int) -> None:
        self.program(values, self.trusted if step else self.at)


class TensorDictActor:
    """Any other policy, which is shown a tensordict at every step."""

    def __init__(self, policy: Callable, layout: Layout, at: Placement) -> None:
        self.policy, self.layout, self.at = policy, layout, at
        self.known: set[NestedKey] = set()

    def __call__(self, values: FlatTensors, step: int) -> None:
        seen = {k: v for k, v in values.items() if k not in self.layout.memory}
        shown = self.layout.with_nested_dims(to_tensordict(seen, self.at))
        shown.update(self.policy(shown))
        values.update(only_tensors(shown, "the policy wrote"))
        if step == 0:
            self.known = set(values)
        elif not self.known.issuperset(values):
            raise ValueError(
                f"The policy wrote {sorted(values.keys() - self.known, key=str)} at step {step} "
                f"and not before. imagine stacks what is there at every step: let it write "
                f"them from the first one on, or take env.rollout."
            )


class RandomActor:
    """Random actions, drawn at every step as :meth:`torchrl.envs.EnvBase.rand_action` does.

    The spec may lack the batch dims ``lead``.
    """

    def __init__(self, spec: Composite, lead: torch.Size) -> None:
        self.spec, self.lead = spec, lead
        self.keys = unique(spec.keys(True, True))

    def __call__(self, values: FlatTensors, step: int) -> None:
        drawn = self.spec.rand(self.lead)
        for key in self.keys:
            values[key] = drawn.get(key)


def lead_of(actions: torch.Tensor | TensorDictBase, layout: Layout) -> torch.Size:
    """Return the batch size ``*B`` of given actions, ``[*B, H, *A]``."""
    if isinstance(actions, TensorDictBase):
        return actions.batch_size[:-1]
    spec = layout.action[layout.action_keys[0]]
    return actions.shape[: actions.ndim - len(spec.shape) - 1]


def flat_actions(
    actions: torch.Tensor | TensorDictBase,
    layout: Layout,
    batch_size: torch.Size,
    horizon: int,
) -> FlatTensors:
    """Return given actions by key, ``[*B, H, *A]``.

    Raises:
        ValueError: if there are others than the env's, or of another shape.
    """
    keys = layout.action_keys
    if not isinstance(actions, TensorDictBase):
        if len(keys) > 1:
            raise ValueError(
                f"The env has the actions {keys}: give them as a TensorDict of batch size "
                f"[*B, H] with these keys, got a tensor."
            )
        actions = {keys[0]: actions}
    elif unknown := [key for key in leaf_keys(actions) if key not in keys]:
        raise ValueError(
            f"actions has {unknown}, which are no actions of the env: it takes {keys}. "
            f"Leave them out: actions.select(*{keys})."
        )
    flat: FlatTensors = {}
    for key in keys:
        expected = (*batch_size, horizon, *layout.action[key].shape)
        value = actions.get(key, None)
        if value is None or tuple(value.shape) != expected:
            got = "nothing" if value is None else f"shape {tuple(value.shape)}"
            raise ValueError(
                f"actions for {key!r} must have the shape [*B, H, *A] = {expected}, "
                f"got {got}."
            )
        flat[key] = value
    return flat


def missing_reads(
    policy: Callable | None,
    start: TensorDictBase | None,
    layout: Layout,
    world_model: WorldModel,
) -> MissingEntryError | None:
    """Return the error that names what a policy reads and an imagined env lacks; None if it has all.

    Other entries of the ``start`` count, too.
    """
    there = [*layout.carried, *layout.action_keys]
    if start is not None:
        there += [key for key in leaf_keys(start) if key not in layout.dropped]
    wanted = unique(getattr(policy, "in_keys", None) or [])
    lacking = [key for key in wanted if key not in there]
    if not lacking:
        return None
    remembered = [key for key in lacking if key in layout.memory]
    decodable = [key for key in lacking if key in world_model.decoded_keys()]
    if remembered:
        fix = (
            f"The model's memory {remembered} is its own, and no policy sees it: leave it out of "
            f"memory=..., so that it is a latent"
        )
    elif decodable:
        fix = f"Pass decode=True to WorldModelEnv for {decodable}"
    elif "is_init" in lacking:
        fix = (
            "The state of a recurrent policy comes from its primer, in an env of a batch size: "
            "TransformedEnv(WorldModelEnv(..., batch_size=[N]), Compose(InitTracker(), "
            "rnn.make_tensordict_primer()))"
        )
    else:
        fix = (
            f"Let the policy read the latents {list(layout.latent)}, or give the world model "
            f"a decoder that writes {lacking} and pass decode=True"
        )
    return MissingEntryError(
        f"The policy reads {lacking}, which the imagined env does not have. It has "
        f"{sorted(set(there), key=str)}. {fix}."
    )
