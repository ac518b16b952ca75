"""The cross-entropy method, improved for real-time planning."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import NestedKey
from torchrl.envs import EnvBase

from torchrl_wm.modules.keys import suffixed
from torchrl_wm.planners.actions import Proposal
from torchrl_wm.planners.base import Carried, moved, MPCPlanner, Population, Search
from torchrl_wm.planners.noise import coloring


class ICEMPlanner(MPCPlanner):
    """Plan by the improved cross-entropy method, iCEM (arXiv 2008.06389).

    Beside :class:`~torchrl_wm.planners.CEMPlanner`: candidates vary smoothly
    over time (coloured noise), a part of the elites stays from iteration to
    iteration and, moved by one step, from plan to plan, each iteration has fewer
    candidates than the one before, and it acts on the best candidate seen. Unlike
    in the paper, the elites become fewer with the candidates: a share that grows
    from iteration to iteration would stop the search from converging.

    Args:
        env, planning_horizon, optim_steps, num_candidates, top_k, reward_key, action_key:
            see :class:`~torchrl_wm.planners.MPCPlanner`, as the other keywords.

    Keyword Args:
        noise_beta: the exponent of the noise's power spectrum over time,
            ``1 / f ** noise_beta``: 0 is white, the paper's tasks take 0.25 to 4,
            the slower the more. Not used for choices.
        kept_elites: the share of the ``top_k`` that stays.
        population_decay: by which factor the number of candidates falls from
            iteration to iteration, never below ``top_k``.
        momentum: 0.1 by default, as in the paper.
        init_std: 0.5 by default, as in the paper.

    Examples:
        >>> import torch
        >>> from tensordict.nn import TensorDictModule as Mod
        >>> from torchrl.envs import GymEnv
        >>> from torchrl.modules import MLP
        >>> from torchrl_wm import WorldModel, WorldModelEnv
        >>> from torchrl_wm.planners import ICEMPlanner
        >>> base_env = GymEnv("Pendulum-v1")
        >>> world_model = WorldModel(
        ...     Mod(torch.nn.Linear(3, 4), ["observation"], ["latent"]),
        ...     Mod(MLP(5, 4, num_cells=[32]), ["latent", "action"], [("next", "latent")]),
        ...     Mod(torch.nn.Linear(4, 1), [("next", "latent")], [("next", "reward")]),
        ... )
        >>> env = WorldModelEnv(world_model, base_env)
        >>> planner = ICEMPlanner(env, 10, 3, 64, 8)
        >>> base_env.rollout(5, planner)["action"].shape
        torch.Size([5, 1])
    """

    default_act_on = "best"

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
        noise_beta: float = 0.5,
        kept_elites: float = 0.3,
        population_decay: float = 1.25,
        momentum: float = 0.1,
        init_std: float = 0.5,
        **kwargs: Any,
    ) -> None:
        if noise_beta < 0:
            raise ValueError(f"noise_beta must not be negative, got {noise_beta}.")
        if not 0 <= kept_elites <= 1:
            raise ValueError(
                f"kept_elites is a share of top_k, 0 to 1, got {kept_elites}."
            )
        if population_decay < 1:
            raise ValueError(
                f"population_decay is what the number of candidates is divided by, at least 1, "
                f"got {population_decay}."
            )
        self.num_kept = round(kept_elites * top_k)
        self.population_decay = population_decay
        super().__init__(
            env,
            planning_horizon,
            optim_steps,
            num_candidates,
            top_k,
            reward_key,
            action_key,
            momentum=momentum,
            init_std=init_std,
            **kwargs,
        )
        self.noise_beta = noise_beta
        self._coloring: torch.Tensor | None = None
        self._colors()

    @property
    def elites_key(self) -> NestedKey:
        """Where the elites that stay travel."""
        return suffixed(self.plan_key, "_elites")

    def population_size(self, iteration: int) -> int:
        size = int(self.num_candidates * self.population_decay**-iteration)
        return min(self.num_candidates, max(size, self.top_k))

    def begin(self, carried: Carried) -> Search:
        search = super().begin(carried)
        kept = carried[self.elites_key] if self.num_kept else None
        return search._replace(kept=kept)

    def draw(self, search: Search, noise: torch.Tensor) -> torch.Tensor:
        return self.space.sample(search.proposal, noise, self.min_std, self._coloring)

    def _colors(self) -> None:
        """Fit the noise to the horizon, which may have been set anew."""
        steps = self.planning_horizon
        if self._coloring is None or len(self._coloring) != steps:
            self._coloring = coloring(
                steps, self.noise_beta, dtype=self.space.dtype, device=self.env.device
            )

    def _update(self) -> None:
        super()._update()
        self._colors()

    def improve(
        self, search: Search, population: Population
    ) -> tuple[Proposal, torch.Tensor | None]:
        share = self.top_k / self.num_candidates
        number = round(share * population.returns.shape[1])
        elites = population.best(min(self.top_k, max(1, self.num_kept, number)))
        proposal = self.refit(search, elites, torch.ones_like(elites.returns))
        return proposal, elites.samples[:, : self.num_kept] if self.num_kept else None

    def carried_shapes(self) -> dict[NestedKey, tuple[int, ...]]:
        if not self.num_kept:
            return {}
        steps = (self.num_kept, self.planning_horizon)
        return {self.elites_key: (*steps, *self.space.sample_shape)}

    def carry(self, search: Search) -> Carried:
        carried = super().carry(search)
        if self.num_kept:
            # The paper draws the new last step; the plan's mean there is zero, too.
            carried[self.elites_key] = moved(search.kept, 2)
        return carried
