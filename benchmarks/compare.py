"""What imagination and filtering cost: ratios, everything measured in this process.

    python benchmarks/compare.py --out docs/benchmarks/imagination.md

The floor is a loop that calls the same networks and keeps nothing; the hand loop keeps and
stacks what they give, on bare tensors. "TorchRL" is TorchRL's
own WorldModelEnv with its specs repaired; it is not our env under EnvBase.rollout. tensordict
0.14.3 looks for pandas on every module output, which is slow where there is none: the
heading says which case this is, and both belong into a report.
"""

from __future__ import annotations

import argparse

import common
from common import (
    compiled_variants,
    filter_variants,
    machine,
    measure,
    peak_ratio,
    variants,
)


def eager_rows(batches: list[int], horizons: list[int], seconds: float) -> list[str]:
    """The eager part of the table, a row for each setting."""
    rows = [
        "| batch | horizon | policy | done head | networks, us/step | hand loop | rollout "
        "| imagine | TorchRL | TorchRL / rollout |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for tanh_normal in (False, True):
        for done in (False, True):
            for batch in batches:
                for horizon in horizons:
                    loops = variants(batch, horizon, done=done, tanh_normal=tanh_normal)
                    best = measure(loops, seconds)
                    floor = best.pop("networks")
                    ratios = " | ".join(f"{best[k] / floor:.2f}" for k in best)
                    rows.append(
                        f"| {batch} | {horizon} | {'TanhNormal' if tanh_normal else 'MLP'} "
                        f"| {'yes' if done else 'no'} | {floor / horizon * 1e6:.0f} | {ratios} "
                        f"| {best['TorchRL'] / best['rollout']:.2f} |"
                    )
                    print(rows[-1], flush=True)
    return rows


def compiled_rows(batches: list[int], horizon: int, seconds: float) -> list[str]:
    """The compiled part: against a compiled loop on tensors that keeps the same entries."""
    rows = [
        "| batch | horizon | compiled tensor loop, us/step | compiled imagine |",
        "|---|---|---|---|",
    ]
    for batch in batches:
        best = measure(compiled_variants(batch, horizon), seconds)
        floor = best["tensor loop"]
        rows.append(
            f"| {batch} | {horizon} | {floor / horizon * 1e6:.0f} | {best['imagine'] / floor:.2f} |"
        )
        print(rows[-1], flush=True)
    return rows


def filter_rows(batches: list[int], length: int, seconds: float) -> list[str]:
    """Filtering sequences with an RSSM: against TorchRL's loop over time."""
    rows = [
        "| batch | length | backward | TorchRL's RSSMRollout, us/step | observe "
        "| observe, compiled step |",
        "|---|---|---|---|---|---|",
    ]
    for train in (False, True):
        for batch in batches:
            best = measure(filter_variants(batch, length, train=train), seconds)
            floor = best.pop("TorchRL")
            ratios = " | ".join(f"{value / floor:.2f}" for value in best.values())
            rows.append(
                f"| {batch} | {length} | {'yes' if train else 'no'} "
                f"| {floor / length * 1e6:.0f} | {ratios} |"
            )
            print(rows[-1], flush=True)
    return rows


def memory_rows(batches: list[int], horizon: int) -> list[str]:
    """Peak memory, beside the networks' activations, as a ratio to the returned tensordict."""
    rows = ["| batch | horizon | rollout | imagine |", "|---|---|---|---|"]
    for batch in batches:
        loops = variants(batch, horizon)
        ratios = [
            peak_ratio(loops[k], loops["networks"]) for k in ("rollout", "imagine")
        ]
        rows.append(f"| {batch} | {horizon} | {ratios[0]:.2f} | {ratios[1]:.2f} |")
        print(rows[-1], flush=True)
    return rows


def imagination(args: argparse.Namespace) -> list[str]:
    """The tables of imagination."""
    return [
        "Time as a ratio to the bare networks (two layers of 256, latent 64, action 6, no grad; the "
        "median over rounds in which all take turns, microseconds the minimum).",
        "",
        *eager_rows(args.batches, args.horizons, args.seconds),
        "",
        "Compiled, as a ratio to a compiled loop on tensors:",
        "",
        *compiled_rows(args.compiled_batches, max(args.horizons), args.seconds),
        "",
        "Peak memory beside the networks' activations, as a ratio to the returned tensordict:",
        "",
        *memory_rows([256, 4096], max(args.horizons)),
        "",
    ]


def main() -> None:
    parser = common.parser(__doc__, seconds=6.0)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 256, 4096])
    parser.add_argument("--horizons", type=int, nargs="+", default=[1, 5, 15])
    parser.add_argument("--compiled-batches", type=int, nargs="*", default=[1, 256])
    parser.add_argument("--filter-batches", type=int, nargs="*", default=[16, 50])
    parser.add_argument("--filter-length", type=int, default=32)
    parser.add_argument("--only", choices=["imagination", "filtering"])
    args = parser.parse_args()
    common.begin(args)
    text = [f"Machine: {machine()}.", ""]
    if args.only != "filtering":
        text += imagination(args)
    if args.only != "imagination":
        text += [
            "Filtering: an RSSM of 64 units, time as a ratio to TorchRL's RSSMRollout (its loop), which "
            "leaves out what observe does besides: the encoder and the first latents.",
            "",
            *filter_rows(args.filter_batches, args.filter_length, args.seconds),
            "",
        ]
    common.finish(args, text)


if __name__ == "__main__":
    main()
