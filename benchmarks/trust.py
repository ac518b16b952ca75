"""How well the report on a policy ranks policies that it sees only through a log.

    python benchmarks/trust.py run --seeds 0 1 2     # a line for each policy in docs/benchmarks/trust.csv
    python benchmarks/trust.py report                # docs/benchmarks/trust.md, from that file alone

For each seed, SAC of this package (MBPO without a model) learns Pendulum-v1, and is kept at five
stages. A log of 20,000 steps is made of 20 episodes each by random actions and by the last four
stages, with their exploration. An ensemble learns from the log for 1500 gradient steps. Then
``write_policy_report`` judges the five policies, without exploration, by log and model alone. Their
real returns are the mean of 60 episodes of 200 steps. The last stage but one is judged with what
the model does not have, too.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path

import gymnasium
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.envs import GymEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_wm import WorldModelEnv
from torchrl_wm.diagnostics import write_policy_report
from torchrl_wm.diagnostics.statistics import rank_correlation
from torchrl_wm.models import make_ensemble_world_model
from torchrl_wm.trainers import MBPOTrainer, ModelLearner
from torchrl_wm.trainers.policy_copies import copied_policy

OUT = Path(__file__).parents[1] / "docs" / "benchmarks"
STAGES = (400, 800, 1200, 1800, 2600)
GAMMA, LENGTH = 0.99, 200
#: What ranks: names of columns, and how they are called in the table.
RANKERS = {
    "fitted": "fitted Q evaluation (the score)",
    "low": "its lower end",
    "penalised": "the model's promise with penalty",
    "promised": "the model's promise",
}


def stages(seed: int) -> list[torch.nn.Module]:
    """Return SAC's policy at several stages of its learning."""
    trainer = MBPOTrainer(
        env="Pendulum-v1", seed=seed, real_share=1.0, termination="none",
        random_steps=STAGES[0], steps=STAGES[-1], evaluation_interval=0, updates_per_step=1,
        batch_size=128, policy_hidden=(64, 64), learning_rate=2e-3,
    )  # fmt: skip
    kept = []

    def keep() -> None:
        if trainer.collected_frames in STAGES:
            kept.append(copied_policy(trainer.policy, "cpu"))

    trainer.register_op("post_steps", keep)
    trainer.train()
    return kept


def episodes(
    policy, count: int, seed: int, exploration: ExplorationType
) -> TensorDictBase:
    """Return real episodes, ``[count, 200]``; of random actions without a policy.

    Gymnasium's own vector env, in this process: TorchRL's would start a process for each.
    """
    env = gymnasium.make_vec("Pendulum-v1", num_envs=count, vectorization_mode="sync")
    rng = torch.Generator().manual_seed(seed)
    seen, _ = env.reset(seed=seed)
    steps = []
    with torch.no_grad(), set_exploration_type(exploration):
        for _ in range(LENGTH):
            td = TensorDict({"observation": torch.tensor(seen)}, batch_size=[count])
            if policy is None:
                td["action"] = 4 * torch.rand(count, 1, generator=rng) - 2
            else:
                td["action"] = policy(td.copy())["action"]
            seen, reward, _, cut, _ = env.step(td["action"].numpy())
            td["next"] = TensorDict(
                {
                    "observation": torch.tensor(seen),
                    "reward": torch.tensor(reward).float()[:, None],
                    "terminated": torch.zeros(count, 1, dtype=torch.bool),
                    "truncated": torch.tensor(cut)[:, None],
                    "done": torch.tensor(cut)[:, None],
                },
                batch_size=[count],
            )
            steps.append(td)
    assert cut.all()
    return torch.stack(steps, 1)


def run(seed: int) -> list[dict[str, float]]:
    """Return a row for each policy."""
    torch.manual_seed(seed)
    began = time.process_time()
    policies = stages(seed)
    print(f"seed {seed}: policies, {time.process_time() - began:.0f} s", flush=True)
    drawn = ExplorationType.RANDOM
    makers = [None, *policies[1:]]
    log = torch.cat(
        [episodes(p, 20, 1000 * seed + n, drawn) for n, p in enumerate(makers)]
    )
    real_env = GymEnv("Pendulum-v1")
    model, loss = make_ensemble_world_model(
        real_env, members=5, hidden=(128, 128), termination="none"
    )
    ModelLearner(model, loss).fit(log.reshape(-1), 1500)
    env = WorldModelEnv(model, real_env)
    print(f"seed {seed}: made, {time.process_time() - began:.0f} s", flush=True)
    rows = []
    for stage, policy in zip(STAGES, policies):
        fixed = ExplorationType.DETERMINISTIC
        real = episodes(policy, 60, 1000 * seed + 500, fixed)["next", "reward"]
        with set_exploration_type(fixed):
            report = write_policy_report(
                env, policy, log, gamma=GAMMA, horizons=(5, 20, 100), rollouts=100
            )
        numbers = report.numbers
        discount = GAMMA ** torch.arange(LENGTH)[:, None]
        rows.append(
            {
                "seed": seed,
                "stage": stage,
                "real": float(real.sum(1).mean()),
                "real_discounted": float((real * discount).sum(1).mean()),
                "fitted": report.score,
                "low": numbers["fitted_q/least"],
                "high": numbers["fitted_q/greatest"],
                "log_value": numbers["fitted_q/the log's episodes"],
                "promised": numbers["returns/return over 100 steps"],
                "penalised": numbers["returns/with penalty, 100 steps"],
                "real_100": float((real * discount)[:, :100].sum(1).mean()),
                "beyond": numbers["disagreement/share of imagined steps beyond it"],
                "far": numbers["distance/share of imagined steps beyond it"],
                "trusted": report.trusted_steps,
                "seconds": time.process_time() - began,
            }
        )
        print({k: round(v, 3) for k, v in rows[-1].items()}, flush=True)
        print(report.verdict, flush=True)
    return rows


def going_on(row: dict[str, float]) -> float:
    """Return the real value of a policy, as if its episodes went on as they were."""
    return row["real_discounted"] / (1 - GAMMA**LENGTH)


def table(rows: list[dict[str, float]]) -> list[str]:
    """Return the lines of the page."""
    seeds = sorted({int(row["seed"]) for row in rows})
    text = [
        f"Pendulum-v1, five stages of SAC, a mixed log of 20,000 steps, {len(seeds)} seed(s), "
        f"gamma = {GAMMA}. Spearman's rank correlation with the real return:",
        "",
        "| ranked by | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean |",
        "|---" * (len(seeds) + 2) + "|",
    ]
    for key, name in RANKERS.items():
        found = []
        for seed in seeds:
            own = [row for row in rows if row["seed"] == seed]
            pair = (torch.tensor([row[k] for row in own]) for k in (key, "real"))
            found.append(float(rank_correlation(*pair)))
        cells = [f"{value:.2f}" for value in (*found, sum(found) / len(found))]
        text.append(f"| {name} | " + " | ".join(cells) + " |")
    held = sum(row["low"] <= going_on(row) <= row["high"] for row in rows)
    text += [
        "",
        f"The interval of fitted Q evaluation held the real value of {held} of {len(rows)} policies.",
        "",
        "The policies. Values are discounted, those of real and of recorded episodes as if these went "
        "on as they were; the model's promise is over 100 steps:",
        "",
        "| seed | steps of SAC | real return | real value | fitted Q | the log's | real, 100 steps | promised | with penalty | disagree | far | trusted steps |",
        "|---" * 12 + "|",
    ]
    for row in rows:
        text.append(
            f"| {row['seed']:.0f} | {row['stage']:.0f} | {row['real']:.0f} | "
            f"{going_on(row):.0f} | {row['fitted']:.0f} ({row['low']:.0f} to "
            f"{row['high']:.0f}) | {row['log_value']:.0f} | {row['real_100']:.0f} | "
            f"{row['promised']:.0f} | {row['penalised']:.0f} | {row['beyond']:.1%} | "
            f"{row['far']:.1%} | {row['trusted']:.0f} |"
        )
    return [*text, ""]


def main() -> None:
    """Run seeds, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = args.out / "trust.csv"
    rows = []
    if path.exists():
        with path.open(newline="") as file:
            rows = [
                {k: float(v) for k, v in row.items()} for row in csv.DictReader(file)
            ]
    if args.command == "report":
        (args.out / "trust.md").write_text("\n".join(table(rows)))
        return
    for seed in args.seeds:
        new = run(seed)
        rows = [row for row in rows if row["seed"] != seed] + new
        rows.sort(key=lambda row: (row["seed"], row["stage"]))
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(new[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
