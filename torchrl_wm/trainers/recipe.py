"""What the recipes share: a run from its config to its checkpoints, on TorchRL's Trainer."""

from __future__ import annotations

import copy
import difflib
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

import gymnasium
import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import EnvBase, TransformedEnv
from torchrl.envs.utils import ExplorationType
from torchrl.trainers import Trainer

from torchrl_wm._files import write_plain
from torchrl_wm.models import make_ensemble_world_model
from torchrl_wm.modules import FunctionHead, WorldModel
from torchrl_wm.modules.keys import as_tuple, join, unique
from torchrl_wm.objectives import WorldModelLoss
from torchrl_wm.trainers.env_checks import check_bounds, check_float_observations
from torchrl_wm.trainers.episode_seeds import episode_seed
from torchrl_wm.trainers.evaluation import episode_return, MAX_STEPS, run_episodes
from torchrl_wm.trainers.functions import find_function, Function, REWARDS, TERMINATIONS
from torchrl_wm.trainers.learning import (
    check_transitions,
    ModelLearner,
    NonFiniteLossError,
)
from torchrl_wm.trainers.progress import Progress
from torchrl_wm.trainers.real_envs import EnvSource, episode_seeds, make_real_env
from torchrl_wm.trainers.run_folder import RunFolder

#: What a run may be given beside its config.
_OBJECTS = ("env", "reward_function", "termination_function")
#: Episodes of evaluations are numbered from here on, so that they are none of the run's.
EVALUATION_EPISODES = 1_000_000


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """The settings that all recipes have.

    Args:
        env: the real env: a Gymnasium id such as Pendulum-v1, a task such as
            dm_control/cartpole/swingup, or module:function, a function of yours that makes it.
        seed: the seed of networks, exploration and episodes.
        max_episode_steps: the most steps of an episode; None for the limit that the env has.
        random_steps: how many steps to act at random first; the episode in which they are
            reached is finished so.
        random_hold: for how many steps a random action is kept. Actions drawn anew at each
            step cancel out in tasks of many small steps, and go nowhere.
        reward: where the model's reward comes from: "learned", a function's name, which is one
            of "pendulum", "cartpole" and "inverted_pendulum", or module:function.
        termination: where the model's terminations come from: "learned", "none" if episodes end
            by time alone, a function's name, which is one of "cartpole", "inverted_pendulum"
            and "hopper", or module:function.
        members: how many networks the ensemble has.
        elites: how many of the members predict; None for all of them.
        hidden: the sizes of the hidden layers of each member.
        beta: how much more rows count that are hard to predict, from 0, the plain likelihood,
            to 1, the likelihood weighted by the predicted variance (beta-NLL, arXiv 2203.09168).
        model_learning_rate: the learning rate of the model's optimizer, AdamW.
        model_weight_decay: the weight decay of the model's optimizer, AdamW.
        model_batch_size: how many transitions a batch of the model's training has.
        checkpoint_interval: how many episodes pass between two checkpoints.
    """

    env: str = "Pendulum-v1"
    seed: int = 0
    max_episode_steps: int | None = None
    random_steps: int = 200
    random_hold: int = 1
    reward: str = "learned"
    termination: str = "learned"
    members: int = 5
    elites: int | None = None
    hidden: tuple[int, ...] = (128, 128)
    beta: float = 0.0
    model_learning_rate: float = 1e-3
    model_weight_decay: float = 1e-5
    model_batch_size: int = 256
    checkpoint_interval: int = 1

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            # Numbers of other libraries, which JSON does not take, become Python's.
            object.__setattr__(self, name, _number(name, getattr(self, name), kind))
        for name, least in self.minima().items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(
                f"hidden are the sizes of the hidden layers, at least one and each at least 1, got "
                f"{tuple(self.hidden)}."
            )

    @classmethod
    def minima(cls) -> dict[str, float]:
        """The least values of settings."""
        return {
            "max_episode_steps": 1,
            "random_steps": 1,
            "random_hold": 1,
            "members": 1,
            "model_batch_size": 1,
            "checkpoint_interval": 1,
        }


class RandomFirst(TensorDictModuleBase):
    """A policy that acts at random until it is told to stop.

    Args:
        policy: what acts then.
        env: the env whose actions are drawn.
        hold: for how many steps a random action is kept.
    """

    def __init__(
        self, policy: TensorDictModuleBase, env: EnvBase, hold: int = 1
    ) -> None:
        super().__init__()
        self.in_keys = list(policy.in_keys)
        self.out_keys = list(policy.out_keys)
        self.policy = policy
        self.is_random = True
        self.hold = hold
        self._held: torch.Tensor | None = None
        #: The steps of the episode so far.
        self.length = 0
        #: Called at each step, for progress bars.
        self.on_step: Callable[[], None] | None = None
        self._action_key = env.action_key
        self._action_spec = env.full_action_spec_unbatched[env.action_key]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write an action.

        Raises:
            RuntimeError: if the episode does not end.
        """
        self.length += 1
        if self.length > MAX_STEPS:
            raise RuntimeError(
                f"The episode has not ended after {MAX_STEPS} steps, and recipes learn from "
                f"episodes that end. Give a time limit: max_episode_steps=..., on the command "
                f"line --max-episode-steps."
            )
        if self.on_step is not None:
            self.on_step()
        if self.is_random:
            if (self.length - 1) % self.hold == 0:
                self._held = self._action_spec.rand(tensordict.batch_size)
            return tensordict.set(self._action_key, self._held.clone())
        return self.policy(tensordict)


class RecipeTrainer(Trainer):
    """A TorchRL Trainer that runs a recipe from its config to its checkpoints.

    A recipe is a subclass: its ``__init__`` builds what its paper's algorithm names, and
    the methods that it registers are the algorithm's steps, each called at each real step.

    A run stops at :attr:`is_over`. At the ends of episodes it saves checkpoints into its
    folder. On a CPU, a run that goes on from one gives the same numbers, to the bit, as
    one that was not interrupted: each episode is seeded from the seed and its number, and
    the random states are saved.

    Args:
        config: the settings.
        env: the real env, as the policy acts in it.
        policy: what acts after the random steps.

    Keyword Args:
        world_model: what is learnt.
        loss_module: what the Trainer optimises.
        parts: what a checkpoint holds, by name; each with a ``state_dict``.
        run: the folder of the run; nothing is kept without one.
        progress: show a progress bar.
        trainer_kwargs: for :class:`torchrl.trainers.Trainer`.
    """

    #: The recipe's name on the command line and in files.
    algorithm: ClassVar[str]
    config_class: ClassVar[type[RecipeConfig]]
    #: How the policy acts in evaluations.
    evaluation_exploration: ClassVar[ExplorationType] = ExplorationType.DETERMINISTIC

    def __init__(
        self,
        config: RecipeConfig,
        env: EnvBase,
        policy: TensorDictModuleBase,
        *,
        world_model: WorldModel,
        loss_module: torch.nn.Module,
        parts: dict[str, Any],
        run: RunFolder | None,
        progress: bool,
        optim_steps_per_batch: int = 1,
        **trainer_kwargs: Any,
    ) -> None:
        self.config, self.env, self.run = config, env, run
        self.world_model, self.policy = world_model, policy
        self.acting = RandomFirst(policy, env, config.random_hold)
        self.parts = parts
        #: A row for each episode or evaluation.
        self.metrics: list[dict[str, Any]] = [] if run is None else run.metrics()
        #: Finished episodes, and all the wall time spent, in seconds.
        self.episodes, self.seconds = 0, 0.0
        self.losses: dict[str, float] = {}
        collector = Collector(
            env,
            self.acting,
            frames_per_batch=1,
            total_frames=-1,
            auto_register_policy_transforms=False,
        )
        super().__init__(
            collector=collector,
            total_frames=sys.maxsize,
            frame_skip=1,
            loss_module=loss_module,
            optim_steps_per_batch=optim_steps_per_batch,
            clip_grad_norm=False,
            progress_bar=False,
            auto_log_optim_steps=False,
            **trainer_kwargs,
        )
        self._progress = Progress(self) if progress else None
        self._rng: dict[str, Any] | None = None
        self._evaluation_env: EnvBase | None = None
        self._began = 0.0
        self._is_running = False
        # Of the episode so far.
        self._is_done, self._episode_return = False, 0.0

    # What a recipe says -----------------------------------------------------

    @property
    def is_over(self) -> bool:
        """Whether the run has come to its end; looked at when an episode ends."""
        raise NotImplementedError

    @property
    def expected_steps(self) -> int:
        """About how many real steps the run will have made in the end."""
        raise NotImplementedError

    # Building ---------------------------------------------------------------

    def build(
        self,
        config: RecipeConfig,
        env: EnvSource | None,
        reward_function: Function | None,
        termination_function: Function | None,
    ) -> tuple[TransformedEnv, WorldModel, WorldModelLoss]:
        """What every recipe begins with: the real env, and the ensemble that learns it.

        Sets ``learner``, which trains the ensemble, and ``data``, all real transitions.

        Returns:
            The real env, the ensemble and its loss.
        """
        self._source = config.env if env is None else env
        torch.manual_seed(config.seed)
        real_env = make_real_env(
            self._source, seed=config.seed, max_episode_steps=config.max_episode_steps
        )
        key = real_env.action_key
        check_bounds(real_env.full_action_spec_unbatched[key], key)
        check_float_observations(real_env)
        world_model, loss = make_model(
            config, real_env, reward_function, termination_function
        )
        self.learner = ModelLearner(
            world_model,
            loss,
            learning_rate=config.model_learning_rate,
            weight_decay=config.model_weight_decay,
            batch_size=config.model_batch_size,
        )
        # The data: every real transition.
        self.data = make_buffer(capacity=1_000_000)
        self._keys = transition_keys(real_env, world_model)
        return real_env, world_model, loss

    # Running ----------------------------------------------------------------

    def train(self) -> None:
        """Run, or go on, to the end.

        Raises:
            NonFiniteLossError: if a loss is NaN or infinite. The batch is in the run's folder.
            RuntimeError: if it was interrupted before.
        """
        if self.is_over:
            return
        if self._is_running:
            raise RuntimeError(
                f"This run was interrupted, and its collector is closed. Go on from its folder: "
                f"{type(self).__name__}.resume(path), or start a new one."
            )
        self._is_running = True
        self._began = time.monotonic() - self.seconds
        if self.run is not None:
            self.run.restore(self.metrics)  # without what came after the checkpoint
        episode_seeds(self.env).episode = self.episodes
        self.collector.reset()
        self.begin_episode()
        if self._rng is not None:
            set_random_state(self._rng)
            self._rng = None
        try:
            super().train()
            self._is_running = False
        except NonFiniteLossError as err:
            raise self._with_batch_saved(err) from err
        finally:
            if self._progress is not None:
                self._progress.close()

    def begin_episode(self) -> None:
        """Begin to count anew, and act at random or not."""
        self.acting.is_random = self.collected_frames < self.config.random_steps
        self.acting.length = 0
        self._episode_return = 0.0

    def add_step(self, step: TensorDictBase) -> TensorDictBase:
        """D <- D + the step that the policy just took."""
        self._episode_return += episode_return(self.env, step)
        rows = step.select(*self._keys)
        check_transitions(rows, self.collected_frames + len(step))
        self.data.extend(rows)
        self._is_done = bool(step.get(join("next", self.env.done_keys[0])).any())
        return step

    def end_step(self) -> None:
        """End the episode where the env ended it."""
        if self._is_done:
            self.end_episode()

    def end_episode(self) -> None:
        """Record an episode, save a checkpoint where one is due, and stop at the end."""
        self.episodes += 1
        row = {
            "return": self._episode_return,
            "length": self.acting.length,
            "random": int(self.acting.is_random),
            **self.losses,
        }
        self.begin_episode()
        self.record(episode=self.episodes, **row)
        due = self.episodes % self.config.checkpoint_interval == 0
        if self.run is not None and (due or self.is_over):
            self.save()
        if self.is_over:
            self.request_stop()

    def record(self, **row: Any) -> None:
        """Add a row to the metrics, here and in the run's folder."""
        self.seconds = time.monotonic() - self._began
        row = {"step": self.collected_frames, "seconds": round(self.seconds, 2), **row}
        self.metrics.append(row)
        if self.run is not None:
            self.run.log(row)
        if self._progress is not None:
            self._progress.show(row)

    def evaluate(
        self, episodes: int, env: EnvBase | None = None, **kwargs: Any
    ) -> list[TensorDictBase]:
        """Episodes of the policy without exploration, in an env of its own.

        Args:
            episodes: how many.
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
    ) -> Iterator[TensorDictBase]:
        """The episodes of :meth:`evaluate`, one by one.

        They begin as the seed and their number say, the same ones each time.

        Args:
            episodes: how many.
            env: the real env; a new one by default.

        Keyword Args:
            seed: how the episodes begin, and what a planner draws: with it the same
                episodes come each time. By default they begin as the run's seed says.
        """
        if env is None:
            if self._evaluation_env is None:
                self._evaluation_env = self.make_env()
            env = self._evaluation_env
        episode_seeds(env).seed = self.config.seed if seed is None else seed
        for number in range(EVALUATION_EPISODES, EVALUATION_EPISODES + episodes):
            with torch.random.fork_rng(devices=[]):
                if seed is not None:
                    torch.manual_seed(episode_seed(seed, number))
                (episode,) = run_episodes(
                    env,
                    self.policy,
                    1,
                    first_episode=number,
                    exploration=self.evaluation_exploration,
                )
            yield episode

    def make_env(self, **kwargs: Any) -> EnvBase:
        """Another real env of the run's, as the policy needs it.

        Args:
            kwargs: for Gymnasium, such as ``render_mode``.
        """
        config = self.config
        return self.prepared(
            make_real_env(
                another(self._source),
                seed=config.seed,
                max_episode_steps=config.max_episode_steps,
                **kwargs,
            )
        )

    def prepared(self, env: TransformedEnv) -> EnvBase:
        """A real env with all entries that the policy needs."""
        return env

    def fit_model(self, steps: int) -> None:
        """Train the world model on D, and keep its losses for the next row of the metrics."""
        if not self.learner.steps:
            warn_of_other_functions(self.world_model, self.data[:])
        on_step = None if self._progress is None else self._progress.fitting(steps)
        self.losses.update(self.learner.fit(self.data, steps, on_step))

    # Checkpoints -------------------------------------------------------------

    def save(self) -> None:
        """Save a checkpoint into the run's folder."""
        content = {
            "algorithm": self.algorithm,
            "counts": {
                "collected_frames": self.collected_frames,
                "episodes": self.episodes,
                "seconds": self.seconds,
                "optim_count": self._optim_count,
            },
            "metrics": self.metrics,
            "losses": self.losses,
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "random": random_state(),
        }
        self.run.save(content, self.collected_frames)

    def load(self) -> None:
        """Go back to the newest checkpoint of the run's folder.

        Nothing is written: what the folder holds of the time after the checkpoint is
        forgotten when :meth:`train` goes on.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is damaged, or one of another recipe.
        """
        content = self.run.load()
        if content.get("algorithm") != self.algorithm:
            raise ValueError(
                f"The checkpoint in {str(self.run.path)!r} is one of "
                f"{content.get('algorithm')!r}, and this is {self.algorithm!r}."
            )
        try:
            for name, part in self.parts.items():
                part.load_state_dict(content["parts"][name])
            counts = content["counts"]
            self.collected_frames = counts["collected_frames"]
            self.episodes, self.seconds = counts["episodes"], counts["seconds"]
            self._optim_count = counts["optim_count"]
            self.metrics, self.losses = content["metrics"], content["losses"]
            self._rng = content["random"]
        except (KeyError, TypeError, RuntimeError, ValueError) as err:
            raise ValueError(
                f"The checkpoint in {str(self.run.path)!r} does not fit the run's config and env "
                f"({type(err).__name__}: {err})."
            ) from err

    @classmethod
    def start(
        cls, path: str, config: RecipeConfig | None = None, **kwargs: Any
    ) -> RecipeTrainer:
        """A new run in a new folder; :meth:`train` runs it.

        Args:
            path: the folder; an empty one may be there already.
            config: the settings.
            kwargs: of the recipe, such as ``env``; settings by name, too.

        Raises:
            FileExistsError: if there is something in the folder already.
        """
        config, kwargs = cls.configured(config, kwargs)
        # Built first: what cannot be built leaves no folder behind.
        trainer = cls(config, **kwargs)
        given = sorted(name for name in _OBJECTS if kwargs.get(name) is not None)
        content = {
            "algorithm": cls.algorithm,
            "config": asdict(config),
            "given": given,
        }
        trainer.run = RunFolder.create(path, content)
        return trainer

    @classmethod
    def resume(cls, path: str, **kwargs: Any) -> RecipeTrainer:
        """A run as its newest checkpoint says; :meth:`train` goes on with it.

        A run that was stopped before its first checkpoint begins again.

        Args:
            path: the run's folder.
            kwargs: what the run was started with beside its config: an env object, functions.

        Raises:
            FileNotFoundError: if the folder is not one of a run.
            ValueError: if what it holds is damaged, or of another recipe.
        """
        run = RunFolder.open(path)
        if run.config.get("algorithm") != cls.algorithm:
            raise ValueError(
                f"{str(run.path)!r} is a run of {run.config.get('algorithm')!r}, and this is "
                f"{cls.algorithm!r}."
            )
        given = [name for name in _OBJECTS if kwargs.get(name) is not None]
        missing = sorted(set(run.config.get("given", [])) - set(given))
        if missing:
            raise ValueError(
                f"The run in {str(run.path)!r} was started with {missing} from Python, which no "
                f"file can hold. Give the same again: {cls.__name__}.resume(path, "
                f"{', '.join(f'{name}=...' for name in missing)})."
            )
        config = cls.config_class(**_tuples(run.config["config"], cls.config_class))
        trainer = cls(config, run=run, **kwargs)
        if run.saved():
            trainer.load()
        else:
            trainer.metrics = []
        return trainer

    @classmethod
    def configured(
        cls, config: RecipeConfig | None, kwargs: dict[str, Any]
    ) -> tuple[RecipeConfig, dict[str, Any]]:
        """The config with the settings among ``kwargs``, and the other ones.

        Raises:
            TypeError: if ``config`` is that of another recipe.
        """
        config = cls.config_class() if config is None else config
        if not isinstance(config, cls.config_class):
            raise TypeError(
                f"config must be a {cls.config_class.__name__}, got {type(config).__name__}."
            )
        names = {field.name for field in fields(config)}
        settings = {k: v for k, v in kwargs.items() if k in names and k != "env"}
        others = {k: v for k, v in kwargs.items() if k not in settings}
        if isinstance(others.get("env"), str):
            settings["env"] = others.pop("env")
        known = {"run", "progress", *_OBJECTS}
        for name in sorted(others.keys() - known):
            close = difflib.get_close_matches(name, names, 1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise TypeError(
                f"{cls.__name__} has no setting {name!r}.{hint} There are {sorted(names)}."
            )
        return replace(config, **settings), others

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


# Pieces that the recipes put together -----------------------------------------


def make_model(
    config: RecipeConfig,
    env: EnvBase,
    reward_function: Function | None,
    termination_function: Function | None,
) -> tuple[WorldModel, WorldModelLoss]:
    """The ensemble that a config asks for, and its loss."""
    reward = reward_function or find_function(
        config.reward, REWARDS, "reward", ("learned",)
    )
    termination = termination_function or find_function(
        config.termination, TERMINATIONS, "termination", ("learned", "none")
    )
    return make_ensemble_world_model(
        env,
        members=config.members,
        elites=config.members if config.elites is None else config.elites,
        hidden=tuple(config.hidden),
        beta=config.beta,
        termination_hidden=tuple(config.hidden),
        termination_members=config.members,
        reward_function=reward,
        termination_function=termination,
        termination="none" if config.termination == "none" else "learned",
    )


def warn_of_other_functions(world_model: WorldModel, rows: TensorDictBase) -> None:
    """Warn where a known reward or termination function says another thing than the real env."""
    for name in ("reward", "done"):
        head = getattr(world_model, f"{name}_head")
        if not isinstance(head, FunctionHead):
            continue
        key = head.out_keys[0]
        real = rows.get(key).reshape(len(rows), -1).double()
        with torch.no_grad():
            said = head(rows.copy()).get(key).reshape(len(rows), -1).double()
        differs = ((said - real).abs() > 1e-3 * (1 + real.abs())).any(-1)
        if differs.double().mean() > 0.01:
            warnings.warn(
                f"The {'reward' if name == 'reward' else 'termination'} function and the real env "
                f"differ in {int(differs.sum())} of {len(rows)} steps, first in step "
                f"{int(differs.nonzero()[0])}: {said[differs][0].tolist()}, and the env gave "
                f"{real[differs][0].tolist()}. The function is what is planned and learnt by; a "
                f"run's returns are the env's.",
                stacklevel=2,
            )


def make_buffer(capacity: int) -> TensorDictReplayBuffer:
    """A replay buffer of transitions."""
    return TensorDictReplayBuffer(storage=LazyTensorStorage(capacity))


def sample_newest(
    buffer: TensorDictReplayBuffer, number: int, among: int
) -> TensorDictBase:
    """``number`` transitions, with replacement, of the ``among`` that were written last."""
    if among >= len(buffer):
        return buffer.sample(number)
    last = buffer.writer.state_dict()["_cursor"] - 1
    return buffer[(last - torch.randint(among, (number,))) % len(buffer)]


class BufferPart:
    """A replay buffer as a part of a checkpoint: its transitions alone, not its capacity."""

    def __init__(self, buffer: TensorDictReplayBuffer) -> None:
        self.buffer = buffer

    def state_dict(self) -> dict[str, Any]:
        """The transitions and the place that is written next, as plain data."""
        if not len(self.buffer):
            return {"entries": [], "size": 0, "cursor": 0}
        rows = self.buffer[:]
        keys = sorted(rows.keys(True, True), key=str)
        return {
            "entries": [[list(as_tuple(key)), rows.get(key)] for key in keys],
            "size": len(rows),
            "cursor": self.buffer.writer.state_dict()["_cursor"],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.buffer.empty()
        if not state_dict["size"]:
            return
        rows = TensorDict({}, batch_size=[state_dict["size"]])
        for names, value in state_dict["entries"]:
            rows.set(tuple(names), value)
        self.buffer.extend(rows)
        self.buffer.writer.load_state_dict({"_cursor": state_dict["cursor"]})


def transition_keys(env: EnvBase, world_model: WorldModel) -> list:
    """What of a real step is worth keeping: what the model, its loss and a policy's read."""
    latents = unique(world_model.encoder.in_keys)
    following = [*latents, env.reward_key, *env.done_keys]
    return [
        *latents,
        *env.done_keys,
        env.action_key,
        *(join("next", key) for key in following),
    ]


def random_state() -> dict[str, Any]:
    """The states of all global random number generators, as plain data."""
    name, keys, *rest = np.random.get_state()
    version, internal, gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "python": [version, list(internal), gauss],
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what :func:`random_state` returned."""
    torch.set_rng_state(state["torch"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def another(source: EnvSource) -> EnvSource:
    """What makes one more env like that of a run: a copy where an env itself was given.

    Raises:
        ValueError: if the env cannot be copied.
    """
    if not isinstance(source, (EnvBase, gymnasium.Env)):
        return source
    try:
        return copy.deepcopy(source)
    except Exception as err:  # whatever the env holds
        raise ValueError(
            f"Evaluations need an env of their own, and this {type(source).__name__} cannot be "
            f"copied ({type(err).__name__}: {err}). Give its name or a function that makes it "
            f"as env=...; MBPO's evaluations can be left out with evaluation_interval=0."
        ) from err


def _number(name: str, value: Any, kind: Any) -> Any:
    """A setting of the type ``kind``: ints, floats and tuples of ints as they are in Python.

    Raises:
        ValueError: if it is something else. Settings that are no numbers are not looked at.
    """
    kinds = get_args(kind) if get_origin(kind) is UnionType else (kind,)
    if value is None and NoneType in kinds:
        return None
    if int in kinds:
        if isinstance(value, Integral) and not isinstance(value, bool):
            return int(value)
        raise ValueError(f"{name} must be an int, got {value!r}.")
    if float in kinds:
        if isinstance(value, Real) and not isinstance(value, bool):
            return value if isinstance(value, (int, float)) else float(value)
        raise ValueError(f"{name} must be a number, got {value!r}.")
    if get_origin(kind) is tuple and get_args(kind)[0] is int:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise ValueError(f"{name} must be a tuple of ints, got {value!r}.")
        return tuple(_number(f"Each of {name}", number, int) for number in value)
    return value


def _tuples(settings: dict[str, Any], kind: type) -> dict[str, Any]:
    """Settings as read from JSON, which has no tuples."""
    known = {field.name for field in fields(kind)}
    unknown = sorted(settings.keys() - known)
    if unknown:
        raise ValueError(
            f"The run's config has the settings {unknown}, which this torchrl_wm does not know."
        )
    return {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
