"""Model-predictive control: plan from the present state, act, and plan again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import EnvBase
from torchrl.envs.utils import exploration_type, ExplorationType

from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.envs.collecting import leave_out_collectors
from torchrl_wm.modules.keys import join, unique
from torchrl_wm.modules.modes import evaluation_mode
from torchrl_wm.modules.world_model.filtering import IS_INIT
from torchrl_wm.planners.actions import action_space, ChoiceSpace
from torchrl_wm.planners.carried import Carried, where_rows, write_carried
from torchrl_wm.planners.checks import check_env, check_modules, check_plan_keys
from torchrl_wm.planners.env_objective import EnvObjective
from torchrl_wm.planners.model_objective import ModelObjective
from torchrl_wm.planners.scores import as_score, Score
from torchrl_wm.planners.search import course, Population, Search
from torchrl_wm.planners.searching import SearchingPlanner
from torchrl_wm.planners.settings import check_execute, PlannerSettings
from torchrl_wm.planners.step_scores import PredictedReward


class MPCPlanner(SearchingPlanner):
    """The base of all planners; :class:`~torchrl_wm.planners.CEMPlanner` shows how to use one.

    A planner is a policy. It reads the state that the env steps from (latents,
    or the observations that they are encoded from), ``[*B]``, imagines
    ``num_candidates`` plans for each of the ``B`` states at once, and writes the
    first action of the plan that the search ends with. A plan is judged by the rewards
    of its steps, or by another ``score``, up to and including the step at which an
    episode is predicted to end. Candidates whose return is not finite lose. No graph of autograd
    is built, except by :class:`~torchrl_wm.planners.GradientPlanner`, and the host does not wait
    for the device, except with ``execute``. Model,
    policy, scores and terminal value are in eval mode during a search.

    A subclass defines how one population of candidates leads to the next one
    (:meth:`improve`).

    Args:
        env: the env to plan in: a :class:`~torchrl_wm.WorldModelEnv`, or any env that
            takes tensordicts of every batch size.
        planning_horizon: the number of actions ``H`` of a plan.
        optim_steps: the number of iterations of a search.
        num_candidates: the number of candidates ``N`` for each state.
        top_k: the number of best candidates that the next ones are drawn like.
        reward_key: the reward, below "next". Rewards of several agents add up. Not read if
            there is a ``score``.
        action_key: the action to plan, and to write.

    Keyword Args:
        score: what a plan is worth in place of its rewards: a
            :class:`~torchrl_wm.planners.Score`, a function of the imagined trajectory
            ``[B, N, H]`` to ``[B, N]``, or a list of these, which add up. Their returns are
            what the planner calls returns.
        discount: the factor on rewards and scores per step.
        action_range: the bounds ``(low, high)`` to search in, numbers or ``[*A]``.
            By default those of the action spec.
        execute: the number of actions of a plan that are taken before the next plan is made,
            for each row by itself: it plans anew where ``is_init`` is True. The actions travel
            beside the plan, under ``plan_key`` with ``"_actions"`` and ``"_step"`` appended. If
            any row needs a plan, all are planned; to know, the host waits for the device.
        action_block: the number of steps that each action of a plan is held for, in
            imagination and when it is taken: a plan reaches ``H * action_block`` steps ahead.
        warm_start: begin each search with the plan of the search before, moved on by
            ``execute`` actions. The plan travels in the tensordict under ``plan_key`` and
            begins anew where ``is_init`` (:class:`~torchrl.envs.InitTracker`) is True.
            By default, searches are warm in envs that have the entry, by
            :meth:`make_tensordict_primer`; with True, the planner adds it everywhere.
        plan_key: the entry in which the plan travels.
        terminal_value: a module that writes the value of the states at the
            horizon (``"state_value"``, or its only output). A truncated episode is
            worth its last state, a terminated one nothing.
        policy: a policy that proposes candidates, rolled out through the model, as in
            TD-MPC2 (arXiv 2310.16828).
        num_policy_candidates: the number of candidates that the policy proposes; a
            twentieth of ``num_candidates`` by default.
        num_particles: the number of times that a random model imagines each candidate;
            its return is the mean.
        init_std: the standard deviation at the start, as a share of half the
            range of an action.
        min_std: the least standard deviation, in the same unit; 0 by default. For
            actions that are a choice, the share of candidates that choose at
            random; 0.05 by default, as a probability of 0 never comes back.
        momentum: the share of the last proposal that stays in the next one, 0 to 1.
        act_on: the ``"mean"`` of the last proposal or the ``"best"`` candidate seen.
            A mean is safer if the model is random. By default the best for
            iCEM and for actions that are a choice, which have no mean, else the
            mean.

    Raises:
        TypeError: if the env, the policy or the value is of a wrong type, or if the
            actions are of a kind that planners do not search.
        ValueError: if the env is batch-locked, if a number does not make sense,
            or if the actions have no bounds.
    """

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
        score: Score | Callable | list | None = None,
        discount: float = 1.0,
        execute: int = 1,
        action_block: int = 1,
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
        check_env(env, action_key, reward_key if score is None else None)
        action_key, reward_key = unravel_key(action_key), unravel_key(reward_key)
        check_modules(policy, terminal_value, action_key)
        settings = PlannerSettings(
            planning_horizon,
            optim_steps,
            num_candidates,
            top_k,
            discount=discount,
            warm_start=warm_start,
            num_policy_candidates=num_policy_candidates,
            num_particles=num_particles,
            init_std=init_std,
            min_std=min_std,
            momentum=momentum,
            act_on=act_on,
            execute=execute,
            action_block=action_block,
            has_policy=policy is not None,
        )
        super().__init__(env, action_key)
        # TorchRL registers the env twice, which doubles its state dict.
        del self.env
        self.__dict__.update(vars(settings), env=env)
        self.action_spec = env.full_action_spec_unbatched[action_key]
        self.action_key, self.reward_key = action_key, reward_key
        self.plan_key = plan_key
        self.terminal_value = terminal_value
        self.policy = policy
        self.score = score
        self._rewards: PredictedReward | None = None
        self.space = action_space(
            self.action_spec, action_key, action_range, env.device
        )
        is_choice = isinstance(self.space, ChoiceSpace)
        if min_std is None:
            self.min_std = 0.05 if is_choice else 0.0
        self.act_on = act_on or ("best" if is_choice else self.default_act_on)
        kind = ModelObjective if isinstance(env, WorldModelEnv) else EnvObjective
        self.objective = kind(env, action_key)
        check_plan_keys(env, plan_key, self.carried_keys, action_key)
        self._hand_on()
        read = [k for k in self._present_score().start_keys if k != action_key]
        self.in_keys = unique([*self.in_keys, *read])
        if carried := self.always_carried:
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
        if name == "score" and value is not None:
            value = as_score(value)
        super().__setattr__(name, value)

    # How it is used --------------------------------------------------------

    @torch.no_grad()
    def forward(
        self,
        tensordict: TensorDictBase,
        tensordict_out: TensorDictBase | None = None,
        **kwargs: Any,
    ) -> TensorDictBase:
        """Plan, and write the first action.

        Under ``ExplorationType.RANDOM`` (a collector's default) the action is that of
        :meth:`explore`; else it is the first action of the chosen plan.

        Args:
            tensordict: the state, ``[*B]``, with the plan of the step before if
                there is one.
            tensordict_out: the tensordict to write to; ``tensordict`` by default.

        Returns:
            The tensordict with the action ``[*B, *A]`` and, if the plan travels,
            the plan for the next step under ``("next", plan_key)`` and ``plan_key``.

        Raises:
            TypeError: for keyword arguments: a planner takes a tensordict.
            MissingEntryError: if the state lacks entries.
            ValueError: if an entry has a wrong shape or dtype.
        """
        if kwargs:
            raise TypeError(f"A planner takes a tensordict, and got {sorted(kwargs)}.")
        warm = self.is_warm(tensordict)
        if self.steps_per_plan == 1:
            search, population, _ = self._solve(tensordict)
            samples = self._samples(search, population)[:, 0]
            carried = self.carry(search) if warm else {}
        else:
            samples, carried = self._act_on_plan(tensordict, warm)
        size = tensordict.batch_size
        out = tensordict if tensordict_out is None else tensordict_out
        out.set(self.action_key, self._action(samples, size))
        write_carried(out, carried, size)
        return out

    def _act_on_plan(
        self, tensordict: TensorDictBase, warm: bool
    ) -> tuple[torch.Tensor, Carried]:
        """Return the samples to act on, ``[B, ...]``, and what travels; plan where a plan is due."""
        taken = self.executed(tensordict)
        plan = self.carried(tensordict) if warm else {}
        step = taken[self.step_key]
        # There are fewer steps to a plan if a setting was changed meanwhile.
        step = torch.where(step < self.steps_per_plan, step, torch.zeros_like(step))
        due = (step == 0).squeeze(-1)
        # The host waits for the device here, and saves the searches of all other steps.
        if due.any():
            search, population, _ = self._solve(tensordict)
            samples = self._samples(search, population)[:, : self.execute]
            new = {self.actions_key: samples, **(self.carry(search) if warm else {})}
            merged = where_rows(due, new, {**plan, **taken})
            taken[self.actions_key] = merged.pop(self.actions_key)
            plan = merged
        rows = torch.arange(len(due), device=due.device)
        now = taken[self.actions_key][rows, step.squeeze(-1) // self.action_block]
        taken[self.step_key] = (step + 1) % self.steps_per_plan
        return now, {**plan, **taken}

    @torch.no_grad()
    def planning(self, td: TensorDictBase) -> torch.Tensor:
        """Return the first action ``[*B, *A]`` of a plan from the states in ``td``, ``[*B]``."""
        search, population, _ = self._solve(td)
        return self._action(self._samples(search, population)[:, 0], td.batch_size)

    @torch.no_grad()
    def plan(self, tensordict: TensorDictBase) -> TensorDict:
        """Plan, and return the plan with the course of its search; ``tensordict`` stays as it is.

        Args:
            tensordict: the state, ``[*B]``.

        Returns:
            A tensordict ``[*B]`` with

            - ``"actions"``: the plan, ``[*B, H, *A]``;
            - ``"predicted_return"``: its predicted return, ``[*B, 1]``;
            - ``"candidates"`` and ``"returns"``: those of the last iteration, kept
              ones included, ``[*B, N, H, *A]`` and ``[*B, N]``;
            - ``("iterations", name)`` for the names ``"max_return"``,
              ``"mean_return"`` and ``"elite_return"``: the returns of each iteration,
              ``[*B, optim_steps]``, without those that are not finite.
        """
        seen: list[Population] = []
        search, _, state = self._solve(tensordict, seen.append)
        chosen = self.choose(search)
        with evaluation_mode(self, self.env):
            predicted = self.rate(state, chosen.unsqueeze(1))
        rows = {
            "actions": self.space.action(chosen),
            "predicted_return": predicted,
            "candidates": self.space.action(seen[-1].samples),
            "returns": seen[-1].returns,
            "iterations": course(seen, self.top_k),
        }
        out = TensorDict(rows, batch_size=[chosen.shape[0]])
        return out.reshape(tensordict.batch_size)

    def __getstate__(self) -> dict[str, Any]:
        leave_out_collectors(self.env)
        return {**self.__dict__, "_compiler": None, "_held": ()}

    # Details ---------------------------------------------------------------

    def _update(self) -> None:
        """Look at what a plan depends on as it is now."""
        check_execute(self.execute, self.planning_horizon)
        self._hand_on()
        self.__dict__["_held"] = self.objective.prepare()

    def _hand_on(self) -> None:
        """Hand the planner's present settings to its objective."""
        self.objective.update(
            score=self._present_score(),
            policy=self.policy,
            terminal_value=self.terminal_value,
            discount=self.discount,
            action_block=self.action_block,
            ignored=self.carried_keys,
        )

    def _present_score(self) -> Score:
        """Return the score, by default the rewards."""
        if self.score is not None:
            return self.score
        rewards = self._rewards
        if rewards is None or rewards.reward_key != self.reward_key:
            rewards = self._rewards = PredictedReward(self.reward_key)
        return rewards

    def _samples(self, search: Search, population: Population) -> torch.Tensor:
        """Return the plan to act on, ``[B, execute, ...]`` or longer."""
        if exploration_type() is ExplorationType.RANDOM:
            return self.explore(search, population)
        return self.choose(search)

    def _action(self, samples: torch.Tensor, size: torch.Size) -> torch.Tensor:
        """Return samples ``[B, ...]`` as actions, ``[*B, *A]``."""
        action = self.space.action(samples)
        return action.reshape((*size, *action.shape[1:]))
