"""Train a world model from only logged data."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.data import TensorSpec
from torchrl.envs import EnvBase

from torchrl_wm.models import make_ensemble_world_model
from torchrl_wm.modules import with_propagation, WorldModel
from torchrl_wm.modules.keys import as_tuple, join, leaf_keys, unique
from torchrl_wm.modules.modes import evaluation_mode
from torchrl_wm.trainers.evaluation import forked_random
from torchrl_wm.trainers.learning import ModelLearner
from torchrl_wm.trainers.logged_bounds import ActionBounds
from torchrl_wm.trainers.logged_data import DataSource
from torchrl_wm.trainers.logged_names import Names
from torchrl_wm.trainers.recorded_env import read_recorded


def train_world_model(
    data: DataSource,
    *,
    env: EnvBase | None = None,
    action_spec: TensorSpec | None = None,
    action_bounds: ActionBounds | None = None,
    names: Names | str | None = None,
    dones: str | None = None,
    steps: int = 2000,
    held_out: float = 0.1,
    interval: int = 200,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-5,
    batch_size: int = 256,
    seed: int | None = None,
    on_row: Callable[[dict[str, float]], Any] | None = None,
    **settings: Any,
) -> tuple[WorldModel, list[dict[str, float]]]:
    """Train an ensemble on logged data, and measure it on held-out data.

    Args:
        data: a source that :func:`load_transitions` reads.

    Keyword Args:
        env: the env that was recorded. Without it the specs are read off the data, see
            :class:`RecordedEnv`.
        action_spec: the spec of only the actions, see :func:`load_transitions`.
        action_bounds: the bounds of actions that are quantities, see :func:`load_transitions`.
        names, dones: what arrays are called in the data, and what ends are that do not tell it,
            see :func:`load_transitions`.
        steps: how many gradient steps to make.
        held_out: the share of the episodes (of the steps, if there is only one episode)
            that is not trained on.
        interval: how many gradient steps pass between two measurements of the held-out error.
            The weights with the least error are returned.
        learning_rate, weight_decay, batch_size: see
            :class:`~torchrl_wm.trainers.ModelLearner`.
        seed: the seed of the split, the weights and the batches. The random state is put back
            afterwards. With None, the current state is used.
        on_row: called with each row of the metrics, for progress bars.
        settings: settings of :class:`~torchrl_wm.models.EnsembleConfig`, by name. A
            termination head is learnt if an episode of the data terminates.

    Returns:
        The world model, for :func:`~torchrl_wm.models.save_world_model`, and the metrics, a row
        for each interval: ``"step"``, the losses, and errors on held-out transitions:
        ``"held_out_error"``, the root mean square error of one-step predictions as a share of
        that of "nothing changes", mean over dims; ``"held_out_reward_error"``, that of rewards
        as a share of their standard deviation; ``"held_out_termination_error"``, the share of
        steps whose termination is wrong.

    Raises:
        ValueError: if there is too little data to hold any out, or nothing to train on; if an
            entry that is learnt has NaN or infinite values; the message names it.
        NonFiniteLossError: if a loss is NaN or infinite.

    Examples:
        >>> from torchrl.envs import GymEnv
        >>> from torchrl_wm.trainers import train_world_model
        >>> world_model, metrics = train_world_model(
        ...     GymEnv("Pendulum-v1").rollout(100), steps=20, interval=10, hidden=(16,), seed=0
        ... )
        >>> [row["step"] for row in metrics]
        [10, 20]
    """
    if steps < 1 or interval < 1 or not 0 < held_out < 1:
        raise ValueError(
            f"steps and interval must be at least 1 and held_out a share between 0 and 1, got "
            f"{steps}, {interval} and {held_out}."
        )
    rows, env = read_recorded(
        data,
        env=env,
        action_spec=action_spec,
        action_bounds=action_bounds,
        names=names,
        dones=dones,
        stacklevel=2,
    )
    with forked_random(seed) if seed is not None else nullcontext():
        training = ModelTraining(
            rows,
            env,
            held_out=held_out,
            seed=seed,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            batch_size=batch_size,
            **settings,
        )
        metrics = []
        while training.learner.steps < steps:
            row = training.advance(min(interval, steps - training.learner.steps))
            metrics.append({"step": training.learner.steps, **row})
            if on_row is not None:
                on_row(metrics[-1])
        return training.best_model(), metrics


class ModelTraining:
    """The training of an ensemble on logged data, which keeps the weights with the least error.

    Args:
        rows: transitions ``[N]``.
        env: the env that was recorded, or its specs.

    Keyword Args:
        held_out, seed: see :func:`split_transitions`.
        learning_rate, weight_decay, batch_size: see
            :class:`~torchrl_wm.trainers.ModelLearner`.
        device: the device to train on.
        settings: settings of :class:`~torchrl_wm.models.EnsembleConfig`, by name.
    """

    def __init__(
        self,
        rows: TensorDictBase,
        env: EnvBase,
        *,
        held_out: float,
        seed: int | None,
        learning_rate: float,
        weight_decay: float,
        batch_size: int,
        device: torch.device | str = "cpu",
        **settings: Any,
    ) -> None:
        train, test = split_transitions(rows, held_out, seed)
        ends = rows.get(("next", "terminated"), None)
        if "termination" not in settings and ends is not None and not ends.any():
            settings["termination"] = "none"
        self.world_model, loss = make_ensemble_world_model(env, **settings)
        _check_finite(rows, env, self.world_model)
        loss.to(device)
        self.learner = ModelLearner(
            self.world_model,
            loss,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            batch_size=batch_size,
        )
        #: The transitions that are trained on, and those that are held out.
        self.train, self.test = train.to(device), test.to(device)
        self._best: dict[str, Any] | None = None
        self._least = float("inf")

    def advance(
        self, steps: int, on_step: Callable[[int, int], Any] | None = None
    ) -> dict[str, float]:
        """Make gradient steps; return the losses and the held-out errors after them."""
        losses = self.learner.fit(self.train, steps, on_step)
        errors = held_out_errors(self.world_model, self.test)
        if errors["held_out_error"] < self._least or self._best is None:
            self._least = errors["held_out_error"]
            self._best = copy.deepcopy(self.world_model.state_dict())
        return {**{name: float(value) for name, value in losses.items()}, **errors}

    def best_model(self) -> WorldModel:
        """Return a copy of the model with the best weights so far."""
        model = copy.deepcopy(self.world_model)
        if self._best is not None:
            model.load_state_dict(self._best)
        return model

    def keep_best(self) -> None:
        """Go back to the best weights so far, in place: other models share them."""
        if self._best is not None:
            self.world_model.load_state_dict(self._best)

    def state_dict(self) -> dict[str, Any]:
        """Return the model, its optimiser and the best weights."""
        learner = self.learner.state_dict()
        return {"learner": learner, "best": self._best, "least": self._least}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.learner.load_state_dict(state_dict["learner"])
        self._best, self._least = state_dict["best"], state_dict["least"]


def split_transitions(
    rows: TensorDictBase, share: float, seed: int | None = None
) -> tuple[TensorDictBase, TensorDictBase]:
    """Return transitions to train on, and others to hold out: whole episodes, drawn at random.

    If there is only one episode, its last steps are held out, with a warning.

    Args:
        rows: transitions ``[N]``, one episode after the other.
        share: how much to hold out.
        seed: makes the split the same each time.
    """
    if not 0 < share < 1:
        raise ValueError(f"held_out must be a share between 0 and 1, got {share}.")
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    done = _ends(rows)
    number = done.long().cumsum(0) - done.long()  # of the episode of each step
    episodes = int(number[-1]) + 1
    if episodes > 1:
        count = min(max(1, round(share * episodes)), episodes - 1)
        chosen = torch.zeros(episodes, dtype=torch.bool)
        chosen[torch.randperm(episodes, generator=generator)[:count]] = True
        test = chosen[number]
    else:
        count = max(1, round(share * len(rows)))
        warnings.warn(
            f"The data is one episode: its last {count} of {len(rows)} steps are held out. Errors on "
            f"them say little of other episodes: record several, or say where they end.",
            UserWarning,
            stacklevel=3,
        )
        test = torch.arange(len(rows)) >= len(rows) - count
    if test.all():
        raise ValueError(
            f"There are {len(rows)} transitions: too few to hold any out of training."
        )
    return rows[~test], rows[test]


@torch.no_grad()
def held_out_errors(world_model: WorldModel, rows: TensorDictBase) -> dict[str, float]:
    """Return errors of one-step predictions, see :func:`train_world_model`."""
    model = with_propagation(world_model, "mean")
    start = rows.exclude("next")
    with evaluation_mode(model):
        predicted = model.step(start.clone())
    shares = []
    for key in model.latent_keys:
        real = rows.get(join("next", key)).flatten(1)
        error = predicted.get(join("next", key)).flatten(1) - real
        still = rows.get(key).flatten(1) - real
        rms, baseline = error.square().mean(0).sqrt(), still.square().mean(0).sqrt()
        varies = baseline > 1e-9
        shares.append(rms[varies] / baseline[varies])
    share = torch.cat(shares)
    out = {"held_out_error": share.mean().item() if len(share) else 0.0}
    keys = unique(predicted.get("next").keys(True, True))
    for key in keys:
        real = rows.get(join("next", key), None)
        if real is None:
            continue
        guess = predicted.get(join("next", key))
        if as_tuple(key)[-1] == "reward":
            rms = (guess - real).square().mean().sqrt()
            spread = real.std(unbiased=False).clamp_min(1e-12)
            out["held_out_reward_error"] = (rms / spread).item()
        elif as_tuple(key)[-1] == "terminated" and guess.dtype is torch.bool:
            out["held_out_termination_error"] = (guess != real).float().mean().item()
    return out


def as_episodes(rows: TensorDictBase) -> list[TensorDictBase]:
    """Return transitions ``[N]``, one episode after the other, as a list of episodes."""
    ends = (1 + _ends(rows).nonzero().flatten()).tolist()
    if not ends or ends[-1] != len(rows):
        ends.append(len(rows))
    return [rows[a:b] for a, b in zip([0, *ends], ends)]


def episode_starts(rows: TensorDictBase) -> torch.Tensor:
    """Return where the episodes of transitions ``[N]`` begin, ``[episodes]`` int64."""
    begins = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    begins[1:] = _ends(rows)[:-1]
    return begins.nonzero().flatten()


def _ends(rows: TensorDictBase) -> torch.Tensor:
    """Return the steps that end an episode, ``[N]``; if only agents have dones, those where all are done."""
    done = rows.get(("next", "done"), None)
    if done is not None:
        return done.reshape(len(rows), -1).any(-1)
    keys = [key for key in leaf_keys(rows) if key[0] == "next" and key[-1] == "done"]
    dones = [rows.get(key).reshape(len(rows), -1).all(-1) for key in keys]
    return torch.stack(dones).all(0)


def _check_finite(rows: TensorDictBase, env: EnvBase, world_model: WorldModel) -> None:
    """Refuse NaN and infinite numbers in the entries that the model reads and learns."""
    following = [*world_model.latent_keys, *env.reward_keys]
    keys = [*world_model.latent_keys, *env.action_keys]
    for key in (*keys, *(join("next", key) for key in following)):
        value = rows.get(key, None)
        if value is None:
            continue
        dims = ~value.reshape(len(rows), -1).isfinite()
        wrong = dims.any(-1)
        if wrong.any():
            first = int(wrong.long().argmax())
            raise ValueError(
                f"The data's {key!r} is NaN or infinite in {int(wrong.sum())} of {len(rows)} "
                f"transitions, first in number {first} (counted from 0, after what was left out), in "
                f"dim {int(dims[first].long().argmax())} of {dims.shape[1]}. Leave their episodes "
                f"out, or repair them."
            )
