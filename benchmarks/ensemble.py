"""What an ensemble's forward and backward cost: ratios, everything measured in this process.

    python benchmarks/ensemble.py --out docs/benchmarks/ensemble.md

7 members of 4 layers of 200, as in PETS and MBPO. The floor is the same arithmetic on bare
tensors: one batched matmul with bias per layer, and the activations. "Member loop" calls
ordinary networks one after the other and stacks what they give; "matmul, then add" is how
mbrl-lib's ensemble layer computes. Every loop runs on the same weights and input. On one CPU
thread it is the processor's time that counts, so that other work on the machine does not.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from common import Loop, machine, measure
from torch import nn
from torchrl_wm.modules import EnsembleMLP

MEMBERS, INPUTS, OUTPUTS, HIDDEN = 7, 23, 36, (200, 200, 200, 200)


def bare(network: EnsembleMLP, value: torch.Tensor) -> torch.Tensor:
    """The arithmetic alone."""
    value = value.expand(MEMBERS, *value.shape)
    *inner, last = ((layer.weight, layer.bias) for layer in network.layers)
    for weight, bias in inner:
        value = F.silu(torch.baddbmm(bias, value, weight))
    return torch.baddbmm(last[1], value, last[0])


def matmul_then_add(network: EnsembleMLP, value: torch.Tensor) -> torch.Tensor:
    """As :func:`bare`, with the bias added by an operation of its own."""
    *inner, last = ((layer.weight, layer.bias) for layer in network.layers)
    for weight, bias in inner:
        value = F.silu(value.matmul(weight) + bias)
    return value.matmul(last[0]) + last[1]


class MemberLoop(nn.Module):
    """Ordinary networks with the weights of an ensemble's members."""

    def __init__(self, network: EnsembleMLP) -> None:
        super().__init__()
        self.members = nn.ModuleList()
        for number in range(MEMBERS):
            parts: list[nn.Module] = []
            for layer in network.layers:
                linear = nn.Linear(layer.in_features, layer.out_features)
                linear.weight.data.copy_(layer.weight[number].T)
                linear.bias.data.copy_(layer.bias[number, 0])
                parts += [linear, nn.SiLU()]
            self.members.append(nn.Sequential(*parts[:-1]))

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return torch.stack([member(value) for member in self.members])


def loops_of(batch: int, device: torch.device) -> dict[str, Loop]:
    """Forward and backward of each, by name."""
    torch.manual_seed(0)
    network = EnsembleMLP(MEMBERS, INPUTS, OUTPUTS, hidden=HIDDEN).to(device)
    members = MemberLoop(network).to(device)
    value = torch.randn(batch, INPUTS, device=device)
    functions = {
        "floor": lambda: bare(network, value),
        "EnsembleMLP": lambda: network(value),
        "member loop": lambda: members(value),
        "matmul, then add": lambda: matmul_then_add(network, value),
    }
    expected = functions["floor"]()
    for name, function in functions.items():
        torch.testing.assert_close(function(), expected, rtol=1e-3, atol=1e-4, msg=name)

    def forward_and_backward(function: Loop, parameters: list[nn.Parameter]) -> Loop:
        @torch.enable_grad()
        def run() -> None:
            for parameter in parameters:
                parameter.grad = None
            function().sum().backward()
            if device.type == "cuda":
                torch.cuda.synchronize()

        return run

    trained = {name: network for name in functions} | {"member loop": members}
    return {
        name: forward_and_backward(function, list(trained[name].parameters()))
        for name, function in functions.items()
    }


def rows(batches: list[int], device: torch.device, seconds: float) -> list[str]:
    """The table, a row for each batch size."""
    table = [
        "| batch | floor, us | EnsembleMLP | member loop | matmul, then add "
        "| member loop / EnsembleMLP |",
        "|---|---|---|---|---|---|",
    ]
    for batch in batches:
        # One thread of a machine that has other work, too.
        alone = device.type == "cpu" and torch.get_num_threads() == 1
        clock = time.process_time if alone else time.perf_counter
        best = measure(loops_of(batch, device), seconds, clock)
        floor = best.pop("floor")
        ratios = " | ".join(f"{seconds / floor:.2f}" for seconds in best.values())
        faster = best["member loop"] / best["EnsembleMLP"]
        table.append(f"| {batch} | {floor * 1e6:.0f} | {ratios} | {faster:.2f} |")
        print(table[-1], flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 256, 1024])
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    where = machine()
    if device.type == "cuda":
        where = f"{torch.cuda.get_device_name(device)}; {where}"
    lines = [
        f"Forward and backward of {MEMBERS} members of {'x'.join(map(str, HIDDEN))}, as ratios to "
        f"the floor. {where}.",
        "",
        *rows(arguments.batches, device, arguments.seconds),
    ]
    if arguments.out is not None:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
