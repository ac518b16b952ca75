"""A source of imagined steps from any model object, through callables or its own methods."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import nn

from torchrl_wm.export.forms import (
    MISSING,
    Outcome,
    read_flag,
    read_reward,
    ResetForm,
    STEP_FORMS,
    StepForm,
)
from torchrl_wm.export.infos import in_rows
from torchrl_wm.export.isolation import Isolation
from torchrl_wm.export.signatures import bind, Bound
from torchrl_wm.export.sources import first_moment, Moment, numpy_info, Start, USERS
from torchrl_wm.export.spaces import batched, Checker, Reader, sample_start
from torchrl_wm.export.trees import (
    as_tensors,
    detached,
    expand_rows,
    holds_tensors,
    map_leaves,
    merge_rows,
    snapshot,
    to_device,
    to_numpy,
)

#: The methods that may step a model; the first that the model has is used.
STEP_METHODS = (
    "env_step",
    "step",
    "predict_step",
    "predict",
    "imagine_step",
    "transition",
    "__call__",
)
RESET_METHODS = ("reset_env", "reset_state", "reset")
DECODE_METHODS = ("decode", "decode_observation")


class AdapterSource:
    """A model object with spaces, stepped by callables or by its own methods.

    Args:
        model: any object.
        observation_space: the space of one env's observations.
        action_space: the space of one env's actions.
        rows: the number of envs ``N`` that the model steps at once; None for a model
            of one env, without a batch dim.
        functions: ``reset_fn``, ``transition_fn``, ``reward_fn``, ``terminal_fn`` and
            ``action_transform_fn``; None for those that are not given.
        initial_observation: the first observation of episodes, without a reset function.
        initial_state: the first state of episodes; it is copied at every reset.
        device: the device of actions and states.
        torch_actions: give callables tensors, else arrays. The output of an action transform
            becomes a tensor only if the model is a module or the state has tensors.
        clip: clip observations to their bounds.

    Raises:
        TypeError: if nothing steps or resets the model, or a callable is not clear.
        ValueError: if the initial observation does not fit its space.
    """

    def __init__(
        self,
        model: Any,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        rows: int | None,
        *,
        functions: dict[str, Callable | None],
        initial_observation: Any,
        initial_state: Any,
        device: torch.device | None,
        torch_actions: bool,
        clip: bool,
    ) -> None:
        self.model = model
        self.observation_space, self.action_space = observation_space, action_space
        self.rows, self.torch_actions = rows, torch_actions
        if device is not None and isinstance(model, nn.Module):
            model.to(device)
        self.device = device or _device_of(model)
        self._moves_states = device is not None
        self.isolation = Isolation(model, self.device)
        self.read = Reader(observation_space, rows, "observation", clip)
        self.check_action = Checker(action_space, rows)
        self._takes_as_is = (
            torch_actions
            and self.device.type == "cpu"
            and isinstance(action_space, spaces.Box)
            and action_space.dtype == np.float32
        )
        self.initial_observation = snapshot(initial_observation)
        self.initial_state = snapshot(initial_state)

        self._step = self._find_step(functions["transition_fn"])
        self._reset = self._find_reset(functions["reset_fn"])
        roles = ("model", "state", "obs", "action")
        self._reward = _bound(functions["reward_fn"], roles, "reward_fn")
        self._terminal = _bound(functions["terminal_fn"], roles, "terminal_fn")
        self._transform = _bound(
            functions["action_transform_fn"], ("model", "action"), "action_transform_fn"
        )
        self._decode = self._find_decode()
        self._check_start()
        self._reset_form = ResetForm(self.read, _name(self._reset))
        self._step_form = StepForm(self.read, _name(self._step))
        #: Whether the model keeps its own state, and so serves one env's episode at a time.
        self.is_stateful = not self._step.takes("state")
        #: Whether the observation is the state; None before the first start.
        self._observes_state: bool | None = None
        self._np_random: Any = None

    # The callables -------------------------------------------------------

    def _find_step(self, function: Callable | None) -> Bound:
        if function is not None:
            return bind(
                function,
                ("model", "state", "action"),
                "transition_fn",
                aliases={"obs": "state"},
            )
        method, name = _method(self.model, STEP_METHODS)
        if method is None:
            raise TypeError(
                f"{type(self.model).__name__} has none of the methods {list(STEP_METHODS)}: pass "
                f"transition_fn(model, state, action). It returns {STEP_FORMS}."
            )
        return bind(
            method,
            ("state", "action"),
            f"{type(self.model).__name__}.{name}",
            aliases={"obs": "state"},
        )

    def _find_reset(self, function: Callable | None) -> Bound | None:
        if function is not None:
            return bind(function, ("model", "seed", "options"), "reset_fn")
        if self.initial_state is not None or self.initial_observation is not None:
            return None
        method, name = _method(self.model, RESET_METHODS)
        if method is None:
            return None
        return bind(method, ("seed", "options"), f"{type(self.model).__name__}.{name}")

    def _find_decode(self, always: bool = False) -> Bound | None:
        method, name = _method(self.model, DECODE_METHODS)
        if method is None:
            return None
        needed = self.initial_observation is None and self._reset is None
        if not (always or needed):
            return None
        return bind(method, ("state",), f"{type(self.model).__name__}.{name}")

    def _check_start(self) -> None:
        nothing = self.initial_state is None and self.initial_observation is None
        if self._reset is None and nothing:
            raise TypeError(
                f"Nothing says where episodes begin: pass reset_fn(model, seed, options), "
                f"initial_observation or initial_state; or give {type(self.model).__name__} one "
                f"of the methods {list(RESET_METHODS)}."
            )
        if self._reset is None and not self._step.takes("state"):
            raise TypeError(
                f"{_name(self._step)} takes no state, so that the model keeps its own, and nothing "
                f"resets it: pass reset_fn(model, seed, options), or let the step take the state."
            )
        if self.initial_observation is not None:
            reader = Reader(self.observation_space, None, "initial_observation")
            reader(self.initial_observation)

    # Resetting -----------------------------------------------------------

    def reset(self, start: Start) -> Moment:
        """Begin episodes; see :class:`~torchrl_wm.export.sources.Source`."""
        self.isolation.refresh()
        self._np_random = start.np_random
        mask = start.mask
        if self.is_stateful:
            if mask is not None and not mask.all():
                raise RuntimeError(
                    f"{_name(self._step)} takes no state, so that the model keeps the state of all "
                    f"{self.rows} envs, and single envs cannot be reset. Let the step take the "
                    f"state and return the next one."
                )
            USERS.claim(self.model, self)
        outcome = self._start(start)
        fresh = self._first_state(outcome, known=self._is_given(start))
        if mask is not None:
            fresh = merge_rows(mask, fresh, start.state)
        info = None if outcome.info is MISSING else outcome.info
        observation = self.read(outcome.observation)
        return first_moment(self.rows, fresh, observation, self._info(info))

    def _start(self, start: Start) -> Outcome:
        """Return the start that ``options``, a reset function or the initial values give."""
        options = start.options
        given = {
            "model": self.model,
            "seed": start.seed,
            "options": options or None,
            "np_random": start.np_random,
        }
        if self.rows is not None:
            given["options"] = {**options, "num_envs": self.rows}
        takes_options = self._reset is not None and self._reset.takes("options")
        unknown = sorted(set(options) - {"state", "observation"})
        if unknown and not takes_options:
            raise ValueError(
                f"reset got the options {unknown}, which nothing reads. Known are 'state' and "
                f"'observation', from which to start; a reset_fn(model, seed, options) may read "
                f"others."
            )
        wanted = {k: options[k] for k in ("state", "observation") if k in options}
        if self._reset is not None and (takes_options or not wanted):
            with self.isolation:
                return self._reset_form(self._reset(given))
        if wanted and self.is_stateful:
            raise ValueError(
                f"reset got the options {sorted(wanted)}, but {_name(self._step)} takes no state: "
                f"the model keeps its own. Let reset_fn take the options."
            )
        if wanted:
            return self._start_given(wanted, given)
        state = self._placed(snapshot(self.initial_state), self.rows)
        observation = self._placed(snapshot(self.initial_observation), self.rows)
        if observation is None and self._decode is not None:
            observation = self._decoded(self._decode, state)
        elif observation is None:
            warnings.warn(
                "The first observation is a sample of the observation space and has nothing to "
                "do with initial_state: there is no initial_observation, and the model has no "
                "decode(state). Pass initial_observation or reset_fn.",
                stacklevel=5,
            )
            space = self.observation_space
            if self.rows is not None:
                space = batched(space, self.rows)
            observation = sample_start(space, start.seed)
        return Outcome(observation, state=MISSING if state is None else state)

    def _start_given(self, wanted: dict[str, Any], given: dict[str, Any]) -> Outcome:
        """Return the start that the options give; one part may determine the other."""
        if self._observes_state is None and self._reset is not None:
            with self.isolation:  # the model's own start shows whether both are the same
                self._first_state(self._reset_form(self._reset(given)))
        elif self._reset is None:
            self._observes_state = self.initial_state is None
        state = self._placed(snapshot(wanted.get("state")), None)
        observation = self._placed(snapshot(wanted.get("observation")), None)
        if self._observes_state:
            if state is None or observation is None:
                return Outcome(state if observation is None else observation)
            return Outcome(observation, state=state)
        if state is None:
            raise ValueError(
                f"reset got options['observation'], but the state of {type(self.model).__name__} "
                f"is not its observation and does not follow from it. Pass the state, too: "
                f"reset(options={{'observation': observation, 'state': state}}); or let reset_fn "
                f"take the options."
            )
        if observation is None:
            decode = self._find_decode(always=True)
            if decode is None:
                raise ValueError(
                    f"reset got options['state'], but {type(self.model).__name__} has no "
                    f"decode(state) that returns the first observation. Pass that, too: "
                    f"reset(options={{'state': state, 'observation': observation}})."
                )
            observation = self._decoded(decode, state)
        return Outcome(observation, state=state)

    def _decoded(self, decode: Bound, state: Any) -> Any:
        with self.isolation:
            given = {"state": snapshot(state), "np_random": self._np_random}
            return detached(decode(given))

    def _placed(self, tree: Any, rows: int | None) -> Any:
        if tree is None:
            return None
        if rows is not None:
            tree = expand_rows(tree, rows)
        return to_device(tree, self.device) if self._moves_states else tree

    def _is_given(self, start: Start) -> bool:
        """Return whether the options, and not the reset function, give the start."""
        takes_options = self._reset is not None and self._reset.takes("options")
        return not takes_options and bool({"state", "observation"} & set(start.options))

    def _first_state(self, outcome: Outcome, known: bool = False) -> Any:
        """Return the first state of an episode; None if the model keeps its own.

        Args:
            outcome: the start.
            known: whether it is already known if the observation is the state.
        """
        if self.is_stateful:
            return None
        state = outcome.state
        is_missing = state is MISSING or state is None
        if not known:
            self._observes_state = is_missing and self.initial_state is None
        if not is_missing:
            return snapshot(state)
        if self.initial_state is not None:
            return self._placed(snapshot(self.initial_state), self.rows)
        # The observation is the state, as in models without latents.
        return snapshot(outcome.observation)

    # Stepping ------------------------------------------------------------

    def step(self, state: Any, action: Any) -> Moment:
        """Predict one step; see :class:`~torchrl_wm.export.sources.Source`."""
        if self.is_stateful and not USERS.holds(self.model, self):
            raise RuntimeError(
                f"{_name(self._step)} takes no state, so that the model keeps its own, and another "
                f"env has used the model since this env's reset. Give each env a model of its own: "
                f"copy.deepcopy(model)."
            )
        rows = self.rows
        with self.isolation:
            action = self._for_model(state, action)
            given = {
                "model": self.model,
                "state": state,
                "action": action,
                "np_random": self._np_random,
            }
            outcome = self._step_form(self._step(given))
            following = self._next_state(state, outcome)
            reward, terminated = outcome.reward, outcome.terminated
            done = outcome.done
            if reward is MISSING or reward is None:
                reward = self._called(self._reward, following, outcome, action)
            if terminated is None or (terminated is MISSING and done is MISSING):
                terminated = self._called(self._terminal, following, outcome, action)
        observation = self.read(outcome.observation)
        if done is not MISSING and done is not None:
            terminated, outcome.truncated = self._ends(outcome)
        truncated, info = outcome.truncated, outcome.info
        return Moment(
            following,
            observation,
            self._filled(0.0)
            if reward is None
            else read_reward(reward, rows, "reward"),
            self._filled(False)
            if terminated is None
            else read_flag(terminated, rows, "terminated"),
            self._filled(False)
            if truncated is MISSING or truncated is None
            else read_flag(truncated, rows, "truncated"),
            {} if info is MISSING else self._info(info),
        )

    def _info(self, info: Any) -> dict[str, Any]:
        info = numpy_info(info)
        return info if self.rows is None or not info else in_rows(info, self.rows)

    def _ends(self, outcome: Outcome) -> tuple[Any, Any]:
        """Return termination and truncation; ``done`` determines the one that is not given."""
        rows, given = self.rows, {"done": outcome.done}
        for name in ("terminated", "truncated"):
            value = getattr(outcome, name)
            if value is not MISSING and value is not None:
                given[name] = value
        flags = {k: np.asarray(read_flag(v, rows, k)) for k, v in given.items()}
        done = flags["done"]
        terminated = flags.get("terminated")
        if terminated is None:
            terminated = done & ~flags["truncated"]
        truncated = flags.get("truncated", done & ~terminated)
        if (done != (terminated | truncated)).any():
            raise ValueError(
                f"{_name(self._step)} returned done={outcome.done}, terminated={terminated} and "
                f"truncated={truncated}: done must be terminated | truncated. Leave it out."
            )
        return terminated, truncated

    def _filled(self, value: Any) -> Any:
        return value if self.rows is None else np.full(self.rows, value)

    def _called(
        self, function: Bound | None, state: Any, outcome: Outcome, action: Any
    ) -> Any:
        if function is None:
            return None
        return function(
            {
                "model": self.model,
                "state": state,
                "obs": outcome.observation,
                "action": action,
                "np_random": self._np_random,
            }
        )

    def _for_model(self, state: Any, action: Any) -> Any:
        if self._takes_as_is and action.ndim:
            action = torch.from_numpy(action)  # the checked action is a copy already
        elif self.torch_actions:
            action = as_tensors(action, self.device)
        if self._transform is None:
            return action
        given = {"model": self.model, "action": action, "np_random": self._np_random}
        action = self._transform(given)
        # The output of a transform stays as it is, unless the model needs tensors.
        in_torch = isinstance(self.model, nn.Module) or holds_tensors(state)
        return (
            as_tensors(action, self.device)
            if self.torch_actions and in_torch
            else action
        )

    def _next_state(self, state: Any, outcome: Outcome) -> Any:
        if self.is_stateful:
            return None
        following = outcome.state
        if following is MISSING or following is None:
            following = outcome.observation
            if not self._observes_state:
                raise TypeError(
                    f"{_name(self._step)} takes the state and returned none, and the first state of "
                    f"an episode is not its observation: the state would stand still. Return "
                    f"(state, observation, reward) or another form with the state: {STEP_FORMS}."
                )
        # A copy: models may return buffers that they write to again.
        return snapshot(following)

    def state_of(self, state: Any) -> Any:
        """Return the state as new numpy arrays."""
        return to_numpy(state)

    def shown(self, state: Any, index: int | None = None) -> Any:
        """Return a copy of the state, of one env or of all."""
        if self.rows is not None and index is not None:
            state = map_leaves(lambda leaf: leaf[index], state)
        return snapshot(state)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": USERS.holds(self.model, self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        held = state.pop("_held")
        self.__dict__.update(state)
        if held:  # the copy's own model is in the same episode
            USERS.claim(self.model, self)


def _bound(function: Callable | None, roles: tuple, name: str) -> Bound | None:
    return None if function is None else bind(function, roles, name)


def _name(bound: Bound | None) -> str:
    if bound is None:
        return "reset"
    function = bound.function
    return getattr(function, "__qualname__", type(function).__name__)


def _method(model: Any, names: tuple[str, ...]) -> tuple[Callable | None, str]:
    for name in names:
        if name == "__call__":
            found = model if callable(model) and not isinstance(model, type) else None
        else:
            found = getattr(model, name, None)
        if callable(found):
            return found, "forward" if found is model else name
    return None, ""


def _device_of(model: Any) -> torch.device:
    held = (
        [model]
        if isinstance(model, nn.Module)
        else list(getattr(model, "__dict__", {}).values())
    )
    for module in held:
        if isinstance(module, nn.Module):
            parameter = next(module.parameters(), None)
            if parameter is not None:
                return parameter.device
    return torch.device("cpu")
