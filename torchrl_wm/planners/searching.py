"""How a planner searches: candidates are judged, and improved from iteration to iteration."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from tensordict import TensorDictBase
from tensordict.nn import InteractionType, set_interaction_type
from torchrl.envs import EnvBase

from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.modules.modes import evaluation_mode
from torchrl_wm.modules.world_model.compiling import Compiler
from torchrl_wm.planners.actions import Proposal
from torchrl_wm.planners.carried import Carried, CarryingPlanner
from torchrl_wm.planners.objective import Objective
from torchrl_wm.planners.search import Population, Search, without_copies


class SearchingPlanner(CarryingPlanner):
    """The part of a planner that searches.

    Attributes:
        env: the env to plan in.
        objective: imagines and scores plans in it.
        optim_steps, num_candidates, num_policy_candidates, num_particles, init_std, min_std,
            momentum, act_on, policy: see :class:`~torchrl_wm.planners.MPCPlanner`.
    """

    #: The default of ``act_on`` for actions that have a mean.
    default_act_on = "mean"

    env: EnvBase
    objective: Objective
    policy: Callable | None
    optim_steps: int
    num_candidates: int
    num_policy_candidates: int
    num_particles: int
    init_std: float
    min_std: float
    momentum: float
    act_on: Literal["mean", "best"]

    @abstractmethod
    def improve(
        self, search: Search, population: Population
    ) -> tuple[Proposal, torch.Tensor | None]:
        """Return the next proposal, and the candidates to keep, from a rated population.

        Args:
            search: the search so far.
            population: its latest candidates, with their returns.
        """

    def choose(self, search: Search) -> torch.Tensor:
        """Return the plan to act on at the end of a search, as samples ``[B, H, ...]``."""
        if self.act_on == "best":
            return search.best.samples[:, 0]
        return self.space.mode(search.proposal.plan)

    def explore(self, search: Search, population: Population) -> torch.Tensor:
        """Return the plan to act on under ``ExplorationType.RANDOM``, ``[B, execute, ...]`` or longer.

        By default it is the chosen plan: planners that search by samples of a random model
        explore where the model is uncertain.

        Args:
            search: the search when it is over.
            population: the candidates of its last iteration.
        """
        return self.choose(search)

    def population_size(self, iteration: int) -> int:
        """Return the number of candidates of an iteration."""
        return self.num_candidates

    def draw(self, search: Search, noise: torch.Tensor) -> torch.Tensor:
        """Draw new candidates ``[B, N, H, ...]``, one for each row of ``noise``."""
        return self.space.sample(search.proposal, noise, self.min_std)

    def begin(self, carried: Carried) -> Search:
        """Return the search before the first iteration."""
        plan = carried[self.plan_key]
        # Above -inf: a candidate whose return is not finite never replaces the plan.
        lowest = torch.finfo(torch.float32).min
        nothing = torch.full((plan.shape[0], 1), lowest, device=plan.device)
        best = Population(self.space.mode(plan).unsqueeze(1), nothing)
        return Search(self.space.proposal(plan, self.init_std), best, None)

    def rate(self, state: Any, samples: torch.Tensor) -> torch.Tensor:
        """Return the predicted returns ``[B, N]`` of samples, -inf if they are not finite.

        Args:
            state: the states to plan from, ``[B]``.
            samples: the candidates, ``[B, N, H, ...]``.
        """
        rows, number = samples.shape[:2]
        particles = self.num_particles
        actions = self.space.action(samples)
        if particles > 1:
            actions = actions.repeat_interleave(particles, 1)
        starts = self.objective.repeat(state, number * particles)
        returns = self.returns(starts, actions)
        returns = returns.reshape(rows, number, particles).mean(-1)
        return torch.where(returns.isfinite(), returns, -torch.inf)

    def returns(self, starts: Any, actions: torch.Tensor) -> torch.Tensor:
        """Return the predicted returns ``[B, N]`` of actions ``[B, N, H, *A]`` from ``B * N`` states."""
        return self.objective.returns(starts, actions)

    def refit(
        self, search: Search, elites: Population, weights: torch.Tensor
    ) -> Proposal:
        """Return the proposal that fits the elites, ``[B, K]``, by their weights."""
        # Returns, and weights made of them, may have another dtype than the plan.
        weights = weights.to(search.proposal.plan.dtype)
        # Candidates that are not finite lose, however few are left.
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

    def candidates(
        self, search: Search, proposed: torch.Tensor | None, noise: torch.Tensor
    ) -> torch.Tensor:
        """Return the candidates of an iteration, ``[B, N, H, ...]``."""
        # The plan itself is a candidate: a search never loses what it had.
        plan = self.space.mode(search.proposal.plan).unsqueeze(1)
        parts = [plan, proposed, self.draw(search, noise), search.kept]
        return torch.cat([part for part in parts if part is not None], 1)

    def _iterate(
        self,
        state: Any,
        search: Search,
        proposed: torch.Tensor | None,
        noise: torch.Tensor,
    ) -> tuple[Search, Population]:
        samples = self.candidates(search, proposed, noise)
        returns = self.rate(state, samples)
        if proposed is not None:
            returns = without_copies(returns, proposed)
        population = Population(samples, returns)
        proposal, kept = self.improve(search, population)
        return Search(proposal, search.best_with(population), kept), population

    @abstractmethod
    def _update(self) -> None:
        """Look at what a plan depends on as it is now."""

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
        begun = self.begin(self.carried(tensordict))
        proposed = None if self.policy is None else self._proposed(state, begun)
        made = None
        for made in self.iterations(state, begun, proposed):
            if watch is not None:
                watch(made[1])
        return *made, state

    def iterations(
        self, state: Any, search: Search, proposed: torch.Tensor | None
    ) -> Iterator[tuple[Search, Population]]:
        """Yield the search after each iteration, with the candidates that it judged.

        Args:
            state: the states to plan from, ``[B]``.
            search: the search at its beginning.
            proposed: the candidates of the policy, ``[B, P, H, ...]``.
        """
        rows = search.best.returns.shape[0]
        for i in range(self.optim_steps):
            # Drawn outside of the graph: compiled plans have the random numbers of eager ones.
            fresh = max(1, self.population_size(i) - self.num_policy_candidates - 1)
            noise = self.space.noise(rows, fresh, self.planning_horizon)
            # One graph for each shape: dynamo gives up on functions of many shapes.
            shapes = (noise.shape, search.kept is None)
            iterate = self._function(self._iterate, "iterate", shapes)
            search, population = iterate(state, search, proposed, noise)
            yield search, population

    def _proposed(self, state: Any, search: Search) -> torch.Tensor:
        """Return the candidates that the policy proposes, ``[B, P, H, ...]``."""
        rows = search.best.returns.shape[0]
        starts = self.objective.repeat(state, self.num_policy_candidates)
        propose = self._function(self.objective.proposed, "proposed", rows)
        # Without noise, a policy would propose the same plan for all its candidates.
        with set_interaction_type(InteractionType.RANDOM):
            actions = propose(starts, self.planning_horizon)
        shape = (rows, self.num_policy_candidates, *actions.shape[1:])
        return self.space.from_action(actions.reshape(shape))

    # Compiled searches

    def compile(self, **kwargs: Any) -> SearchingPlanner:
        """Compile the search: each iteration, with all its imagination, becomes one graph.

        The first call for each shape of the state and each population size makes a
        graph (ten seconds to a minute or more), which is kept. Replacing a
        component makes new ones.

        Args:
            kwargs: for :func:`torch.compile`; ``fullgraph`` is True and ``dynamic``
                False unless given.

        Returns:
            The planner itself. Without a compiler, the first call warns, and planning
            stays eager. :meth:`eager` undoes it.

        Raises:
            TypeError: if the env is not a ``WorldModelEnv``.
        """
        if not isinstance(self.env, WorldModelEnv):
            raise TypeError(
                f"Only the step of a WorldModelEnv compiles as a whole, and this planner plans in "
                f"a {type(self.env).__name__}."
            )
        self.__dict__["_compiler"] = Compiler(kwargs, "A plan", "planner.eager()")
        return self

    def eager(self) -> SearchingPlanner:
        """Undo :meth:`compile`, and return the planner itself."""
        self.__dict__["_compiler"] = None
        return self

    def _function(self, function: Callable, name: str, shapes: Any) -> Callable:
        """Return a function, compiled after :meth:`compile`."""
        compiler = self.__dict__.get("_compiler")
        if compiler is None:
            return function
        if name == "proposed" and self.objective.program is None:
            return function  # a policy of any kind
        key = (name, shapes, self.discount, self.action_block)
        return compiler.wrap(function, self._held, (), key)
