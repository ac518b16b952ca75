"""Mish and the softmax over groups: equal to torch's, however they are called."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from torchrl_wm.modules import Mish, NormedMLP, SimNorm
from torchrl_wm.modules.blocks.activations import group_softmax


def softmax(value: torch.Tensor) -> torch.Tensor:
    return value.unflatten(-1, (-1, 8)).softmax(-1).flatten(-2)


def groups(value: torch.Tensor) -> torch.Tensor:
    return group_softmax(value, 8)


PAIRS = pytest.mark.parametrize(
    "ours, theirs", [(Mish(), F.mish), (groups, softmax)], ids=["mish", "softmax"]
)


def gradient(function, value, weight):
    value = value.detach().requires_grad_()
    (grad,) = torch.autograd.grad((function(value) * weight).sum(), value)
    return grad


@PAIRS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(8,), (3, 16), (90, 128), (7, 100, 128)])
def test_values_and_gradients_are_torchs(ours, theirs, dtype, shape) -> None:
    value = 3 * torch.randn(shape, dtype=dtype)
    weight = torch.randn(shape, dtype=dtype)
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(ours(value), theirs(value), **close)
    torch.testing.assert_close(
        gradient(ours, value, weight), gradient(theirs, value, weight), **close
    )


@PAIRS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_and_small_numbers(ours, theirs, dtype) -> None:
    ends = torch.tensor([0.0, 1e-30, 1.0, 20.0, 45.0, 90.0, 1e4, 1e30], dtype=dtype)
    value = torch.cat([ends, -ends]).repeat(64, 16)
    ones = torch.ones_like(value)
    for result in (ours(value), gradient(ours, value, ones)):
        assert result.isfinite().all()
    torch.testing.assert_close(ours(value), theirs(value))
    torch.testing.assert_close(
        gradient(ours, value, ones), gradient(theirs, value, ones)
    )


@PAIRS
def test_layouts(ours, theirs) -> None:
    value = torch.randn(128, 90).t()  # not contiguous
    assert value.shape == (90, 128)
    torch.testing.assert_close(ours(value), theirs(value))
    weight = torch.ones(1, 1).expand(90, 128)
    torch.testing.assert_close(
        gradient(ours, value, weight), gradient(theirs, value, weight)
    )


@PAIRS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(ours, theirs, dtype) -> None:
    value = (3 * torch.randn(90, 128)).to(dtype)
    assert torch.equal(ours(value), theirs(value))


@PAIRS
def test_the_same_each_time(ours, theirs) -> None:
    value, weight = torch.randn(2, 90, 128).unbind()
    assert torch.equal(ours(value), ours(value))
    first, second = (gradient(ours, value, weight) for _ in range(2))
    assert torch.equal(first, second)


@PAIRS
def test_under_torch_func(ours, theirs) -> None:
    value = torch.randn(5, 90, 128)
    torch.testing.assert_close(torch.vmap(ours)(value), theirs(value))
    rows = torch.func.grad(lambda x: (ours(x) ** 2).sum())
    expected = torch.func.grad(lambda x: (theirs(x) ** 2).sum())
    torch.testing.assert_close(torch.vmap(rows)(value), torch.vmap(expected)(value))
    out = torch.func.jvp(ours, (value,), (torch.ones_like(value),))
    torch.testing.assert_close(
        out, torch.func.jvp(theirs, (value,), (torch.ones_like(value),))
    )


@PAIRS
def test_second_derivatives(ours, theirs) -> None:
    def second(function):
        value = torch.linspace(-3, 3, 90 * 128).reshape(90, 128).requires_grad_()
        (first,) = torch.autograd.grad(
            function(value).square().sum(), value, create_graph=True
        )
        return torch.autograd.grad(first.square().sum(), value)[0]

    torch.testing.assert_close(second(ours), second(theirs))


def test_forward_mode() -> None:
    value, tangent = torch.randn(2, 90, 128).unbind()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(value, tangent)
        for ours, theirs in ((Mish(), F.mish), (groups, softmax)):
            mine, other = (
                torch.autograd.forward_ad.unpack_dual(f(dual)).tangent
                for f in (ours, theirs)
            )
            torch.testing.assert_close(mine, other)


def test_batched_gradients() -> None:
    value = torch.randn(90, 128, requires_grad=True)
    weights = torch.randn(3, 90, 128)
    for ours, theirs in ((Mish(), F.mish), (groups, softmax)):
        mine, other = (
            torch.autograd.grad(f(value), value, weights, is_grads_batched=True)[0]
            for f in (ours, theirs)
        )
        torch.testing.assert_close(mine, other)


def test_networks_of_functional_parameters() -> None:
    network = NormedMLP(4, 32, [64], activation=SimNorm)
    others = [copy.deepcopy(network) for _ in range(3)]
    stacked, buffers = torch.func.stack_module_state(others)
    inputs = torch.randn(256, 4)

    def call(parameters, buffers):
        return torch.func.functional_call(network, (parameters, buffers), (inputs,))

    together = torch.vmap(call)(stacked, buffers)
    torch.testing.assert_close(together, torch.stack([n(inputs) for n in others]))


@pytest.mark.slow
def test_compiled_graphs() -> None:
    network = NormedMLP(4, 64, [128], activation=SimNorm)
    inputs = torch.randn(256, 4)
    compiled = torch.compile(network, fullgraph=True)
    outputs, gradients = [], []
    for function in (network, compiled):
        network.zero_grad()
        outputs.append(function(inputs))
        outputs[-1].square().sum().backward()
        gradients.append([p.grad.clone() for p in network.parameters()])
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
