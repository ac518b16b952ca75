"""The table of results in README, from the CSV files of the seeds.

    python -m benchmarks.results          # prints it
    python -m benchmarks.results --write  # puts it into README, between its two comments
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.learning import (
    curves,
    DREAMER_SUITE,
    EXPERIMENTS,
    planned,
    rows_of,
    Suite,
    table,
    TDMPC2_SUITE,
    true_returns,
)

README = Path(__file__).parents[1] / "README.md"
MARKS = "<!-- results -->\n\n", "\n<!-- end of results -->"


@dataclass(frozen=True)
class Result:
    """A line of the table.

    Args:
        task: the real env.
        algorithm: what learns there.
        experiment: its runs.
        compared: what their returns are to be compared with.
    """

    task: str
    algorithm: str
    experiment: str
    compared: Callable[[], str]

    def cells(self) -> list[str]:
        """Return the cells: medians over the seeds."""
        runs = rows_of(self.experiment)
        returns, steps = zip(*ends(self.experiment))
        minutes = median(spent(rows) for rows in runs.values()) / 60
        return [
            self.task,
            self.algorithm,
            f"{median(returns):.0f}",
            f"{median(steps):,.0f}",
            f"{minutes:.0f}" if minutes >= 10 else f"{minutes:.1f}",
            str(len(runs)),
            self.compared(),
        ]


def ends(name: str) -> list[tuple[float, float]]:
    """Return what each seed has learnt: a return, and after how many steps of the real env.

    It is the last evaluation, or the mean of all planned trials of PETS, which is not evaluated
    apart from them.
    """
    experiment, runs = EXPERIMENTS[name], rows_of(name)
    repeat = experiment.settings.get("action_repeat", 1)
    steps = [repeat * float(rows[-1]["step"]) for rows in runs.values()]
    if experiment.recipe == "pets":
        return list(zip(map(mean, planned(name).values()), steps))
    last = [curve[-1] for curve in curves(name, "evaluation_return").values()]
    return [(value, repeat * step) for step, value in last]


def spent(rows: list[dict[str, str]]) -> float:
    """Return the seconds of one CPU thread; where they were not kept, wall time, which is more."""
    return float(rows[-1].get("cpu") or rows[-1]["seconds"])


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def true_dynamics() -> str:
    """Return what planning with the true dynamics earns, from the same starts as PETS."""
    best = median(mean(returns) for returns in true_returns().values())
    return f"true dynamics: {best:.0f}"


def sac(task: str) -> Callable[[], str]:
    """Return what SAC learns: the same trainer without a model."""

    def compared() -> str:
        found = []
        for kind in ("same-updates", "one-update"):
            returns, steps = zip(*ends(f"sac-{task}-{kind}"))
            found.append(f"{median(returns):.0f} after {median(steps):,.0f}")
        return f"SAC: {found[0]}; with one update a step {found[1]}"

    return compared


def authors(suite: Suite, task: str) -> Callable[[], str]:
    """Return the authors' returns, from as many steps, with more parameters."""

    def compared() -> str:
        theirs = suite.published_then(task)
        return f"its authors: {median(theirs):.0f}"

    return compared


def most(value: int) -> Callable[[], str]:
    return lambda: f"the most: {value}"


def nothing() -> str:
    return ""


RESULTS = (
    Result("Pendulum-v1", "PETS", "pets-pendulum", true_dynamics),
    Result("Pendulum-v1", "MBPO", "mbpo-pendulum", sac("pendulum")),
    Result("Pendulum-v1", "TD-MPC2", "tdmpc2-pendulum", nothing),
    Result("Pendulum-v1", "Dreamer", "dreamer-pendulum", nothing),
    Result("Pendulum-v1, images", "Dreamer", "dreamer-pendulum-pixels", nothing),
    Result("Pendulum-v1", "PlaNet", "planet-pendulum", nothing),
    Result("CartPole, continuous", "PETS", "pets-cartpole", most(200)),
    Result("CartPole-v1", "Dreamer", "dreamer-cartpole", most(500)),
    Result(
        "InvertedPendulum-v5",
        "MBPO",
        "mbpo-inverted-pendulum",
        sac("inverted-pendulum"),
    ),
    Result("InvertedPendulum-v5", "TD-MPC2", "tdmpc2-inverted-pendulum", most(1000)),
    *(
        Result(
            f"dm_control {task}",
            name,
            f"{suite.recipe}-{task}",
            authors(suite, task),
        )
        for name, suite in (("TD-MPC2", TDMPC2_SUITE), ("Dreamer", DREAMER_SUITE))
        for task in suite.tasks
    ),
)


def results_table() -> str:
    """Return the table, as README has it."""
    header = [
        "task",
        "algorithm",
        "return",
        "real steps",
        "minutes",
        "seeds",
        "to compare with",
    ]
    return table(header, [result.cells() for result in RESULTS])


def table_in(text: str) -> str:
    """Return what stands between the two comments of a page."""
    _, _, rest = text.partition(MARKS[0])
    return rest.partition(MARKS[1])[0]


def main() -> None:
    found = results_table()
    print(found)
    if "--write" in sys.argv[1:]:
        text = README.read_text(encoding="utf-8")
        old, new = (MARKS[0] + inner + MARKS[1] for inner in (table_in(text), found))
        README.write_text(text.replace(old, new), encoding="utf-8")


if __name__ == "__main__":
    main()
