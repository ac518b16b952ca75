"""What a world model env carries, and of which shape: specs from a model and a reference env."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torchrl.data import Composite, TensorSpec, Unbounded
from torchrl.envs import EnvBase

from torchrl_wm.envs.decoding import as_observed, read_decoded, specs_to_round
from torchrl_wm.envs.endings import ENDING_NAMES, Endings
from torchrl_wm.envs.masks import masked_actions, without_masks
from torchrl_wm.envs.tracing import undisturbed
from torchrl_wm.modules import WorldModel
from torchrl_wm.modules.keys import as_tuple, is_next, join, sibling, strip_next, unique
from torchrl_wm.modules.world_model.flat import Placement
from torchrl_wm.modules.world_model.run_components import run_components
from torchrl_wm.modules.world_model.wiring import written_keys

_CHANGE = (
    "Change the component's output, or give the spec: observation_spec=Composite(...)."
)
_ROUNDING = (
    "Let the decoder write the spec's dtype; or, if its floats are in the units of the env, say "
    "so, and they are rounded: decoder.in_env_units = True; or show floats: "
    "WorldModelEnv(..., observation_spec=Composite(...))."
)


@dataclass
class Layout:
    """The entries of an imagined env. All specs are without batch dims.

    Args:
        action, reward, done: specs copied from the reference env; ``done``
            with the entries added that the env needs.
        latent: the latents that move.
        context: root entries that the step reads and that never change.
        decoded: the observations that the decoder writes, if it is run.
        predicted: what the step writes beside the latents and the caller declared:
            an ensemble's disagreement, say.
        endings: what decides the done entries.
        observed: the encoder's inputs, as far as the reference env has them.
        nested: dims that nested tensordicts have of their own, by their keys.
        dropped: entries of the reference env that are not part of this one.
        masked: actions of which the reference env had masked options when its spec was
            copied; here, all are allowed.
    """

    action: Composite
    reward: Composite
    done: Composite
    latent: dict[NestedKey, TensorSpec]
    context: dict[NestedKey, TensorSpec]
    decoded: dict[NestedKey, TensorSpec]
    predicted: dict[NestedKey, TensorSpec]
    endings: Endings
    observed: dict[NestedKey, TensorSpec]
    nested: dict[tuple[str, ...], torch.Size]
    dropped: set[NestedKey] = field(default_factory=set)
    masked: list[NestedKey] = field(default_factory=list)

    def to(self, device: torch.device) -> Layout:
        """The same on another device."""
        moved = {
            name: {key: spec.to(device) for key, spec in getattr(self, name).items()}
            for name in ("latent", "context", "decoded", "predicted", "observed")
        }
        whole = {
            name: getattr(self, name).to(device)
            for name in ("action", "reward", "done")
        }
        return replace(self, **moved, **whole)

    @property
    def keys(self) -> set[NestedKey]:
        """All that the env carries, but for the action."""
        return {
            *self.state,
            *self.decoded,
            *self.predicted,
            *self.reward_keys,
            *unique(self.done.keys(True, True)),
        }

    @cached_property
    def action_keys(self) -> list[NestedKey]:
        return unique(self.action.keys(True, True))

    @cached_property
    def reward_keys(self) -> list[NestedKey]:
        return unique(self.reward.keys(True, True))

    @cached_property
    def state(self) -> dict[NestedKey, TensorSpec]:
        """What a step starts from: latents and context."""
        return {**self.latent, **self.context}


def make_layout(
    world_model: WorldModel,
    base_env: EnvBase,
    *,
    observation_spec: TensorSpec | None,
    batch_size: torch.Size,
    device: torch.device | None,
    latent_key: NestedKey | None,
    decode: bool,
    time_limit: bool,
) -> Layout:
    """Work out the entries of an imagined env, and check them on one traced step.

    Raises:
        ValueError: if the model and the reference env do not fit together; the
            message names the component, the key and the fix.
        RuntimeError: if a component fails on inputs of the specs' shapes.
    """
    latent_keys = _latent_keys(world_model, latent_key)
    explicit = _explicit_specs(
        observation_spec, batch_size, latent_key or latent_keys[0]
    )
    reference = _flatten(base_env.full_state_spec_unbatched)
    reference.update(_flatten(base_env.full_observation_spec_unbatched))
    action = without_masks(base_env.full_action_spec_unbatched)
    _check_encoder(world_model, action)
    reward = base_env.full_reward_spec_unbatched.clone()
    done = base_env.full_done_spec_unbatched
    written = [strip_next(k) for k in world_model.step_module.out_keys if is_next(k)]
    endings = Endings(done, written, time_limit=time_limit)
    layout = Layout(
        action=_to(action, device),
        reward=_to(reward, device),
        done=_to(endings.spec(done), device),
        latent={},
        context={},
        decoded={},
        predicted={},
        endings=endings,
        observed={
            key: _to(reference[key], device)
            for key in unique(world_model.encoder.in_keys)
            if key in reference
        },
        nested=nested_dims(
            base_env.full_state_spec_unbatched,
            base_env.full_observation_spec_unbatched,
            action,
            reward,
            done,
        ),
        masked=masked_actions(base_env),
    )
    _check_rewards(world_model, layout)
    _check_done_head(world_model, layout)

    # On the env's own batch size: some modules, an ensemble over a batch dim say,
    # take no other.
    lead = batch_size if len(batch_size) else torch.Size([1])
    dims = len(lead)
    with undisturbed(world_model, device):
        encoded = _trace_encoder(world_model, {**reference, **explicit}, lead, device)
        unseen = [k for k in unique(world_model.encoder.in_keys) if k not in reference]
        layout.latent = {
            key: _state_spec(key, explicit, reference, encoded, dims, device, unseen)
            for key in latent_keys
        }
        layout.context = {
            key: _state_spec(key, explicit, reference, encoded, dims, device)
            for key in _context_keys(
                world_model,
                latent_keys,
                layout,
                {**reference, **explicit},
                explicit,
                encoded,
            )
        }
        if encoded is not None:
            for key in layout.latent:
                _check_entry(
                    "encoder", key, encoded.get(key, None), layout.latent[key], dims
                )
        layout.predicted = {
            key: _to(explicit[key], device)
            for key in _predicted_keys(layout, explicit, written)
        }
        state = _zeros({**layout.state, **_flatten(layout.action)}, lead, device)
        stepped = check_step(world_model, layout, state)
        decoded_keys = _decoded_keys(world_model, layout, explicit, decode)
        if decoded_keys:
            layout.decoded = _trace_decoder(
                world_model, layout, decoded_keys, stepped, explicit, reference, dims
            )
    carried = {*layout.state, *layout.decoded, *layout.predicted}
    inputs = {strip_next(k) for k in unique(world_model.encoder.in_keys)}
    outputs = set(written_keys(world_model.encoder))
    layout.dropped = ({*reference} | inputs | outputs) - carried
    return layout


def check_step(
    world_model: WorldModel, layout: Layout, state: TensorDictBase
) -> TensorDictBase:
    """Run one step on ``state`` and check every output against the specs.

    Args:
        state: latents, context and action, with any batch size.

    Raises:
        ValueError: if an output's shape or dtype is not its spec's.
    """
    dims = state.batch_dims
    components = {
        name: module
        for name, module in world_model.components.items()
        if name in world_model.step_names
    }
    out = run_components(components, state)
    who = {
        strip_next(key): name
        for name, module in components.items()
        for key in written_keys(module)
    }
    next_td = out.get("next")
    for key, spec in {**layout.latent, **layout.predicted}.items():
        _check_entry(who[key], join("next", key), next_td.get(key), spec, dims)
    for key in layout.reward_keys:
        _check_entry(
            who[key],
            join("next", key),
            next_td.get(key),
            layout.reward[key],
            dims,
            "The spec is the reference env's: change the head's output.",
        )
    for key in layout.endings.bool_keys:
        value = next_td.get(key)
        if value.is_floating_point():
            logits = join("next", sibling(key, "terminated_logits"))
            raise ValueError(
                f"{who[key]} writes {join('next', key)!r} as {value.dtype}, but the env "
                f"needs a bool there. If these are logits, let the head write {logits!r} "
                f"instead: the loss trains them and the env derives the bools. A head that "
                f"ends in a sigmoid: take that off and write {logits!r}. Else write "
                f"value > threshold."
            )
        _check_entry(
            who[key],
            join("next", key),
            value,
            _done_leaf(layout, key),
            dims,
            "The spec is the reference env's: change the head's output.",
        )
    for key in layout.endings.logit_keys:
        value = next_td.get(key)
        shape = _done_leaf(layout, key).shape
        if not value.is_floating_point() or value.shape[dims:] != shape:
            raise ValueError(
                f"{who[key]} writes {join('next', key)!r} with feature shape "
                f"{tuple(value.shape[dims:])} and {value.dtype}; logits of shape "
                f"{tuple(shape)} and a float dtype are expected."
            )
    return out


# Specs ---------------------------------------------------------------------


def rebatch(spec: Composite, batch_size: torch.Size) -> Composite:
    """A spec without batch dims for ``batch_size`` envs, leaf by leaf."""
    return spec.expand(batch_size).clone()


def composite(
    specs: dict[NestedKey, TensorSpec],
    layout: Layout,
    batch_size: torch.Size,
    device: Any,
) -> Composite:
    """A Composite from flat keys, nested where the keys are, with the nested dims of ``layout``."""
    out = Composite(shape=(), device=device)
    for key, spec in specs.items():
        node, prefix = out, ()
        *parents, name = as_tuple(key)
        for parent in parents:
            prefix = (*prefix, parent)
            if parent not in node.keys():
                dims = layout.nested.get(prefix, torch.Size([]))
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


def nested_dims(*specs: Composite) -> dict[tuple[str, ...], torch.Size]:
    """The dims that nested Composites have of their own, ``("agents",): (n_agents,)``."""
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


def _flatten(spec: Composite) -> dict[NestedKey, TensorSpec]:
    return {key: spec[key] for key in unique(spec.keys(True, True))}


def _to(spec: Any, device: torch.device | None) -> Any:
    return spec if device is None else spec.to(device)


def _unbounded(shape, dtype: torch.dtype, device) -> TensorSpec:
    return Unbounded(shape=torch.Size(shape), dtype=dtype, device=device)


def _zeros(
    specs: dict[NestedKey, TensorSpec], lead: torch.Size, device: torch.device | None
) -> TensorDict:
    out = TensorDict({}, batch_size=lead, device=device)
    for key, spec in specs.items():
        out.set(key, _to(spec, device).zero(lead))
    return out


def _explicit_specs(
    spec: TensorSpec | None, batch_size: torch.Size, latent_key: NestedKey
) -> dict[NestedKey, TensorSpec]:
    """The caller's observation_spec by key, without batch dims."""
    if spec is None:
        return {}
    if not isinstance(spec, TensorSpec):
        raise TypeError(
            f"observation_spec must be a torchrl.data.Composite, got {type(spec).__name__}."
        )
    if not isinstance(spec, Composite):
        dims = len(batch_size)
        batched = len(spec.shape) > dims and spec.shape[:dims] == batch_size
        wrapped = Composite(shape=batch_size if batched else ())
        wrapped[latent_key] = spec
        spec = wrapped
    if spec.shape == batch_size and len(batch_size):
        spec = spec[(0,) * len(batch_size)]
    elif len(spec.shape):
        raise ValueError(
            f"observation_spec has the batch shape {tuple(spec.shape)}, but the env's batch "
            f"size is {tuple(batch_size)}. Give it that shape, or none: Composite(..., shape=())."
        )
    return _flatten(spec)


def _latent_keys(
    world_model: WorldModel, latent_key: NestedKey | None
) -> list[NestedKey]:
    keys = world_model.latent_keys
    if not keys:
        raise ValueError(
            f"The world model has no latent that moves: its step reads "
            f"{world_model.step_in_keys} and writes {world_model.step_module.out_keys}. For a "
            f"latent k, let dynamics read k and write ('next', k)."
        )
    if latent_key is not None and unique([latent_key])[0] not in keys:
        raise ValueError(
            f"latent_key={latent_key!r} is not a latent of the world model. Its latents (root "
            f"keys that its step reads and writes under 'next') are {keys}; leave latent_key "
            f"out to use them."
        )
    return keys


def _context_keys(
    world_model: WorldModel,
    latent_keys: list[NestedKey],
    layout: Layout,
    specs: dict[NestedKey, TensorSpec],
    explicit: dict[NestedKey, TensorSpec],
    encoded: TensorDictBase | None,
) -> list[NestedKey]:
    """Root keys of the step that are neither latents nor actions: constant context."""
    context = []
    for name in world_model.step_names:
        module = world_model.components.get(name)
        for key in unique(module.in_keys) if module is not None else ():
            if is_next(key) or key in latent_keys or key in layout.action_keys:
                continue
            if key in context or key not in world_model.step_in_keys:
                continue
            known = key in specs or (
                encoded is not None and encoded.get(key, None) is not None
            )
            frozen = key in world_model.encoder.in_keys and key not in explicit
            if frozen or key in (strip_next(k) for k in world_model.decoded_keys()):
                raise ValueError(
                    f"{name} reads the observation {key!r} at the root, where it would stand "
                    f"still while the latents {latent_keys} move. Let {name} read latents, e.g. "
                    f"{join('next', latent_keys[0])!r}. If {key!r} is constant over an episode, "
                    f"as a goal is, say so: observation_spec=Composite("
                    f"{key if isinstance(key, str) else '...'}=Unbounded(...))."
                )
            if not known:
                raise ValueError(
                    f"{name} reads {key!r}, which nothing in the env supplies: the latents are "
                    f"{latent_keys}, the action is {layout.action_keys}, and the specs have "
                    f"{sorted(specs, key=str)}. Rename the in_key, or, if it is a constant "
                    f"context such as a goal, declare it: observation_spec=Composite("
                    f"{key if isinstance(key, str) else '...'}=Unbounded(...))."
                )
            context.append(key)
    return context


def _state_spec(
    key: NestedKey,
    explicit: dict[NestedKey, TensorSpec],
    reference: dict[NestedKey, TensorSpec],
    encoded: TensorDictBase | None,
    dims: int,
    device: torch.device | None,
    unseen: list[NestedKey] | None = None,
) -> TensorSpec:
    if key in explicit:
        return _to(explicit[key], device)
    if key in reference:
        spec = reference[key]
        # The reference's bounds hold for real observations; a prediction may
        # leave them, and a spec that says otherwise would be untrue.
        if spec.dtype.is_floating_point:
            return _unbounded(spec.shape, spec.dtype, device)
        return _to(spec, device)
    value = None if encoded is None else encoded.get(key, None)
    if value is None and unseen:
        raise ValueError(
            f"The shape of the latent {key!r} cannot be inferred: the encoder reads {unseen}, "
            f"which the reference env lacks (it has {sorted(reference, key=str)}). Let the "
            f"encoder read the env's observations, or say the shape: observation_spec="
            f"Composite({key if isinstance(key, str) else '...'}=Unbounded(shape))."
        )
    if value is None:
        raise ValueError(
            f"The shape of the latent {key!r} cannot be inferred: it is neither in "
            f"observation_spec nor in the reference env, the encoder does not write it, and no "
            f"initial state supplies it. If it is recurrent, pass "
            f"WorldModel(..., initial_state=TensorDict({{{key!r}: ...}})); else say its shape: "
            f"observation_spec=Composite({key if isinstance(key, str) else '...'}="
            f"Unbounded(shape))."
        )
    return _unbounded(value.shape[dims:], value.dtype, device)


# Traces --------------------------------------------------------------------


def _trace_encoder(
    world_model: WorldModel,
    specs: dict[NestedKey, TensorSpec],
    lead: torch.Size,
    device: torch.device | None,
) -> TensorDictBase | None:
    """The encoder's outputs on zeros, or None where the specs lack its inputs."""
    keys = unique(world_model.encoder.in_keys)
    if any(key not in specs for key in keys):
        return None
    inputs = _zeros({key: specs[key] for key in keys}, lead, device)
    run_components({"encoder": world_model.encoder}, inputs.copy())  # names what fails
    try:
        return world_model.encode(inputs)
    except Exception as err:
        raise RuntimeError(
            f"The latents could not be begun from the encoder's outputs by posterior and "
            f"initial_state. It raised {type(err).__name__}: {err}"
        ) from err


def _decoded_keys(
    world_model: WorldModel,
    layout: Layout,
    explicit: dict[NestedKey, TensorSpec],
    decode: bool,
) -> list[NestedKey]:
    available = [strip_next(key) for key in world_model.decoded_keys()]
    if decode and not available:
        raise ValueError(
            "decode=True needs a world model with a decoder: WorldModel(..., decoder="
            "TensorDictModule(net, in_keys=[latent], out_keys=[observation]))."
        )
    carried = {*layout.state, *layout.predicted}
    unknown = [k for k in explicit if k not in carried and k not in available]
    if unknown:
        step = [k for k in unique(world_model.step_module.out_keys) if is_next(k)]
        raise ValueError(
            f"observation_spec has {unknown}, which the imagined env cannot produce: its "
            f"latents are {list(layout.latent)}, its decoder writes {available} and its step "
            f"writes {step}."
        )
    wanted = available if decode else [k for k in available if k in explicit]
    return [k for k in wanted if k not in layout.state and k not in layout.predicted]


def _predicted_keys(
    layout: Layout, explicit: dict[NestedKey, TensorSpec], written: list[NestedKey]
) -> list[NestedKey]:
    """What the caller declared and the step writes, and is nothing else already."""
    taken = {*layout.state, *layout.reward_keys, *layout.action_keys}
    taken.update(layout.endings.keys)
    return [key for key in explicit if key in written and key not in taken]


def _trace_decoder(
    world_model: WorldModel,
    layout: Layout,
    keys: list[NestedKey],
    stepped: TensorDictBase,
    explicit: dict[NestedKey, TensorSpec],
    reference: dict[NestedKey, TensorSpec],
    dims: int,
) -> dict[NestedKey, TensorSpec]:
    state = {key: stepped.get(key) for key in layout.state}
    values = read_decoded(
        world_model, state, keys, Placement(stepped.batch_size, stepped.device)
    )
    known = {**reference, **explicit}
    fitting = {
        key: _to(known[key], value.device)
        for key, value in values.items()
        if key in known and value.shape[dims:] == known[key].shape
    }
    rounded = specs_to_round(world_model.decoder, fitting)
    out = {}
    for key, value in values.items():
        if key in known:
            if key in rounded:
                value = as_observed(value, rounded[key])
            floats = value.is_floating_point(), known[key].dtype.is_floating_point
            fix = _ROUNDING if floats == (True, False) else _CHANGE
            _check_entry("decoder", key, value, known[key], dims, fix)
        if key in explicit or key in rounded:
            out[key] = fitting[key]
        else:
            out[key] = _unbounded(value.shape[dims:], value.dtype, value.device)
    return out


# Checks --------------------------------------------------------------------


def _check_encoder(world_model: WorldModel, action: Composite) -> None:
    """An encoder that reads the action's entry would read what a policy wrote there."""
    actions = unique(action.keys(True, True))
    shared = [key for key in unique(world_model.encoder.in_keys) if key in actions]
    if shared:
        other = [sibling(key, f"env_{as_tuple(key)[-1]}") for key in shared]
        raise ValueError(
            f"The encoder reads {shared}, where the action of base_env stands. An observation of "
            f"that name needs another one, in the model and in the env: "
            f"torchrl.envs.TransformedEnv(base_env, torchrl.envs.RenameTransform("
            f"in_keys={shared}, out_keys={other}))."
        )


def _check_rewards(world_model: WorldModel, layout: Layout) -> None:
    written = unique(world_model.step_module.out_keys)
    missing = [k for k in layout.reward_keys if join("next", k) not in written]
    if missing:
        raise ValueError(
            f"The reference env's reward is {missing}, so that {[join('next', k) for k in missing]} "
            f"must be predicted, but reward_head writes {written_keys(world_model.reward_head)}. "
            f"Change its out_keys to {[join('next', k) for k in missing]}."
        )


def _check_done_head(world_model: WorldModel, layout: Layout) -> None:
    """Refuse a done head that nobody would listen to."""
    if world_model.done_head is None:
        return
    heard = [
        join("next", group.key(name))
        for group in layout.endings.groups
        for name in ENDING_NAMES
    ]
    written = written_keys(world_model.done_head)
    if not set(heard) & set(written):
        raise ValueError(
            f"done_head writes {written}, none of which ends an episode. The env listens to "
            f"{heard}. Change the out_key; {heard[0]!r} is what the loss trains, too."
        )


def _check_entry(
    component: str,
    key: NestedKey,
    value: torch.Tensor | None,
    spec: TensorSpec,
    dims: int,
    fix: str = _CHANGE,
) -> None:
    if value is None:
        return
    shape = value.shape[dims:]
    if shape != spec.shape or value.dtype != spec.dtype:
        raise ValueError(
            f"{component} writes {key!r} with feature shape {tuple(shape)} and {value.dtype}, "
            f"but its spec says {tuple(spec.shape)} and {spec.dtype}. {fix}"
        )


def _done_leaf(layout: Layout, key: NestedKey) -> TensorSpec:
    return layout.done[sibling(key, "done")]
