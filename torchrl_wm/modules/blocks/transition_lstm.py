"""An LSTM over transitions, which heads judge by: as DIAMOND's model of rewards and ends."""

from __future__ import annotations

import torch
from torch import nn


class TransitionLSTM(nn.Module):
    """An LSTM that reads one transition a step: frame, action and next frame.

    A frame may not show what a reward or an end depends on, such as how many lives were left.
    DIAMOND (arXiv 2405.12399) predicts both from all transitions up to now. As (part of) a head it
    reads and writes memory::

        TensorDictModule(
            TransitionLSTM(features, actions, dims=1, size=64),
            ["frame", "action", "hidden", "cell", ("next", "frame")],
            [("next", "hidden"), ("next", "cell")],
        )

    Args:
        features: ``features(frame, next_frame, action)`` maps ``[N, *S]``, ``[N, *S]`` and
            ``[N, A]`` to ``[N, out_features]``; it has the attribute ``out_features``.
        actions: joins the actions to ``[*B, A]``.

    Keyword Args:
        dims: the number of dims of a frame, ``*S``.
        size: that of the LSTM, ``L``.

    Examples:
        >>> import torch
        >>> from torchrl.data import Unbounded
        >>> from torchrl_wm.modules import Entry, JoinEntries, TransitionLSTM
        >>> class Features(torch.nn.Module):
        ...     out_features = 8
        ...     def forward(self, frame, following, action):
        ...         return torch.cat([frame, following, action], -1)
        >>> actions = JoinEntries([Entry.from_spec("action", Unbounded((2,)))])
        >>> lstm = TransitionLSTM(Features(), actions, dims=1, size=4)
        >>> frame, action, state = torch.randn(5, 3), torch.randn(5, 2), torch.zeros(5, 4)
        >>> hidden, cell = lstm(frame, action, state, state, frame)
        >>> hidden.shape
        torch.Size([5, 4])
    """

    def __init__(
        self, features: nn.Module, actions: nn.Module, *, dims: int, size: int
    ) -> None:
        super().__init__()
        self.features, self.actions, self.dims = features, actions, dims
        self.cell = nn.LSTMCell(features.out_features, size)

    def forward(
        self, frame: torch.Tensor, *rest: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the next state of the LSTM, ``[*B, L]`` twice.

        Args:
            frame: ``[*B, *S]``.
            rest: the actions, ``[*B, ...]`` each; the hidden state and the cell before,
                ``[*B, L]``; and the next frame, ``[*B, *S]``.
        """
        *actions, hidden, cell, following = rest
        lead = frame.shape[: frame.ndim - self.dims]
        rows = (frame, following, self.actions(*actions), hidden, cell)
        if len(lead) != 1:
            rows = [row.reshape(-1, *row.shape[len(lead) :]) for row in rows]
        frame, following, action, *state = rows
        state = self.cell(self.features(frame, following, action), tuple(state))
        return tuple(part.reshape(*lead, part.shape[-1]) for part in state)
