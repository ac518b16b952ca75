"""MOPO: a policy from a log alone, in a model that charges for what it does not know (arXiv 2005.13239)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import EnvBase
from torchrl.envs.utils import set_exploration_type

from torchrl_wm.diagnostics import ReportSection, write_policy_report
from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.modules import data_limit, with_penalty, with_propagation, WorldModel
from torchrl_wm.modules.keys import join
from torchrl_wm.modules.modes import evaluation_mode
from torchrl_wm.trainers.episode_seeds import episode_seed
from torchrl_wm.trainers.evaluation import forked_random
from torchrl_wm.trainers.imagined_replay import ImaginedReplayHook, mixed_batches
from torchrl_wm.trainers.model_training import as_episodes
from torchrl_wm.trainers.recipe import Counts, make_replay
from torchrl_wm.trainers.recipes.ensemble import transition_keys
from torchrl_wm.trainers.recipes.model import ModelConfig, ModelRecipe
from torchrl_wm.trainers.recipes.penalty_sweep import (
    check_actions,
    check_episodes,
    check_penalties,
    check_rewards_vary,
    chosen_of,
    judged,
    measured_on,
    Outcome,
    recorded_returns,
    sweep_section,
)
from torchrl_wm.trainers.recipes.sac import SoftActorCritic
from torchrl_wm.trainers.settings import Above, AtLeast, Within
from torchrl_wm.trainers.steps import Steps

#: The share of the held-out steps below the doubt that a penalty of 1 charges a spread of rewards.
EDGE = 0.99


@dataclass(frozen=True, kw_only=True)
class MOPOConfig(ModelConfig):
    """The settings of :class:`MOPO`. Its steps are gradient steps.

    Args:
        steps: how many gradient steps to make in all: those of the model, and then updates of
            the policies, each step one of each policy.
        model_steps: how many gradient steps the model is trained for, first.
        interval: how many gradient steps pass between two rows of the metrics: of the held-out
            error, and then of what the model promises each policy.
        penalties: how much doubt costs; a policy is learnt for each. With 1, a step as doubtful as
            the most doubtful hundredth of the held-out ones costs the standard deviation of the
            recorded rewards. With a single penalty nothing is chosen.
        measure: what is charged: disagreement, the spread of the members' predictions, or
            deviation, the largest deviation that a member predicts, as in the paper. Both are in
            units of the spread of what is predicted.
        limit_quantile: the share of the held-out steps whose measure is below a limit, beyond
            which imagined episodes end as if the worst recorded reward, none above zero, went on
            for ever; None for no limit.
        horizon: the length of imagined rollouts.
        rollouts: how many imagined rollouts a round has, branched off recorded states.
        imagination_interval: how many updates pass between two rounds of imagined rollouts.
        retained_rounds: how many of the newest rounds a policy learns from.
        real_share: the share of recorded transitions in a batch of a policy.
        policy_batch_size: how many transitions a batch of a policy has.
        policy_learning_rate: the learning rate of policies, values and temperatures.
        policy_hidden: the sizes of the hidden layers of policies and values.
        alpha_init: the initial temperature of a policy's entropy, which is learnt.
        gamma: the discount per step.
        tau: the share of the values that is mixed into their targets in an update.
        judged_episodes: how many imagined episodes tell what the model promises a policy.
        judged_steps: how long they are at most; None for the longest recorded episode, and no
            more than 1000.
        evaluation_interval: how many steps pass between two evaluations of the policies in the
            real env, if the config names it; 0 for none.
        evaluation_episodes: how many episodes an evaluation has.
    """

    steps: Annotated[int, AtLeast(1)] = 12_000
    model_steps: Annotated[int, AtLeast(1)] = 2000
    interval: Annotated[int, AtLeast(1)] = 500
    penalties: tuple[float, ...] = (0.0, 1.0, 5.0)
    measure: Literal["disagreement", "deviation"] = "disagreement"
    limit_quantile: Annotated[float, Within(0, 1)] | None = None
    horizon: Annotated[int, AtLeast(1)] = 5
    rollouts: Annotated[int, AtLeast(1)] = 400
    imagination_interval: Annotated[int, AtLeast(1)] = 250
    retained_rounds: Annotated[int, AtLeast(1)] = 20
    real_share: Annotated[float, Within(0, 1)] = 0.05
    policy_batch_size: Annotated[int, AtLeast(1)] = 256
    policy_learning_rate: Annotated[float, Above(0)] = 3e-4
    policy_hidden: tuple[int, ...] = (128, 128)
    alpha_init: Annotated[float, Above(0)] = 0.2
    gamma: Annotated[float, Within(0, 1)] = 0.99
    tau: Annotated[float, Within(0, 1)] = 0.005
    judged_episodes: Annotated[int, AtLeast(1)] = 50
    judged_steps: Annotated[int, AtLeast(1)] | None = None
    evaluation_interval: Annotated[int, AtLeast(0)] = 0
    evaluation_episodes: Annotated[int, AtLeast(1)] = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_penalties(self.penalties)
        if self.steps <= self.model_steps:
            raise ValueError(
                f"steps={self.steps} are all of the model, which takes model_steps="
                f"{self.model_steps} of them: no policy would learn. Give more steps, or train "
                f"only a model: torchrl-wm train model."
            )
        if self.measure == "disagreement" and self.members < 2:
            raise ValueError(
                f"members={self.members} cannot disagree. Give more, or charge what a member says of "
                f"its own error: measure='deviation', on the command line --measure deviation."
            )
        if self.real_share >= 1:
            raise ValueError(
                "real_share is the share of recorded transitions in a batch, below 1, got "
                f"{self.real_share}: a policy must learn from imagined ones, too."
            )
        if self.evaluation_interval and self.env is None:
            raise ValueError(
                f"evaluation_interval={self.evaluation_interval} needs the real env: name it, "
                f"env=..., on the command line --env. Without it the model tells what it promises "
                f"each policy, each interval={self.interval} steps."
            )


class MOPO(ModelRecipe):
    """Learn a policy from a log alone, by SAC in a model that charges for what it does not know.

    The model is trained once. Then a policy is learnt for each penalty, all of them at the same
    pace, in imagined rollouts from recorded states whose rewards are lower by the penalty times
    the measure.

    Args:
        config: the settings.
        env: the env that was recorded; None to read its specs off the data.

    Attributes:
        training: trains the ensemble, and has the held-out data.
        real_env: the env that was recorded, if it was given.
        candidates: what is learnt with each penalty, in their order.
        outcomes: what the model promised each policy when it was asked last.
        policy: the policy of the penalty that was chosen.
    """

    name = "mopo"
    config_class = MOPOConfig
    config: MOPOConfig

    def __init__(self, config: MOPOConfig, env: EnvBase | None) -> None:
        super().__init__(config, env)
        # D_env, without a copy: transitions that are held out judge the model.
        self.recorded = self.training.train
        self.parts_of_log = (self.training.train, self.training.test)
        check_actions(self.parts_of_log, self.env)
        check_episodes(self.parts_of_log)
        check_rewards_vary(self.parts_of_log, self.env.reward_key)
        keys = transition_keys(self.env, self.world_model)
        # Logs say only after a step whether it was done.
        self.keys = [key for key in keys if key not in self.env.done_keys]
        self.candidates = [
            Candidate(config, self, penalty) for penalty in config.penalties
        ]
        self.outcomes: list[Outcome] = []
        self._choice = Counts(chosen=0)
        self.parts = {"training": self.training, "choice": self._choice}
        for number, candidate in enumerate(self.candidates):
            for name, part in candidate.parts.items():
                self.parts[f"{name}_{number}"] = part

    def learn(self, steps: Steps) -> dict[str, float]:
        """Make as many steps of Algorithm 2."""
        config, row = self.config, {}
        begun = steps.total - steps.count
        # Line 1: train the ensemble on D_env, once.
        of_model = min(steps.total, config.model_steps) - begun
        if of_model > 0:
            row.update(self.training.advance(of_model, self.on_fit))
        if steps.total <= config.model_steps:
            return row
        self.training.keep_best()
        # Lines 3 to 7, for each penalty: rollouts from D_env into D_model, updates of the policy.
        first = max(begun, config.model_steps) - config.model_steps
        last = steps.total - config.model_steps
        for step, updates in _rounds(first, last, config.imagination_interval):
            for candidate in self.candidates:
                losses = candidate.learn(step, updates)
                row.update({f"{k}_{candidate}": v for k, v in losses.items()})
            self.on_fit(step - first, last - first)
        return {**row, **self._judge()}

    @property
    def policy(self) -> TensorDictModuleBase:
        return self.candidates[self._choice.chosen].learning.policy

    @property
    def policy_has_learnt(self) -> bool:
        return bool(self.policies)

    @property
    def policies(self) -> dict[str, TensorDictModuleBase]:
        """The policies by penalty, for evaluations; nothing before they learn."""
        learnt = [c for c in self.candidates if c.learning.counts.updates]
        return {str(candidate): candidate.learning.policy for candidate in learnt}

    @property
    def title(self) -> str:
        number = sum(len(part) for part in self.parts_of_log)
        return f"{self.name} on {number} transitions from {self.config.about}"

    def measures(self) -> dict[str, float]:
        """Return the held-out errors, and what the model promises the policy that was chosen."""
        found = super().measures()
        if self.policies:
            if not self.outcomes:
                self._judge()
            outcome = self.outcomes[self._choice.chosen]
            found["penalty"] = self.config.penalties[self._choice.chosen]
            found["imagined_return"] = outcome.mean
        return found

    def report_sections(
        self, returns: Callable[[TensorDictModuleBase], list[float]] | None
    ) -> list[ReportSection]:
        """Return the section on the sweep, and those on whether the policy is to be trusted."""
        if not self.policies:
            return []
        if not self.outcomes:
            self._judge()
        config, test = self.config, self.training.test
        price = self.coefficient(1.0)  # the model is asked about all held-out steps
        section = sweep_section(
            {penalty: penalty * price for penalty in config.penalties},
            self.outcomes,
            self._choice.chosen,
            measured_on(self.world_model, self.env, test, config.measure).mean().item(),
            recorded_returns(self.parts_of_log, self.env.reward_key),
            returns and [returns(policy) for policy in self.policies.values()],
            config.measure,
        )
        return [section, *self._trust(price)]

    def _trust(self, price: float) -> Sequence[ReportSection]:
        """Return the sections on whether the policy that was chosen is to be trusted."""
        config = self.config
        taken = config.penalties[self._choice.chosen] or 1.0
        charged = config.measure == "disagreement"
        exploration = set_exploration_type(self.evaluation_exploration)
        with exploration, evaluation_mode(self.policy):
            return write_policy_report(
                self.diagnosed_env(),
                self.policy,
                [e for part in self.parts_of_log for e in as_episodes(part)],
                gamma=config.gamma,
                coefficient=taken * price if charged else None,
                seed=config.seed,
            ).sections

    def coefficient(self, penalty: float) -> float:
        """Return what a unit of the measure costs, in units of reward, once the model is trained."""
        return penalty * self._rewards().std().item() / self._quantile(EDGE)

    def penalised(self, penalty: float, propagation: str = "ts1") -> WorldModel:
        """Return the model whose rewards pay a penalty, and whose episodes end at the limit."""
        config, limit, worst = self.config, None, None
        if config.limit_quantile is not None:
            limit = self._quantile(config.limit_quantile)
            # Where all rewards are negative, an end alone would be a relief.
            worst = min(self._rewards().min().item(), 0.0) / max(1 - config.gamma, 1e-3)
        if not penalty and limit is None:
            # One member predicts each row, which is quicker.
            return with_propagation(self.world_model, propagation, all_members=False)
        model = with_propagation(self.world_model, propagation)
        return with_penalty(
            model,
            self.coefficient(penalty) if penalty else 0.0,
            measure=config.measure,
            limit=limit,
            limit_reward=worst,
        )

    def _rewards(self) -> torch.Tensor:
        """Return the recorded rewards, ``[N]``."""
        key = join("next", self.env.reward_key)
        return torch.cat([part.get(key).flatten() for part in self.parts_of_log])

    def _quantile(self, share: float) -> float:
        """Return the value that the measure does not exceed in a share of the held-out steps."""
        test, measure = self.training.test, self.config.measure
        return data_limit(self.world_model, test, share, measure=measure)

    def _judge(self) -> dict[str, float]:
        """Ask the model what it promises each policy, and choose one; return a row."""
        config, row = self.config, {}
        policies = [candidate.learning.policy for candidate in self.candidates]
        with forked_random(config.seed):
            self.outcomes = judged(
                self.world_model,
                # Each elite member imagines episodes of its own, so that they can be told apart.
                self.penalised(0.0, "tsinf"),
                self.env,
                policies,
                self.parts_of_log,
                episodes=config.judged_episodes,
                steps=config.judged_steps,
                measure=config.measure,
            )
        self._choice.chosen = chosen_of(self.outcomes)
        for candidate, outcome in zip(self.candidates, self.outcomes):
            row[f"imagined_return_{candidate}"] = outcome.mean
            row[f"imagined_worst_{candidate}"] = outcome.worst
            row[f"imagined_{config.measure}_{candidate}"] = outcome.measured
        return {**row, "chosen_penalty": config.penalties[self._choice.chosen]}


class Candidate:
    """A policy, and the imagined transitions from which it learns, with one penalty.

    Args:
        config: the settings.
        recipe: the recipe, with its model and its recorded transitions.
        penalty: the penalty.
    """

    def __init__(self, config: MOPOConfig, recipe: MOPO, penalty: float) -> None:
        self.config, self.recipe, self.penalty = config, recipe, penalty
        # All candidates begin alike, and draw alike, whatever the other penalties are.
        with forked_random(episode_seed(config.seed, 0)):
            self.learning = SoftActorCritic(
                recipe.env,
                list(recipe.world_model.encoder.in_keys),
                hidden=config.policy_hidden,
                alpha_init=config.alpha_init,
                gamma=config.gamma,
                tau=config.tau,
                learning_rate=config.policy_learning_rate,
                device=recipe.device,
            )
        # D_model.
        rows = config.retained_rounds * config.rollouts * config.horizon
        self.imagined = make_replay(rows, recipe.device)
        self._hook: ImaginedReplayHook | None = None

    @property
    def parts(self) -> dict[str, Any]:
        """The parts of a checkpoint."""
        return {**self.learning.parts, "imagined": self.imagined}

    def learn(self, step: int, number: int) -> dict[str, float]:
        """Make updates from one on, after a round of rollouts if it is due; return the last losses."""
        with forked_random(episode_seed(self.config.seed, 1 + step)):
            if step % self.config.imagination_interval == 0:
                self.imagine()
            return self.update(number)

    def imagine(self) -> None:
        """Add a round of rollouts in the penalised model."""
        if self._hook is None:
            # Not before the model is trained: the limit is read off what it says of the data.
            # A run that goes on makes it at another step, and must draw the same after it.
            with forked_random(self.config.seed):
                self._hook = ImaginedReplayHook(
                    WorldModelEnv(
                        self.recipe.penalised(self.penalty),
                        self.recipe.env,
                        batch_size=[],
                    ),
                    self.imagined,
                    self.recipe.recorded,
                    policy=self.learning.policy,
                    horizon=self.config.horizon,
                    num_starts=self.config.rollouts,
                    keys=self.recipe.keys,
                )
        self._hook()

    def update(self, number: int) -> dict[str, float]:
        """Make updates of the policy on imagined and recorded transitions; return the last losses."""
        config, recorded = self.config, self.recipe.recorded
        real = round(config.real_share * config.policy_batch_size)
        sources = (
            (recorded, real, len(recorded)),
            (self.imagined, config.policy_batch_size - real, len(self.imagined)),
        )
        losses = {}
        for batch in mixed_batches(sources, number, self.recipe.keys):
            losses = self.learning.update(batch)
        return {name: float(value) for name, value in losses.items()}

    def __str__(self) -> str:
        return f"{self.penalty:g}"


def _rounds(first: int, last: int, interval: int) -> Iterator[tuple[int, int]]:
    """Give the steps from ``first`` to ``last`` in parts that end at multiples of ``interval``."""
    while first < last:
        number = min(interval - first % interval, last - first)
        yield first, number
        first += number
