"""The trainer of every recipe: collects, lets the recipe learn, evaluates and saves."""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import nn
from torchrl.envs import EnvBase
from torchrl.trainers import Trainer

from torchrl_wm import _upstream
from torchrl_wm._files import write_plain
from torchrl_wm._interrupts import check_interrupt, deferred_interrupts
from torchrl_wm.modules.keys import as_tuple, join
from torchrl_wm.trainers.checkpoints import all_parts
from torchrl_wm.trainers.counted_steps import CollectingError, CountedSteps
from torchrl_wm.trainers.episode_seeds import episode_seed
from torchrl_wm.trainers.evaluation import episode_return, forked_random, run_episodes
from torchrl_wm.trainers.learning import check_transitions, NonFiniteLossError
from torchrl_wm.trainers.progress import Progress
from torchrl_wm.trainers.real_envs import episode_seeds
from torchrl_wm.trainers.recipe import Recipe
from torchrl_wm.trainers.run_folder import RunFolder
from torchrl_wm.trainers.run_state import RandomState, TrainerState
from torchrl_wm.trainers.steps import Steps

#: The number of the first episode of evaluations, beyond those of the run.
EVALUATION_EPISODES = 1_000_000


class RecipeTrainer(Trainer):
    """A TorchRL Trainer that runs a recipe.

    At each step of the real envs it puts the steps into the recipe's replay, lets the recipe
    learn, evaluates and films when that is due, and records the episodes that ended. It does not
    depend on the parts of the recipe.

    Checkpoints are saved when episodes end. On a CPU, a run that goes on from one gives the
    same numbers, to the bit, as one that was not interrupted: each episode is seeded from the
    seed and its number, and repeating its actions restores the state of an env.

    Args:
        recipe: the algorithm.
        collector: makes the steps of all real envs.

    Keyword Args:
        run: the folder of the run; without it nothing is saved.
        progress: show a progress bar.

    Attributes:
        metrics: a row for each episode and each evaluation.
        episodes: how many episodes have been finished.
        seconds: the wall time spent.
    """

    def __init__(
        self,
        recipe: Recipe,
        collector: CountedSteps,
        *,
        run: RunFolder | None = None,
        progress: bool = False,
    ) -> None:
        self.recipe, self.config, self.env = recipe, recipe.config, recipe.env
        self.run = run
        self.metrics: list[dict[str, Any]] = []
        self.episodes, self.seconds = 0, 0.0
        modules = [p for p in recipe.parts.values() if isinstance(p, nn.Module)]
        super().__init__(
            collector=collector,
            total_frames=sys.maxsize,
            frame_skip=1,
            loss_module=nn.ModuleList(modules),
            optim_steps_per_batch=1,
            progress_bar=False,
            auto_log_optim_steps=False,
        )
        # TorchRL's Trainer would step an optimizer itself; the recipe does so here.
        self.optimizer = getattr(recipe, "optimizer", None)
        self._losses: dict[str, Any] = {}
        self._random = RandomState()
        self._progress = Progress(recipe.title) if progress else None
        self._evaluation_env: EnvBase | None = None
        self._is_running, self._began = False, 0.0
        #: The terminations that a model without any is watched for, until there is one.
        self._unexpected = [
            join("next", key)
            for key in self.env.done_keys
            if as_tuple(key)[-1] == "terminated" and not recipe.learns_from_log
        ]
        #: The newest real steps.
        self.new_steps: Steps | None = None
        #: The parts of a checkpoint, by name.
        own = {"trainer": TrainerState(self), "random": self._random, **collector.parts}
        self._parts = all_parts(recipe.name, recipe.parts, recipe.replay, own)
        recipe.on_fit = self._on_fit
        # At each step, in this order, with optim_steps between them.
        self.register_op("batch_process", self.add_steps)
        self.register_op("post_steps", self.end_steps)
        if run is not None:
            self.attach(run)

    def __repr__(self) -> str:
        # TorchRL's has all losses in it, some of which cannot be shown.
        path = None if self.run is None else str(self.run.path)
        return (
            f"{type(self).__name__}({self.recipe.title}, step={self.collected_frames}, "
            f"episodes={self.episodes}, run={path!r})"
        )

    def __getattr__(self, name: str) -> Any:
        # Attributes of the recipe: policy, world_model, imagined_env ...
        recipe = self.__dict__.get("recipe")
        if recipe is None or name.startswith("_") or not hasattr(recipe, name):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}.")
        return getattr(recipe, name)

    @property
    def data(self) -> Any:
        """The replay of real steps."""
        return self.recipe.replay

    @property
    def is_over(self) -> bool:
        """Whether the run is over; checked when an episode ends."""
        steps = self.config.steps
        is_long_enough = steps is not None and self.collected_frames >= steps
        return is_long_enough or self.has_reached or self.recipe.is_over(self.metrics)

    @property
    def has_reached(self) -> bool:
        """Whether an evaluation reached ``stop_return``."""
        level = getattr(self.config, "stop_return", None)
        return level is not None and any(
            row.get("evaluation_return", -math.inf) >= level for row in self.metrics
        )

    # Running ----------------------------------------------------------------

    def train(self) -> None:
        """Run to the end, from the beginning or a checkpoint.

        Ctrl-C takes effect between steps. The files in the run's folder are complete at any time.

        Raises:
            NonFiniteLossError: if a loss is NaN or infinite. The batch is in the run's folder.
            CollectingError: if the real envs cannot go on. The run is saved as it is, if it has a
                folder and made steps.
            RuntimeError: if this trainer was interrupted before.
            KeyboardInterrupt: after Ctrl-C.
        """
        if self.is_over:
            self._finish()  # a kill may have prevented it
            return
        if self._is_running:
            raise RuntimeError(
                "This run was interrupted, and its collector is closed. Go on from its folder: "
                f"{type(self).__name__}.resume(path), or start a new one."
            )
        self._began = time.monotonic() - self.seconds
        if self.run is not None:
            self.run.go_on()
            self.run.restore(self.metrics)
        if self._progress is not None:
            self._progress.begin(self.collected_frames, self._expected_steps())
        self.collector.begin(self.collected_frames)
        self.collector.on_begin = self._random.restore
        self._is_running = True
        try:
            with deferred_interrupts():
                super().train()
                self._finish()
            self._is_running = False
        except NonFiniteLossError as err:
            raise self._with_batch_saved(err) from err
        except CollectingError as err:
            raise self._saved_after(err) from err
        finally:
            self.collector.shutdown()
            if self.run is not None:
                self.run.close()
            if self._progress is not None:
                self._progress.close()

    def add_steps(self, steps: TensorDictBase) -> TensorDictBase:
        """Put the newest steps into the replay."""
        total = self.collected_frames + len(steps)
        if self.recipe.replay is not None:
            rows = self.recipe.kept(steps)
            computed = [*self.recipe.latents, self.env.action_key]
            check_transitions(rows, total, computed)
            self.recipe.replay.extend(rows)
        self.new_steps = self.collector.count(steps, total)
        self._watch_terminations(steps, total)
        if self._progress is not None:
            self._progress.step(len(steps))
        return steps

    def _watch_terminations(self, steps: TensorDictBase, total: int) -> None:
        """Warn if an episode terminates, and the model predicts that none does."""
        model = self.recipe.world_model
        if model is None or model.done_head is not None:
            return
        if any(steps.get(key).any() for key in self._unexpected):
            self._unexpected = []
            warnings.warn(
                f"The world model predicts no terminations, and an episode terminated at real step "
                f"{total}. In the model it goes on, with rewards that the env does not pay. Start a "
                f"run whose model learns them: termination='learned', and of Dreamer version='v2' "
                f"or 'v3'.",
                stacklevel=2,
            )

    def optim_steps(self, batch: TensorDictBase) -> None:
        """Let the recipe learn once the random steps are over, and run the "post_optim" hooks.

        The checkpoint of this step has what such a hook records.
        """
        if self.collected_frames >= getattr(self.config, "random_steps", 0):
            self._losses.update(self.recipe.learn(self.new_steps) or {})
        _upstream.run_post_optim(self)

    def end_steps(self) -> None:
        """Evaluate if it is due, record the episodes that ended, save, and stop at the end."""
        steps = self.new_steps
        interval = getattr(self.config, "evaluation_interval", 0)
        is_evaluated = (
            bool(interval) and steps.due(interval) and self.recipe.policy_has_learnt
        )
        if is_evaluated:
            self.record(**self._evaluation())
        before = self.episodes
        rows = self.collector.finished(steps, before)
        losses = (
            {name: float(value) for name, value in self._losses.items()} if rows else {}
        )
        for row in rows:
            self.episodes += 1
            self.record(**row, **losses)
        interval = self.config.checkpoint_interval
        over = bool(rows) and self.is_over or is_evaluated and self.has_reached
        if self.run is not None and (
            over or self.episodes // interval > before // interval
        ):
            self.save()
        if over:
            self.request_stop()
        check_interrupt()

    def record(self, **row: Any) -> None:
        """Add a row to the metrics, here and in the run's folder."""
        self.seconds = time.monotonic() - self._began
        row = {"step": self.collected_frames, "seconds": round(self.seconds, 2), **row}
        self.metrics.append(row)
        if self.run is not None:
            self.run.log(row)
        if self._progress is not None:
            self._progress.show(row, self._expected_steps())

    # Evaluating --------------------------------------------------------------

    def returns(self, episodes: int, **kwargs: Any) -> list[float]:
        """Return the returns of :meth:`iterate`'s episodes."""
        found = self.iterate(episodes, **kwargs)
        return [episode_return(self.env, episode) for episode in found]

    def evaluate(
        self, episodes: int, env: EnvBase | None = None, **kwargs: Any
    ) -> list[TensorDictBase]:
        """Return episodes of the policy without exploration, in a separate env.

        Args:
            episodes: how many episodes to run.
            env: the real env; a new one by default.
            kwargs: see :meth:`iterate`.
        """
        return list(self.iterate(episodes, env, **kwargs))

    def iterate(
        self,
        episodes: int,
        env: EnvBase | None = None,
        *,
        seed: int | None = None,
        policy: TensorDictModuleBase | None = None,
    ) -> Iterator[TensorDictBase]:
        """Give the episodes of :meth:`evaluate`, one by one.

        The seed and their numbers determine how they begin, so that they are the same each time.
        All random states are left as they were.

        Args:
            episodes: how many episodes to run.
            env: the real env; a new one by default.

        Keyword Args:
            seed: the seed of how the episodes begin, and of what a planner draws. By default
                the seed of the run determines how they begin.
            policy: what acts; the policy of the run by default.
        """
        policy = self.policy if policy is None else policy
        if env is None:
            if self._evaluation_env is None:
                self._evaluation_env = self.make_env()
            env = self._evaluation_env
        episode_seeds(env).seed = self.config.seed if seed is None else seed
        for number in range(EVALUATION_EPISODES, EVALUATION_EPISODES + episodes):
            drawn = None if seed is None else episode_seed(seed, number)
            with forked_random(drawn):
                (episode,) = run_episodes(
                    env,
                    policy,
                    1,
                    first_episode=number,
                    exploration=self.recipe.evaluation_exploration,
                )
            yield episode

    def _evaluation(self) -> dict[str, float]:
        """Return the row of an evaluation: returns of the policy, and means of all that are compared."""
        episodes, policies = self.config.evaluation_episodes, self.recipe.policies
        found = {k: self.returns(episodes, policy=p) for k, p in policies.items()}
        own = [found[name] for name, each in policies.items() if each is self.policy]
        returns = own[0] if own else self.returns(episodes)
        return {
            "evaluation_return": sum(returns) / episodes,
            "evaluation_least": min(returns),
            **{f"evaluation_return_{k}": sum(v) / episodes for k, v in found.items()},
        }

    def make_env(self, **kwargs: Any) -> EnvBase:
        """Return another real env of the run, with the entries that the policy needs.

        Args:
            kwargs: arguments for Gymnasium, such as ``render_mode``.
        """
        return self.collector.make_env(**kwargs)

    # Checkpoints -------------------------------------------------------------

    def attach(self, run: RunFolder) -> None:
        """Keep the run in a folder from here on."""
        self.run = run
        run.bind(self._parts)

    def save(self) -> None:
        """Save a checkpoint into the run's folder."""
        self.run.save(self.collected_frames)

    def load(self, step: int | None = None) -> None:
        """Go back to a checkpoint of the run's folder.

        Nothing is written. When :meth:`train` goes on, it removes what the folder holds of the
        time after the checkpoint.

        Args:
            step: the number of the checkpoint; the newest one if None.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is damaged, or belongs to another recipe.
        """
        self.run.load(step)

    def _finish(self) -> None:
        if self.run is not None:
            self.recipe.finish(self.run.path)

    def _expected_steps(self) -> int | None:
        return self.recipe.expected_steps(self.metrics, self.collected_frames)

    def _on_fit(self, step: int, steps: int) -> None:
        check_interrupt()
        if self._progress is not None:
            self._progress.fitting(step, steps)

    def _saved_after(self, err: CollectingError) -> CollectingError:
        """Save the run as it is; return the error with where it is saved."""
        step = self.collected_frames
        if self.run is None or not step:
            return err
        if not self.run.has(step):
            self.save()
        return CollectingError(
            f"{err} The run is saved at step {step}: go on from {str(self.run.path)!r}."
        )

    def _with_batch_saved(self, err: NonFiniteLossError) -> NonFiniteLossError:
        if self.run is None:
            return err
        path = self.run.path / "bad_batch.pt"
        try:
            write_plain(err.batch.detach().cpu().to_dict(), path)
        except OSError as reason:
            return NonFiniteLossError(
                f"{err} (The batch was not saved: {reason})", err.batch
            )
        return NonFiniteLossError(
            f"{err} At real step {self.collected_frames}. The batch is in {str(path)!r} "
            f"(torch.load reads it); the last checkpoint is untouched.",
            err.batch,
        )
