"""How imagined episodes begin: from latents, from observations, or from ``start_states``."""

from __future__ import annotations

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torchrl.data import TensorSpec

from torchrl_wm.envs.decoding import as_observed, read_decoded, specs_to_round
from torchrl_wm.envs.entries import fits, widened
from torchrl_wm.envs.flattening import flat_tensors
from torchrl_wm.envs.layout import Layout
from torchrl_wm.envs.start_states import make_sampler, StartStates
from torchrl_wm.modules import WorldModel
from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import as_tuple, leaf_keys, missing_from, sibling, unique
from torchrl_wm.modules.world_model.flat import FlatTensors, Placement, to_tensordict
from torchrl_wm.modules.world_model.wiring import written_keys

#: What collectors, replay buffers and transforms note of real samples.
_NOTES = (
    "next",
    "collector",
    "index",
    "priority_weight",
    "_weight",
    "weight",
    "is_init",
    "step_count",
    "_step",
)
#: What EnvBase writes into a state for itself.
_RESERVED = {"next", "_step", "_reset"}


class Starts:
    """Makes the states that imagined episodes begin with.

    Args:
        world_model: encodes, and decodes what the start lacks.
        layout: the entries of the env.
        source: where episodes begin when no state is given; None if nothing says so.
        device: where the states are; None leaves them where they are.
    """

    def __init__(
        self,
        world_model: WorldModel,
        layout: Layout,
        source: StartStates | None,
        device: torch.device | None,
    ) -> None:
        self.world_model, self.layout = world_model, layout
        self.source, self.device = source, device
        self._sampler = None if source is None else make_sampler(source)

        # Not on demand: graphs look them up, too.
        #: The entries that ask for a partial reset.
        self.reset_keys = {sibling(key, "_reset") for key in layout.endings.keys}
        #: The entries that a reset takes away: they would stand still, or be untrue.
        self.dropped = {
            *_NOTES,
            *layout.endings.keys,
            *layout.action_keys,
            *layout.reward_keys,
            *layout.predicted,
            *layout.memory,
            *layout.dropped,
        }
        written = written_keys(world_model.encoder)
        self._encoded_context = [key for key in layout.context if key in written]

    # Whole starts --------------------------------------------------------

    def kept(self, given: TensorDictBase) -> TensorDictBase:
        """Return a copy of the caller's tensordict without what a reset takes away."""
        # Nested tensordicts are copied, too: the caller's are not written to.
        kept = given.exclude(*self.dropped, *self.reset_keys).copy()
        # The start may be a time slice of real data; the imagined time is another.
        kept.names = [None] * kept.batch_dims
        return kept

    def kept_flat(self, given: TensorDictBase, resets: bool) -> FlatTensors | None:
        """Return the entries of a start that stay, by flat key; None if it is not plain.

        These are all if it is not reset, else those of :meth:`kept`.
        """
        if self.device is None or not resets:
            if given.device != self.device:
                return None
        kept = flat_tensors(given, self.dropped if resets else ())
        if kept is None:
            return None
        names = kept if resets else {as_tuple(key)[0] for key in kept}
        if not (self.reset_keys if resets else _RESERVED).isdisjoint(names):
            return None
        return {key: self._moved(value) for key, value in kept.items()}

    def begin(
        self, given: TensorDictBase, honour: bool = True, with_done: bool = True
    ) -> FlatTensors:
        """Return all that a reset gives: state, memory, decoded observations, counts, done entries.

        Args:
            given: the caller's tensordict, ``[*B]``.
            honour: whether it may say where to begin.
            with_done: whether done entries are written that are never True.

        Raises:
            RuntimeError: if neither it nor ``start_states`` says where to begin.
            ValueError: if an entry does not fit its spec.
        """
        state = self.from_given(given) if honour else None
        if state is None:
            state = self.sampled(given)
        at, limit = Placement(given.batch_size, self.device), self.layout.time_limit
        if limit is not None:
            state[limit.key] = limit.begin(at)
        for key, spec in self.layout.predicted.items():
            state[key] = spec.zero(at.batch_size)  # nothing was predicted yet
        endings = self.layout.endings
        if with_done or endings.can_end:
            state.update(endings.none(at))
        return state

    # States --------------------------------------------------------------

    def from_given(self, given: TensorDictBase) -> FlatTensors | None:
        """Return latents, memory, context and decoded observations from what ``given`` has.

        Memory that it does not have begins anew.

        Returns:
            The entries ``[*B, ...]`` by flat key; None if it has neither the latents nor the
            observations to encode.
        """
        layout = self.layout
        found = {key: self._get(given, key) for key in layout.state}
        lacking = [key for key in layout.latent if found[key] is None]
        if lacking or any(found[key] is None for key in self._encoded_context):
            encoded = self._encode(given, found, lacking)
            if encoded is None:
                return None
            for key, value in found.items():
                if value is None or key in layout.latent:
                    found[key] = encoded.get(key, None)
        state: FlatTensors = {}
        for key, value in found.items():
            if value is None:
                raise self._lacks(key, given)
            state[key] = self._checked(key, value, layout.state[key], given)
        if layout.decoded:
            self._add_decoded(state, given)
        if layout.memory:
            state.update(self._memory(given))
        return state

    def _memory(self, given: TensorDictBase) -> FlatTensors:
        filter_ = self.world_model.filter
        memory = filter_.given_memory(given)
        if memory is None:
            return filter_.initial_memory(given.batch_size, self.device or given.device)
        return {
            key: self._checked(key, self._moved(value), spec, given)
            for (key, value), spec in zip(memory.items(), self.layout.memory.values())
        }

    def sampled(self, given: TensorDictBase) -> FlatTensors:
        """Return a state as :meth:`from_given`, drawn from ``start_states``.

        Args:
            given: ``[*B]``; its context, a goal, counts for sampled states, too.
        """
        layout, inputs = self.layout, unique(self.world_model.encoder.in_keys)
        if self._sampler is None:
            if missing_from(given, layout.latent):
                why = (
                    f"the tensordict has {leaf_keys(given)}, not the latents "
                    f"{list(layout.latent)} nor the observations {inputs}"
                )
            else:
                why = "set_state=False leaves out what the tensordict has"
            raise RuntimeError(
                f"WorldModelEnv has no initial latent to start from: {why}. Encode real "
                f"observations, env.rollout(max_steps, tensordict=world_model.encode(obs)), with "
                f"set_state=True where a TransformedEnv is around the env, which hands on only "
                f"latents; or give the env a source: WorldModelEnv(..., start_states=real_env)."
            )
        sample = self._sampler(given.batch_size)
        if self.device is not None:
            sample = sample.to(self.device)
        own = {key: self._get(given, key) for key in layout.context}
        own = {key: value for key, value in own.items() if value is not None}
        if own:
            sample = sample.copy()
            for key, value in own.items():
                sample.set(key, value)
        state = self.from_given(sample)
        if state is None:
            raise RuntimeError(
                f"start_states gives {leaf_keys(sample)}, which has no initial latent: neither "
                f"the latents {list(layout.latent)} nor the observations {inputs}."
            )
        return state

    def _encode(
        self, given: TensorDictBase, found: FlatTensors, lacking: list[NestedKey]
    ) -> TensorDictBase | None:
        """Return what the encoder makes of the observations in ``given``; None without them.

        Latents that the encoder does not write are used as they are given; all of them, if none
        is ``lacking``.
        """
        inputs = unique(self.world_model.encoder.in_keys)
        observed = {key: self._get(given, key) for key in inputs}
        if any(value is None for value in observed.values()):
            return None
        for key, value in observed.items():
            if key in self.layout.observed:
                self._checked(key, value, self.layout.observed[key], given)
        kept = {k: found[k] for k in self.layout.latent if k not in lacking}
        at = Placement(given.batch_size, self.device or given.device)
        encoded = self.world_model.encode(to_tensordict({**kept, **observed}, at))
        if not lacking:
            for key, value in kept.items():
                encoded.set(key, value)
        return encoded

    def _add_decoded(self, state: FlatTensors, given: TensorDictBase) -> None:
        """Add the observations that the state stands for: the caller's own, else decoded."""
        layout, model = self.layout, self.world_model
        absent = []
        for key, spec in layout.decoded.items():
            value = self._get(given, key)
            observed = layout.observed.get(key, spec).dtype
            # An image in uint8, say, may be decoded as floats: it is not the caller's then.
            if value is None or value.dtype == observed != spec.dtype:
                absent.append(key)
            else:
                state[key] = self._checked(key, value, spec, given)
        if not absent:
            return
        latents = {key: state[key] for key in layout.state}
        at = Placement(given.batch_size, self.device)
        rounded = specs_to_round(model.decoder, layout.decoded)
        for key, value in read_decoded(model, latents, absent, at).items():
            spec = rounded.get(key)
            state[key] = value if spec is None else as_observed(value, spec)

    # Entries -------------------------------------------------------------

    def _get(self, given: TensorDictBase, key: NestedKey) -> torch.Tensor | None:
        value = given.get(key, None)
        return None if value is None else self._moved(value)

    def _moved(self, value: torch.Tensor) -> torch.Tensor:
        device = self.device
        return value if device is None or value.device == device else value.to(device)

    def _checked(
        self, key: NestedKey, value: torch.Tensor, spec: TensorSpec, given: TensorDict
    ) -> torch.Tensor:
        """Return an entry of a start in its spec's dtype, or refuse it."""
        value = widened(value, spec.dtype)
        if not fits(value, spec, given.batch_size):
            raise ValueError(
                f"The start state's {key!r} has shape {tuple(value.shape)} and {value.dtype}; "
                f"the tensordict's batch size {tuple(given.batch_size)} and the spec ask for "
                f"{(*given.batch_size, *spec.shape)} and {spec.dtype}. Give TensorDict(..., "
                f"batch_size=[...]) the batch dims of its entries; latents come from "
                f"world_model.encode(obs), observations from the reference env or one like it."
            )
        return value

    def _lacks(self, key: NestedKey, given: TensorDictBase) -> MissingEntryError:
        if key in self.layout.latent:
            fix = "or let the model supply it: WorldModel(..., initial_state=TensorDict({...}))"
        else:
            fix = "or let start_states give it"
        return MissingEntryError(
            f"The start state lacks {key!r}, which the world model's step reads. Put it into the "
            f"start tensordict (there: {leaf_keys(given)}), {fix}."
        )
