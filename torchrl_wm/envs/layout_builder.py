"""What entries an imagined env has: worked out from a model and a reference env, and checked.

The model runs once on zeros, and each of its outputs is held against the specs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torchrl.data import Composite, TensorSpec, Unbounded
from torchrl.envs import EnvBase

from torchrl_wm.envs.decoding import as_observed, read_decoded, specs_to_round
from torchrl_wm.envs.endings import ENDING_NAMES, Endings
from torchrl_wm.envs.entries import fits
from torchrl_wm.envs.layout import Layout, nested_dims, Specs
from torchrl_wm.envs.masks import masked_actions, without_masks
from torchrl_wm.envs.time_limit import TimeLimit
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
_REFERENCE = "The spec is the reference env's: change the head's output."


class Reference(NamedTuple):
    """The specs that an imagined env is made after, without batch dims.

    Args:
        observed: states and observations.
        action, reward, done: as in :class:`~torchrl_wm.envs.layout.Layout`.
        nested: the dims of nested Composites.
        masked: the actions of which some options are masked.
    """

    observed: Specs
    action: Composite
    reward: Composite
    done: Composite
    nested: dict[tuple[str, ...], torch.Size]
    masked: list[NestedKey]

    @classmethod
    def of_env(cls, env: EnvBase) -> Reference:
        """Return the specs of a reference env."""
        state = env.full_state_spec_unbatched
        observation = env.full_observation_spec_unbatched
        action = without_masks(env.full_action_spec_unbatched)
        reward = env.full_reward_spec_unbatched.clone()
        done = env.full_done_spec_unbatched
        nested = nested_dims(state, observation, action, reward, done)
        observed = {**flat_specs(state), **flat_specs(observation)}
        return cls(observed, action, reward, done, nested, masked_actions(env))

    @classmethod
    def of_layout(cls, layout: Layout) -> Reference:
        """Return the specs of an imagined env itself, which a replaced component must fit."""
        parts = (layout.action, layout.reward, layout.done, layout.nested)
        return cls(layout.observation, *parts, layout.masked)


class LayoutBuilder:
    """Works out the entries of an imagined env.

    Args:
        world_model: the model that predicts.
        reference: the specs of the reference env.
        explicit: the specs that the caller gives (:func:`explicit_specs`).
        batch_size: ``*B`` of the env.
        device: where the model is.
        time_limit: truncates episodes; None without one.
    """

    def __init__(
        self,
        world_model: WorldModel,
        reference: Reference,
        explicit: Specs,
        *,
        batch_size: torch.Size,
        device: torch.device | None,
        time_limit: TimeLimit | None,
    ) -> None:
        self.world_model = world_model
        self.reference = reference
        self.explicit = explicit
        self.known = {**reference.observed, **explicit}
        self.device, self.time_limit = device, time_limit
        # On the env's own batch size: some modules, an ensemble over a batch dim say,
        # take no other.
        self.lead = batch_size if len(batch_size) else torch.Size([1])
        self.inputs = unique(world_model.encoder.in_keys)
        self.written = unique(world_model.step_module.out_keys)
        self.predictions = [strip_next(key) for key in self.written if is_next(key)]
        self.endings = Endings(
            reference.done, self.predictions, time_limit=time_limit is not None
        )
        self.action_keys = unique(reference.action.keys(True, True))

    def build(self, decode: bool) -> Layout:
        """Return the entries, checked on one traced step.

        Args:
            decode: whether all that the decoder writes is decoded.

        Raises:
            ValueError: if the model and the reference env do not fit together; the
                message names the component, the key and the fix.
            RuntimeError: if a component fails on inputs of the specs' shapes.
        """
        self._check_encoder()
        self._check_rewards()
        self._check_done_head()
        with undisturbed(self.world_model, self.device):
            layout = self._traced_state()
            moving = {**layout.state, **layout.memory}
            state = self._zeros({**moving, **flat_specs(layout.action)})
            stepped = self._check_step(layout, state)
            keys = self._decoded_keys(layout, decode)
            if keys:
                decoded = self._trace_decoder(layout, keys, stepped)
                layout = replace(layout, decoded=decoded)
        known = {*self.reference.observed, *map(strip_next, self.inputs)}
        known.update(written_keys(self.world_model.encoder))
        return replace(layout, dropped=frozenset(known - {*layout.observation}))

    def _traced_state(self) -> Layout:
        """Return the entries of which one traced encoding shows the shapes."""
        encoded = self._trace_encoder()
        latents = self.world_model.latent_keys
        latent = {key: self._state_spec(key, encoded, True) for key in latents}
        context = {
            key: self._state_spec(key, encoded, False)
            for key in self._context_keys(latents, encoded)
        }
        if encoded is not None:
            for key, spec in latent.items():
                self._check("encoder", key, encoded.get(key, None), spec)
        reference, device = self.reference, self.device
        rewards = self._rewards()
        taken = {*latent, *context, *unique(rewards.keys(True, True))}
        taken.update(self.action_keys, self.endings.keys)
        return Layout(
            action=_to(reference.action, device),
            reward=_to(rewards, device),
            done=_to(self.endings.spec(reference.done), device),
            latent=latent,
            memory=self._memory_specs(),
            context=context,
            decoded={},
            predicted={
                key: _to(spec, device)
                for key, spec in self.explicit.items()
                if key in self.predictions and key not in taken
            },
            endings=self.endings,
            observed={
                key: _to(reference.observed[key], device)
                for key in self.inputs
                if key in reference.observed
            },
            nested=reference.nested,
            dropped=frozenset(),
            time_limit=self.time_limit,
            masked=reference.masked,
        )

    # Keys and specs ------------------------------------------------------

    def _context_keys(
        self, latents: list[NestedKey], encoded: TensorDictBase | None
    ) -> list[NestedKey]:
        """Return the root keys of the step that are neither latents nor actions: constant context."""
        model, context = self.world_model, []
        decoded = [strip_next(key) for key in model.decoded_keys()]
        for name in model.step_names:
            module = model.components.get(name)
            for key in unique(module.in_keys) if module is not None else ():
                moving = (*latents, *model.memory_keys)
                if is_next(key) or key in (*moving, *self.action_keys, *context):
                    continue
                if key not in model.step_in_keys:
                    continue
                frozen = key in model.encoder.in_keys and key not in self.explicit
                shown = key if isinstance(key, str) else "..."
                if frozen or key in decoded:
                    raise ValueError(
                        f"{name} reads the observation {key!r} at the root, where it would stand "
                        f"still while the latents {latents} move. Let {name} read latents, e.g. "
                        f"{join('next', latents[0])!r}. If {key!r} is constant over an episode, "
                        f"as a goal is, say so: observation_spec=Composite("
                        f"{shown}=Unbounded(...))."
                    )
                if key not in self.known and _get(encoded, key) is None:
                    raise ValueError(
                        f"{name} reads {key!r}, which nothing in the env supplies: the latents are "
                        f"{latents}, the action is {self.action_keys}, and the specs have "
                        f"{sorted(self.known, key=str)}. Rename the in_key, or, if it is a constant "
                        f"context such as a goal, declare it: observation_spec=Composite("
                        f"{shown}=Unbounded(...))."
                    )
                context.append(key)
        return context

    def _memory_specs(self) -> Specs:
        model = self.world_model
        initial = model.filter.initial_memory(self.lead, self.device)
        dims = len(self.lead)
        return {
            key: _unbounded(value.shape[dims:], value.dtype, self.device)
            for key, value in initial.items()
        }

    def _state_spec(
        self, key: NestedKey, encoded: TensorDictBase | None, is_latent: bool
    ) -> TensorSpec:
        if key in self.explicit:
            return _to(self.explicit[key], self.device)
        if key in self.reference.observed:
            spec = self.reference.observed[key]
            # The reference's bounds hold for real observations; a prediction may
            # leave them, and a spec that says otherwise would be untrue.
            if spec.dtype.is_floating_point:
                return _unbounded(spec.shape, spec.dtype, self.device)
            return _to(spec, self.device)
        value = _get(encoded, key)
        if value is not None:
            return _unbounded(value.shape[len(self.lead) :], value.dtype, self.device)
        reference = self.reference.observed
        unseen = [k for k in self.inputs if k not in reference] if is_latent else []
        shown = key if isinstance(key, str) else "..."
        if unseen:
            raise ValueError(
                f"The shape of the latent {key!r} cannot be inferred: the encoder reads {unseen}, "
                f"which the reference env lacks (it has {sorted(reference, key=str)}). Let the "
                f"encoder read the env's observations, or say the shape: observation_spec="
                f"Composite({shown}=Unbounded(shape))."
            )
        raise ValueError(
            f"The shape of the latent {key!r} cannot be inferred: it is neither in "
            f"observation_spec nor in the reference env, the encoder does not write it, and no "
            f"initial state supplies it. If it is recurrent, pass "
            f"WorldModel(..., initial_state=TensorDict({{{key!r}: ...}})); else say its shape: "
            f"observation_spec=Composite({shown}=Unbounded(shape))."
        )

    def _decoded_keys(self, layout: Layout, decode: bool) -> list[NestedKey]:
        available = [strip_next(key) for key in self.world_model.decoded_keys()]
        if decode and not available:
            raise ValueError(
                "decode=True needs a world model with a decoder: WorldModel(..., decoder="
                "TensorDictModule(net, in_keys=[latent], out_keys=[observation]))."
            )
        carried = layout.observation
        unknown = [k for k in self.explicit if k not in (*carried, *available)]
        if unknown:
            step = [key for key in self.written if is_next(key)]
            raise ValueError(
                f"observation_spec has {unknown}, which the imagined env cannot produce: its "
                f"latents are {list(layout.latent)}, its decoder writes {available} and its step "
                f"writes {step}."
            )
        wanted = available if decode else [k for k in available if k in self.explicit]
        return [key for key in wanted if key not in carried]

    # Traces --------------------------------------------------------------

    def _zeros(self, specs: Specs) -> TensorDict:
        out = TensorDict({}, batch_size=self.lead, device=self.device)
        for key, spec in specs.items():
            out.set(key, _to(spec, self.device).zero(self.lead))
        return out

    def _trace_encoder(self) -> TensorDictBase | None:
        """Return the encoder's outputs on zeros; None if the specs lack its inputs."""
        if any(key not in self.known for key in self.inputs):
            return None
        model = self.world_model
        inputs = self._zeros({key: self.known[key] for key in self.inputs})
        run_components({"encoder": model.encoder}, inputs.copy())  # names what fails
        try:
            return model.encode(inputs)
        except Exception as err:
            raise RuntimeError(
                f"The latents could not be begun from the encoder's outputs by posterior and "
                f"initial_state. It raised {type(err).__name__}: {err}"
            ) from err

    def _trace_decoder(
        self, layout: Layout, keys: list[NestedKey], stepped: TensorDictBase
    ) -> Specs:
        state = {key: stepped.get(key) for key in layout.state}
        decoder, known, dims = self.world_model.decoder, self.known, len(self.lead)
        at = Placement(stepped.batch_size, stepped.device)
        values = read_decoded(self.world_model, state, keys, at)
        fitting = {
            key: _to(known[key], value.device)
            for key, value in values.items()
            if key in known and value.shape[dims:] == known[key].shape
        }
        rounded = specs_to_round(decoder, fitting)
        out = {}
        for key, value in values.items():
            if key in known:
                if key in rounded:
                    value = as_observed(value, rounded[key])
                floats = value.is_floating_point(), known[key].dtype.is_floating_point
                fix = _ROUNDING if floats == (True, False) else _CHANGE
                self._check("decoder", key, value, known[key], fix)
            if key in self.explicit or key in rounded:
                out[key] = fitting[key]
            else:
                out[key] = _unbounded(value.shape[dims:], value.dtype, value.device)
        return out

    def _check_step(self, layout: Layout, state: TensorDictBase) -> TensorDictBase:
        """Run one step from ``state`` and hold every output against the specs.

        Raises:
            ValueError: if an output's shape or dtype is not its spec's.
        """
        names = self.world_model.step_names
        components = {
            k: m for k, m in self.world_model.components.items() if k in names
        }
        out = run_components(components, state)
        next_td = out.get("next")
        writers = {
            strip_next(key): name
            for name, module in components.items()
            for key in written_keys(module)
        }

        def check(key: NestedKey, spec: TensorSpec, fix: str) -> None:
            self._check(writers[key], join("next", key), next_td.get(key), spec, fix)

        moving = {**layout.latent, **layout.memory}
        for key, spec in {**moving, **layout.predicted}.items():
            check(key, spec, _CHANGE)
        for key in layout.reward_keys:
            check(key, layout.reward[key], _REFERENCE)
        for key in layout.endings.bool_keys:
            if next_td.get(key).is_floating_point():
                raise ValueError(_float_done(writers[key], key, next_td.get(key).dtype))
            check(key, layout.done[sibling(key, "done")], _REFERENCE)
        for key in layout.endings.logit_keys:
            value = next_td.get(key)
            shape = layout.done[sibling(key, "done")].shape
            feature = value.shape[len(self.lead) :]
            if not value.is_floating_point() or feature != shape:
                raise ValueError(
                    f"{writers[key]} writes {join('next', key)!r} with feature shape "
                    f"{tuple(feature)} and {value.dtype}; logits of shape {tuple(shape)} and a "
                    f"float dtype are expected."
                )
        return out

    # Checks --------------------------------------------------------------

    def _check(
        self,
        component: str,
        key: NestedKey,
        value: torch.Tensor | None,
        spec: TensorSpec,
        fix: str = _CHANGE,
    ) -> None:
        if value is not None and not fits(value, spec, self.lead):
            raise ValueError(
                f"{component} writes {key!r} with feature shape "
                f"{tuple(value.shape[len(self.lead):])} and {value.dtype}, but its spec says "
                f"{tuple(spec.shape)} and {spec.dtype}. {fix}"
            )

    def _check_encoder(self) -> None:
        """Refuse an encoder that reads the action's entry, which a policy writes."""
        shared = [key for key in self.inputs if key in self.action_keys]
        if shared:
            other = [sibling(key, f"env_{as_tuple(key)[-1]}") for key in shared]
            raise ValueError(
                f"The encoder reads {shared}, where the action of base_env stands. An observation "
                f"of that name needs another one, in the model and in the env: "
                f"torchrl.envs.TransformedEnv(base_env, torchrl.envs.RenameTransform("
                f"in_keys={shared}, out_keys={other}))."
            )

    def _rewards(self) -> Composite:
        """Return the specs of the rewards: none of a model that predicts none and has no head for them."""
        rewards = self.reference.reward
        below = {join("next", key) for key in unique(rewards.keys(True, True))}
        if self.world_model.reward_head is None and not below & {*self.written}:
            return Composite()
        return rewards

    def _check_rewards(self) -> None:
        keys = unique(self._rewards().keys(True, True))
        missing = [key for key in keys if join("next", key) not in self.written]
        if missing:
            below = [join("next", key) for key in missing]
            head, writer = self.world_model.reward_head, "the model has no reward_head"
            if head is not None:
                writer = f"reward_head writes {written_keys(head)}"
            raise ValueError(
                f"The reference env's reward is {missing}, so that {below} must be predicted, but "
                f"{writer}. Change its out_keys to {below}."
            )

    def _check_done_head(self) -> None:
        """Refuse a done head whose outputs nothing reads."""
        if self.world_model.done_head is None:
            return
        groups = self.endings.groups
        heard = [join("next", g.key(name)) for g in groups for name in ENDING_NAMES]
        written = written_keys(self.world_model.done_head)
        if not set(heard) & set(written):
            raise ValueError(
                f"done_head writes {written}, none of which ends an episode. The env listens to "
                f"{heard}. Change the out_key; {heard[0]!r} is what the loss trains, too."
            )


def explicit_specs(
    spec: TensorSpec | None, batch_size: torch.Size, latent_key: NestedKey
) -> Specs:
    """Return the caller's ``observation_spec`` by key, without batch dims.

    Args:
        spec: a Composite, or the spec of one entry.
        batch_size: the batch dims that it may have.
        latent_key: the entry that a spec without a name is of.
    """
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
    return flat_specs(spec)


def main_latent(world_model: WorldModel, latent_key: NestedKey | None) -> NestedKey:
    """Return the latent that the caller names, by default the first one.

    Raises:
        ValueError: if the model has no such latent, or none at all.
    """
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
    return latent_key or keys[0]


def flat_specs(spec: Composite) -> Specs:
    """Return the leaves of a Composite by flat key."""
    return {key: spec[key] for key in unique(spec.keys(True, True))}


def _float_done(component: str, key: NestedKey, dtype: torch.dtype) -> str:
    """Return the message about floats under a bool done key."""
    logits = join("next", sibling(key, "terminated_logits"))
    return (
        f"{component} writes {join('next', key)!r} as {dtype}, but the env needs a bool there. If "
        f"these are logits, let the head write {logits!r} instead: the loss trains them and the "
        f"env derives the bools. A head that ends in a sigmoid: take that off and write "
        f"{logits!r}. Else write value > threshold."
    )


def _get(tensordict: TensorDictBase | None, key: NestedKey) -> torch.Tensor | None:
    return None if tensordict is None else tensordict.get(key, None)


def _to(spec: Any, device: torch.device | None) -> Any:
    return spec if device is None else spec.to(device)


def _unbounded(shape: Any, dtype: torch.dtype, device: Any) -> TensorSpec:
    return Unbounded(shape=torch.Size(shape), dtype=dtype, device=device)
