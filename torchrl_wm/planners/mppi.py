"""Model-predictive path integral control."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchrl.envs import EnvBase

from torchrl_wm.planners.actions import BoundedSpace, Proposal
from torchrl_wm.planners.base import MPCPlanner
from torchrl_wm.planners.env_objective import done_keys, rewards_until_end
from torchrl_wm.planners.search import Population, Search
from torchrl_wm.planners.settings import passes_on_to


#: What plans are not judged by where there is an advantage module.
_UNJUDGED = {"discount", "terminal_value", "score"}


def _check_judged(given: set[str]) -> None:
    """Raise for settings that an advantage module would ignore."""
    if given:
        raise ValueError(
            f"An advantage_module judges by rewards, its own discount and its value network: "
            f"leave out {sorted(given)}."
        )


class MPPIPlanner(MPCPlanner):
    """Plan by model-predictive path integral control (arXiv 1509.01149).

    The next Gaussian is fitted to the best candidates, weighted by the softmax of
    ``temperature`` times their returns; the planner acts on the weighted mean. With a
    ``terminal_value``, a ``policy`` and ``min_std`` it is the planner of TD-MPC2
    (arXiv 2310.16828). Under ``ExplorationType.RANDOM`` it explores as TD-MPC2 does: it takes
    one of the best candidates, drawn by their weights, and adds noise of the proposal's
    standard deviation. An action that is a choice gets no noise.

    Args:
        env: the env to plan in.
        advantage_module: a value estimator, for instance
            :class:`~torchrl.objectives.value.TDLambdaEstimator`. Candidates are compared
            by its advantage at the first step, for which whole trajectories are
            imagined. With None they are compared by their returns, which is faster.
        temperature: the factor on the returns. As in TorchRL, fewer candidates count
            when it is higher. The default fits returns that differ by about one.
        planning_horizon, optim_steps, num_candidates, top_k, reward_key, action_key:
            see :class:`~torchrl_wm.planners.MPCPlanner`, as for the keywords.

    Raises:
        TypeError: if the advantage module is not a module, and as
            :class:`~torchrl_wm.planners.MPCPlanner`.
        ValueError: if ``temperature`` is not positive, if an advantage module has
            a ``discount``, a ``terminal_value`` or a ``score`` beside it, and as
            :class:`~torchrl_wm.planners.MPCPlanner`.

    Examples:
        >>> import torch
        >>> from tensordict.nn import TensorDictModule as Mod
        >>> from torchrl.envs import GymEnv
        >>> from torchrl.modules import MLP
        >>> from torchrl_wm import WorldModel, WorldModelEnv
        >>> from torchrl_wm.planners import MPPIPlanner
        >>> base_env = GymEnv("Pendulum-v1")
        >>> world_model = WorldModel(
        ...     Mod(torch.nn.Linear(3, 4), ["observation"], ["latent"]),
        ...     Mod(MLP(5, 4, num_cells=[32]), ["latent", "action"], [("next", "latent")]),
        ...     Mod(torch.nn.Linear(4, 1), [("next", "latent")], [("next", "reward")]),
        ... )
        >>> env = WorldModelEnv(world_model, base_env)
        >>> planner = MPPIPlanner(
        ...     env, planning_horizon=10, optim_steps=3, num_candidates=64, top_k=8
        ... )
        >>> base_env.rollout(5, planner)["action"].shape
        torch.Size([5, 1])
    """

    @passes_on_to(MPCPlanner.__init__)
    def __init__(
        self,
        env: EnvBase,
        advantage_module: nn.Module | None = None,
        temperature: float = 1.0,
        planning_horizon: int = 15,
        optim_steps: int = 6,
        num_candidates: int = 512,
        top_k: int = 64,
        *keys: Any,
        **kwargs: Any,
    ) -> None:
        if advantage_module is not None and not isinstance(advantage_module, nn.Module):
            raise TypeError(
                f"advantage_module must be a value estimator or None, got "
                f"{type(advantage_module).__name__}. MPPIPlanner(env, None, temperature, ...), or "
                f"name the arguments."
            )
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}.")
        if advantage_module is not None:
            _check_judged(_UNJUDGED & kwargs.keys())
        super().__init__(
            env, planning_horizon, optim_steps, num_candidates, top_k, *keys, **kwargs
        )
        self.advantage_module = advantage_module
        self.register_buffer("temperature", torch.as_tensor(float(temperature)))
        self.to(env.device)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _UNJUDGED and value is not None:
            if getattr(self, "advantage_module", None) is not None:
                _check_judged({name})
        super().__setattr__(name, value)

    def returns(self, starts: Any, actions: torch.Tensor) -> torch.Tensor:
        if self.advantage_module is None:
            return super().returns(starts, actions)
        lead, plans = actions.shape[:2], actions.flatten(0, 1)
        steps = torch.stack(self.objective.held(plans, 1), 1)
        imagined = self.objective.imagine(starts, steps)
        reward = rewards_until_end(imagined, self.reward_key, done_keys(self.env))
        self.advantage_module(imagined.set(self.reward_key, reward))
        return imagined.get("advantage")[:, 0].reshape(lead)

    def improve(self, search: Search, population: Population) -> tuple[Proposal, None]:
        elites = population.best(self.top_k)
        return self.refit(search, elites, self._weights(elites)), None

    def explore(self, search: Search, population: Population) -> torch.Tensor:
        elites = population.best(self.top_k)
        weights = torch.where(elites.returns > -torch.inf, self._weights(elites), 0.0)
        # The largest of p / Exponential(1) is a draw from p.
        drawn = (weights / torch.empty_like(weights).exponential_()).argmax(1)
        rows = torch.arange(len(drawn), device=drawn.device)
        first = elites.samples[rows, drawn, : self.execute]  # [B, execute, ...]
        if not isinstance(self.space, BoundedSpace):
            return first
        around = Proposal(first, search.proposal.spread[:, : self.execute])
        noise = self.space.noise(len(drawn), 1, self.execute)
        return self.space.sample(around, noise, self.min_std)[:, 0]

    def _weights(self, elites: Population) -> torch.Tensor:
        """Return the weights of elites, ``[B, K]``; the best has 1, however large the returns."""
        lead = (elites.returns - elites.returns[:, :1]).nan_to_num(0.0)
        return (self.temperature * lead).exp()
