"""The cross-entropy method, improved for real-time planning."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import NestedKey

from torchrl_wm.modules.keys import suffixed
from torchrl_wm.planners.actions import Proposal
from torchrl_wm.planners.base import MPCPlanner
from torchrl_wm.planners.carried import Carried, moved
from torchrl_wm.planners.noise import coloring
from torchrl_wm.planners.search import Population, Search
from torchrl_wm.planners.settings import passes_on_to


class ICEMPlanner(MPCPlanner):
    """Plan by the improved cross-entropy method, iCEM (arXiv 2008.06389).

    It differs from :class:`~torchrl_wm.planners.CEMPlanner` in four ways: candidates
    vary smoothly over time (coloured noise); a part of the elites stays from
    iteration to iteration and, moved on, from plan to plan; each iteration
    has fewer candidates than the one before; and the planner acts on the best
    candidate seen. Unlike in the paper, the elites become fewer with the candidates:
    a share that grows from iteration to iteration would stop the search from
    converging.

    Args:
        env, planning_horizon, optim_steps, num_candidates, top_k, reward_key, action_key:
            see :class:`~torchrl_wm.planners.MPCPlanner`, as for the other keywords.

    Keyword Args:
        noise_beta: the exponent of the noise's power spectrum over time,
            ``1 / f ** noise_beta``: 0 is white noise. The paper takes 0.25 to 4, more
            for slower tasks. Not used for choices.
        kept_elites: the share of the ``top_k`` that stays.
        population_decay: the factor by which the number of candidates falls from
            iteration to iteration, never below ``top_k``.
        momentum: 0.1 by default, as in the paper.
        init_std: 0.5 by default, as in the paper.

    Raises:
        TypeError, ValueError: as :class:`~torchrl_wm.planners.MPCPlanner`.

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

    @passes_on_to(MPCPlanner.__init__)
    def __init__(
        self,
        *args: Any,
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
                f"population_decay divides the number of candidates and must be at least 1, got "
                f"{population_decay}."
            )
        self.kept_elites = kept_elites
        self.population_decay = population_decay
        super().__init__(*args, momentum=momentum, init_std=init_std, **kwargs)
        self.noise_beta = noise_beta
        self._coloring: torch.Tensor | None = None
        self._colors()

    @property
    def num_kept(self) -> int:
        """The number of elites that stay."""
        return round(self.kept_elites * self.top_k)

    @property
    def elites_key(self) -> NestedKey:
        """The entry in which the elites that stay travel."""
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
        """Fit the noise to the horizon, which a user may have set anew."""
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
            # The paper draws new last steps; here they are zero, the mean of the moved plan.
            carried[self.elites_key] = moved(search.kept, self.execute, 2)
        return carried
