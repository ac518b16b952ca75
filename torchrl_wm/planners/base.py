"""Model-predictive control: plan from the present state, act once, plan again."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from math import inf
from typing import Any, Literal, NamedTuple

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key
from tensordict.nn import InteractionType, set_interaction_type, TensorDictModuleBase
from torchrl.data import Composite, Unbounded
from torchrl.envs import EnvBase, TensorDictPrimer
from torchrl.envs.utils import exploration_type, ExplorationType
from torchrl.modules import MPCPlannerBase

from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.envs.collecting import leave_out_collectors
from torchrl_wm.envs.compiler import Compiler
from torchrl_wm.modules.keys import join, unique
from torchrl_wm.modules.modes import evaluation_mode
from torchrl_wm.modules.world_model.filtering import IS_INIT
from torchrl_wm.planners.actions import action_space, ChoiceSpace, Proposal
from torchrl_wm.planners.checks import (
    check_env,
    check_modules,
    check_plan_key,
    positive,
)
from torchrl_wm.planners.objective import EnvObjective, ModelObjective

Carried = dict[NestedKey, torch.Tensor]


class Population(NamedTuple):
    """The candidates of one iteration.

    Args:
        samples: ``[B, N, H, ...]``.
        returns: what is predicted for them, ``[B, N]``; -inf if that is not finite.
    """

    samples: torch.Tensor
    returns: torch.Tensor

    def best(self, number: int) -> Population:
        """The best ones, best first."""
        returns, index = self.returns.topk(number, dim=1)
        rows = torch.arange(index.shape[0], device=index.device).unsqueeze(1)
        return Population(self.samples[rows, index], returns)


class Search(NamedTuple):
    """How far a search has come.

    Args:
        proposal: where the next candidates come from.
        best: the best candidate so far, ``[B, 1, H, ...]``, with its return.
        kept: candidates that stay, ``[B, K, H, ...]``; None if none do.
    """

    proposal: Proposal
    best: Population
    kept: torch.Tensor | None


class MPCPlanner(MPCPlannerBase):
    """What all planners share; :class:`~torchrl_wm.planners.CEMPlanner` shows how to use one.

    A planner is a policy. It reads the state that the env steps from (latents,
    or the observations that they are encoded from), ``[*B]``, imagines
    ``num_candidates`` plans for each of the ``B`` states at once, and writes the
    first action of the plan it ends with. Rewards count up to and including the
    step at which an episode is predicted to end. Candidates whose return is not
    finite lose. No graph is built, and the host does not wait for the device. Model, policy
    and terminal value are in eval mode meanwhile: a plan knows no dropout.

    A subclass says how a population of candidates becomes the next one
    (:meth:`improve`).

    Args:
        env: what predicts: a :class:`~torchrl_wm.WorldModelEnv`, or any env that
            takes tensordicts of every batch size.
        planning_horizon: the number of steps ``H`` of a plan.
        optim_steps: how often the candidates are improved.
        num_candidates: the number of candidates ``N`` for each state.
        top_k: how many of the best ones are learnt from.
        reward_key: the reward, below "next". Rewards of several agents add up.
        action_key: the action to plan, and to write.

    Keyword Args:
        discount: the factor on rewards per step.
        action_range: the bounds ``(low, high)`` to search in, numbers or ``[*A]``.
            By default those of the action spec.
        warm_start: begin each search with the plan of the step before, moved by
            one step. It travels in the tensordict under ``plan_key`` and begins
            anew where ``is_init`` (:class:`~torchrl.envs.InitTracker`) says so. By
            default in envs that know the entry, by :meth:`make_tensordict_primer`;
            with True, the planner itself adds it everywhere.
        plan_key: where the plan travels.
        terminal_value: a module that writes the value of the states at the
            horizon (``"state_value"``, or its only output). A truncated episode is
            worth its last state, a terminated one nothing.
        policy: proposes candidates, rolled out through the model, as in TD-MPC2
            (arXiv 2310.16828).
        num_policy_candidates: how many of the ``num_candidates``.
        num_particles: how often each candidate is imagined where the model is
            random; its return is the mean.
        init_std: the standard deviation to begin with, as a share of half the
            range of an action.
        min_std: the least standard deviation, in the same unit; 0 by default. For
            actions that are a choice, the share of candidates that choose at
            random; 0.05 by default, as a probability of 0 never comes back.
        momentum: how much of the last proposal stays in the next one, 0 to 1.
        act_on: the ``"mean"`` of the last proposal or the ``"best"`` candidate seen.
            A mean is surer where the model is random. By default the best for
            iCEM and for actions that are a choice, which have no mean, else the
            mean.

    Raises:
        ValueError: if the env is batch-locked, if a number does not make sense,
            or if the actions have no bounds.
    """

    default_act_on = "mean"

    def __init__(
        self,
        env: EnvBase,
        planning_horizon: int,
        optim_steps: int,
        num_candidates: int,
        top_k: int,
        reward_key: NestedKey = ("next", "reward"),
        action_key: NestedKey = "action",
        *,
        discount: float = 1.0,
        action_range: tuple | None = None,
        warm_start: bool | None = None,
        plan_key: str = "plan",
        terminal_value: TensorDictModuleBase | None = None,
        policy: Callable | None = None,
        num_policy_candidates: int | None = None,
        num_particles: int = 1,
        init_std: float = 1.0,
        min_std: float | None = None,
        momentum: float = 0.0,
        act_on: Literal["mean", "best"] | None = None,
    ) -> None:
        check_env(env, action_key, reward_key)
        check_plan_key(env, plan_key, action_key)
        counts = {
            "planning_horizon": planning_horizon,
            "optim_steps": optim_steps,
            "num_candidates": num_candidates,
            "top_k": top_k,
            "num_particles": num_particles,
        }
        for name, value in counts.items():
            counts[name] = positive(name, value)
        action_key, reward_key = unravel_key(action_key), unravel_key(reward_key)
        check_modules(policy, terminal_value, action_key)
        num_candidates, top_k = counts["num_candidates"], counts["top_k"]
        if policy is None:
            if num_policy_candidates:
                raise ValueError(
                    f"num_policy_candidates={num_policy_candidates} need a policy that proposes "
                    f"them: pass policy=..."
                )
            num_policy_candidates = 0
        elif num_policy_candidates is None:
            # TD-MPC2 takes 24 of 512.
            num_policy_candidates = max(1, num_candidates // 20)
        if top_k > num_candidates:
            raise ValueError(
                f"top_k={top_k} of num_candidates={num_candidates}: there are not so many. "
                f"Choose a top_k of about a tenth of the candidates."
            )
        if not 0 <= num_policy_candidates < num_candidates:
            raise ValueError(
                f"num_policy_candidates={num_policy_candidates} must be less than "
                f"num_candidates={num_candidates}, of which they are a part."
            )
        for name, value in {"discount": discount, "momentum": momentum}.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {value}.")
        if momentum == 1:
            raise ValueError("With momentum=1 the proposal would never move.")
        if not 0 < init_std < inf or not 0 <= (min_std or 0) <= init_std:
            raise ValueError(
                f"0 <= min_std <= init_std and 0 < init_std < inf are needed, got "
                f"min_std={min_std} and init_std={init_std}."
            )
        if warm_start not in (None, True, False):
            raise ValueError(
                f"warm_start must be True, False, or None, where the env decides; got "
                f"{warm_start!r}."
            )
        if act_on not in (None, "mean", "best"):
            raise ValueError(f"act_on must be 'mean' or 'best', got {act_on!r}.")
        super().__init__(env, action_key)
        # TorchRL registers the env twice, which doubles its state dict.
        del self.env
        self.__dict__["env"] = env
        self.action_spec = env.full_action_spec_unbatched[action_key]
        self.action_key = action_key
        self.reward_key = reward_key
        self.planning_horizon = counts["planning_horizon"]
        self.optim_steps = counts["optim_steps"]
        self.num_candidates = counts["num_candidates"]
        self.top_k = counts["top_k"]
        self.discount = float(discount)
        self.warm_start = warm_start
        self.plan_key = plan_key
        self.terminal_value = terminal_value
        self.policy = policy
        self.num_policy_candidates = num_policy_candidates
        self.num_particles = counts["num_particles"]
        self.init_std = float(init_std)
        self.momentum = float(momentum)
        self.space = action_space(
            self.action_spec, action_key, action_range, env.device
        )
        is_choice = isinstance(self.space, ChoiceSpace)
        self.min_std = (0.05 if is_choice else 0.0) if min_std is None else min_std
        self.act_on = act_on or ("best" if is_choice else self.default_act_on)
        kind = ModelObjective if isinstance(env, WorldModelEnv) else EnvObjective
        self.objective = kind(
            env, action_key, reward_key, discount, terminal_value, policy
        )
        if warm_start:
            carried = list(self._carried_specs())
            self.in_keys = unique([*self.in_keys, *carried, IS_INIT])
            self.out_keys = [action_key, *(join("next", key) for key in carried)]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "env" and "env" in self.__dict__:
            if value is self.env:
                return
            raise AttributeError(
                "A planner belongs to its env, whose actions and model it was made for: make a new "
                "one. A model's components may be replaced: env.world_model.reward_head = ..."
            )
        super().__setattr__(name, value)

    # How a planner searches -----------------------------------------------

    @abstractmethod
    def improve(
        self, search: Search, population: Population
    ) -> tuple[Proposal, torch.Tensor | None]:
        """The next proposal, and the candidates to keep, from an evaluated population."""

    def choose(self, search: Search) -> torch.Tensor:
        """The plan to act on when the search is over, as samples ``[B, H, ...]``."""
        if self.act_on == "best":
            return search.best.samples[:, 0]
        return self.space.mode(search.proposal.plan)

    def explore(self, search: Search, population: Population) -> torch.Tensor:
        """The first step to take under ``ExplorationType.RANDOM``, ``[B, ...]``.

        By default the one that is chosen: planners that search by samples of a random model
        explore by what the model does not know.

        Args:
            search: the search when it is over.
            population: the candidates of its last iteration.
        """
        return self.choose(search)[:, 0]

    def population_size(self, iteration: int) -> int:
        """The number of candidates of an iteration."""
        return self.num_candidates

    def draw(self, search: Search, noise: torch.Tensor) -> torch.Tensor:
        """New candidates ``[B, N, H, ...]``, one for each row of ``noise``."""
        return self.space.sample(search.proposal, noise, self.min_std)

    def carried_shapes(self) -> dict[NestedKey, tuple[int, ...]]:
        """What goes on from one step to the next beside the plan, without batch dims."""
        return {}

    def carry(self, search: Search) -> Carried:
        """What the next search begins with, moved by one step."""
        return {self.plan_key: moved(search.proposal.plan, 1)}

    def begin(self, carried: Carried) -> Search:
        """The search before the first iteration."""
        plan = carried[self.plan_key]
        # Before all that was tried and found infinite.
        lowest = torch.finfo(torch.float32).min
        nothing = torch.full((plan.shape[0], 1), lowest, device=plan.device)
        best = Population(self.space.mode(plan).unsqueeze(1), nothing)
        return Search(self.space.proposal(plan, self.init_std), best, None)

    def score(self, state: Any, samples: torch.Tensor) -> torch.Tensor:
        """The predicted returns ``[B, N]`` of samples ``[B, N, H, ...]``."""
        rows, number = samples.shape[:2]
        particles = self.num_particles
        actions = self.space.action(samples).flatten(0, 1)
        if particles > 1:
            actions = actions.repeat_interleave(particles, 0)
        starts = self.objective.repeat(state, number * particles)
        returns = self.objective.returns(starts, actions)
        returns = returns.reshape(rows, number, particles).mean(-1)
        return torch.where(returns.isfinite(), returns, -torch.inf)

    def refit(
        self, search: Search, elites: Population, weights: torch.Tensor
    ) -> Proposal:
        """The proposal that fits the elites, ``[B, K]``, by their weights."""
        # Returns, and what follows from them, may be of another dtype than the plan.
        weights = weights.to(search.proposal.plan.dtype)
        # What was not finite loses, however few are left.
        weights = torch.where(elites.returns > -torch.inf, weights, 0.0)
        any_left = weights.sum(1) > 0
        weights = torch.where(any_left.unsqueeze(1), weights, 1.0)
        new, old = (
            self.space.fit(elites.samples, weights, self.min_std),
            search.proposal,
        )
        keep = torch.where(any_left, self.momentum, 1.0).to(old.plan.dtype)
        keep = keep.reshape(-1, *(1,) * (old.plan.ndim - 1))
        return Proposal(*(torch.lerp(n, o, keep) for n, o in zip(new, old)))

    def _iterate(
        self,
        state: Any,
        search: Search,
        proposed: torch.Tensor | None,
        noise: torch.Tensor,
    ) -> tuple[Search, Population]:
        # The plan itself is a candidate: a search never forgets what it had.
        plan = self.space.mode(search.proposal.plan).unsqueeze(1)
        parts = [plan, proposed, self.draw(search, noise), search.kept]
        samples = torch.cat([part for part in parts if part is not None], 1)
        returns = self.score(state, samples)
        if proposed is not None:
            returns = _without_copies(returns, proposed)
        population = Population(samples, returns)
        best = Population(*(torch.cat(p, 1) for p in zip(search.best, population)))
        proposal, kept = self.improve(search, population)
        return Search(proposal, best.best(1), kept), population

    def _solve(
        self,
        tensordict: TensorDictBase,
        watch: Callable[[Population], None] | None = None,
    ) -> tuple[Search, Population, Any]:
        with evaluation_mode(self, self.env):
            return self._search(tensordict, watch)

    def _search(
        self,
        tensordict: TensorDictBase,
        watch: Callable[[Population], None] | None,
    ) -> tuple[Search, Population, Any]:
        self._update()
        state = self.objective.start(tensordict)
        search = self.begin(self.carried(tensordict))
        proposed, rows = None, search.best.returns.shape[0]
        if self.policy is not None:
            starts = self.objective.repeat(state, self.num_policy_candidates)
            propose = self._function(self.objective.proposed, "proposed", rows)
            # One plan, again and again, is what a policy would propose as its mode.
            with set_interaction_type(InteractionType.RANDOM):
                actions = propose(starts, self.planning_horizon)
            shape = (rows, self.num_policy_candidates, *actions.shape[1:])
            proposed = self.space.from_action(actions.reshape(shape))
        for i in range(self.optim_steps):
            # Drawn here, so that a compiled plan has the random numbers of an eager one.
            fresh = max(1, self.population_size(i) - self.num_policy_candidates - 1)
            noise = self.space.noise(rows, fresh, self.planning_horizon)
            # A graph for each shape: dynamo gives up on functions of many.
            shapes = (noise.shape, search.kept is None)
            iterate = self._function(self._iterate, "iterate", shapes)
            search, population = iterate(state, search, proposed, noise)
            if watch is not None:
                watch(population)
        return search, population, state

    # How it is used --------------------------------------------------------

    @torch.no_grad()
    def forward(
        self,
        tensordict: TensorDictBase,
        tensordict_out: TensorDictBase | None = None,
        **kwargs: Any,
    ) -> TensorDictBase:
        """Plan, and write the first action.

        Under ``ExplorationType.RANDOM`` (a collector's default) it explores, if the planner
        does; else it is the first action of the chosen plan.

        Args:
            tensordict: the state, ``[*B]``, with the plan of the step before if
                there is one.
            tensordict_out: where to write; ``tensordict`` by default.

        Returns:
            The tensordict with the action ``[*B, *A]`` and, where the plan travels
            on, the plan for the next step under ``("next", plan_key)`` and
            ``plan_key``.
        """
        if kwargs:
            raise TypeError(f"A planner takes a tensordict, and got {sorted(kwargs)}.")
        search, population, _ = self._solve(tensordict)
        size = tensordict.batch_size
        out = tensordict if tensordict_out is None else tensordict_out
        out.set(self.action_key, self._first_action(search, population, size))
        if self._is_warm(tensordict):
            for key, value in self.carry(search).items():
                value = value.reshape(*size, *value.shape[1:])
                out.set(join("next", key), value)
                # Rollouts in an env that does not know the entry take it from here.
                out.set(key, value.clone())
        return out

    @torch.no_grad()
    def planning(self, td: TensorDictBase) -> torch.Tensor:
        """The first action ``[*B, *A]`` of a plan from the states in ``td``, ``[*B]``."""
        search, population, _ = self._solve(td)
        return self._first_action(search, population, td.batch_size)

    @torch.no_grad()
    def plan(self, tensordict: TensorDictBase) -> TensorDict:
        """Plan, and return all there is to know of it; the tensordict is not modified.

        Args:
            tensordict: the state, ``[*B]``.

        Returns:
            A tensordict ``[*B]`` with

            - ``"actions"``: the plan, ``[*B, H, *A]``;
            - ``"predicted_return"``: what the model predicts for it, ``[*B, 1]``;
            - ``"candidates"`` and ``"returns"``: those of the last iteration, kept
              ones included, ``[*B, N, H, *A]`` and ``[*B, N]``;
            - ``("iterations", name)`` for the names ``"max_return"``,
              ``"mean_return"`` and ``"elite_return"``: how the search went,
              ``[*B, optim_steps]``. Candidates that lost because their return
              is not finite do not count.
        """
        seen: list[Population] = []
        search, _, state = self._solve(tensordict, seen.append)
        chosen = self.choose(search)
        tops = [population.returns.topk(self.top_k, 1).values for population in seen]
        iterations = {
            "max_return": [top[:, 0] for top in tops],
            "mean_return": [_mean(population.returns) for population in seen],
            "elite_return": [_mean(top) for top in tops],
        }
        with evaluation_mode(self, self.env):
            predicted = self.score(state, chosen.unsqueeze(1))
        rows = {
            "actions": self.space.action(chosen),
            "predicted_return": predicted,
            "candidates": self.space.action(seen[-1].samples),
            "returns": seen[-1].returns,
            "iterations": {name: torch.stack(x, 1) for name, x in iterations.items()},
        }
        out = TensorDict(rows, batch_size=[chosen.shape[0]])
        return out.reshape(tensordict.batch_size)

    def make_tensordict_primer(self, **kwargs: Any) -> TensorDictPrimer:
        """A transform that gives an env the entries in which the plan travels.

        They are zero at a reset, which is a search from nothing. Needed where an
        env must know all entries beforehand: in collectors and batched envs.

        Args:
            kwargs: for :class:`~torchrl.envs.TensorDictPrimer`, such as
                ``reset_key``.
        """
        if self.warm_start is False:
            raise RuntimeError(
                "The planner carries no plan from step to step: pass warm_start=True, or leave "
                "the primer out."
            )
        spec = Composite(shape=())
        for key, (shape, dtype) in self._carried_specs().items():
            spec[key] = Unbounded(shape, dtype=dtype, device=self.env.device)
        return TensorDictPrimer(spec, default_value=0.0, expand_specs=True, **kwargs)

    def compile(self, **kwargs: Any) -> MPCPlanner:
        """Compile the search: each iteration, all its imagination included, is one graph.

        A graph is made for each shape of the state and each population size, at
        the first call (some ten seconds to a minute or more), and kept. Replacing a
        component makes new ones.

        Args:
            kwargs: for :func:`torch.compile`; ``fullgraph`` is True and ``dynamic``
                False unless given.

        Returns:
            The planner itself. Where there is no compiler, a warning says so at
            the first call, and planning stays eager. :meth:`eager` undoes it.
        """
        if not isinstance(self.env, WorldModelEnv):
            raise TypeError(
                f"Only the step of a WorldModelEnv compiles as a whole, and this planner plans in "
                f"a {type(self.env).__name__}."
            )
        self.__dict__["_compiler"] = Compiler(kwargs, "A plan", "planner.eager()")
        return self

    def eager(self) -> MPCPlanner:
        """Undo :meth:`compile`."""
        self.__dict__["_compiler"] = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        leave_out_collectors(self.env)
        return {**self.__dict__, "_compiler": None, "_held": ()}

    # Details ---------------------------------------------------------------

    def _update(self) -> None:
        """Tell the objective what the planner is now."""
        self.objective.update(
            policy=self.policy,
            terminal_value=self.terminal_value,
            discount=self.discount,
            reward_key=self.reward_key,
            ignored=self.carried_keys,
        )
        self.__dict__["_held"] = self.objective.prepare()

    def _function(self, function: Callable, name: str, shapes: Any) -> Callable:
        """A function, compiled if that was asked for."""
        compiler = self.__dict__.get("_compiler")
        if compiler is None:
            return function
        if name == "proposed" and self.objective.program is None:
            return function  # the policy may be anything
        key = (name, shapes, self.discount, self.reward_key)
        return compiler.wrap(function, self._held, (), key)

    def _first_action(
        self, search: Search, population: Population, size: torch.Size
    ) -> torch.Tensor:
        if exploration_type() is ExplorationType.RANDOM:
            sample = self.explore(search, population)
        else:
            sample = self.choose(search)[:, 0]
        action = self.space.action(sample)
        return action.reshape((*size, *action.shape[1:]))

    def _carried_specs(self) -> dict[NestedKey, tuple[torch.Size, torch.dtype]]:
        plan = (self.planning_horizon, *self.space.plan_shape)
        dtype = self.space.dtype
        specs = {self.plan_key: (torch.Size(plan), dtype)}
        for key, shape in self.carried_shapes().items():
            specs[key] = (torch.Size(shape), self.space.sample_dtype)
        return specs

    @property
    def carried_keys(self) -> list[NestedKey]:
        """The entries in which the plan travels; none with ``warm_start=False``."""
        return [] if self.warm_start is False else list(self._carried_specs())

    def _is_warm(self, tensordict: TensorDictBase) -> bool:
        if self.warm_start is None:
            return tensordict.get(self.plan_key, None) is not None
        return self.warm_start

    def carried(self, tensordict: TensorDictBase) -> Carried:
        """What was carried from the step before, by rows; zeros where an episode begins."""
        size, device = tensordict.batch_size, self.env.device
        warm = self._is_warm(tensordict)
        begins = tensordict.get(IS_INIT, None) if warm else None
        if begins is not None:
            begins = begins.reshape(size.numel(), -1).all(-1).to(device)
        out: Carried = {}
        for key, (shape, dtype) in self._carried_specs().items():
            value = tensordict.get(key, None) if warm else None
            if value is None:
                out[key] = torch.zeros(size.numel(), *shape, dtype=dtype, device=device)
                continue
            if tuple(value.shape) != (*size, *shape):
                raise ValueError(
                    f"{key!r} has the shape {tuple(value.shape)}, and this planner carries "
                    f"{(*size, *shape)} there. Is it another planner's? Give each its own: "
                    f"plan_key=..."
                )
            value = value.reshape(-1, *shape).to(device)
            if begins is not None:
                rows = begins.reshape(-1, *(1,) * len(shape))
                value = torch.where(rows, torch.zeros_like(value), value)
            out[key] = value
        return out


def moved(steps: torch.Tensor, dim: int) -> torch.Tensor:
    """A plan one step later: the first step is gone, and nothing is known of the last."""
    later = steps.narrow(dim, 1, steps.shape[dim] - 1)
    return torch.cat([later, torch.zeros_like(steps.narrow(dim, 0, 1))], dim)


def _without_copies(returns: torch.Tensor, proposed: torch.Tensor) -> torch.Tensor:
    """Returns in which proposals that equal the first one lose.

    A policy that is not random proposes one plan: as the whole elite it would
    leave nothing to search.

    Args:
        returns: ``[B, N]``, of the plan, the proposals and others.
        proposed: ``[B, P, H, ...]``.
    """
    copies = (proposed[:, 1:] == proposed[:, :1]).flatten(2).all(-1)
    others = returns[:, 2 : 1 + proposed.shape[1]]
    others = torch.where(copies, -torch.inf, others)
    rest = returns[:, 1 + proposed.shape[1] :]
    return torch.cat([returns[:, :2], others, rest], 1)


def _mean(returns: torch.Tensor) -> torch.Tensor:
    """The mean of the finite ones, ``[B]``."""
    finite = returns > -torch.inf
    total = torch.where(finite, returns, 0.0).sum(1)
    return total / finite.sum(1).clamp_min(1)
