"""An environment whose transitions a world model predicts."""

from __future__ import annotations

from collections.abc import Sequence
from multiprocessing import parent_process
from numbers import Integral
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key
from torchrl.data import TensorSpec, Unbounded
from torchrl.envs import EnvBase, ModelBasedEnvBase, TransformedEnv

from torchrl_wm import _upstream
from torchrl_wm.envs.collecting import leave_out_collectors
from torchrl_wm.envs.decoding import as_observed, read_decoded, specs_to_round
from torchrl_wm.envs.imagination import Imagination
from torchrl_wm.envs.layout import composite, Layout, make_layout, rebatch
from torchrl_wm.envs.masks import warn_of_masks
from torchrl_wm.envs.start_states import make_sampler, StartStates
from torchrl_wm.envs.step import StepKernel, widened
from torchrl_wm.modules import WorldModel
from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import as_tuple, leaf_keys, missing_from, unique
from torchrl_wm.modules.world_model.flat import FlatTensors, Placement
from torchrl_wm.modules.world_model.wiring import written_keys

_COUNTER_KEY = "imagined_step"


class WorldModelEnv(Imagination, ModelBasedEnvBase):
    """Imagine with a world model through the ordinary :class:`~torchrl.envs.EnvBase` API.

    The env steps in latent space: no observation is encoded after the start,
    and none is decoded unless asked for. Action, reward and done specs are
    copied from a reference env, so that policies, losses and buffers made for
    the real env fit the imagined one. The reference env is never stepped.

    An episode starts from the latents in the tensordict given to ``reset`` or
    ``rollout``, else from the observations in it, which are encoded, else from
    ``start_states``.

    At every step ``done == terminated | truncated``. A termination is what the
    model's ``done_head`` predicts; a truncation is the time limit ``max_steps``.

    Args:
        world_model: the model that predicts.
        base_env: the reference env, whose specs are copied.

    Keyword Args:
        observation_spec: specs of latents (else taken from the reference env's
            entry of that name, else inferred by tracing the encoder), of decoder
            outputs (which are then decoded at every step), of constant
            context that the model reads, and of other entries that the model's
            step writes below "next" and that are to be carried, such as an
            ensemble's disagreement (zero after a reset). With the env's batch
            shape, or none.
        batch_size: the number of envs imagined at once; ``base_env``'s by
            default. An int is one batch dim. With ``[]`` the env takes
            tensordicts of any batch size; else it is batch-locked.
        device: where to imagine; the model is moved there as a whole. By
            default the model's own, or ``base_env``'s if it has no parameters.
        latent_key: a latent that must be among the model's. They are found by
            themselves (:attr:`~torchrl_wm.WorldModel.latent_keys`); the argument is
            here for code written for TorchRL's class.
        start_states: where episodes begin when no state is given: an env (its
            resets), a replay buffer (its samples), a tensordict (random rows) or
            a function of the batch size.
        max_steps: truncate episodes after so many steps. Counted under
            ``"imagined_step"``.
        decode: write the decoder's observations of the next latents at every
            step. The start has them too: the caller's own if given, else
            decoded. Of a ready-made model they are what the real env shows: bytes,
            bits and one-hot entries are rounded and clamped to ``base_env``'s specs,
            through which no gradient flows. A float spec for such an entry in
            ``observation_spec`` shows the decoder's floats.
        check_finite: raise a ``FloatingPointError`` that names the entries where
            a prediction is NaN or infinite. It waits for the device at every
            step, so it is for looking for a fault.

    Raises:
        TypeError: if ``world_model`` or ``base_env`` is something else.
        ValueError: if the two do not fit together. The message names the
            component, the key and the fix.

    .. note:: ``set_seed(s)`` seeds torch's global random state, as TorchRL's own
        stateless envs do, and the env that ``start_states`` may be.

    .. note:: Inside a ``TransformedEnv`` only latents and context reach ``reset``:
        start from encoded observations, or from ``start_states``.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> from torchrl.envs import GymEnv
        >>> from torchrl.modules import MLP
        >>> from torchrl_wm import WorldModel, WorldModelEnv
        >>> base_env = GymEnv("Pendulum-v1")
        >>> encoder = TensorDictModule(
        ...     torch.nn.Linear(3, 4), in_keys=["observation"], out_keys=["latent"]
        ... )
        >>> dynamics = TensorDictModule(
        ...     MLP(in_features=5, out_features=4, num_cells=[32]),
        ...     in_keys=["latent", "action"], out_keys=[("next", "latent")],
        ... )
        >>> reward_head = TensorDictModule(
        ...     torch.nn.Linear(4, 1), in_keys=[("next", "latent")], out_keys=[("next", "reward")]
        ... )
        >>> world_model = WorldModel(encoder, dynamics, reward_head)
        >>> env = WorldModelEnv(world_model, base_env, batch_size=[3])
        >>> obs = TensorDict({"observation": torch.randn(3, 3)}, batch_size=[3])
        >>> rollout = env.rollout(max_steps=5, tensordict=world_model.encode(obs))
        >>> rollout.shape
        torch.Size([3, 5])
        >>> rollout["action"].shape, rollout["next", "latent"].shape
        (torch.Size([3, 5, 1]), torch.Size([3, 5, 4]))

        With start states it is an env like any other:

        >>> env = WorldModelEnv(world_model, base_env, start_states=base_env, max_steps=10)
        >>> env.check_env_specs()
        >>> env.rollout(100)["next", "truncated"].squeeze(-1).nonzero().tolist()
        [[9]]
    """

    # A start state in the tensordict is honoured, as TorchRL asks of stateless envs.
    _supports_set_state = True

    def __init__(
        self,
        world_model: WorldModel,
        base_env: EnvBase,
        *,
        observation_spec: TensorSpec | None = None,
        batch_size: int | torch.Size | Sequence[int] | None = None,
        device: torch.device | str | None = None,
        latent_key: NestedKey | None = None,
        start_states: StartStates | None = None,
        max_steps: int | None = None,
        decode: bool = False,
        check_finite: bool = False,
    ) -> None:
        _upstream.check_replaced(EnvBase)
        _check_arguments(world_model, base_env, max_steps)
        batch_size = _as_size(batch_size, base_env.batch_size)
        sampler = None if start_states is None else make_sampler(start_states)
        present = _device_of(world_model, base_env)
        arguments = {
            "observation_spec": observation_spec,
            "batch_size": batch_size,
            "latent_key": latent_key,
            "decode": decode,
            "time_limit": max_steps is not None,
        }
        # Before anything is moved: what does not fit leaves the model as it is.
        layout = make_layout(world_model, base_env, device=present, **arguments)
        warn_of_masks(layout.masked)
        # Moves the model as a whole. A start may be done: done_head decides.
        super().__init__(
            world_model,
            device=present if device is None else device,
            batch_size=batch_size,
            allow_done_after_reset=True,
        )
        # Not registered: the source's parameters are not the env's.
        self.__dict__["_start_states"] = start_states
        self.__dict__["_sampler"] = sampler
        self.max_steps = None if max_steps is None else int(max_steps)
        self.check_finite = check_finite
        self._layout_arguments = arguments
        if self.device is not None and self.device != present:
            layout = layout.to(self.device)
        group_map = _group_map(base_env)
        if group_map is not None:
            self.group_map = group_map
        self.latent_key = latent_key or next(iter(layout.latent))
        self._set_specs(layout)
        self.__dict__["_layout"] = layout
        self.__dict__["_compiler"] = None
        self.__dict__["_kernel"] = self._make_kernel(layout)

    @property
    def batch_locked(self) -> bool:
        """Whether the env takes its own batch size alone: only such an env steps rows partly."""
        return len(self.batch_size) > 0

    # Construction --------------------------------------------------------

    def _set_specs(self, layout: Layout) -> None:
        size, device = self.batch_size, self.device
        self.full_action_spec = rebatch(layout.action, size)
        self.full_reward_spec = rebatch(layout.reward, size)
        self.full_done_spec = rebatch(layout.done, size)
        counter = {}
        if self.max_steps is not None:
            counter[_COUNTER_KEY] = Unbounded(
                shape=(1,), dtype=torch.int64, device=device
            )
        state = {**layout.state, **counter}
        self._nested_keys = {
            unravel_key(as_tuple(key)[:depth])
            for key in {**state, **layout.decoded, **layout.predicted}
            for depth in range(1, len(as_tuple(key)))
        }
        self.state_spec = composite(state, layout, size, device)
        self.observation_spec = composite(
            {**state, **layout.decoded, **layout.predicted}, layout, size, device
        )

    def _make_kernel(self, layout: Layout) -> StepKernel:
        return StepKernel(
            self.world_model,
            layout,
            max_steps=self.max_steps,
            counter_key=None if self.max_steps is None else _COUNTER_KEY,
            check_finite=self.check_finite,
        )

    @property
    def start_states(self) -> StartStates | None:
        """Where episodes begin when no state is given."""
        return self._start_states

    @property
    def start_keys(self) -> list[NestedKey]:
        """What a start may be made of: latents, context, or observations to encode."""
        return unique([*self._layout.state, *self.world_model.encoder.in_keys])

    @property
    def latent_keys(self) -> list[NestedKey]:
        """The latents that the env steps."""
        return list(self._layout.latent)

    @property
    def step_kernel(self) -> StepKernel:
        """What predicts one step; made anew when a component was replaced."""
        kernel = self._kernel
        if kernel is None:  # in a copy
            kernel = self.__dict__["_kernel"] = self._make_kernel(self._layout)
        if not kernel.is_current():
            self.__dict__["_layout"], kernel = self._rewired()
            self.__dict__["_kernel"] = kernel
        kernel.refresh()
        return kernel

    def __getstate__(self) -> dict[str, Any]:
        leave_out_collectors(self, self._start_states)
        # These hold on to networks, or to the env itself: a copy makes its own, and is eager.
        state = {**self.__dict__, **dict.fromkeys(("_kernel", "_compiler"))}
        for name in ("_wrapped", "_policy_program", _upstream.COMPILED_STEP):
            state.pop(name, None)
        return state

    def _rewired(self) -> tuple[Layout, StepKernel]:
        """The layout for replaced components: the env's specs are what they must fit."""
        arguments = {
            **self._layout_arguments,
            "observation_spec": self.observation_spec,
        }
        if self.max_steps is not None:
            spec = self.observation_spec.clone()
            del spec[_COUNTER_KEY]
            arguments["observation_spec"] = spec
        layout = make_layout(self.world_model, self, device=self.device, **arguments)
        changed = sorted(layout.keys ^ self._layout.keys, key=str)
        if changed:
            raise ValueError(
                f"A component of the world model was replaced by one that changes the entries of "
                f"the env: {changed}. Make a new WorldModelEnv."
            )
        layout.dropped, layout.masked = self._layout.dropped, self._layout.masked
        return layout, self._make_kernel(layout)

    def __repr__(self) -> str:
        source = self._start_states
        parts = {
            "batch_size": list(self.batch_size),
            "device": self.device,
            "action": self._layout.action_keys,
            "latents": self.latent_keys,
            "context": list(self._layout.context),
            "decoded": list(self._layout.decoded),
            "predicted": list(self._layout.predicted),
            "max_steps": self.max_steps,
            "start_states": None if source is None else type(source).__name__,
        }
        lines = [f"  {name}={value}" for name, value in parts.items() if value != []]
        model = "\n".join("  " + line for line in repr(self.world_model).splitlines())
        return "\n".join([f"{type(self).__name__}(", *lines, model, ")"])

    def add_truncated_keys(self) -> EnvBase:
        """Add ``truncated`` to every done entry, as :meth:`~torchrl.envs.EnvBase.add_truncated_keys`."""
        super().add_truncated_keys()
        layout = self._layout
        layout.endings.add_truncated()
        layout.done = layout.endings.spec(layout.done)
        return self

    # Stepping ------------------------------------------------------------

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        self.__dict__["_slow_because"] = "its steps were made one by one, from outside"
        kernel = self.step_kernel
        if parent_process() is not None and tensordict.get(self.latent_key).is_shared():
            # In the worker of a ParallelEnv, whose shared buffers would chain the
            # graphs of all steps; none of them could be used by the parent.
            with torch.no_grad():
                out = kernel(tensordict)
        else:
            out = kernel(tensordict)
        mask = tensordict.get("_step", None)
        if mask is None:
            return out
        # Rows that are not to be stepped stay where they are, with reward 0.
        mask = mask.reshape(out.batch_size)
        rewards = set(self._layout.reward_keys)
        for key in unique(out.keys(True, True)):
            new = out.get(key)
            old = None if key in rewards else tensordict.get(key, None)
            old = torch.zeros_like(new) if old is None else old
            out.set(key, torch.where(_expand_right(mask, new), new, old))
        return out

    # Resetting -----------------------------------------------------------

    def _reset(
        self,
        tensordict: TensorDictBase | None = None,
        *,
        set_state: bool | None = None,
        **kwargs: Any,
    ) -> TensorDictBase:
        layout = self.step_kernel.layout
        given = tensordict
        if given is None:
            given = TensorDict({}, batch_size=self.batch_size, device=self.device)
        elif self.device is not None and given.device != self.device:
            given = given.to(self.device)
        partial = bool(self.reset_keys) and len(
            missing_from(given, self.reset_keys)
        ) < len(self.reset_keys)
        honour = set_state is not False and not (partial and self._sampler is not None)
        state = self._state_from(given, layout) if honour else None
        if state is None:
            state = self._sample_state(given, layout)
        out = self._entries_to_keep(given, layout)
        for key, value in state.items():
            out.set(key, value)
        if self.max_steps is not None:
            counter = torch.zeros(
                (*out.batch_size, 1), dtype=torch.int64, device=self.device
            )
            out.set(_COUNTER_KEY, counter)
        for key, spec in layout.predicted.items():
            out.set(key, spec.zero(out.batch_size))  # nothing was predicted yet
        for key, flag in layout.endings.none(out.batch_size, self.device).items():
            out.set(key, flag)
        return self.step_kernel.with_nested_dims(out)

    def _state_from(
        self, given: TensorDictBase, layout: Layout
    ) -> dict[NestedKey, torch.Tensor] | None:
        """Latents, context and root observations from what the caller gave, if they are there."""
        world_model: WorldModel = self.world_model
        lacking = missing_from(given, layout.latent)
        encodable = set(written_keys(world_model.encoder)) & {*layout.context}
        if lacking or missing_from(given, encodable):
            inputs = unique(world_model.encoder.in_keys)
            if missing_from(given, inputs):
                return None
            # Latents that the encoder does not write are used where they are given.
            kept = given.select(*[k for k in layout.latent if k not in lacking])
            for key in inputs:
                if key in layout.observed:
                    self._checked(key, given.get(key), layout.observed[key], given)
            encoded = world_model.encode(kept.copy().update(given.select(*inputs)))
            if not lacking:
                encoded.update(kept)
        else:
            encoded = None
        state: dict[NestedKey, torch.Tensor] = {}
        for key in layout.state:
            value = given.get(key, None)
            if encoded is not None and (value is None or key in layout.latent):
                value = encoded.get(key, None)
            if value is None:
                fix = (
                    "or let the model supply it: WorldModel(..., initial_state=TensorDict({...}))"
                    if key in layout.latent
                    else "or let start_states give it"
                )
                raise MissingEntryError(
                    f"The start state lacks {key!r}, which the world model's step reads. Put it "
                    f"into the start tensordict (there: {leaf_keys(given)}), {fix}."
                )
            state[key] = self._checked(key, value, layout.state[key], given)
        for key, spec in layout.decoded.items():
            value = given.get(key, None)
            observed = layout.observed.get(key, spec)
            if value is None or (value.dtype, observed.dtype) == (
                observed.dtype,
                spec.dtype,
            ):
                pass
            elif value.dtype == observed.dtype:
                continue  # an image in uint8, say, that is decoded as floats
            if value is not None:
                state[key] = self._checked(key, value, spec, given)
        absent = [key for key in layout.decoded if key not in state]
        if absent:
            latents = {key: state[key] for key in layout.state}
            decoded = read_decoded(
                world_model, latents, absent, Placement(given.batch_size, self.device)
            )
            rounded = specs_to_round(world_model.decoder, layout.decoded)
            for key, value in decoded.items():
                spec = rounded.get(key)
                state[key] = value if spec is None else as_observed(value, spec)
        return state

    def _sample_state(
        self, given: TensorDictBase, layout: Layout
    ) -> dict[NestedKey, torch.Tensor]:
        if self._sampler is None:
            inputs = unique(self.world_model.encoder.in_keys)
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
                f"set_state=True where a TransformedEnv is around the env, which hands on latents "
                f"alone; or give the env a source: WorldModelEnv(..., start_states=real_env)."
            )
        sample = self._sampler(given.batch_size)
        if self.device is not None:
            sample = sample.to(self.device)
        # A goal that the caller gives counts for sampled states, too.
        own = [k for k in layout.context if given.get(k, None) is not None]
        if own:
            sample = sample.copy().update(given.select(*own))
        state = self._state_from(sample, layout)
        if state is None:
            raise RuntimeError(
                f"start_states gives {leaf_keys(sample)}, which has no initial latent: neither "
                f"the latents {list(layout.latent)} nor the observations "
                f"{unique(self.world_model.encoder.in_keys)}."
            )
        return state

    def _entries_to_keep(self, given: TensorDictBase, layout: Layout) -> TensorDictBase:
        """What is left of the caller's tensordict after a reset: what may stand still."""
        # A copy, nested tensordicts included: the caller's are not written to.
        kept = given.exclude(*self._dropped_keys(layout)).copy()
        # The start may be a time slice of real data; the imagined time is another.
        kept.names = [None] * kept.batch_dims
        return kept

    def _dropped_keys(self, layout: Layout) -> set[NestedKey]:
        return {
            "next",
            # What collectors, replay buffers and transforms note of real samples.
            "collector",
            "index",
            "priority_weight",
            "_weight",
            "weight",
            "is_init",
            "step_count",
            "_step",
            *layout.endings.keys,
            *self.reset_keys,
            *layout.action_keys,
            *layout.reward_keys,
            *layout.predicted,
            *layout.dropped,
        }

    def _checked(
        self,
        key: NestedKey,
        value: torch.Tensor,
        spec: TensorSpec,
        given: TensorDictBase,
    ) -> torch.Tensor:
        expected = (*given.batch_size, *spec.shape)
        value = widened(value, spec.dtype)
        if tuple(value.shape) != expected or value.dtype != spec.dtype:
            raise ValueError(
                f"The start state's {key!r} has shape {tuple(value.shape)} and {value.dtype}; "
                f"the tensordict's batch size {tuple(given.batch_size)} and the spec ask for "
                f"{expected} and {spec.dtype}. Give TensorDict(..., batch_size=[...]) the batch "
                f"dims of its entries; latents come from world_model.encode(obs), observations "
                f"from the reference env or one like it."
            )
        return value

    def _reset_proc_data(
        self, tensordict: TensorDictBase | None, tensordict_reset: TensorDictBase
    ) -> TensorDictBase:
        if tensordict is None or len(missing_from(tensordict, self.reset_keys)) == len(
            self.reset_keys
        ):
            # The caller's tensordict is not written to: what it has and an
            # imagined start must not have would survive.
            return tensordict_reset
        rows = self._rows_to_reset(tensordict)
        merged = super()._reset_proc_data(tensordict.copy(), tensordict_reset)
        if rows is not None:
            for key in (*self.state_spec.keys(True, True), *self._layout.predicted):
                new, old = tensordict_reset.get(key), merged.get(key)
                merged.set(key, torch.where(_expand_right(rows, new), new, old))
        return merged

    def _rows_to_reset(self, tensordict: TensorDictBase) -> torch.Tensor | None:
        """Rows that all agents leave, where only agents have done entries: ``[*B]``.

        TorchRL then resets the agents' own entries; what the agents share, at
        the root, has to begin anew with them.
        """
        if "_reset" in self.reset_keys:
            return None
        dims = tensordict.batch_dims
        flags = [
            tensordict.get(key).flatten(dims).all(-1)
            for key in self.reset_keys
            if tensordict.get(key, None) is not None
        ]
        return torch.stack(flags).all(0)

    def _resolve_set_state(
        self,
        set_state: bool | None,
        tensordict: TensorDictBase | None,
        select_reset_only: bool,
    ) -> bool | None:
        # Starting from a given state is this env's normal use, and stays so: no
        # warning about a default that will change.
        if set_state is None and not select_reset_only:
            return True
        return super()._resolve_set_state(set_state, tensordict, select_reset_only)

    def maybe_reset(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Start finished rows anew from ``start_states``.

        Without ``start_states`` there is nothing to start from: the rows are
        left as they are, as planners need it, and nothing syncs with the host.
        """
        if self._sampler is None:
            return tensordict
        return super().maybe_reset(tensordict)

    def _assert_tensordict_shape(self, tensordict: TensorDictBase) -> None:
        if self.batch_locked and tensordict.batch_size != self.batch_size:
            raise RuntimeError(
                f"Expected a tensordict with shape==env.batch_size, {tuple(self.batch_size)}, "
                f"got {tuple(tensordict.batch_size)}. Give a tensordict of that batch size, or "
                f"make the env for any: WorldModelEnv(..., batch_size=[])."
            )

    def _set_seed(self, seed: int | None) -> None:
        if seed is None:
            return
        torch.manual_seed(seed)
        if isinstance(self._start_states, EnvBase):
            self._start_states.set_seed(seed)

    def _flat_start(
        self, given: TensorDictBase | None, heeds_done: bool
    ) -> FlatTensors | None:
        """What :meth:`reset` makes of flat latents, as a dictionary; None for all else.

        Where ``heeds_done`` is False, done entries that are never True are left out.
        """
        layout = self._layout
        if (
            type(given) is not TensorDict
            or layout.decoded
            or (self.batch_locked and given.batch_size != self.batch_size)
        ):
            return None
        values: FlatTensors = dict(given.items())
        others = values.keys() - layout.state.keys()
        if len(values) - len(others) != len(layout.state) or "_reset" in others:
            return None
        if others:
            for key in others & self._dropped_keys(layout):
                del values[key]
        size, device = given.batch_size, self.device
        for value in values.values():
            if not isinstance(value, torch.Tensor) or value.device != device:
                return None
        for key, spec in layout.state.items():
            values[key] = self._checked(key, values[key], spec, given)
        if self.max_steps is not None:
            values[_COUNTER_KEY] = torch.zeros(
                (*size, 1), dtype=torch.int64, device=device
            )
        for key, spec in layout.predicted.items():
            values[key] = spec.zero(size)
        if heeds_done or layout.endings.can_end:
            values.update(layout.endings.none(size, device))
        return values


def _check_arguments(world_model: Any, base_env: Any, max_steps: Any) -> None:
    if not isinstance(world_model, WorldModel):
        raise TypeError(
            f"world_model must be a torchrl_wm.WorldModel, got "
            f"{type(world_model).__module__}.{type(world_model).__name__}. Compose one: "
            f"WorldModel(encoder, dynamics, reward_head, done_head=..., decoder=...)."
        )
    if not isinstance(base_env, EnvBase):
        raise TypeError(
            f"base_env must be a torchrl.envs.EnvBase, whose specs are copied, got "
            f"{type(base_env).__name__}. Wrap a Gymnasium env: torchrl.envs.GymWrapper(env)."
        )
    is_count = isinstance(max_steps, Integral) and not isinstance(max_steps, bool)
    if max_steps is not None and (not is_count or max_steps <= 0):
        raise ValueError(
            f"max_steps must be a positive int or None, got {max_steps!r}."
        )


def _group_map(env: EnvBase) -> dict | None:
    """The agents by group, which multi-agent code looks for in an env."""
    while isinstance(env, TransformedEnv):
        env = env.base_env
    # Not getattr: batched envs ask their workers, and start them.
    return env.__dict__.get("group_map")


def _as_size(batch_size: int | Sequence[int] | None, default: torch.Size) -> torch.Size:
    if batch_size is None:
        return default
    sizes = [batch_size] if isinstance(batch_size, Integral) else list(batch_size)
    if not all(isinstance(size, Integral) and size > 0 for size in sizes):
        raise ValueError(
            f"batch_size must be a positive int or a sequence of them, [] for any batch size; "
            f"got {batch_size!r}."
        )
    return torch.Size(int(size) for size in sizes)


def _device_of(world_model: WorldModel, base_env: EnvBase) -> torch.device | None:
    parameter = next(world_model.parameters(), None)
    return base_env.device if parameter is None else parameter.device


def _expand_right(mask: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return mask.reshape(*mask.shape, *(1,) * (value.ndim - mask.ndim)).expand_as(value)
