"""The cross-entropy method."""

from __future__ import annotations

import torch

from torchrl_wm.planners.actions import Proposal
from torchrl_wm.planners.base import MPCPlanner
from torchrl_wm.planners.search import Population, Search


class CEMPlanner(MPCPlanner):
    """Plan by the cross-entropy method.

    Candidates are drawn from a Gaussian around the plan (for an action that is a
    choice, from probabilities), and the next Gaussian is fitted to the best
    ones. The planner acts on the mean. Reference: De Boer et al., "A tutorial on the
    cross-entropy method", 2005; in model-based RL, PETS (arXiv 1805.12114).

    The arguments are those of TorchRL's
    :class:`~torchrl.modules.planners.CEMPlanner`, and the keywords of
    :class:`~torchrl_wm.planners.MPCPlanner`.

    Examples:
        >>> import torch
        >>> from tensordict.nn import TensorDictModule as Mod, TensorDictSequential
        >>> from torchrl.envs import GymEnv
        >>> from torchrl.modules import MLP
        >>> from torchrl_wm import WorldModel, WorldModelEnv
        >>> from torchrl_wm.planners import CEMPlanner
        >>> base_env = GymEnv("Pendulum-v1")
        >>> world_model = WorldModel(
        ...     Mod(torch.nn.Linear(3, 4), ["observation"], ["latent"]),
        ...     Mod(MLP(5, 4, num_cells=[32]), ["latent", "action"], [("next", "latent")]),
        ...     Mod(torch.nn.Linear(4, 1), [("next", "latent")], [("next", "reward")]),
        ... )
        >>> planner = CEMPlanner(
        ...     WorldModelEnv(world_model, base_env),
        ...     planning_horizon=10,
        ...     optim_steps=3,
        ...     num_candidates=64,
        ...     top_k=8,
        ... )
        >>> base_env.rollout(5, planner)["action"].shape
        torch.Size([5, 1])

        The plan from one state, and the course of its search:

        >>> plan = planner.plan(base_env.reset())
        >>> plan["actions"].shape, plan["predicted_return"].shape
        (torch.Size([10, 1]), torch.Size([1]))
        >>> plan["iterations", "max_return"].shape
        torch.Size([3])
    """

    # Named here: early releases of Python 3.11 show an inherited __new__ as the signature.
    __init__ = MPCPlanner.__init__

    def improve(self, search: Search, population: Population) -> tuple[Proposal, None]:
        elites = population.best(self.top_k)
        return self.refit(search, elites, torch.ones_like(elites.returns)), None
