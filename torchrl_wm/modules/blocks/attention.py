"""Causal attention over the steps of a sequence: all at once, or step by step with a cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from torchrl_wm.modules.world_model.memory import write_memory


class CausalTransformer(nn.Module):
    """A transformer over time, which sees a step and those before it.

    A step has ``K`` tokens, which see each other and those of earlier steps (block-causal). How
    long ago a step was enters as a linear bias (ALiBi, arXiv 2108.12409), so that sequences may
    be longer than those of training. :meth:`forward` makes whole sequences in one pass;
    :meth:`step` makes one step with the keys and values of those before it, which
    :meth:`initial_cache` begins. Both give the same.

    Args:
        width: the size of a token, ``D``.
        layers: the number of blocks, each attention and a network, with layer norms before them
            (arXiv 2002.04745).
        heads: the number of heads, which divides ``width``.
        context: how many steps are seen, the present one included, ``W``.
        expansion: the hidden size of the networks, in units of ``width``.

    Raises:
        ValueError: if ``heads`` does not divide ``width``.

    Examples:
        >>> import torch
        >>> from torchrl_wm.modules import CausalTransformer
        >>> transformer = CausalTransformer(8, layers=2, heads=2, context=4)
        >>> tokens = torch.randn(3, 6, 1, 8)  # [B, T, K, D]
        >>> whole = transformer(tokens)
        >>> cache = transformer.initial_cache(1).expand(3, -1, -1, -1, -1, -1, -1)
        >>> for t in range(6):
        ...     count = torch.full((3, 1), t)
        ...     out, cache = transformer.step(tokens[:, t], cache, count)
        >>> torch.allclose(out, whole[:, -1], atol=1e-5)
        True
    """

    def __init__(
        self,
        width: int,
        *,
        layers: int = 2,
        heads: int = 4,
        context: int = 16,
        expansion: int = 4,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(
                f"heads must divide width, got heads={heads} and width={width}."
            )
        self.width, self.heads, self.context = width, heads, context
        self.blocks = nn.ModuleList(
            _Block(width, heads, expansion) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        # Some heads see little but the newest steps, others nearly all alike.
        slopes = 2.0 ** -torch.linspace(0, 8, heads + 1)[:-1]
        self.register_buffer("slopes", slopes, persistent=False)

    def forward(
        self, tokens: torch.Tensor, begins: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Make whole sequences.

        Args:
            tokens: ``[B, T, K, D]``.
            begins: where episodes begin, ``[B, T]`` bool: steps see none of the episode before.

        Returns:
            What each token has become, ``[B, T, K, D]``.
        """
        batch, length, number, _ = tokens.shape
        time = torch.arange(length, device=tokens.device)
        age = time[:, None] - time  # of a key, seen from a query
        seen = (age >= 0) & (age < self.context)
        if begins is not None:
            episode = begins.cumsum(1)
            seen = seen & (episode[:, :, None] == episode[:, None])
        bias = self._bias(age, seen.reshape(-1, 1, length, length), number)
        flat = tokens.flatten(1, 2)
        for block in self.blocks:
            queries, keys, values = block.project(flat)
            flat = block(flat, queries, keys, values, bias)
        return self.norm(flat).unflatten(1, (length, number))

    def step(
        self, tokens: torch.Tensor, cache: torch.Tensor, count: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Make one step.

        Args:
            tokens: ``[B, K, D]``.
            cache: keys and values of the steps before, ``[B, layers, 2, heads, W, K, D / heads]``.
                Without a gradient it is written to in place.
            count: how many steps there were before, ``[B, 1]`` int64.

        Returns:
            What each token has become, ``[B, K, D]``, and the next cache.
        """
        slots = torch.arange(self.context, device=tokens.device)
        place = count.squeeze(-1) % self.context
        age = (place.unsqueeze(-1) - slots) % self.context  # [B, W]
        seen = (age <= count).unflatten(0, (-1, 1, 1))
        bias = self._bias(age.unflatten(0, (-1, 1, 1)), seen, tokens.shape[1])
        parts, is_new = [], False
        for layer, block in enumerate(self.blocks):
            queries, keys, values = block.project(tokens)
            new = torch.stack([keys, values], 1)  # [B, 2, heads, K, D / heads]
            given = cache[:, layer]
            part = write_memory(given, 3, place, new)
            parts.append(part)
            is_new = is_new or part is not given
            keys, values = part.flatten(3, 4).unbind(1)
            tokens = block(tokens, queries, keys, values, bias)
        if is_new:
            cache = torch.stack(parts, 1)
        return self.norm(tokens), cache

    def initial_cache(self, tokens: int) -> torch.Tensor:
        """Return the cache before the first step of ``tokens`` tokens, ``[1, layers, ...]``."""
        size = (2, self.heads, self.context, tokens, self.width // self.heads)
        return self.norm.weight.new_zeros(1, len(self.blocks), *size)

    def _bias(self, age: torch.Tensor, seen: torch.Tensor, number: int) -> torch.Tensor:
        """Return what is added to the weights of ``number`` tokens a step, ``[B, heads, Q, K]``."""
        slopes = self.slopes[:, None, None]
        bias = torch.where(seen, -slopes * age, -torch.inf)
        if number == 1:
            return bias
        bias = bias.repeat_interleave(number, -1)
        # Keys are those of several steps; queries may be those of one.
        return bias.repeat_interleave(number, -2)


class _Block(nn.Module):
    """Attention and a network, each added to its input."""

    def __init__(self, width: int, heads: int, expansion: int) -> None:
        super().__init__()
        self.heads = heads
        self.before = nn.LayerNorm(width)
        self.inputs = nn.Linear(width, 3 * width)
        self.outputs = nn.Linear(width, width)
        self.network = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, expansion * width),
            nn.GELU(),
            nn.Linear(expansion * width, width),
        )

    def project(self, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return queries, keys and values of tokens ``[B, N, D]``, ``[B, heads, N, D / heads]``."""
        parts = self.inputs(self.before(tokens)).unflatten(-1, (3, self.heads, -1))
        return parts.movedim(1, 3).unbind(1)

    def forward(
        self,
        tokens: torch.Tensor,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        bias: torch.Tensor,
    ) -> torch.Tensor:
        found = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias)
        tokens = tokens + self.outputs(found.transpose(1, 2).flatten(2))
        return tokens + self.network(tokens)
