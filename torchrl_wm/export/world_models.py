"""A :class:`~torchrl_wm.WorldModelEnv` as a source of imagined steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from tensordict import NestedKey, TensorDict, TensorDictBase
from torchrl.data import Binary, TensorSpec, Unbounded
from torchrl.envs import EnvBase

from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.export.choices import from_numbers, is_choice, number_shape, to_numbers
from torchrl_wm.export.forms import read_flag, read_reward
from torchrl_wm.export.isolation import Isolation
from torchrl_wm.export.sources import first_moment, Moment, Start
from torchrl_wm.export.spaces import checked_space, Checker, Reader, space_of_spec
from torchrl_wm.export.trees import tensor_to_numpy
from torchrl_wm.modules import penalty_of
from torchrl_wm.modules.keys import as_tuple, is_next, strip_next, unique
from torchrl_wm.modules.world_model.flat import FlatTensors, Placement


class WorldModelSource:
    """Steps a :class:`~torchrl_wm.WorldModelEnv` on flat tensors, as imagination does.

    Args:
        env: the imagined env: of batch size ``[]``, or of ``rows`` (one for a single
            env).
        rows: the number of envs ``N`` at once; None for one without a first dim.
        observation_space: which entries are observed, and within which bounds; by
            default all decoded ones, or, without any, all latents.
        action_space: in place of the action spec's own space.
        initial: where episodes begin, ``{"state": ...}`` or ``{"observation": ...}``; by
            default ``start_states`` is asked.
        clip: whether observations are clipped to their bounds.
    """

    def __init__(
        self,
        env: WorldModelEnv,
        rows: int | None,
        *,
        observation_space: spaces.Space | None,
        action_space: spaces.Space | None,
        initial: dict[str, Any],
        clip: bool,
    ) -> None:
        self.env, self.rows = env, rows
        self.count = 1 if rows is None else rows
        self.size = torch.Size([self.count])
        if env.batch_size not in (torch.Size([]), self.size):
            fix = (
                f"Make the env with batch_size=[], or ask for {env.batch_size.numel()} envs: "
                f"GymWorldModelVectorEnv(env)."
            )
            raise ValueError(
                f"The WorldModelEnv imagines envs of batch size {tuple(env.batch_size)}, and "
                f"{self.count} are asked for. {fix}"
            )
        self.device = env.device or torch.device("cpu")
        layout = env.imaginer.layout
        self.initial = {
            key: value for key, value in initial.items() if value is not None
        }

        self._reward_key = _only(layout.reward_keys, layout.reward, "reward")
        self._done = _done_group(layout)
        self._decoded = {
            key: _as_real(spec, layout.observed.get(key))
            for key, spec in layout.decoded.items()
        }
        entries = self._decoded or layout.latent
        every = {**layout.state, **self._decoded}
        if observation_space is None:
            self._observed = entries
            observation_space = _space_of(entries)
        else:
            self._observed = _entries_for(observation_space, entries, every)
        #: What is handed out as numbers of options, with the shapes of these.
        self._numbered = {
            key: shape
            for key, spec in self._observed.items()
            if (shape := number_shape(spec)) is not None
        }
        self._actions = {key: layout.action[key] for key in layout.action_keys}
        own = _space_of(self._actions)
        if action_space is None:
            action_space = own
        else:
            _check_same_form(action_space, own, "action_space")
            _check_not_wider(action_space, own, "action_space")
        self.observation_space = checked_space(observation_space, "observation_space")
        self.action_space = checked_space(action_space, "action_space")
        self.is_dict = isinstance(self.observation_space, spaces.Dict)
        self.read = Reader(self.observation_space, rows, "observation", clip)
        self.check_action = Checker(self.action_space, rows)
        self.isolation = Isolation(env.world_model, self.device)
        self._never = layout.endings.never(Placement(self.size, self.device))
        self._program: Any = None
        #: What a step tells beside observations, in its info.
        self._told: list[NestedKey] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_program": None}  # a copy makes its own

    # Resetting -----------------------------------------------------------

    def reset(self, start: Start) -> Moment:
        """Begin episodes; see :class:`~torchrl_wm.export.sources.Source`."""
        self.isolation.refresh()
        options, mask = start.options, start.mask
        unknown = sorted(set(options) - {"state", "observation"})
        if unknown:
            raise ValueError(
                f"reset got the options {unknown}, which nothing reads. Known are 'state' "
                f"(latents) and 'observation' (encoded), where to start."
            )
        whole = mask is None or self.env.batch_locked or bool(options or self.initial)
        count = self.count if whole else int(mask.sum())
        source = self.env.start_states
        with self.isolation:
            given = self._given(options or self.initial, count, expand=not options)
            if given is None and isinstance(source, EnvBase):
                # Its own random numbers too: the source may be shared with other envs.
                source.set_seed(start.seed)
            fresh = self._first(given, count)
        if mask is not None:
            fresh = self._merged(mask, fresh, start.state, whole)
        return first_moment(self.rows, fresh, self._observation(fresh), {})

    def _first(self, start: TensorDictBase | None, count: int) -> FlatTensors:
        env, starts = self.env, self.env.imaginer.refreshed().starts
        layout = starts.layout
        if start is not None:
            values = starts.from_given(start)
            if values is None:
                raise ValueError(
                    f"reset cannot start from {sorted(start.keys(True, True), key=str)}: it takes "
                    f"the latents {list(layout.latent)}, or the observations "
                    f"{unique(env.world_model.encoder.in_keys)}."
                )
        elif env.start_states is None:
            raise RuntimeError(
                "Nothing says where episodes begin. Make the env with a source, "
                "WorldModelEnv(..., start_states=real_env) or, of a model or its path, "
                "base_env='Pendulum-v1' or start_states=replay_buffer; or start from a given state: "
                "env.reset(options={'observation': observation}) or {'state': latents}."
            )
        else:
            empty = TensorDict({}, batch_size=[count], device=env.device)
            values = starts.sampled(empty)
        if env.step_kernel.rounded:  # which would hide it
            bad = [key for key in layout.latent if not values[key].isfinite().all()]
            if bad:
                raise FloatingPointError(
                    f"The latents {bad} that the episode begins with are NaN or infinite. Look "
                    f"at what it starts from, and at the training of encoder and posterior."
                )
        limit = layout.time_limit
        if limit is not None:
            at = Placement(torch.Size([count]), self.device)
            values[limit.key] = limit.begin(at)
        return {key: value.detach().clone() for key, value in values.items()}

    def _given(
        self, given: dict[str, Any], count: int, expand: bool
    ) -> TensorDictBase | None:
        """Return a start from ``options`` or the constructor, as a tensordict ``[N]``."""
        if not given:
            return None
        env, layout = self.env, self.env.imaginer.layout
        out = TensorDict({}, batch_size=[count], device=env.device)
        specs = {**layout.observed, **layout.state, **layout.memory, **self._decoded}
        defaults = {
            "state": list(layout.latent),
            "observation": unique(env.world_model.encoder.in_keys),
        }
        names = {_name(key): key for key in {**specs}}
        for what, value in given.items():
            if not isinstance(value, (Mapping, TensorDictBase)):
                keys = defaults[what]
                if len(keys) != 1:
                    raise ValueError(
                        f"The {what} to start from must be a dictionary with the keys "
                        f"{[_name(key) for key in keys]}, got {type(value).__name__}."
                    )
                value = {keys[0]: value}
            entries = (
                {k: value.get(k) for k in value.keys(True, True)}
                if isinstance(value, TensorDictBase)
                else value
            )
            for key, entry in entries.items():
                key = names.get(key, key)
                if key not in specs:
                    raise ValueError(
                        f"The {what} to start from has {key!r}; known are {sorted(names)}."
                    )
                out.set(key, self._as_tensor(entry, specs[key], key, count, expand))
        return out

    def _as_tensor(
        self, entry: Any, spec: TensorSpec, key: NestedKey, count: int, expand: bool
    ) -> torch.Tensor:
        if isinstance(entry, torch.Tensor):
            tensor = entry.detach().clone().to(self.device)
        else:
            tensor = torch.from_numpy(np.array(entry)).to(self.device)
        single = self.rows is None or expand
        numbers = number_shape(spec)
        as_spec = [(count, *spec.shape), *([spec.shape] if single else [])]
        if numbers is not None and tensor.shape not in as_spec:
            if single and tensor.shape == numbers:
                tensor = tensor.expand(count, *numbers)
            if tensor.shape == (count, *numbers) and not tensor.is_floating_point():
                return from_numbers(tensor, spec, count, key)
        both_float = tensor.is_floating_point() and spec.dtype.is_floating_point
        if both_float or not (tensor.is_floating_point() or spec.dtype is torch.bool):
            tensor = tensor.to(spec.dtype)
        if spec.dtype is torch.bool and not tensor.is_floating_point():
            # MultiBinary spaces have bits as integers.
            if ((tensor == 0) | (tensor == 1)).all():
                tensor = tensor.bool()
        if single and tensor.shape == spec.shape:
            tensor = tensor.expand(count, *spec.shape)
        if tensor.shape != (count, *spec.shape) or tensor.dtype != spec.dtype:
            lead = () if self.rows is None else (self.rows,)
            raise ValueError(
                f"The start's {key!r} has the shape {tuple(tensor.shape)} and {tensor.dtype}; "
                f"expected are {(*lead, *spec.shape)} and {spec.dtype}."
            )
        return tensor

    def _merged(
        self, mask: np.ndarray, fresh: FlatTensors, state: FlatTensors, whole: bool
    ) -> FlatTensors:
        """Return the fresh rows where ``mask``, else those of ``state``."""
        where = torch.from_numpy(mask).to(self.device)
        out = {}
        for key, old in state.items():
            new = fresh[key]
            if whole:
                picked = where.reshape(-1, *(1,) * (new.ndim - 1))
                out[key] = torch.where(picked, new, old)
            else:
                out[key] = old.clone()
                out[key][where] = new
        return out

    # Stepping ------------------------------------------------------------

    def step(self, state: FlatTensors, action: Any) -> Moment:
        """Predict one step; see :class:`~torchrl_wm.export.sources.Source`."""
        kernel = self.env.step_kernel
        trusted = kernel.program is self._program
        if not trusted:  # a component was replaced
            self.isolation.refresh()
            self._program, self._told = kernel.program, told_keys(self.env)
        values = dict(state)
        self._write_actions(values, action)
        with self.isolation:
            predicted = kernel.predict(
                values,
                Placement(self.size, self.env.device, trusted),
                self._never,
                check_rounded=True,
                more=self._told,
            )
        group, rows = self._done, self.rows
        truncated = False if rows is None else np.zeros(rows, bool)
        if group.truncates:
            truncated = read_flag(predicted[group.key("truncated")], rows, "truncated")
        observation = self._observation(predicted)
        following = {
            key: predicted[key] if key in predicted else state[key] for key in state
        }
        return Moment(
            following,
            observation,
            read_reward(predicted[self._reward_key], rows, "reward"),
            read_flag(predicted[group.key("terminated")], rows, "terminated"),
            truncated,
            {
                _name(key): self._shown_in_info(predicted[key])
                for key in self._told
                if key in predicted
            },
        )

    def _shown_in_info(self, value: torch.Tensor) -> Any:
        """Return an entry ``[N, ...]`` as numpy: numbers of one element without its dim."""
        array = tensor_to_numpy(value).copy()
        if array[0].size == 1:
            array = array.reshape(self.count)
        return array if self.rows is not None else array[0]

    def _observation(self, values: FlatTensors) -> Any:
        if self.rows is None:
            values = {key: values[key][0] for key in self._observed}
        if self._numbered:
            values = dict(values)
            for key, shape in self._numbered.items():
                values[key] = to_numbers(values[key], self._observed[key], shape)
        if not self.is_dict:
            (key,) = self._observed
            return self.read(values[key])
        return self.read({_name(key): values[key] for key in self._observed})

    def _write_actions(self, values: FlatTensors, action: Any) -> None:
        several = isinstance(self.action_space, spaces.Dict)
        for key, spec in self._actions.items():
            array = action[_name(key)] if several else action
            tensor = torch.as_tensor(np.asarray(array), device=self.device)
            values[key] = from_numbers(tensor, spec, self.count, key)

    def shown(
        self, state: FlatTensors, index: int | None = None
    ) -> dict[str, torch.Tensor]:
        """Return a copy of latents and context by name: of one env, or of all."""
        picked = slice(None) if index is None else index
        return {
            _name(k): state[k][picked].clone() for k in self.env.imaginer.layout.state
        }

    def state_of(self, state: FlatTensors) -> dict[str, np.ndarray]:
        """Return the latents as separate numpy arrays, by name."""
        out = {}
        for key in self.env.imaginer.layout.latent:
            array = tensor_to_numpy(state[key])
            out[_name(key)] = (array[0] if self.rows is None else array).copy()
        return out


#: What models say of their own doubts, wherever it stands.
_DOUBTS = ("disagreement", "deviation", "penalty")


def told_keys(env: WorldModelEnv) -> list[NestedKey]:
    """Return what a step of an imagined env tells in its ``info``.

    It is the disagreement of an ensemble, what a penalty is made of and what it takes off, and
    the predictions that the env's ``observation_spec`` declares.
    """
    model = env.world_model
    penalty = penalty_of(model)
    written = [key for key in unique(model.step_module.out_keys) if is_next(key)]
    told = [
        key
        for key in written
        if as_tuple(key)[-1] in _DOUBTS or (penalty and key == penalty.measure)
    ]
    return unique([*map(strip_next, told), *env.imaginer.layout.predicted])


def _name(key: NestedKey) -> str:
    """Return a key as one string: Gymnasium's Dict spaces have no nested keys that SB3 could read."""
    return "/".join(as_tuple(key))


def _space_of(entries: dict[NestedKey, TensorSpec]) -> spaces.Space:
    """Return the space of one entry, or a Dict of several."""
    parts = {_name(key): space_of_spec(spec) for key, spec in entries.items()}
    return next(iter(parts.values())) if len(parts) == 1 else spaces.Dict(parts)


def _only(keys: list[NestedKey], specs: Any, what: str) -> NestedKey:
    if not keys:
        raise ValueError(
            f"A Gymnasium env has one {what} a step, and the world model predicts none. Give it a "
            f"{what}_head: WorldModel(encoder, dynamics, {what}_head, ...)."
        )
    if len(keys) != 1 or specs[keys[0]].shape.numel() != 1:
        shapes = {key: tuple(specs[key].shape) for key in keys}
        raise ValueError(
            f"A Gymnasium env has one {what} a step, and this env has {shapes}. Multi-agent envs "
            f"stay in TorchRL."
        )
    return keys[0]


def _done_group(layout: Any) -> Any:
    groups = layout.endings.groups
    if groups[0].shape.numel() != 1:
        raise ValueError(
            f"A Gymnasium env ends as a whole, and this env's done entries have the shape "
            f"{tuple(groups[0].shape)}. Multi-agent envs stay in TorchRL."
        )
    return groups[0]  # the outermost one: it follows those below


def _entries_for(
    space: spaces.Space,
    defaults: dict[NestedKey, TensorSpec],
    every: dict[NestedKey, TensorSpec],
) -> dict[NestedKey, TensorSpec]:
    """Return the entries that a given observation space needs."""
    checked_space(space, "observation_space")
    named = {_name(key): (key, spec) for key, spec in every.items()}
    if isinstance(space, spaces.Dict):
        lacking = sorted(set(space.spaces) - set(named))
        if lacking:
            raise ValueError(
                f"observation_space has {lacking}, which the env does not have. It has "
                f"{sorted(named)}; decoded observations take WorldModelEnv(..., decode=True)."
            )
        chosen = {named[name][0]: named[name][1] for name in space.spaces}
        children = space.spaces
    else:
        shapes = {key: space_of_spec(spec).shape for key, spec in defaults.items()}
        fitting = [
            key
            for key, spec in defaults.items()
            if space.shape == (spec.shape if _is_raw(space, spec) else shapes[key])
        ]
        if len(fitting) != 1:
            shapes = {_name(key): tuple(shape) for key, shape in shapes.items()}
            raise ValueError(
                f"observation_space has the shape {space.shape}, and the env has {shapes}: "
                f"{'none' if not fitting else 'more than one'} fits. Name the entry by a Dict: "
                f"gymnasium.spaces.Dict({{name: space}})."
            )
        chosen = {fitting[0]: defaults[fitting[0]]}
        children = {_name(fitting[0]): space}
    for key, spec in chosen.items():
        child, name = children[_name(key)], f"observation_space[{_name(key)!r}]"
        if _is_raw(child, spec):
            chosen[key] = spec = Unbounded(spec.shape, dtype=spec.dtype)
        own = space_of_spec(spec)
        _check_same_form(child, own, name)
        if not _same_numbers(child, own):
            raise ValueError(f"{name} is {child}; the env's own is {own}.")
    return chosen


def _as_real(spec: TensorSpec, real: TensorSpec | None) -> TensorSpec:
    """Return the spec of a decoded entry: the real env's, if that is one of options.

    A decoder's dtype and shape alone do not say which numbers there are.
    """
    if real is None or spec.dtype.is_floating_point or spec.shape != real.shape:
        return spec
    options = is_choice(real) or isinstance(real, Binary)
    traced = isinstance(spec, Unbounded)
    return real if options and traced else spec


def _is_raw(space: spaces.Space, spec: TensorSpec) -> bool:
    """Whether a space asks for a choice as the spec has it: for one-hot blocks."""
    return isinstance(space, (spaces.Box, spaces.MultiBinary)) and is_choice(spec)


def _same_numbers(space: spaces.Space, own: spaces.Space) -> bool:
    """Whether two spaces of options call them by the same numbers; True for others."""
    return all(
        np.array_equal(getattr(space, part, None), getattr(own, part, None))
        for part in ("n", "nvec", "start")
    )


def _check_not_wider(space: spaces.Space, own: spaces.Space, name: str) -> None:
    """Whether all actions of a given space are among the env's own, under the same numbers."""
    if isinstance(own, spaces.Dict):
        for key, child in own.spaces.items():
            _check_not_wider(space[key], child, f"{name}[{key!r}]")
        return
    if isinstance(own, spaces.Box):
        fits = (space.low >= own.low).all() and (space.high <= own.high).all()
    else:
        fits = _same_numbers(space, own)
    if not fits:
        raise ValueError(
            f"{name} is {space}, which has actions that the env's own {own} does not have: pass "
            f"{own}, or a Box within it."
        )


def _check_same_form(space: spaces.Space, own: spaces.Space, name: str) -> None:
    checked_space(space, name)
    if isinstance(space, spaces.Dict) != isinstance(own, spaces.Dict):
        raise ValueError(f"{name} is {space}; the env's own is {own}.")
    if isinstance(own, spaces.Dict):
        if set(space.spaces) != set(own.spaces):
            raise ValueError(
                f"{name} has the keys {sorted(space.spaces)}; the env's own are "
                f"{sorted(own.spaces)}."
            )
        for key, child in own.spaces.items():
            _check_same_form(space[key], child, f"{name}[{key!r}]")
        return
    kinds = {np.dtype(space.dtype).kind, np.dtype(own.dtype).kind}
    same_kind = len(kinds) == 1 or kinds <= {"i", "u"}
    fewer = isinstance(own, spaces.Discrete) and getattr(space, "n", own.n) != own.n
    if (
        type(space) is not type(own)
        or space.shape != own.shape
        or not same_kind
        or fewer
    ):
        raise ValueError(f"{name} is {space}, which does not fit the env's own {own}.")
