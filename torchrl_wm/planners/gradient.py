"""Planning by the gradient of a plan's score."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from tensordict import NestedKey
from torchrl.envs import EnvBase

from torchrl_wm.planners.actions import BoundedSpace, Proposal
from torchrl_wm.planners.base import MPCPlanner
from torchrl_wm.planners.search import Population, Search
from torchrl_wm.planners.settings import passes_on_to

#: What other planners draw candidates by, and this one does not.
_NOT_USED = ("top_k", "min_std", "momentum", "act_on")


class GradientPlanner(MPCPlanner):
    """Plan by Adam on the actions of several plans, through the differentiable model.

    The plans begin at the last plan, at what the policy proposes and at random. Each iteration
    judges all of them and moves each along the gradient of its own score, within the bounds of
    the action. The planner acts on the best plan of all that were judged. Only continuous
    actions have a gradient.

    Args:
        env: the env to plan in, whose step must be differentiable by the action.
        planning_horizon, reward_key, action_key: see
            :class:`~torchrl_wm.planners.MPCPlanner`, as for the other keywords.
        optim_steps: the number of times that the plans are judged; Adam moves them in between.
        num_candidates: the number of plans ``N`` for each state.

    Keyword Args:
        learning_rate: Adam's, in half the range of an action.

    Raises:
        TypeError: if the action is a choice, and as :class:`~torchrl_wm.planners.MPCPlanner`.
        ValueError: if the learning rate is not positive, and as
            :class:`~torchrl_wm.planners.MPCPlanner`. In a plan, if the score has no gradient by
            the action.

    Examples:
        >>> import torch
        >>> from tensordict.nn import TensorDictModule as Mod
        >>> from torchrl.envs import GymEnv
        >>> from torchrl.modules import MLP
        >>> from torchrl_wm import WorldModel, WorldModelEnv
        >>> from torchrl_wm.planners import GradientPlanner
        >>> base_env = GymEnv("Pendulum-v1")
        >>> world_model = WorldModel(
        ...     Mod(torch.nn.Linear(3, 4), ["observation"], ["latent"]),
        ...     Mod(MLP(5, 4, num_cells=[32]), ["latent", "action"], [("next", "latent")]),
        ...     Mod(torch.nn.Linear(4, 1), [("next", "latent")], [("next", "reward")]),
        ... )
        >>> env = WorldModelEnv(world_model, base_env)
        >>> planner = GradientPlanner(env, planning_horizon=10, optim_steps=5, num_candidates=4)
        >>> base_env.rollout(5, planner)["action"].shape
        torch.Size([5, 1])
    """

    @passes_on_to(MPCPlanner.__init__, without=_NOT_USED)
    def __init__(
        self,
        env: EnvBase,
        planning_horizon: int = 15,
        optim_steps: int = 20,
        num_candidates: int = 8,
        *,
        reward_key: NestedKey = ("next", "reward"),
        action_key: NestedKey = "action",
        learning_rate: float = 0.1,
        **kwargs: Any,
    ) -> None:
        given = [name for name in _NOT_USED if name in kwargs]
        if given:
            raise TypeError(
                f"GradientPlanner draws no candidates like the best ones, and has no {given}."
            )
        if not learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {learning_rate}.")
        numbers = (planning_horizon, optim_steps, num_candidates, 1)
        super().__init__(env, *numbers, reward_key, action_key, act_on="best", **kwargs)
        self.learning_rate = float(learning_rate)
        if not isinstance(self.space, BoundedSpace):
            raise TypeError(
                f"The action {action_key!r} is a choice, which has no gradient: take CEMPlanner."
            )

    def iterations(
        self, state: Any, search: Search, proposed: torch.Tensor | None
    ) -> Iterator[tuple[Search, Population]]:
        rows = search.best.returns.shape[0]
        fresh = max(1, self.num_candidates - self.num_policy_candidates - 1)
        noise = self.space.noise(rows, fresh, self.planning_horizon)
        plans = self.candidates(search, proposed, noise).detach().requires_grad_()
        adam = torch.optim.Adam([plans], self.learning_rate, maximize=True)
        rate = self._function(self.rate, "rate", plans.shape)
        for step in range(self.optim_steps):
            if step:
                adam.step()
                with torch.no_grad():
                    plans.clamp_(-1.0, 1.0)
            with torch.enable_grad():
                returns = rate(state, plans)
                if (
                    not step or step + 1 < self.optim_steps
                ):  # the last one moves nothing
                    plans.grad = self._gradient(returns, plans)
            population = Population(plans.detach().clone(), returns.detach())
            proposal, _ = self.improve(search, population)
            search = Search(proposal, search.best_with(population), None)
            yield search, population

    def improve(self, search: Search, population: Population) -> tuple[Proposal, None]:
        best = search.best_with(population).samples[:, 0]
        return self.space.proposal(best, self.init_std), None

    def _gradient(self, returns: torch.Tensor, plans: torch.Tensor) -> torch.Tensor:
        """Return the gradient of each plan's return by its samples, zero where it is not finite."""
        gradient = None
        if returns.requires_grad:
            (gradient,) = torch.autograd.grad(returns.sum(), plans, allow_unused=True)
        if gradient is None:
            raise ValueError(
                f"The score {self._present_score()} has no gradient by the action "
                f"{self.action_key!r} in this {type(self.env).__name__}: a component detaches, "
                f"rounds or draws a choice on the way, or gradients are off (inference mode). "
                f"Make the step differentiable, or search by samples: CEMPlanner."
            )
        return gradient.nan_to_num(0.0, 0.0, 0.0)
