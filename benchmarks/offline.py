"""From a log alone to a policy: MOPO on logs of policies that are random, medium, or both.

    python benchmarks/offline.py logs pendulum-random pendulum-mixed
    OMP_NUM_THREADS=1 python benchmarks/offline.py train pendulum-mixed 0
    python benchmarks/offline.py report

``logs`` records what ``train`` needs, into ``outputs/offline/``; ``train`` writes a CSV for each
log and seed into ``docs/benchmarks/offline/``; ``report`` makes the table and the figures from
those files alone. What is there already is not made again.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LOGS = ROOT / "outputs" / "offline"
OUT = ROOT / "docs" / "benchmarks" / "offline"
#: How many steps a log has.
STEPS = 20_000
SEEDS = 3

#: The SAC that acts in the medium logs: MBPO without a model, stopped at a mediocre return.
MEDIUM: dict[str, dict[str, Any]] = {
    "pendulum": {
        "env": "Pendulum-v1",
        "policy_hidden": (64, 64),
        "learning_rate": 1e-3,
        "random_steps": 400,
        "random_hold": 10,
        "updates_per_step": 2,
        "evaluation_interval": 100,
        "evaluation_episodes": 10,
        "stop_return": -900.0,
    },
    "hopper": {
        "env": "Hopper-v5",
        "random_steps": 1000,
        "updates_per_step": 1,
        "learning_rate": 1e-3,
        "evaluation_interval": 1000,
        "evaluation_episodes": 10,
        "stop_return": 800.0,
        "steps": 60_000,
    },
}
NAMES = (
    "pendulum-random",
    "pendulum-medium",
    "pendulum-mixed",
    "pendulum-narrow",
    "hopper-medium",
)


# Logs -----------------------------------------------------------------------------


def make_log(name: str, seed: int) -> Path:
    """Return the file of a log, which is recorded if it is not there."""
    import torch

    path = LOGS / f"{name}-{seed}.npz"
    if path.exists():
        return path
    torch.set_num_threads(1)
    task, kind = name.split("-")
    path.parent.mkdir(parents=True, exist_ok=True)
    say(f"{name} seed {seed}: recording")
    if kind == "mixed":
        save_log(path, [*halved(task, "random", seed), *halved(task, "medium", seed)])
        return path
    policy = medium_policy(task, seed) if kind == "medium" else None
    save_log(path, recorded(task, policy, seed, 0.3 if kind == "narrow" else 1.0))
    return path


def recorded(task: str, policy: Any, seed: int, scale: float = 1.0) -> list:
    """Return episodes of a policy that explores, ``STEPS`` steps at least; None acts at random."""
    import torch
    from torchrl.envs.utils import ExplorationType

    from torchrl_wm.trainers import make_real_env, run_episodes

    torch.manual_seed(seed)
    env = make_real_env(MEDIUM[task]["env"], seed=1000 + seed)
    key, spec = env.action_key, env.full_action_spec_unbatched[env.action_key]

    def narrow(td: Any) -> Any:
        return td.set(key, scale * spec.rand())

    acting = narrow if policy is None and scale < 1 else policy
    episodes, steps = [], 0
    while steps < STEPS:
        # Not by one call: the global random state goes on from episode to episode.
        with torch.random.fork_rng():
            torch.manual_seed(10_000 * seed + len(episodes))
            found = run_episodes(
                env,
                acting,
                1,
                first_episode=len(episodes),
                exploration=ExplorationType.RANDOM,
            )
        episodes += found
        steps += len(found[0])
    return episodes


def halved(task: str, kind: str, seed: int) -> list:
    """Return the episodes of the first half of a log."""
    from torchrl_wm.trainers import load_transitions
    from torchrl_wm.trainers.model_training import as_episodes

    found, steps = [], 0
    for episode in as_episodes(load_transitions(make_log(f"{task}-{kind}", seed))):
        if steps >= STEPS // 2:
            break
        found.append(episode)
        steps += len(episode)
    return found


def medium_policy(task: str, seed: int) -> Any:
    """Return the policy of a SAC that was stopped at a mediocre return."""
    from torchrl_wm.trainers import MBPOTrainer

    settings = {"termination": "none", "real_share": 1.0, **MEDIUM[task]}
    trainer = MBPOTrainer(**settings, seed=seed)
    trainer.train()
    row = next(r for r in trainer.metrics[::-1] if "evaluation_return" in r)
    say(f"{task} SAC seed {seed}: {row['evaluation_return']:.0f} at {row['step']}")
    return trainer.policy


def save_log(path: Path, episodes: list) -> None:
    """Write episodes as arrays."""
    import numpy as np
    import torch

    rows = torch.cat([e.reshape(-1) for e in episodes])
    following = rows["next"]
    np.savez_compressed(
        path,
        observations=rows["observation"].numpy(),
        actions=rows["action"].numpy(),
        rewards=following["reward"].numpy().squeeze(-1),
        next_observations=following["observation"].numpy(),
        terminations=following["terminated"].numpy().squeeze(-1),
        truncations=following["truncated"].numpy().squeeze(-1),
    )
    say(f"{path.name}: {summary(path)}")


def summary(path: Path) -> dict[str, float]:
    """Return the number of episodes of a log, their mean return and that of the best tenth."""
    from torchrl_wm.diagnostics.logs import best_tenth
    from torchrl_wm.trainers import load_transitions
    from torchrl_wm.trainers.recipes.penalty_sweep import recorded_returns

    returns = recorded_returns([load_transitions(path)], "reward")
    return {
        "episodes": len(returns),
        "log_mean": float(returns.mean()),
        "log_best_tenth": float(best_tenth(returns)),
    }


# Training -------------------------------------------------------------------------

#: The settings of MOPO by task, beside its defaults.
SETTINGS: dict[str, dict[str, Any]] = {
    "pendulum": {
        "env": "Pendulum-v1",
        "members": 5,
        "hidden": (128, 128),
        "model_steps": 2000,
        "steps": 6000,
        "interval": 1000,
        "penalties": (0.0, 1.0, 5.0),
        "policy_hidden": (64, 64),
        "policy_learning_rate": 1e-3,
        "judged_episodes": 20,
        "evaluation_interval": 1000,
        "evaluation_episodes": 5,
    },
    # A policy of this log soon leaves it: episodes end there, and doubt costs more.
    "hopper": {
        "env": "Hopper-v5",
        "hidden": (200, 200),
        "model_steps": 5000,
        "steps": 13_000,
        "interval": 1000,
        "penalties": (0.0, 5.0, 25.0),
        "limit_quantile": 0.99,
        "judged_episodes": 25,
        "judged_steps": 500,
        "evaluation_interval": 1000,
        "evaluation_episodes": 10,
    },
}


def train(name: str, seed: int) -> None:
    """Learn from a log, and write what became of each penalty, and the metrics."""
    import torch

    from torchrl_wm.trainers import MOPOTrainer

    torch.set_num_threads(1)
    if part(name, seed).exists():
        return
    log = make_log(name, seed)
    began = time.process_time()
    settings = SETTINGS[name.split("-")[0]]
    trainer = MOPOTrainer(data=str(log), **settings, seed=seed)
    trainer.register_op("post_steps", lambda: show(trainer))
    trainer.train()
    cpu = round(time.process_time() - began)
    write(curve(name, seed), trainer.metrics)
    last = trainer.metrics[-1]
    about = summary(log)
    rows = []
    for penalty, policy in trainer.policies.items():
        returns = trainer.returns(10, seed=seed, policy=policy)
        rows.append(
            {
                "penalty": penalty,
                "chosen": int(float(penalty) == last["chosen_penalty"]),
                "real_return": sum(returns) / len(returns),
                "imagined_return": last[f"imagined_return_{penalty}"],
                "imagined_worst": last[f"imagined_worst_{penalty}"],
                "disagreement": last[f"imagined_disagreement_{penalty}"],
                **about,
                "cpu": cpu,
            }
        )
        say(str(rows[-1]))
    write(part(name, seed), rows)


def show(trainer: Any) -> None:
    """Print the newest rows."""
    for row in trainer.metrics:
        if row["step"] == trainer.collected_frames:
            shown = ("held_out", "imagined", "evaluation_return", "chosen")
            values = {k: v for k, v in row.items() if k.startswith(shown)}
            say(
                f"{row['step']}: {', '.join(f'{k} {v:.4g}' for k, v in values.items())}"
            )


def part(name: str, seed: int) -> Path:
    return OUT / "seeds" / f"{name}-{seed}.csv"


def curve(name: str, seed: int) -> Path:
    return OUT / "curves" / f"{name}-{seed}.csv"


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(key for row in rows for key in row))
    with open(path, "w", newline="") as file:
        out = csv.DictWriter(file, names)
        out.writeheader()
        out.writerows(rows)


# Reporting ------------------------------------------------------------------------


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def report() -> None:
    """Write the table and the figure of what is there."""
    header = ["log", "seed", "log's mean", "log's best tenth"]
    header += ["penalty", "real return", "promised", "least promise", "disagreement"]
    lines = [header, ["---"] * len(header)]
    for name in NAMES:
        for path in sorted((OUT / "seeds").glob(f"{name}-*.csv")):
            rows = read(path)
            for row in rows:
                mark = " (chosen)" if row["chosen"] == "1" else ""
                first = row is rows[0]
                about = [name, path.stem.rpartition("-")[2]]
                about += [
                    f"{float(row[k]):.0f}" for k in ("log_mean", "log_best_tenth")
                ]
                told = ("real_return", "imagined_return", "imagined_worst")
                lines.append(
                    [
                        *(about if first else [""] * len(about)),
                        row["penalty"] + mark,
                        *(f"{float(row[key]):.0f}" for key in told),
                        f"{float(row['disagreement']):.2g}",
                    ]
                )
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
    (OUT / "table.md").write_text(table)
    say(table)
    figure().savefig(OUT / "curves.png", dpi=110)


def figure() -> Any:
    """Draw real returns over the steps of each run, a line for each penalty."""
    from matplotlib.figure import Figure

    found = [p for n in NAMES for p in sorted((OUT / "curves").glob(f"{n}-*.csv"))]
    columns = min(3, len(found))
    lines = -(-len(found) // columns)
    drawn = Figure(figsize=(4 * columns, 3 * lines), layout="constrained")
    places = drawn.subplots(lines, columns, squeeze=False).flatten()
    for path, place in zip(found, places):
        rows = [row for row in read(path) if row.get("evaluation_return")]
        names = [key for key in rows[0] if key.startswith("evaluation_return_")]
        for key in names:
            points = [(float(row["step"]), float(row[key])) for row in rows]
            label = f"penalty {key.rpartition('_')[2]}"
            place.plot(*zip(*points), "o-", markersize=3, label=label)
        about = read(OUT / "seeds" / path.name)[0]
        best = float(about["log_best_tenth"])
        place.axhline(best, color="k", ls=":", lw=1, label="log's best tenth")
        place.axhline(float(about["log_mean"]), color="0.6", ls=":", lw=1, label="mean")
        name, _, seed = path.stem.rpartition("-")
        place.set(title=f"{name}, seed {seed}", xlabel="gradient step")
        place.legend(fontsize="x-small")
    for place in places[len(found) :]:
        place.set_axis_off()
    return drawn


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    logs = commands.add_parser("logs")
    logs.add_argument("names", nargs="+", choices=NAMES)
    logs.add_argument("--seeds", type=int, default=SEEDS)
    trained = commands.add_parser("train")
    trained.add_argument("name", choices=NAMES)
    trained.add_argument("seed", type=int)
    commands.add_parser("report")
    args = parser.parse_args()
    if args.command == "logs":
        for name in args.names:
            for seed in range(args.seeds):
                make_log(name, seed)
    elif args.command == "train":
        train(args.name, args.seed)
    else:
        report()


if __name__ == "__main__":
    main()
