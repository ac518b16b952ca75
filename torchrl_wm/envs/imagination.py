"""Imagining with an env: rollouts, fixed horizons, one compiled graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from numbers import Integral
from typing import Any

import torch
from tensordict import is_leaf_nontensor, NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.nn.utils import skip_existing
from torchrl.data.utils import DEVICE_TYPING
from torchrl.envs import EnvBase

from torchrl_wm import _upstream
from torchrl_wm.envs.unroll import (
    Act,
    assemble,
    flat_values,
    imagined,
    moving_keys,
    ProgramActor,
    stacked,
    unroll,
)
from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import leaf_keys, unique
from torchrl_wm.modules.world_model.compiling import Compiler
from torchrl_wm.modules.world_model.flat import FlatTensors, Placement, to_tensordict
from torchrl_wm.modules.world_model.program import Program

#: What the fast path does in place of these methods is what they do as they were written
#: for WorldModelEnv.
_AS_WRITTEN = (
    "_step",
    "_reset",
    *_upstream.STEP_METHODS,
    "reset",
    "maybe_reset",
    "any_done",
    "step",
    "step_mdp",
    "rand_action",
    "step_and_maybe_reset",
)


class Imagination(EnvBase):
    """The part of :class:`~torchrl_wm.WorldModelEnv` that makes many steps.

    It relies on the env's ``step_kernel``, ``_layout`` and ``_flat_start``.
    """

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
        _check_start(tensordict, "rollout(max_steps")
        if tensordict is not None and "time" in tensordict.names:
            # A time slice of real data: the imagined time is another dim.
            tensordict = tensordict.copy()
            tensordict.names = [None] * tensordict.batch_dims
        program = self._program(policy)
        reason = self._why_not_fast(
            policy,
            program,
            tensordict,
            {
                "callback": callback,
                "actions": actions,
                "auto_cast_to_device": auto_cast_to_device,
                "break_when_all_done": break_when_all_done,
                "set_truncated": set_truncated,
                "out": out,
                "storing_device": storing_device,
                "trust_policy": trust_policy,
            },
        )
        if reason is None:
            goes_on = break_when_any_done is not None and not break_when_any_done
            out_td, reason = self._fast_rollout(
                max_steps,
                policy,
                program,
                tensordict,
                auto_reset=auto_reset,
                goes_on=goes_on,
                set_state=set_state,
                return_contiguous=return_contiguous,
            )
            if out_td is not None:
                self.__dict__["_slow_because"] = reason
                return out_td
        if not auto_reset and tensordict is not None:
            tensordict = tensordict.copy()  # the inherited loop writes to it
        try:
            out_td = super().rollout(
                max_steps,
                policy,
                callback,
                actions=actions,
                auto_reset=auto_reset,
                auto_cast_to_device=auto_cast_to_device,
                break_when_any_done=break_when_any_done,
                break_when_all_done=break_when_all_done,
                return_contiguous=return_contiguous,
                tensordict=tensordict,
                set_truncated=set_truncated,
                out=out,
                trust_policy=trust_policy,
                storing_device=storing_device,
                set_state=set_state,
            )
        except KeyError as err:
            self._explain_policy_error(policy, tensordict, err)
            raise
        self.__dict__["_slow_because"] = reason  # after its steps, which leave another
        return out_td

    @property
    def slow_because(self) -> str | None:
        """Why the last :meth:`rollout` took the inherited loop; None if it took the fast path.

        The result is the same. The fast path calls the networks directly and
        builds one tensordict at the end. Steps that something else made one by one (a
        TransformedEnv around the env, a collector) are no fast path either, and are told.
        """
        return self.__dict__.get("_slow_because", "there was no rollout yet")

    def _why_not_fast(
        self,
        policy: Callable | None,
        program: Program | None,
        tensordict: TensorDictBase | None,
        options: dict,
    ) -> str | None:
        """What a fast path would do differently, known before anything is run."""
        asked = [k for k, v in options.items() if v is not None and v is not False]
        if asked:
            return f"the options {asked} are given"
        known = policy is None if program is None else program.is_known
        if not known:
            return f"the policy, {type(policy).__name__}, may do more than it says"
        if self._reads_nested(program, tensordict):
            return "the policy reads whole nested tensordicts"
        unknown = _upstream.unknown_step(EnvBase)
        if unknown is not None:
            return f"TorchRL's envs have no {unknown}, which the fast path relies on"
        overridden = self._overridden()
        if overridden is not None:
            return f"{type(self).__name__} overrides {overridden}"
        if _upstream.has_step_hooks(self) or self.run_type_checks:
            return "hooks or type checks are set"
        if skip_existing():
            return "existing entries are to be skipped"
        endings = self._layout.endings
        if not endings.at_root and endings.can_end:
            return "several groups of done entries can end"
        if set(self.done_keys) != set(endings.keys):
            return "the done spec was changed"
        return None

    def _overridden(self) -> str | None:
        """The method that is not what it was written to be, of those that the fast path replaces."""
        kind = type(self)
        written = next(
            c for c in kind.__mro__ if c.__module__.startswith("torchrl_wm.")
        )
        for name in _AS_WRITTEN:
            if name in self.__dict__ or (
                kind is not written
                and getattr(kind, name) is not getattr(written, name)
            ):
                return name
        return None

    def _fast_rollout(
        self,
        max_steps: int,
        policy: Callable | None,
        program: Program | None,
        tensordict: TensorDictBase | None,
        *,
        auto_reset: bool,
        goes_on: bool,
        set_state: bool | None,
        return_contiguous: bool | None,
    ) -> tuple[TensorDictBase | None, str | None]:
        """The rollout by :func:`~torchrl_wm.envs.unroll.unroll`, or why it cannot serve.

        Where the start shows that only after it was reset, the inherited loop goes on from it.
        """
        if max_steps < 1:
            return None, "the inherited rollout says what is wrong"
        kernel = self.step_kernel
        can_end = kernel.layout.endings.can_end
        if goes_on and can_end and self._sampler is not None:
            return None, "finished rows begin anew"
        values = nodes = None
        if auto_reset and set_state is not False:
            values = self._flat_start(tensordict, self._heeds_done(policy, program))
        if values is not None:
            size, device = tensordict.batch_size, self.device
        elif auto_reset:
            state = self.reset(tensordict, set_state=set_state)
        elif tensordict is None:
            return None, "the inherited rollout says what is wrong"
        else:
            state = self.maybe_reset(tensordict)
        if values is None:
            nodes, size, device = state, state.batch_size, state.device
            reserved = {"next", "_step", "_reset"} & set(state.keys())
            if device == self.device and not reserved:
                values = flat_values(state)
            reason = "the start is no plain tensordict of tensors on the env's device"
            if not auto_reset and _has_leftovers(state, kernel.layout.reward_keys):
                values, reason = None, "the start has names or rewards of its own"
            elif values is not None and not values.keys() >= set(moving_keys(kernel)):
                values, reason = None, "the start lacks entries that a reset gives"
        if values is None:
            out_td = super().rollout(
                max_steps,
                policy,
                auto_reset=False,
                tensordict=state if auto_reset else state.copy(),
                break_when_any_done=not goes_on,
                return_contiguous=return_contiguous,
            )
            return out_td, reason
        stop = _any_done if can_end and not goes_on else None
        if program is None:
            act = partial(self._act_randomly, size, device)
        else:
            act = ProgramActor(program, size, device)
        try:
            trace = unroll(kernel, act, values, max_steps, size, device, stop)
        except KeyError as err:
            self._explain_policy_error(policy, tensordict, err)
            raise
        root, next_ = stacked(trace, kernel.layout.endings, size, device)
        return assemble(root, next_, nodes, kernel, size, device), None

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
        if not isinstance(horizon, Integral) or isinstance(horizon, bool):
            raise TypeError(
                f"horizon must be an int, got {type(horizon).__name__}: imagine(horizon, policy, "
                f"tensordict)."
            )
        horizon = int(horizon)
        if horizon <= 0:
            raise ValueError(f"horizon must be at least 1, got {horizon}.")
        if isinstance(policy, TensorDictBase):
            raise TypeError(
                "imagine got a tensordict as policy. The start is a keyword: "
                "imagine(horizon, tensordict=start)."
            )
        _check_start(tensordict, "imagine(horizon")
        if actions is not None and not isinstance(
            actions, (torch.Tensor, TensorDictBase)
        ):
            raise TypeError(
                f"actions must be a tensor [*B, H, *A] or a TensorDict, got "
                f"{type(actions).__name__}. Convert them: torch.as_tensor(actions)."
            )
        if policy is not None and actions is not None:
            raise ValueError(
                "imagine takes a policy or actions, not both: with actions given there is "
                "nothing left to decide."
            )
        if tensordict is None and actions is not None:
            tensordict = TensorDict(
                {}, batch_size=self._batch_of_actions(actions), device=self.device
            )
        program = self._program(policy)
        state = None
        values = self._flat_start(tensordict, self._heeds_done(policy, program))
        if values is not None:
            size, device = tensordict.batch_size, self.device
        else:
            state = self.reset(tensordict)
            size, device = state.batch_size, state.device
            values = _only_tensors(state, "the start has")
        if actions is None and policy is None:
            # All at once: to draw a bounded action waits for the device.
            lead = () if self.batch_locked else size
            actions = self.full_action_spec.rand((horizon, *lead))
            actions = actions.permute(*range(1, actions.batch_dims), 0)
        flat = act = None
        if actions is not None:
            flat = self._flat_actions(actions, size, horizon)
        else:
            act = self._actor(policy, program, tensordict, size, device)
        kernel = self.step_kernel
        run = partial(imagined, kernel, act, horizon, size, device)
        program = getattr(act, "program", None)
        if self._compiler is not None and (act is None or program is not None):
            # A program is made for its networks and keys: two that agree are one.
            made_for = None if program is None else program.made_for
            run = self._compiler.wrap(
                run,
                (kernel, kernel.program),
                () if program is None else program.modules,
                (made_for, horizon, size),
            )
        try:
            root, next_, mask = run(values, flat)
        except KeyError as err:
            self._explain_policy_error(policy, tensordict, err)
            raise
        out = assemble(root, next_, state, kernel, size, device)
        return out.set(("collector", "mask"), mask)

    def compile(self, *, warmup: int | None = None, **kwargs: Any) -> Imagination:
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
        self.__dict__["_compiler"] = Compiler(kwargs, "imagine", "env.eager()")
        return self

    def eager(self) -> Imagination:
        """Undo :meth:`compile`."""
        super().eager()
        self.__dict__["_compiler"] = None
        return self

    def actor(self, policy: Callable, batch_size: torch.Size) -> Act:
        """A policy as what acts on flat values, ``[*B]`` by key."""
        program = self._program(policy)
        return self._actor(policy, program, None, batch_size, self.device)

    def _program(self, policy: Callable | None) -> Program | None:
        """A policy made of TensorDict modules as a program; the last one is kept."""
        policy = self._compatible(policy)
        if not isinstance(policy, TensorDictModuleBase):
            return None
        program = self.__dict__.get("_policy_program")
        if program is None or not program.is_for(policy):
            program = self.__dict__["_policy_program"] = Program([policy])
        return program

    def _compatible(self, policy: Callable | None) -> Callable | None:
        """The policy as TorchRL takes it, which wraps what reads tensors; the last one is kept."""
        if policy is None or isinstance(policy, TensorDictModuleBase):
            return policy
        given, compatible = self.__dict__.get("_wrapped", (None, None))
        if given is not policy:
            compatible = _upstream.compatible_policy(
                policy, self.observation_spec, self
            )
            self.__dict__["_wrapped"] = policy, compatible
        return compatible

    def _actor(
        self,
        policy: Callable,
        program: Program | None,
        start: TensorDictBase | None,
        size: torch.Size,
        device: torch.device | None,
    ) -> Act:
        """A policy that acts on flat values: as a program, or on a tensordict made for it."""
        if (
            program is not None
            and program.is_known
            and not self._reads_nested(program, start)
        ):
            return ProgramActor(program, size, device)
        compatible = self._compatible(policy)
        if compatible is None:
            raise _upstream.missing(_upstream.POLICY_WRAPPER)
        policy = compatible
        known: set[NestedKey] = set()

        def act(values: FlatTensors, step: int) -> None:
            shown = self.step_kernel.with_nested_dims(
                to_tensordict(values, Placement(size, device))
            )
            shown.update(policy(shown))
            values.update(_only_tensors(shown, "the policy wrote"))
            if step == 0:
                known.update(values)
            elif not known.issuperset(values):
                raise ValueError(
                    f"The policy wrote {sorted(values.keys() - known, key=str)} at step {step} "
                    f"and not before. imagine stacks what is there at every step: let it write "
                    f"them from the first one on, or take env.rollout."
                )

        return act

    def _act_randomly(
        self,
        size: torch.Size,
        device: torch.device | None,
        values: FlatTensors,
        step: int,
    ) -> None:
        lead = () if self.batch_locked else size
        drawn = self.input_spec["full_action_spec"].rand(torch.Size(lead))
        for key in self._layout.action_keys:
            values[key] = drawn.get(key)

    def _heeds_done(self, policy: Callable | None, program: Program | None) -> bool:
        """Whether a policy may look at done entries on the way.

        The model never does: they are no latents and no context.
        """
        if program is None or not program.is_known:
            return policy is not None
        return not program.reads.isdisjoint(self.done_keys)

    def _reads_nested(
        self, program: Program | None, start: TensorDictBase | None
    ) -> bool:
        """Whether a policy takes nested tensordicts as such, which flat values do not have."""
        if program is None:
            return False
        if not program.reads.isdisjoint(self._nested_keys):
            return True
        return isinstance(start, TensorDictBase) and any(
            isinstance(value, TensorDictBase) and key in program.reads
            for key, value in start.items()
        )

    def _batch_of_actions(self, actions: torch.Tensor | TensorDictBase) -> torch.Size:
        if self.batch_locked:
            return self.batch_size
        if isinstance(actions, TensorDictBase):
            return actions.batch_size[:-1]
        spec = self._layout.action[self._layout.action_keys[0]]
        return actions.shape[: actions.ndim - len(spec.shape) - 1]

    def _flat_actions(
        self,
        actions: torch.Tensor | TensorDictBase,
        batch_size: torch.Size,
        horizon: int,
    ) -> FlatTensors:
        """The given actions by key, ``[*B, H, *A]``, checked."""
        keys = self._layout.action_keys
        if not isinstance(actions, TensorDictBase):
            if len(keys) > 1:
                raise ValueError(
                    f"The env has the actions {keys}: give them as a TensorDict of batch size "
                    f"[*B, H] with these keys, got a tensor."
                )
            actions = {keys[0]: actions}
        elif unknown := [k for k in leaf_keys(actions) if k not in keys]:
            raise ValueError(
                f"actions has {unknown}, which are no actions of the env: it takes {keys}. "
                f"Leave them out: actions.select(*{keys})."
            )
        flat: FlatTensors = {}
        for key in keys:
            expected = (*batch_size, horizon, *self._layout.action[key].shape)
            value = actions.get(key, None)
            if value is None or tuple(value.shape) != expected:
                got = "nothing" if value is None else f"shape {tuple(value.shape)}"
                raise ValueError(
                    f"actions for {key!r} must have the shape [*B, H, *A] = {expected}, "
                    f"got {got}."
                )
            flat[key] = value
        return flat

    def _explain_policy_error(
        self,
        policy: Callable | None,
        tensordict: TensorDictBase | None,
        err: KeyError,
    ) -> None:
        """Raise an error that names what the policy reads and the env lacks, if that is it."""
        wanted = unique(getattr(policy, "in_keys", None) or [])
        there = unique(
            [
                *self.observation_spec.keys(True, True),
                *self.state_spec.keys(True, True),
                *self.done_keys,
                *self.action_keys,
            ]
        )
        if tensordict is not None:
            there += [k for k in leaf_keys(tensordict) if k not in self._layout.dropped]
        lacking = [key for key in wanted if key not in there]
        if not lacking:
            return
        decodable = [k for k in lacking if k in self.world_model.decoded_keys()]
        fix = (
            f"Let the policy read the latents {self.latent_keys}, or give the world model "
            f"a decoder that writes {lacking} and pass decode=True"
        )
        if decodable:
            fix = f"Pass decode=True to WorldModelEnv for {decodable}"
        elif "is_init" in lacking:
            fix = (
                "The state of a recurrent policy comes from its primer, in an env of a batch size: "
                "TransformedEnv(WorldModelEnv(..., batch_size=[N]), Compose(InitTracker(), "
                "rnn.make_tensordict_primer()))"
            )
        raise MissingEntryError(
            f"The policy reads {lacking}, which the imagined env does not have. It has "
            f"{sorted(set(there), key=str)}. {fix}."
        ) from err


def _check_start(tensordict: Any, call: str) -> None:
    if tensordict is not None and not isinstance(tensordict, TensorDictBase):
        raise TypeError(
            f"The start must be a TensorDict, got {type(tensordict).__name__}: "
            f"env.{call}, tensordict=world_model.encode(obs))."
        )


def _has_leftovers(start: TensorDictBase, reward_keys: Iterable[NestedKey]) -> bool:
    """Whether a start that is not reset has what a reset would have taken away."""
    if any(name is not None for name in start.names):
        return True
    return any(start.get(key, None) is not None for key in reward_keys)


def _only_tensors(tensordict: TensorDictBase, origin: str) -> FlatTensors:
    """The entries of a tensordict by flat key.

    Raises:
        TypeError: if some are no tensors, which cannot be stacked over time.
    """
    values = flat_values(tensordict)
    if values is None:  # lazily stacked, or with empty nested tensordicts
        values = flat_values(tensordict.to_tensordict().filter_empty_())
    if values is None:
        others = [
            key
            for key, value in tensordict.items(True, True, is_leaf=is_leaf_nontensor)
            if not isinstance(value, torch.Tensor)
        ]
        raise TypeError(
            f"imagine carries tensors alone, and {origin} {others}, which are none. Leave "
            f"them out: td.exclude(*{others})."
        )
    return values


def _any_done(predicted: FlatTensors) -> bool:
    return bool(predicted["done"].any())
