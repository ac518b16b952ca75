"""The entries of an imagined env, and their specs; :mod:`.layout_builder` works them out."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from tensordict import NestedKey, TensorDictBase, unravel_key
from torchrl.data import Composite, TensorSpec

from torchrl_wm.envs.endings import Endings
from torchrl_wm.envs.time_limit import TimeLimit
from torchrl_wm.modules.keys import as_tuple, unique

#: Specs by flat key, without batch dims.
Specs = dict[NestedKey, TensorSpec]


@dataclass(frozen=True, eq=False)
class Layout:
    """The entries of an imagined env. All specs are without batch dims.

    Args:
        action, reward, done: specs copied from the reference env; ``done``
            with the entries added that the env needs.
        latent: the latents that move.
        memory: what the step carries beside them; no entry of the env holds it.
        context: root entries that the step reads and that never change.
        decoded: the observations that the decoder writes, if it is run.
        predicted: what the step writes beside the latents and the caller declared:
            an ensemble's disagreement, say.
        endings: what decides the done entries.
        observed: the encoder's inputs, as far as the reference env has them.
        nested: dims that nested tensordicts have of their own, by their keys.
        dropped: entries of the reference env that are not part of this one.
        time_limit: truncates episodes; None without one.
        masked: actions of which the reference env had masked options when its spec was
            copied; here, all are allowed.
    """

    action: Composite
    reward: Composite
    done: Composite
    latent: Specs
    memory: Specs
    context: Specs
    decoded: Specs
    predicted: Specs
    endings: Endings
    observed: Specs
    nested: dict[tuple[str, ...], torch.Size]
    dropped: frozenset[NestedKey]
    time_limit: TimeLimit | None
    masked: list[NestedKey]
    #: The keys of actions and rewards.
    action_keys: list[NestedKey] = field(init=False)
    reward_keys: list[NestedKey] = field(init=False)
    #: What a step starts from: latents and context.
    state: Specs = field(init=False)
    #: What is seen at every step: the state, decoded observations, declared predictions.
    observation: Specs = field(init=False)
    #: What counts the steps, if there is a time limit.
    counter: Specs = field(init=False)
    #: The keys of what a step hands on to the next one.
    carried: list[NestedKey] = field(init=False)
    #: The keys of the nested tensordicts that hold entries of the observation.
    nodes: set[NestedKey] = field(init=False)

    def __post_init__(self) -> None:
        # Not on demand: graphs look them up, too.
        state = {**self.latent, **self.context}
        observation = {**state, **self.decoded, **self.predicted}
        limit, device = self.time_limit, self.action.device
        counter = {} if limit is None else {limit.key: limit.spec(device)}
        paths = [as_tuple(key) for key in observation]
        vars(self).update(
            action_keys=unique(self.action.keys(True, True)),
            reward_keys=unique(self.reward.keys(True, True)),
            state=state,
            observation=observation,
            counter=counter,
            carried=[*observation, *counter, *self.endings.keys],
            nodes={unravel_key(p[:n]) for p in paths for n in range(1, len(p))},
        )

    @property
    def keys(self) -> set[NestedKey]:
        """All that the env carries, but for the action."""
        done = unique(self.done.keys(True, True))
        return {*self.observation, *self.reward_keys, *done}

    def to(self, device: torch.device) -> Layout:
        """Return the same layout on another device."""
        moved = {
            name: {key: spec.to(device) for key, spec in getattr(self, name).items()}
            for name in (
                "latent",
                "memory",
                "context",
                "decoded",
                "predicted",
                "observed",
            )
        }
        whole = {
            name: getattr(self, name).to(device)
            for name in ("action", "reward", "done")
        }
        return replace(self, **moved, **whole)

    def with_truncated(self) -> Layout:
        """Return the same layout with a ``truncated`` entry in every group of done entries."""
        endings = self.endings.with_truncated()
        return replace(self, endings=endings, done=endings.spec(self.done))

    def with_nested_dims(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Give nested tensordicts the batch dims that their specs have, and return the whole."""
        for key, dims in self.nested.items():
            node = tensordict.get(key, None)
            if node is not None:
                node.batch_size = (*tensordict.batch_size, *dims)
        return tensordict


def nested_dims(*specs: Composite) -> dict[tuple[str, ...], torch.Size]:
    """Return the dims that nested Composites have of their own, ``("agents",): (n_agents,)``."""
    found: dict[tuple[str, ...], torch.Size] = {}

    def visit(spec: Composite, prefix: tuple[str, ...]) -> None:
        for name, child in spec.items():
            if isinstance(child, Composite):
                if len(child.shape):
                    found[(*prefix, name)] = child.shape
                visit(child, (*prefix, name))

    for spec in specs:
        visit(spec, ())
    return found


def composite(
    specs: Specs,
    nested: dict[tuple[str, ...], torch.Size],
    batch_size: torch.Size,
    device: torch.device | None,
) -> Composite:
    """Return a Composite of flat keys, nested where the keys are, for ``batch_size`` envs.

    Args:
        specs: without batch dims.
        nested: the dims of nested Composites (:func:`nested_dims`).
        batch_size: ``*B``.
        device: where the Composite is.

    Raises:
        ValueError: if an entry lacks the dims of the Composite that holds it.
    """
    out = Composite(shape=(), device=device)
    for key, spec in specs.items():
        node, prefix = out, ()
        *parents, name = as_tuple(key)
        for parent in parents:
            prefix = (*prefix, parent)
            if parent not in node.keys():
                dims = nested.get(prefix, torch.Size([]))
                node[parent] = Composite(shape=dims, device=device)
            node = node[parent]
        if spec.shape[: len(node.shape)] != node.shape:
            raise ValueError(
                f"{key!r} has the feature shape {tuple(spec.shape)}, but everything under "
                f"{prefix!r} begins with {tuple(node.shape)} in the reference env. Give it these "
                f"dims, or a key outside of {prefix!r}."
            )
        node[name] = spec.clone()
    return rebatch(out, batch_size)


def rebatch(spec: Composite, batch_size: torch.Size) -> Composite:
    """Return a spec without batch dims for ``batch_size`` envs, leaf by leaf."""
    return spec.expand(batch_size).clone()
