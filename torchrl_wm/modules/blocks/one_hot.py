"""The distribution of a choice, in graphs, too."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import one_hot
from torchrl.modules import OneHotCategorical


class OneHotChoice(OneHotCategorical):
    """TorchRL's distribution of a choice, with samples that ``torch.compile`` can trace."""

    def sample(self, sample_shape: Sequence[int] = ()) -> torch.Tensor:
        drawn = torch.distributions.Categorical.sample(self, sample_shape)
        return one_hot(drawn, self.num_samples)
