"""Verdicts on a policy: the rules by which a report says what to believe."""

from __future__ import annotations

from dataclasses import dataclass

from tensordict import TensorDictBase

from torchrl_wm.diagnostics.verdicts import leading

#: Rollouts are among the data where no more of them than this are beyond its 99 % quantile.
MOST_BEYOND = 0.1

RULES = (
    f"Rollouts stay with the data up to the first step at which more than {MOST_BEYOND:.0%} of them are "
    f"beyond the data's 99 % quantile, of the members' disagreement or of the distance to recorded "
    f"steps. Up to the longest horizon: trust. Less than the shortest one: do not trust. Else: "
    f"trust up to there. It is about whether the model can be believed; whether the policy is any "
    f"good is what the returns and the values below say, which count only as far as that."
)


@dataclass(frozen=True)
class Trust:
    """How far the model can be believed about a policy.

    Args:
        steps: for so many imagined steps.
        horizons: what was asked about.
        why: what the first step after them has too much of.
    """

    steps: int
    horizons: tuple[int, ...]
    why: str = ""

    @property
    def good(self) -> bool | None:
        """Whether it is to be trusted; None for up to a horizon."""
        if self.steps >= max(self.horizons):
            return True
        return False if self.steps < min(self.horizons) else None

    @property
    def words(self) -> str:
        """The verdict with its numbers."""
        if self.good:
            return (
                f"Trust: for {self.steps} steps, at most {MOST_BEYOND:.0%} of the rollouts go beyond "
                f"what the data have"
            )
        if self.good is None:
            return f"Trust up to {self.steps} steps: {self.why}"
        return f"Do not trust what the model says of this policy: {self.why}"


def trusted(
    measured: dict[str, TensorDictBase], horizons: tuple[int, ...]
) -> Trust | None:
    """Return how far rollouts stay with the data.

    Args:
        measured: what :func:`~torchrl_wm.diagnostics.policy_disagreement` and
            :func:`~torchrl_wm.diagnostics.policy_distance` returned, by name; those that do not
            apply are missing.
        horizons: what is asked about.
    """
    steps, why = max(horizons), ""
    if not measured:
        return None
    for name, found in measured.items():
        # A step that no rollout reaches is not beyond anything.
        beyond = found["beyond"].nan_to_num(0.0)[: max(horizons)]
        within = leading((beyond <= MOST_BEYOND).tolist())
        if within < steps:
            steps = within
            why = (
                f"at step {within + 1}, {float(beyond[within]):.0%} of the rollouts are beyond the "
                f"data's 99 % quantile of {name}"
            )
    return Trust(steps, tuple(horizons), why)


def settled(fitted: TensorDictBase) -> bool:
    """Return whether fitted Q evaluation came to values that the log's rewards could add up to."""
    return float(fitted["unsettled"]) <= MOST_BEYOND


def judged(
    trust: Trust | None,
    fitted: TensorDictBase | None,
    gap: tuple[float, float] | None,
) -> str:
    """Return the sentence at the top of a report.

    Args:
        trust: how far the model can be believed.
        fitted: what :func:`~torchrl_wm.diagnostics.fitted_q_value` returned.
        gap: the imagined and the real return, without a discount.
    """
    if trust is None:
        said = ["Nothing says whether the model can be believed about this policy"]
    else:
        said = [trust.words]
    if fitted is not None and not settled(fitted):
        said.append(
            "the log alone does not say what it is worth: fitted Q evaluation did not settle"
        )
    elif fitted is not None:
        value, own = float(fitted["value"]), float(fitted["log_value"])
        low, high = float(fitted["low"]), float(fitted["high"])
        kind = (
            "better"
            if low > own
            else "worse"
            if high < own
            else "neither better nor worse"
        )
        said.append(
            f"by the log alone it is worth {value:.4g} ({low:.4g} to {high:.4g}), {kind} than the log's "
            f"episodes ({own:.4g})"
        )
    if gap is not None:
        said.append(
            f"undiscounted, the model promises {gap[0]:.4g} and the real env pays {gap[1]:.4g}"
        )
    return "; ".join(said) + "."
