"""Dynamics that draw the next frame by a diffusion model, and remember the frames before.

A frame, ``*S``, is a vector ``[n]`` or an image ``[C, H, W]``. Time runs as in any TorchRL data.
With ``K`` frames of context, ``[*B, K, *S]``, and the action ``a_t``::

    memory:  z_(t-K+1) ... z_(t-1)     a_(t-K+1) ... a_(t-1)
    root:                         z_t                        a_t
    next:                             z_(t+1), drawn of all of these
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from torchrl_wm.modules.blocks.diffusion import Denoiser, DiffusionSampler
from torchrl_wm.modules.blocks.normalizer import Normalizer, valid_rows
from torchrl_wm.modules.keys import join, unique
from torchrl_wm.modules.modes import draws

#: The frames and the actions before the present ones.
MEMORY = ("past_frames", "past_actions")


class FrameModel(nn.Module):
    """A distribution of the next frame given ``K`` frames and actions, as a diffusion model.

    Images are drawn as they are, as in DIAMOND (arXiv 2405.12399). Of vectors the change is
    drawn, in units of its own spread: a step changes an observation by little, and errors should
    be small beside that.

    Args:
        denoiser: the denoiser, conditioned on frames ``[*B, K, *S]`` and actions ``[*B, K, A]``.
        sampler: draws samples by it; three Euler steps by default.

    Keyword Args:
        changes: the normaliser of the changes of vectors; None for images.
        levels: for images in bytes, how many there are beside 0: samples are rounded to them, as
            in DIAMOND, with the gradient of what they were before.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        sampler: DiffusionSampler | None = None,
        *,
        changes: Normalizer | None = None,
        levels: int | None = None,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.sampler = DiffusionSampler() if sampler is None else sampler
        self.changes, self.levels = changes, levels

    def forward(self, frames: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Draw next frames, ``[*B, *S]``; see :class:`DiffusionSampler` for when it draws.

        Args:
            frames: the frames, ``[*B, K, *S]``, the newest one last.
            actions: the actions that followed them, ``[*B, K, A]``; the last feature is 1 where
                frame and action are real, and 0 where they are padding.
        """
        dims = self.denoiser.dims
        newest = frames.select(-dims - 1, -1)
        context = self._context(frames, actions)

        def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            return self._bounded(self.denoiser(x, sigma, *context))

        drawn = self.sampler(denoise, newest, dims, noisy=draws())
        if self.changes is None:
            return drawn
        return newest + self.changes.inverse(drawn / self.denoiser.sigma_data)

    def loss(
        self, following: torch.Tensor, frames: torch.Tensor, actions: torch.Tensor
    ) -> torch.Tensor:
        """Return the denoising loss of real next frames, ``[*B]``; nothing is sampled.

        Args:
            following: the next frames, ``[*B, *S]``.
            frames, actions: as for :meth:`forward`.
        """
        clean = following
        if self.changes is not None:
            change = following - frames.select(-self.denoiser.dims - 1, -1)
            clean = self.denoiser.sigma_data * self.changes(change)
        return self.denoiser.loss(clean, *self._context(frames, actions))

    def _context(
        self, frames: torch.Tensor, actions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return frames and actions as the network reads them."""
        if self.changes is None:
            return frames / self.denoiser.sigma_data, actions
        # The newest frame, and by how much each of the real ones before it changed.
        steps = self.changes(frames[..., 1:, :] - frames[..., :-1, :])
        steps = steps * actions[..., :-1, -1:]
        return torch.cat([steps, frames[..., -1:, :]], -2), actions

    def _bounded(self, image: torch.Tensor) -> torch.Tensor:
        """Return images between -1 and 1, of bytes that there are; vectors as they are."""
        if self.changes is not None:
            return image
        image = image.clamp(-1, 1)
        if self.levels is None:
            return image
        half = self.levels / 2
        rounded = ((image.detach() + 1) * half).round() / half - 1
        return image + (rounded - image.detach())


class DiffusionDynamics(TensorDictSequential):
    """The dynamics of a diffusion world model, as DIAMOND (arXiv 2405.12399).

    The latent is the newest frame. The ``K - 1`` frames before it, and the actions that followed
    them, are memory: give ``memory=dynamics.memory`` and ``initial_state=dynamics.initial_memory``
    to the :class:`~torchrl_wm.WorldModel`. So one frame is recorded for each step, where a latent of
    all frames would record each of them ``K`` times. An episode, or an imagination that begins at
    a single frame, begins with padding, which is zero.

    Two modules run one after the other: one moves the memory, and the other draws the frame. Where
    real frames are filtered and nobody needs predictions, the filter runs the first alone.

    ================================  ==========================  ================================
    entry                             shape                       what
    ================================  ==========================  ================================
    ``frame``                         ``[*B, *S]``                the newest frame, a latent
    ``past_frames``                   ``[*B, K - 1, *S]``         the frames before, memory
    ``past_actions``                  ``[*B, K - 1, A + 1]``      their actions, memory; the last
                                                                  number is 1 if they are no padding
    ``("next", frame)``               ``[*B, *S]``                the next frame, drawn
    ================================  ==========================  ================================

    Args:
        model: draws frames.
        actions: joins the actions to ``[*B, A]``, with the attribute ``out_features``, such as a
            :class:`JoinEntries`.
        frame_shape: ``*S``.

    Keyword Args:
        context: ``K``, at least 1. With 1 there is no memory.
        frame_key: the latent.
        action_keys: the actions.
        memory_keys: the memory: frames, and actions.

    Raises:
        ValueError: if ``context`` is below 1.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.data import Unbounded
        >>> from torchrl_wm.modules import (
        ...     Denoiser, DenoiserMLP, DiffusionDynamics, Entry, FrameModel, JoinEntries, Normalizer
        ... )
        >>> actions = JoinEntries([Entry.from_spec("action", Unbounded((2,)))])
        >>> network = DenoiserMLP(3, context=4, action_size=3, hidden=(32,))
        >>> model = FrameModel(Denoiser(network), changes=Normalizer(3).fit(torch.randn(9, 3)))
        >>> dynamics = DiffusionDynamics(model, actions, (3,), context=4)
        >>> start = dynamics.initial_memory.expand(5)
        >>> start = start.update({"frame": torch.randn(5, 3), "action": torch.randn(5, 2)})
        >>> dynamics(start)["next", "frame"].shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        model: FrameModel,
        actions: nn.Module,
        frame_shape: Sequence[int],
        *,
        context: int = 4,
        frame_key: NestedKey = "frame",
        action_keys: Sequence[NestedKey] = ("action",),
        memory_keys: tuple[NestedKey, NestedKey] = MEMORY,
    ) -> None:
        if context < 1:
            raise ValueError(
                f"context is the number of frames that the next one is drawn of, at least 1 (the "
                f"newest); got {context}. DIAMOND has 4."
            )
        frame_key, *action_keys = unique([frame_key, *action_keys])
        memory = unique(memory_keys) if context > 1 else []
        reads = [frame_key, *memory, *action_keys]
        dims, moved = len(frame_shape), [join("next", key) for key in memory]
        parts = [
            TensorDictModule(
                _Draw(model, actions, dims, bool(memory)),
                reads,
                [join("next", frame_key)],
            )
        ]
        if memory:
            parts.insert(0, TensorDictModule(_Move(actions, dims), reads, moved))
        super().__init__(*parts)
        self.context, self.frame_shape = context, tuple(frame_shape)
        self.frame_key, self.action_keys = frame_key, list(action_keys)
        #: The keys of the memory; none with a context of 1.
        self.memory = memory
        #: What the normalisers are fitted to.
        self.normalizer_keys = [frame_key, join("next", frame_key)]

    @property
    def model(self) -> FrameModel:
        """The model of the next frame."""
        return self[-1].module.model

    @property
    def actions(self) -> nn.Module:
        """The module that joins the actions."""
        return self[-1].module.actions

    @property
    def initial_memory(self) -> TensorDictBase | None:
        """The memory at the beginning of an episode: padding, without batch dims; None without one."""
        if not self.memory:
            return None
        before = self.context - 1
        frames, actions = self.memory
        out = TensorDict({})
        out.set(frames, torch.zeros(before, *self.frame_shape))
        return out.set(actions, torch.zeros(before, self.actions.out_features + 1))

    def denoising_loss(
        self,
        frames: torch.Tensor,
        actions: Sequence[torch.Tensor],
        following: torch.Tensor,
        pieces: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the denoising loss of each real next frame, given the real frames before it.

        Args:
            frames: the frames, ``[*B, T, *S]``; ``[*B, *S]`` with a context of 1.
            actions: the actions, ``[*B, T, ...]`` for each key.
            following: the next frames, as ``frames``.
            pieces: a number for each step, ``[*B, T]``: only frames of the same number, without
                another in between, are context of each other. All are by default.

        Returns:
            ``[*B, T]``.
        """
        dims = len(self.frame_shape)
        joined = with_flag(self.actions(*actions))
        if not self.memory:
            before = frames.unsqueeze(-dims - 1), joined.unsqueeze(-2)
        else:
            before = (
                stacked(frames, self.context, dims, pieces),
                stacked(joined, self.context, 1, pieces),
            )
        return self.model.loss(following, *before)

    def fit_normalizers(self, batch: TensorDictBase) -> None:
        """Fit the normaliser of changes to real transitions, ``[*B]``, of encoded frames."""
        changes, batch = self.model.changes, valid_rows(batch)
        if changes is not None:
            before, following = (batch.get(key) for key in self.normalizer_keys)
            changes.fit(following - before)


class _Move(nn.Module):
    """What is remembered after a step: the oldest frame and action go, the present ones come."""

    def __init__(self, actions: nn.Module, dims: int) -> None:
        super().__init__()
        self.actions, self.dims = actions, dims

    def forward(
        self,
        frame: torch.Tensor,
        frames: torch.Tensor,
        actions: torch.Tensor,
        *newest: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        frames = _joined(frames, frame, self.dims)
        actions = _joined(actions, with_flag(self.actions(*newest)), 1)
        time = frames.ndim - self.dims - 1
        return frames.narrow(time, 1, frames.shape[time] - 1), actions[..., 1:, :]


class _Draw(nn.Module):
    """The next frame, drawn of the frames and the actions before it."""

    def __init__(
        self, model: FrameModel, actions: nn.Module, dims: int, remembers: bool
    ) -> None:
        super().__init__()
        self.model, self.actions = model, actions
        self.dims, self.remembers = dims, remembers

    def forward(self, frame: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        if self.remembers:
            frames, actions, *newest = rest
            frames = _joined(frames, frame, self.dims)
            actions = _joined(actions, with_flag(self.actions(*newest)), 1)
        else:
            frames = frame.unsqueeze(-self.dims - 1)
            actions = with_flag(self.actions(*rest)).unsqueeze(-2)
        return self.model(frames, actions)


def with_flag(actions: torch.Tensor) -> torch.Tensor:
    """Return joined actions ``[*B, A]`` with a 1 beside them, ``[*B, A + 1]``: they are no padding."""
    return torch.cat([actions, torch.ones_like(actions[..., :1])], -1)


def stacked(
    values: torch.Tensor, count: int, dims: int, pieces: torch.Tensor | None = None
) -> torch.Tensor:
    """Return each step of sequences with the steps before it; zero where there is none.

    Args:
        values: ``[*B, T, *S]``.
        count: the number of steps ``K``.
        dims: the number of dims of ``*S``.
        pieces: ``[*B, T]``, which of the pieces of its sequence a step belongs to: a rising
            number. No stack goes beyond a piece.

    Returns:
        ``[*B, T, K, *S]``, the newest step last.

    Examples:
        >>> import torch
        >>> from torchrl_wm.modules.blocks.diffusion_dynamics import stacked
        >>> stacked(torch.tensor([1, 2, 3, 4]), 3, 0, torch.tensor([0, 0, 0, 1]))
        tensor([[0, 0, 1],
                [0, 1, 2],
                [1, 2, 3],
                [0, 0, 4]])
    """
    time = values.ndim - dims - 1
    length = values.shape[time]
    steps = torch.arange(length, device=values.device)
    out = []
    for back in reversed(range(count)):
        if not back:
            out.append(values)
            continue
        known = steps >= back
        if pieces is not None:
            known = known & (pieces == pieces.roll(back, -1))
        known = known.reshape(*known.shape, *(1,) * dims)
        earlier = values.roll(back, time)
        out.append(torch.where(known, earlier, torch.zeros_like(earlier)))
    return torch.stack(out, time + 1)


def _joined(before: torch.Tensor, newest: torch.Tensor, dims: int) -> torch.Tensor:
    """Return ``[*B, K - 1, *S]`` and ``[*B, *S]`` as ``[*B, K, *S]``."""
    return torch.cat([before, newest.unsqueeze(-dims - 1)], -dims - 1)
