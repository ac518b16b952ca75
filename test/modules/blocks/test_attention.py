"""The causal transformer: one pass over sequences, and the same step by step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from torchrl_wm.modules import CausalTransformer


def made(context: int = 4, tokens: int = 1) -> tuple[CausalTransformer, torch.Tensor]:
    torch.manual_seed(0)
    transformer = CausalTransformer(8, layers=2, heads=2, context=context)
    return transformer, transformer.initial_cache(tokens)


def stepped(transformer, cache, tokens, begins) -> torch.Tensor:
    batch, length = tokens.shape[:2]
    empty = cache.expand(batch, *cache.shape[1:])
    cache, count, outs = empty, torch.zeros(batch, 1, dtype=torch.int64), []
    for t in range(length):
        anew = begins[:, t] if t else torch.zeros(batch, dtype=torch.bool)
        count = torch.where(anew[:, None], 0, count)
        cache = torch.where(anew.reshape(-1, *(1,) * 6), empty, cache)
        out, cache = transformer.step(tokens[:, t], cache, count)
        outs.append(out)
        count = count + 1
    return torch.stack(outs, 1)


@settings(max_examples=60)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 9),
    number=st.integers(1, 3),
    context=st.integers(1, 6),
    places=st.lists(st.integers(0, 26), max_size=3),
    grad=st.booleans(),
)
def test_steps_are_the_pass(batch, length, number, context, places, grad) -> None:
    transformer, cache = made(context, number)
    tokens = torch.randn(batch, length, number, 8)
    begins = torch.zeros(batch, length, dtype=torch.bool)
    for place in places:
        begins.view(-1)[place % begins.numel()] = True
    with torch.set_grad_enabled(grad):
        whole = transformer(tokens, begins)
        found = stepped(transformer, cache, tokens, begins)
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)
    assert not cache.any(), "the empty cache was written to"


def test_a_step_sees_the_context_and_no_more() -> None:
    transformer, _ = made(context=3)
    tokens = torch.randn(1, 8, 1, 8)
    whole = transformer(tokens)
    for changed in range(8):
        other = tokens.clone()
        other[:, changed] = torch.randn(1, 8)
        differs = (transformer(other) != whole).flatten(2).any(-1)[0]
        # Two blocks: what a step has seen reaches those that see it.
        reach = [changed <= t < changed + 5 for t in range(8)]
        assert differs.tolist() == reach


def test_gradients_of_steps_are_those_of_the_pass() -> None:
    transformer, cache = made(tokens=2)
    tokens = torch.randn(2, 6, 2, 8)
    begins = torch.zeros(2, 6, dtype=torch.bool)
    begins[0, 3] = True
    parameters = list(transformer.parameters())
    runs = (transformer(tokens, begins), stepped(transformer, cache, tokens, begins))
    grads = [torch.autograd.grad(run.pow(2).sum(), parameters) for run in runs]
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_without_a_gradient_the_cache_is_written_in_place() -> None:
    transformer, cache = made()
    cache = cache.repeat(3, *(1,) * 6)
    count = torch.zeros(3, 1, dtype=torch.int64)
    with torch.no_grad():
        _, following = transformer.step(torch.randn(3, 1, 8), cache, count)
    assert following is cache and cache.any()


def test_heads_divide_the_width() -> None:
    with pytest.raises(ValueError, match="heads=3 and width=8"):
        CausalTransformer(8, heads=3)
