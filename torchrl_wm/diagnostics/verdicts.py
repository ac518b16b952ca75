"""Verdicts: what the numbers of a report say, in words."""

from __future__ import annotations


def leading(flags: list[bool]) -> int:
    """Return how many are True before the first that is not."""
    return flags.index(False) if False in flags else len(flags)


def beats_baselines(persistence: int, mean: int, horizon: int) -> str:
    """Say up to which step predictions are better than persistence, and than the data's mean."""
    if persistence == 0:
        return "does not beat persistence, not even one step ahead"
    if min(persistence, mean) == horizon:
        return f"beats persistence and the mean at every step up to k = {horizon}"
    if mean >= persistence:
        return f"beats persistence up to k = {persistence} of {horizon}"
    return (
        f"beats persistence up to k = {persistence} of {horizon}, the data's mean only "
        f"up to k = {mean}"
    )


def judged_fan(
    inside: list[float], widths: list[float]
) -> tuple[str, bool | None, str]:
    """Say whether 90% fans are as wide as they should be.

    Args:
        inside: the share of the truth within the fan, by entry.
        widths: the width of the fan in units of the data's spread, by entry.

    Returns:
        The verdict; whether it is good; and "narrow", "wide" or nothing.
    """
    if not inside:
        return "Nothing changes in the episodes.", None, ""
    if max(widths) < 1e-6:
        verdict = (
            "All particles agree: this model predicts without noise, so that the fan says nothing "
            "about what it does not know."
        )
        return verdict, None, ""
    share = sum(inside) / len(inside)
    kind = "wide" if share > 0.97 else "narrow" if share < 0.8 else ""
    tail = f"the fan is too {kind}" if kind else "about as often as it should be"
    verdict = f"The truth lies within the 90% fan {share:.0%} of the time: {tail}."
    return verdict, True if not kind else False if share < 0.6 else None, kind


def confidence(off: float, signed: dict[str, float], fan: str, horizon: int) -> str:
    """Say how intervals are wrong, and whether the fan agrees.

    Args:
        off: the mean distance from the nominal coverage.
        signed: the mean difference from it, by entry: below zero the model is too sure.
        fan: whether the fan is "narrow" or "wide".
        horizon: of the fan.
    """
    sure = [name for name, value in signed.items() if value < 0]
    sign = sum(signed.values()) / len(signed)
    if abs(sign) < off / 2:
        unsure = [name for name in signed if name not in sure]
        if sure and unsure:
            return f"too sure of {' and '.join(sure)}, not sure enough of {' and '.join(unsure)}"
        return "too high at some levels or dims and too low at others"
    kind = "narrow" if sign < 0 else "wide"
    if fan and fan != kind:
        over = (
            "grow faster than the spread"
            if fan == "narrow"
            else "add up to less than it"
        )
        return (
            f"the intervals are too {kind} there, unlike the fan over {horizon} steps, in which "
            f"errors {over}"
        )
    return f"the model is {'overconfident' if sign < 0 else 'underconfident'}"


def graded(score: float) -> bool | None:
    """Return whether a score is good, bad or neither (None)."""
    return True if score > 0.9 else False if score < 0.5 else None


def sentence(parts: list[str]) -> str:
    """Join the parts into a sentence."""
    text = "; ".join(parts)
    return text[:1].upper() + text[1:] + "."
