"""An environment whose transitions a world model predicts: the face of it, and what EnvBase calls.

What imagines is its :class:`~torchrl_wm.envs.imaginer.Imaginer`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from multiprocessing import parent_process
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.data import TensorSpec
from torchrl.data.utils import DEVICE_TYPING
from torchrl.envs import EnvBase, ModelBasedEnvBase, TransformedEnv

from torchrl_wm import _upstream
from torchrl_wm.envs.acting import (
    flat_actions,
    lead_of,
    missing_reads,
    Policy,
    RandomActor,
)
from torchrl_wm.envs.arguments import as_size, check_imagine, check_parts, check_start
from torchrl_wm.envs.collecting import leave_out_collectors
from torchrl_wm.envs.fast_path import overridden_method, why_slow
from torchrl_wm.envs.imaginer import Imaginer, Start
from torchrl_wm.envs.layout import composite, rebatch
from torchrl_wm.envs.layout_builder import (
    explicit_specs,
    LayoutBuilder,
    main_latent,
    Reference,
)
from torchrl_wm.envs.masks import warn_of_masks
from torchrl_wm.envs.start_states import StartStates
from torchrl_wm.envs.step import StepKernel
from torchrl_wm.envs.time_limit import TimeLimit
from torchrl_wm.envs.unroll import Act
from torchrl_wm.modules import WorldModel
from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import missing_from, unique
from torchrl_wm.modules.world_model.flat import FlatTensors, Placement, to_flat, where


class WorldModelEnv(ModelBasedEnvBase):
    """Imagine with a world model through the ordinary :class:`~torchrl.envs.EnvBase` API.

    The env steps in latent space: no observation is encoded after the start,
    and none is decoded unless asked for. Action, reward and done specs are
    copied from a reference env, so that policies, losses and buffers made for
    the real env fit the imagined one. The reference env is never stepped.

    An episode starts from the latents in the tensordict given to ``reset`` or
    ``rollout``, else from the observations in it, which are encoded, else from
    ``start_states``.

    At every step ``done == terminated | truncated``. A termination is what the
    model's ``done_head`` predicts; a truncation is the time limit ``max_steps``, or what a head
    writes as ``truncated``.

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
        check_parts(world_model, base_env, max_steps)
        batch_size = as_size(batch_size, base_env.batch_size)
        limit = None if max_steps is None else TimeLimit(int(max_steps))
        present = _device_of(world_model, base_env)
        # Before anything is moved: what does not fit leaves the model as it is.
        main = main_latent(world_model, latent_key)
        builder = LayoutBuilder(
            world_model,
            Reference.of_env(base_env),
            explicit_specs(observation_spec, batch_size, main),
            batch_size=batch_size,
            device=present,
            time_limit=limit,
        )
        imaginer = Imaginer(
            world_model,
            builder.build(decode),
            start_states=start_states,
            batch_size=batch_size,
            device=present,
            decode=decode,
            check_finite=check_finite,
        )
        warn_of_masks(imaginer.layout.masked)
        # Moves the model as a whole. A start may be done: done_head decides.
        super().__init__(
            world_model,
            device=present if device is None else device,
            batch_size=batch_size,
            allow_done_after_reset=True,
        )
        if self.device is not None and self.device != present:
            imaginer.to(self.device)
        #: What imagines: the entries, the starts, the step kernel, the loop of steps.
        self.imaginer = imaginer
        self.latent_key = main
        self.max_steps = None if limit is None else limit.max_steps
        self.check_finite = check_finite
        group_map = _group_map(base_env)
        if group_map is not None:
            self.group_map = group_map
        self._set_specs()

    @property
    def batch_locked(self) -> bool:
        """Whether the env takes only its own batch size: only such an env steps some of its rows."""
        return len(self.batch_size) > 0

    # Construction --------------------------------------------------------

    def _set_specs(self) -> None:
        layout, size, device = self.imaginer.layout, self.batch_size, self.device
        state = {**layout.state, **layout.counter}
        observation = {**layout.observation, **layout.counter}
        self.full_action_spec = rebatch(layout.action, size)
        self.full_reward_spec = rebatch(layout.reward, size)
        self.full_done_spec = rebatch(layout.done, size)
        self.state_spec = composite(state, layout.nested, size, device)
        self.observation_spec = composite(observation, layout.nested, size, device)

    @property
    def start_states(self) -> StartStates | None:
        """Where episodes begin when no state is given."""
        return self.imaginer.start_states

    @property
    def start_keys(self) -> list[NestedKey]:
        """What a start may be made of: latents, context, or observations to encode."""
        layout = self.imaginer.layout
        return unique([*layout.state, *self.world_model.encoder.in_keys])

    @property
    def latent_keys(self) -> list[NestedKey]:
        """The latents that the env steps."""
        return list(self.imaginer.layout.latent)

    @property
    def step_kernel(self) -> StepKernel:
        """What predicts one step; made anew when a component was replaced."""
        return self.imaginer.refreshed().kernel

    def __getstate__(self) -> dict[str, Any]:
        leave_out_collectors(self, self.start_states)
        state = dict(self.__dict__)
        for name in ("_wrapped_policy", _upstream.COMPILED_STEP):
            state.pop(name, None)
        return state

    def __repr__(self) -> str:
        source, layout = self.start_states, self.imaginer.layout
        parts = {
            "batch_size": list(self.batch_size),
            "device": self.device,
            "action": layout.action_keys,
            "latents": self.latent_keys,
            "context": list(layout.context),
            "decoded": list(layout.decoded),
            "predicted": list(layout.predicted),
            "max_steps": self.max_steps,
            "start_states": None if source is None else type(source).__name__,
        }
        lines = [f"  {name}={value}" for name, value in parts.items() if value != []]
        model = "\n".join("  " + line for line in repr(self.world_model).splitlines())
        return "\n".join([f"{type(self).__name__}(", *lines, model, ")"])

    def add_truncated_keys(self) -> EnvBase:
        """Add ``truncated`` to every done entry, as :meth:`~torchrl.envs.EnvBase.add_truncated_keys`."""
        super().add_truncated_keys()
        self.imaginer.use(self.imaginer.layout.with_truncated())
        return self

    def to(self, device: DEVICE_TYPING) -> WorldModelEnv:
        """Move the model, the specs and what imagines, as :meth:`torchrl.envs.EnvBase.to`."""
        before = self.device
        super().to(device)
        if self.device != before:
            self.imaginer.to(self.device)
        return self

    # Stepping ------------------------------------------------------------

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        self.__dict__["_slow_because"] = "its steps were made one by one, from outside"
        kernel, held = self.step_kernel, self.imaginer.held
        mask = tensordict.get("_step", None)
        kernel.check_inputs(tensordict)
        before = memory = self._memory_of(tensordict)
        if memory:
            held.forget()  # a step that fails may have written into it
        if mask is not None:  # some rows keep theirs
            memory = {key: value.clone() for key, value in before.items()}
        if parent_process() is not None and tensordict.get(self.latent_key).is_shared():
            # In the worker of a ParallelEnv, whose shared buffers would chain the
            # graphs of all steps; none of them could be used by the parent.
            with torch.no_grad():
                out, memory = kernel(tensordict, memory)
        else:
            out, memory = kernel(tensordict, memory)
        if mask is None:
            held.keep(to_flat(out, self.latent_keys) if memory else {}, memory)
            return out
        # Rows that are not to be stepped stay where they are, with reward 0.
        mask = mask.reshape(out.batch_size)
        rewards = self.imaginer.layout.reward_keys
        for key in unique(out.keys(True, True)):
            new = out.get(key)
            old = None if key in rewards else tensordict.get(key, None)
            old = torch.zeros_like(new) if old is None else old
            out.set(key, torch.where(_expand_right(mask, new), new, old))
        if memory:
            held.keep(to_flat(out, self.latent_keys), where(mask, memory, before))
        return out

    @property
    def memory(self) -> TensorDictBase:
        """The memory of the model after the newest step, ``[*B]``, to go on from; a copy.

        No rollout holds it: ``env.rollout(10, tensordict=rollout[..., -1]["next"].update(
        env.memory))`` goes on where ``rollout`` ended. It is empty of a model without memory.
        """
        held = self.imaginer.held
        size = torch.Size([])
        for key, spec in self.imaginer.layout.memory.items():
            value = held.memory.get(key)
            if value is not None:
                size = value.shape[: value.ndim - len(spec.shape)]
        return held.as_tensordict(size, self.device)

    def _memory_of(self, tensordict: TensorDictBase) -> FlatTensors:
        """Return the memory that belongs to the latents in ``tensordict``, given or held.

        What is given is taken out of the tensordict.

        Raises:
            MissingEntryError: if it is neither.
        """
        layout, filter_ = self.imaginer.layout, self.world_model.filter
        if not layout.memory:
            return {}
        held = self.imaginer.held
        found = held.find(to_flat(tensordict, layout.latent))
        if found is not None and held.was_given(tensordict):
            return found
        given = filter_.given_memory(tensordict)
        if given is not None:
            held.note_given(tensordict, layout.memory)
            # At the next step it would be that of the step before.
            tensordict.exclude(*layout.memory, inplace=True)
            return given
        if found is None:
            raise MissingEntryError(
                f"The model's memory {self.world_model.memory_keys} is carried from step to step, "
                f"and the latents given are not those that the env left at its newest step. Go on "
                f"from that step, begin at these latents by env.reset(tensordict), or give the "
                f"memory that belongs to them: tensordict.update(env.memory), taken when they were "
                f"made."
            )
        return found

    # Resetting -----------------------------------------------------------

    def _reset(
        self,
        tensordict: TensorDictBase | None = None,
        *,
        set_state: bool | None = None,
        **kwargs: Any,
    ) -> TensorDictBase:
        given = self._given(tensordict)
        if self.device is not None and given.device != self.device:
            given = given.to(self.device)
        starts = self.imaginer.refreshed().starts
        partial = len(missing_from(given, self.reset_keys)) < len(self.reset_keys)
        sampled = set_state is False or (partial and self.start_states is not None)
        out = starts.kept(given)
        begun = starts.begin(given, honour=not sampled)
        self.imaginer.held.note_given(given, starts.layout.memory)
        memory = {key: begun.pop(key) for key in starts.layout.memory}
        for key, value in begun.items():
            out.set(key, value)
        if memory:
            latents = {key: begun[key] for key in starts.layout.latent}
            if partial:
                rows = self._reset_rows(given)
                self.imaginer.held.begin(rows, latents, memory)
            else:
                self.imaginer.held.keep(latents, memory)
        return self.imaginer.layout.with_nested_dims(out)

    def _given(self, tensordict: TensorDictBase | None) -> TensorDictBase:
        """Return the start that the caller gives, or an empty one."""
        if tensordict is not None:
            return tensordict
        return TensorDict({}, batch_size=self.batch_size, device=self.device)

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
            predicted = self.imaginer.layout.predicted
            for key in (*self.state_spec.keys(True, True), *predicted):
                new, old = tensordict_reset.get(key), merged.get(key)
                merged.set(key, torch.where(_expand_right(rows, new), new, old))
        return merged

    def _rows_to_reset(self, tensordict: TensorDictBase) -> torch.Tensor | None:
        """Return the rows that all agents leave, ``[*B]``, if only agents have done entries.

        TorchRL then resets the agents' own entries; what the agents share, at
        the root, has to begin anew with them.
        """
        return None if "_reset" in self.reset_keys else self._reset_rows(tensordict)

    def _reset_rows(self, tensordict: TensorDictBase) -> torch.Tensor:
        """Return the rows that a partial reset begins anew as a whole, ``[*B]``."""
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
        if self.start_states is None:
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
        if isinstance(self.start_states, EnvBase):
            self.start_states.set_seed(seed)

    # Imagining -----------------------------------------------------------

    def rollout(
        self,
        max_steps: int,
        policy: Callable[[TensorDictBase], TensorDictBase] | None = None,
        callback: Callable[[TensorDictBase, ...], Any] | None = None,
        *,
        actions: Iterable[Any] | None = None,
        auto_reset: bool = True,
        auto_cast_to_device: bool = False,
        break_when_any_done: bool | None = None,
        break_when_all_done: bool | None = None,
        return_contiguous: bool | None = False,
        tensordict: TensorDictBase | None = None,
        set_truncated: bool = False,
        out=None,
        trust_policy: bool = False,
        storing_device: DEVICE_TYPING | None = None,
        set_state: bool | None = None,
    ) -> TensorDictBase:
        """Imagine until an episode ends; :meth:`torchrl.envs.EnvBase.rollout`, its arguments and results.

        What to know of it here:

        - ``tensordict`` is the start: latents, or observations to encode. It is
          not written to.
        - By default it stops as soon as *one* of the trajectories ends. With
          ``break_when_all_done=True`` it waits for all, with
          ``break_when_any_done=False`` it goes on: ended rows begin anew from
          ``start_states``, or, without, are left as they are.
        - ``max_steps`` here is how long to roll out; the env's own ``max_steps`` is
          where it truncates episodes.
        - Gradients flow through it. Under ``torch.no_grad()`` it keeps no graph:
          what goes into a replay buffer belongs there.

        Returns:
            The trajectories, ``[*B, T]``.
        """
        tensordict = check_start(tensordict, "rollout(max_steps")
        options = {
            "callback": callback,
            "actions": actions,
            "auto_cast_to_device": auto_cast_to_device,
            "break_when_all_done": break_when_all_done,
            "set_truncated": set_truncated,
            "out": out,
            "storing_device": storing_device,
            "trust_policy": trust_policy,
        }
        imaginer = self.imaginer.refreshed()
        acting = self._policy(policy)
        goes_on = break_when_any_done is not None and not break_when_any_done
        kept = self._flat_start(tensordict, auto_reset)
        reason = why_slow(
            self,
            imaginer,
            acting,
            tensordict,
            kept,
            max_steps=max_steps,
            auto_reset=auto_reset,
            goes_on=goes_on,
            options=options,
        )
        if reason is None:
            if auto_reset:
                honour = set_state is not False
                start = imaginer.start(self._given(tensordict), kept, acting, honour)
            else:
                start = self._going_on(self.maybe_reset(tensordict.copy()))
            act = self._actor(acting, start.at, tensordict)
            run = partial(imaginer.rollout, start, act, max_steps, not goes_on)
        else:
            if not auto_reset and tensordict is not None:
                tensordict = tensordict.copy()  # the inherited loop writes to it
            run = partial(
                super().rollout,
                max_steps,
                policy,
                auto_reset=auto_reset,
                break_when_any_done=break_when_any_done,
                return_contiguous=return_contiguous,
                tensordict=tensordict,
                set_state=set_state,
                **options,
            )
        try:
            return self._explained(run, policy, tensordict)
        finally:
            self.__dict__[
                "_slow_because"
            ] = reason  # each inherited step leaves another

    @property
    def slow_because(self) -> str | None:
        """Why the last :meth:`rollout` took the inherited loop; None if it took the fast path.

        The result is the same. The fast path calls the networks directly and
        builds one tensordict at the end. Steps that something else makes one by one (a
        TransformedEnv around the env, a collector) do not take the fast path either; this property
        then says so.
        """
        return self.__dict__.get("_slow_because", "there was no rollout yet")

    def imagine(
        self,
        horizon: int,
        policy: Callable | None = None,
        tensordict: TensorDictBase | None = None,
        actions: torch.Tensor | TensorDictBase | None = None,
    ) -> TensorDictBase:
        """Imagine exactly ``horizon`` steps, whatever ends on the way.

        Unlike :meth:`rollout`, nothing stops early, no row is started anew, and
        the host never waits for the device (TorchRL's ``TanhNormal`` does, which looks at
        its bounds whenever it is made, but for compiled and captured graphs). Where a
        trajectory has ended, what follows is marked invalid under ``("collector", "mask")``,
        which TorchRL's losses heed.

        Args:
            horizon: the number of steps ``H``.
            policy: what acts; random actions if there is neither a policy nor
                ``actions``.
            tensordict: the start, ``[*B]``, as for :meth:`reset`.
            actions: the actions to take, ``[*B, H, *A]``; with several action
                keys a tensordict of batch size ``[*B, H]``.

        Returns:
            The trajectories, ``[*B, H]``, with what :meth:`rollout` returns and
            ``("collector", "mask")``, ``[*B, H]`` bool: True up to and including
            the step at which the trajectory ends.

        Raises:
            TypeError: if the start is no tensordict, or the actions no tensors.
            ValueError: if ``horizon`` is not positive, if both a policy and
                actions are given, or if the actions' shape is not ``[*B, H, *A]``.

        Examples:
            >>> import torch
            >>> from tensordict.nn import TensorDictModule as Mod
            >>> from torchrl.envs import GymEnv
            >>> from torchrl.modules import MLP
            >>> from torchrl_wm import WorldModel, WorldModelEnv
            >>> base_env = GymEnv("Pendulum-v1")
            >>> world_model = WorldModel(
            ...     Mod(torch.nn.Linear(3, 4), ["observation"], ["latent"]),
            ...     Mod(MLP(5, 4, num_cells=[32]), ["latent", "action"], [("next", "latent")]),
            ...     Mod(torch.nn.Linear(4, 1), [("next", "latent")], [("next", "reward")]),
            ... )
            >>> env = WorldModelEnv(world_model, base_env)
            >>> start = world_model.encode(base_env.reset()).expand(7)
            >>> imagined = env.imagine(15, tensordict=start, actions=torch.zeros(7, 15, 1))
            >>> imagined.shape, imagined["collector", "mask"].all()
            (torch.Size([7, 15]), tensor(True))
        """
        horizon = check_imagine(horizon, policy, tensordict, actions)
        imaginer = self.imaginer.refreshed()
        layout = imaginer.layout
        if tensordict is None and actions is not None:
            size = self.batch_size if self.batch_locked else lead_of(actions, layout)
            tensordict = TensorDict({}, batch_size=size, device=self.device)
        acting = self._policy(policy)
        kept = None if overridden_method(self) else self._flat_start(tensordict, True)
        if kept is not None:
            start = imaginer.start(self._given(tensordict), kept, acting)
        else:
            start = self._going_on(self.reset(tensordict))
        act = flat = None
        if policy is not None:
            act = self._actor(acting, start.at, tensordict)
        else:
            if actions is None:
                # All at once: to draw a bounded action waits for the device.
                lead = () if self.batch_locked else start.at.batch_size
                actions = self.full_action_spec.rand((horizon, *lead))
                actions = actions.permute(*range(1, actions.batch_dims), 0)
            flat = flat_actions(actions, layout, start.at.batch_size, horizon)
        run = partial(imaginer.imagine, start, act, flat, horizon)
        return self._explained(run, policy, tensordict)

    def compile(self, *, warmup: int | None = None, **kwargs: Any) -> WorldModelEnv:
        """Make :meth:`imagine` one compiled graph, and compile what EnvBase compiles.

        :meth:`rollout`, which stops where episodes end, stays as it was; copies of the env
        are eager.

        A graph is made for each horizon, batch shape, set of entries, policy
        and gradient mode, at its first call (some ten seconds to a minute or more, more for
        a longer horizon), and the 64 used last are kept: horizons that change from call to
        call are better imagined eagerly, or cut from one that is long enough. Replacing a
        component makes new graphs. Policies that are more than networks and
        distributions are not compiled.

        Args:
            warmup: see :meth:`torchrl.envs.EnvBase.compile`.
            kwargs: for :func:`torch.compile`; ``fullgraph`` is True and
                ``dynamic`` False unless given.

        Returns:
            The env itself. Where there is no compiler, a warning says so at the
            first call, and imagination stays eager. :meth:`eager` undoes it.

        Raises:
            ValueError: if the env was made with ``check_finite=True``, which looks at values.
        """
        if self.check_finite and kwargs.get("fullgraph", True):
            raise ValueError(
                "check_finite=True looks at the values of every step, which one graph cannot. "
                "Make the env without it, or call env.compile(fullgraph=False)."
            )
        super().compile(warmup=warmup, **kwargs)
        self.imaginer.compile(kwargs)
        return self

    def eager(self) -> WorldModelEnv:
        """Undo :meth:`compile`."""
        super().eager()
        self.imaginer.eager()
        return self

    def actor(self, policy: Callable, batch_size: torch.Size) -> Act:
        """Return a policy as what acts on flat tensors, ``[*B]`` by key."""
        return self._actor(self._policy(policy), Placement(batch_size, self.device))

    def _going_on(self, state: TensorDictBase) -> Start:
        """Return the start that a state is, with the memory that belongs to it."""
        memory = self._memory_of(state)
        start = Start.of(state)
        return start._replace(values={**start.values, **memory})

    def _flat_start(
        self, given: TensorDictBase | None, auto_reset: bool
    ) -> FlatTensors | None:
        """Return the entries of a start that stay, by flat key; None if they cannot be had."""
        if given is None:
            return {} if auto_reset else None
        if self.batch_locked and given.batch_size != self.batch_size:
            return None
        return self.imaginer.starts.kept_flat(given, auto_reset)

    def _actor(
        self, acting: Policy, at: Placement, start: TensorDictBase | None = None
    ) -> Act:
        if acting.given is None:
            lead = torch.Size(()) if self.batch_locked else at.batch_size
            return RandomActor(self.input_spec["full_action_spec"], lead)
        if acting.callable is None:
            raise _upstream.missing(_upstream.POLICY_WRAPPER)
        return acting.actor(self.imaginer.layout, at, start)

    def _policy(self, policy: Callable | None) -> Policy:
        """Return a policy as TorchRL takes it, which wraps what reads tensors."""
        layout = self.imaginer.layout
        if layout.memory:
            read = unique(getattr(policy, "in_keys", None) or [])
            if not layout.memory.keys().isdisjoint(read):
                raise missing_reads(policy, None, layout, self.world_model)
        if policy is None or isinstance(policy, TensorDictModuleBase):
            return self.imaginer.policy(policy, policy)
        given, wrapped = self.__dict__.get("_wrapped_policy", (None, None))
        if given is not policy:  # the last one is kept
            wrapped = _upstream.compatible_policy(policy, self.observation_spec, self)
            self.__dict__["_wrapped_policy"] = policy, wrapped
        return self.imaginer.policy(policy, wrapped)

    def _explained(
        self,
        run: Callable[[], TensorDictBase],
        policy: Callable | None,
        start: TensorDictBase | None,
    ) -> TensorDictBase:
        """Run, and name what the policy reads and the env lacks, if that fails."""
        try:
            return run()
        except KeyError as err:
            layout = self.imaginer.layout
            error = missing_reads(policy, start, layout, self.world_model)
            if error is None:
                raise
            raise error from err


def _group_map(env: EnvBase) -> dict | None:
    """Return the agents by group, which multi-agent code looks for in an env."""
    while isinstance(env, TransformedEnv):
        env = env.base_env
    # Not getattr: batched envs ask their workers, and start them.
    return env.__dict__.get("group_map")


def _device_of(world_model: WorldModel, base_env: EnvBase) -> torch.device | None:
    parameter = next(world_model.parameters(), None)
    return base_env.device if parameter is None else parameter.device


def _expand_right(mask: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return mask.reshape(*mask.shape, *(1,) * (value.ndim - mask.ndim)).expand_as(value)
