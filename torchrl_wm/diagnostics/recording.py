"""Recorded episodes as an imagined env sees them: checked, filtered, cut into windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Union

import torch
from tensordict import NestedKey, TensorDictBase

from torchrl.envs import EnvBase

from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.modules.blocks.penalty import penalty_paused
from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import join, leaf_keys, missing_from, unique
from torchrl_wm.modules.modes import evaluation_mode
from torchrl_wm.modules.world_model.filtering import episode_begins
from torchrl_wm.modules.world_model.flat import Placement, to_tensordict

Entries = dict[NestedKey, torch.Tensor]

#: The data of diagnostics: steps ``[*B, T]``, or a list of them, of different lengths.
Episodes = Union[TensorDictBase, Sequence[TensorDictBase]]

#: The entry of the next latents that a recurrent model filters from the recorded observations.
FILTERED = "_filtered"

#: The entry that says where in the recording a step is, for the memory of a model there.
_PLACE = "_place"

#: How many frames a recurrent model has seen where it begins to imagine, if there are as many.
CONTEXT = 5

#: How many imagined numbers are held in memory at once.
_NUMBERS_AT_ONCE = 30_000_000


@dataclass(frozen=True)
class Recording:
    """Episodes that predictions start from and are compared with.

    For a recurrent model, the latents of all steps are filtered from the recorded
    observations, whatever latents were recorded.

    Args:
        env: the imagined env.
        steps: the episodes, ``[N, T]``, on the env's device.
        keys: the observations that are compared; empty if latents are.
        batch_size: the batch size of the episodes as they were given, ``[*B, T]``.
    """

    env: WorldModelEnv
    steps: TensorDictBase
    keys: list[NestedKey]
    batch_size: torch.Size

    @classmethod
    def of(cls, env: WorldModelEnv, episodes: Episodes, name: str) -> Recording:
        """Check the arguments of the diagnostic called ``name``.

        Args:
            env: an imagined env of batch size ``[]``.
            episodes: ``[*B, T]``, or a list of them.

        Raises:
            TypeError: if ``env`` is no WorldModelEnv, or the episodes are of another type.
            ValueError: if it is batch-locked, or the episodes have no time dim.
            KeyError: if the episodes lack actions.
        """
        check_env(env, name)
        episodes = as_rows(episodes, name)
        missing = missing_from(episodes, env.action_keys)
        if missing:
            raise MissingEntryError(
                f"The episodes lack the actions {missing}; they have {leaf_keys(episodes)}."
            )
        steps = episodes.reshape(-1, episodes.batch_size[-1]).detach()
        if env.device is not None and steps.device != env.device:
            steps = steps.to(env.device)
        model = env.world_model
        observed = observed_keys(env)
        keys = [k for k in observed if steps.get(join("next", k), None) is not None]
        observations = unique(model.encoder.in_keys)
        inputs = [*observations, *(join("next", key) for key in observations)]
        if model.is_recurrent and not missing_from(steps, inputs):
            with torch.no_grad(), evaluation_mode(model):
                # Without a posterior, predictions are of no use: no sampler runs.
                corrects = model.posterior is not None
                filtered = model.filter.observe_sequence(steps, corrects, ())
                ahead, latents = filtered.get("next"), model.latent_keys
                following = ahead.select(*latents, strict=False)
                if not corrects:  # what the encoder writes was seen, not predicted
                    seen = model.encoder(steps.get("next").select(*observations))
                    following.update(seen.select(*latents, strict=False))
            steps = steps.copy().update(filtered.select(*model.latent_keys))
            steps.set(FILTERED, following)
            if model.memory_keys:
                places = torch.arange(steps.numel(), device=steps.device)
                steps.set(_PLACE, places.reshape(steps.batch_size))
        return cls(env, steps, keys, episodes.batch_size)

    @property
    def valid(self) -> torch.Tensor:
        """The steps without padding, ``[N, T]`` bool."""
        mask = self.steps.get(("collector", "mask"), None)
        if mask is None:
            device = self.steps.device
            return torch.ones(self.steps.batch_size, dtype=torch.bool, device=device)
        return mask.reshape(self.steps.batch_size)

    @property
    def done(self) -> torch.Tensor:
        """The steps that end an episode, ``[N, T]`` bool."""
        return ends(self.env, self.steps)

    @property
    def ages(self) -> torch.Tensor:
        """The numbers of steps since the episodes began, as far as the rows show, ``[N, T]`` int64."""
        done = self.done
        time = torch.arange(done.shape[1], device=done.device).expand(done.shape)
        begins = torch.cat([torch.ones_like(done[:, :1]), done[:, :-1]], 1)
        return time - (time * begins).cummax(1).values

    @property
    def episodes(self) -> torch.Tensor:
        """The number of each step's episode, ``[N, T]`` int64."""
        begins = self.ages == 0
        return (begins.flatten().long().cumsum(0) - 1).reshape(begins.shape)

    def transitions(self) -> TensorDictBase:
        """Return all steps without padding, ``[M]``."""
        self.check_any()
        return self.steps[self.valid]

    def windows(self, horizon: int, stride: int = 1) -> TensorDictBase:
        """Return all windows of ``horizon`` steps that lie within one episode, ``[W, H]``."""
        return self.steps[self.window_index(horizon, stride)]

    def window_index(
        self, horizon: int, stride: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows and times of the windows, ``[W, 1]`` and ``[W, H]`` int64."""
        rows, length = self.steps.batch_size
        for name, value in (("horizon", horizon), ("stride", stride)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, got {value!r}.")
        if horizon < 1 or length < horizon:
            raise ValueError(
                f"No window of horizon={horizon} steps fits into episodes of {length} steps "
                f"(time is the last dim)."
            )
        if stride < 1:
            raise ValueError(f"stride must be at least 1, got {stride}.")
        starts = torch.arange(0, length - horizon + 1, stride)
        index = starts[:, None] + torch.arange(horizon)  # [S, H]
        index = index.to(self.valid.device)
        # The last step of a window may end the episode.
        crosses = self.done[:, index][..., :-1].any(-1)
        keep = self.valid[:, index].all(-1) & ~crosses  # [N, S]
        if not keep.any():
            raise ValueError(
                f"No window of horizon={horizon} steps lies within one episode. Take a shorter "
                f"horizon, or longer episodes."
            )
        row, start = keep.nonzero(as_tuple=True)
        return row[:, None], index[start]

    def longest_window(self) -> int:
        """Return how many steps the longest episode has."""
        self.check_any()
        longest = run = torch.zeros(len(self.steps), dtype=torch.long)
        valid, done = self.valid.cpu(), self.done.cpu()
        for time in range(valid.shape[1]):
            run = torch.where(valid[:, time], run + 1, 0)
            longest = torch.maximum(longest, run)
            run = torch.where(done[:, time], 0, run)
        return int(longest.max())

    def check_any(self) -> None:
        """Refuse episodes that are all padding."""
        if not self.valid.any():
            raise ValueError(
                "There is nothing to compare: the episodes' ('collector', 'mask') calls every "
                "step invalid."
            )

    def state(self, steps: TensorDictBase) -> TensorDictBase:
        """Return what predictions of these steps start from, with the model's memory there.

        Args:
            steps: recorded steps, ``[M]``. Memory begins anew where none is known.
        """
        # Other entries (such as an image in bytes that is decoded as floats) are left out.
        state = steps.select(*self.env.start_keys, strict=False)
        places = steps.get(_PLACE, None)
        return state if places is None else state.update(self._memory(places))

    @torch.no_grad()
    def _memory(self, places: torch.Tensor) -> TensorDictBase:
        """Return the memory at these places of the recording, ``[M]``."""
        model, length = self.env.world_model, self.steps.batch_size[-1]
        found: dict[NestedKey, torch.Tensor] = {}
        with evaluation_mode(model):
            for time, state in enumerate(model.filter.states(self.steps)):
                here = (places % length == time).nonzero().squeeze(-1)
                for key in model.memory_keys if len(here) else ():
                    value = state[key]
                    shape = (len(places), *value.shape[1:])
                    kept = found.setdefault(key, value.new_empty(shape))
                    # A copy: later steps may write over it.
                    kept[here] = value[places[here] // length]
        return to_tensordict(found, Placement(places.shape, places.device))

    def real(self, steps: TensorDictBase) -> Entries:
        """Return what predictions of these steps are compared with, ``[..., *feature]`` by key.

        These are the observations below "next", or the latents of the next
        observations if the env has no observations.
        """
        if self.keys:
            return {key: steps.get(join("next", key)) for key in self.keys}
        env, model = self.env, self.env.world_model
        inputs = unique(model.encoder.in_keys)
        if missing_from(steps, [join("next", key) for key in inputs]):
            raise ValueError(
                f"There is nothing to compare: the imagined env has "
                f"{list(env.observation_spec.keys(True, True))}, and the episodes have "
                f"{leaf_keys(steps)}. Record {[join('next', k) for k in inputs]}."
            )
        if model.is_recurrent:
            latents = steps.get(FILTERED)
        else:
            with torch.no_grad(), evaluation_mode(model):
                latents = model.encode(steps.get("next").select(*inputs))
        found = {key: latents.get(key, None) for key in env.latent_keys}
        return {key: value for key, value in found.items() if value is not None}

    def rewards(self, steps: TensorDictBase) -> Entries:
        """Return the recorded rewards, ``[..., *feature]`` by key; empty if none were recorded."""
        found = {k: steps.get(join("next", k), None) for k in self.env.reward_keys}
        return {key: value for key, value in found.items() if value is not None}


def as_rows(episodes: Episodes, name: str) -> TensorDictBase:
    """Return episodes as one tensordict ``[*B, T]``.

    Args:
        episodes: such a tensordict, which is returned as it is; or a list of tensordicts
            ``[*B, T]`` of any lengths, which become rows ``[N, T]`` of the greatest length,
            with padding marked in ``("collector", "mask")``.
        name: the name of the diagnostic, for errors.

    Raises:
        TypeError: if they are neither.
        ValueError: if there is no step, or an episode has no time dim, or other shapes than the
            first.
        KeyError: if an episode lacks entries that others have.
    """
    if isinstance(episodes, TensorDictBase):
        _check_time(episodes, name)
        return episodes
    is_list = isinstance(episodes, (list, tuple))
    others = (
        [e for e in episodes if not isinstance(e, TensorDictBase)] if is_list else []
    )
    if not is_list or others:
        what = (
            f"a list with {type(others[0]).__name__}"
            if others
            else type(episodes).__name__
        )
        raise TypeError(
            f"{name} takes recorded episodes as a tensordict [*B, T], or a list of tensordicts, "
            f"got {what}. Arrays and buffers are read by "
            f"torchrl_wm.trainers.load_transitions(data)."
        )
    if not episodes:
        raise ValueError(f"{name} was given no episode: the list is empty.")
    for number, episode in enumerate(episodes):
        _check_time(episode, f"{name} of a list (episode {number})")
    longest = max(episode.batch_size[-1] for episode in episodes)
    rows = [_padded(episode, longest) for episode in episodes]
    wanted = {key: rows[0].get(key).shape[2:] for key in leaf_keys(rows[0])}
    for number, row in enumerate(rows):
        found = {key: row.get(key).shape[2:] for key in leaf_keys(row)}
        if found.keys() != wanted.keys():
            raise MissingEntryError(
                f"The episodes given to {name} have different entries: episode 0 and episode "
                f"{number} do not share {sorted(found.keys() ^ wanted.keys(), key=str)}. Give "
                f"all of them the same, episode.select(...)."
            )
        for key, shape in found.items():
            if shape != wanted[key]:
                raise ValueError(
                    f"{key!r} has the shape {tuple(wanted[key])} per step in episode 0 of those "
                    f"given to {name}, and {tuple(shape)} in episode {number}."
                )
    return torch.cat(rows)


def _check_time(episodes: TensorDictBase, name: str) -> None:
    if not episodes.batch_dims or not episodes.batch_size.numel():
        raise ValueError(
            f"{name} needs episodes of batch size [*B, T] with at least one step, time last, "
            f"as rollouts return them; got {tuple(episodes.batch_size)}."
        )


def _padded(episode: TensorDictBase, length: int) -> TensorDictBase:
    """Return an episode as rows ``[N, length]``, padded with its last step, which is masked out."""
    rows = episode.reshape(-1, episode.batch_size[-1]).copy()
    number, steps = rows.batch_size
    mask = rows.get(("collector", "mask"), None)
    if mask is None:
        mask = torch.ones(number, steps, dtype=torch.bool, device=rows.device)
    mask = mask.reshape(number, steps)
    if steps < length:
        last = rows[:, -1:].expand(number, length - steps)
        rows = torch.cat([rows, last], 1)
        mask = torch.cat([mask, mask.new_zeros(number, length - steps)], 1)
    return rows.set(("collector", "mask"), mask)


def check_env(env: WorldModelEnv, name: str) -> None:
    """Refuse anything but an imagined env without a fixed batch size."""
    if not isinstance(env, WorldModelEnv):
        raise TypeError(
            f"{name} needs a WorldModelEnv, got {type(env).__name__}. Wrap a world model, "
            f"WorldModelEnv(world_model, real_env, batch_size=[]); of a TransformedEnv pass its "
            f"base_env."
        )
    if env.batch_locked:
        raise ValueError(
            f"{name} needs an env of any batch size, got one of "
            f"{tuple(env.batch_size)}. Make it with WorldModelEnv(..., batch_size=[])."
        )


def observed_keys(env: WorldModelEnv) -> list[NestedKey]:
    """Return the observations that an imagined env shows, without latents that only the model has."""
    own = set(env.latent_keys) - set(unique(env.world_model.encoder.in_keys))
    shown = unique(env.observation_spec.keys(True, True))
    return [key for key in shown if key not in own]


def ends(env: EnvBase, steps: TensorDictBase) -> torch.Tensor:
    """Return the last steps of episodes, ``[*B, T]`` bool.

    These are the steps that are done, and those before a step that begins an episode: the
    done of an episode that was sliced or cut may not have been recorded.
    """
    return ends_of(env.done_keys, steps)


def ends_of(done_keys: Sequence[NestedKey], steps: TensorDictBase) -> torch.Tensor:
    """Return the same for given done entries."""
    out = torch.zeros(steps.batch_size, dtype=torch.bool, device=steps.device)
    for key in done_keys:
        done = steps.get(join("next", key), None)
        if done is not None:
            out |= done.reshape(*steps.batch_size, -1).any(-1)
    begins = episode_begins(steps)
    if begins is not None:
        out[..., :-1] |= begins[..., 1:]
    return out


class Imagined(NamedTuple):
    """Imagined windows.

    Args:
        steps: the mean over particles, ``[W, H, *feature]`` by key.
        start: what imagination started from, ``[W, *feature]`` by key.
    """

    steps: Entries
    start: Entries


@torch.no_grad()
def imagine_windows(
    recording: Recording,
    windows: TensorDictBase,
    keys: list[NestedKey],
    particles: int = 1,
) -> Imagined:
    """Imagine windows with their own actions, and return the mean over particles.

    Args:
        recording: what the windows are of.
        windows: its steps, ``[W, H]``; predictions start from the first.
        keys: the imagined entries to return, without the "next".
        particles: how many times each window is imagined, ``P``.
    """
    positive(particles, "particles")
    horizon = windows.batch_size[-1]
    specs = recording.env.observation_spec.values(True, True)
    numbers = sum(spec.shape.numel() for spec in specs)
    at_once = max(1, _NUMBERS_AT_ONCE // (2 * numbers * particles * horizon))
    steps: dict[NestedKey, list[torch.Tensor]] = {}
    starts: dict[NestedKey, list[torch.Tensor]] = {}
    for part in windows.split(at_once, 0):
        imagined = imagine_particles(recording, part, particles)
        for key in keys:
            value = imagined.get(join("next", key))
            if particles > 1 and not value.is_floating_point():
                value = value.float()
            mean = value[0] if particles == 1 else value.mean(0)
            steps.setdefault(key, []).append(mean)
            start = imagined.get(key, None)
            if start is not None:
                starts.setdefault(key, []).append(start[0, :, 0])
    return Imagined(_joined(steps), _joined(starts))


@torch.no_grad()
def imagine_particles(
    recording: Recording, windows: TensorDictBase, particles: int
) -> TensorDictBase:
    """Imagine windows of a recording, ``[W, H]``, with their own actions, ``[P, W, H]``.

    They are held against what is real, which has no penalties.
    """
    env, start = recording.env, recording.state(windows[:, 0])
    actions = windows.select(*env.action_keys)
    number, horizon = windows.batch_size
    # Networks such as TorchRL's RSSM take one batch dim.
    with evaluation_mode(env.world_model), penalty_paused(env.world_model):
        imagined = env.imagine(
            horizon,
            tensordict=start.expand(particles, number).reshape(-1),
            actions=actions.expand(particles, number, horizon).reshape(-1, horizon),
        )
    return imagined.reshape(particles, number, horizon)


def matching(
    key: NestedKey, predicted: torch.Tensor, real: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both as numbers that can be subtracted, or raise an error that says why not.

    Images may be bytes, whose differences would wrap around.
    """
    if predicted.shape != real.shape:
        raise ValueError(
            f"The imagined {key!r} has the shape {tuple(predicted.shape)}, the recorded one "
            f"{tuple(real.shape)}. Record what the model was made for: the transforms of the "
            f"env that collects must be those of the env whose specs the model has."
        )
    if not predicted.is_floating_point():
        predicted = predicted.float()
    return predicted, real.to(predicted.dtype)


def _joined(parts: dict[NestedKey, list[torch.Tensor]]) -> Entries:
    return {key: torch.cat(values) for key, values in parts.items()}


def spread(count: int, most: int) -> torch.Tensor:
    """Return the numbers of at most ``most`` of ``count`` things, from the first to the last."""
    return torch.linspace(0, count - 1, min(count, most)).round().long()


def positive(value: int, name: str) -> None:
    """Refuse counts below one."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive int, got {value!r}.")
