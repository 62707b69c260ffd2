"""Two results beside each other: what got faster or slower beyond the noise."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from .results import Result, Row


class Verdict(Enum):
    """What a change of a time is."""

    FASTER = "faster"
    SAME = "same"
    SLOWER = "slower"
    REGRESSION = "regression"
    BROKEN = "check failed"


class Change(NamedTuple):
    """One row of both results."""

    old: Row
    new: Row
    verdict: Verdict

    @property
    def percent(self) -> float:
        """How much longer the new time is."""
        return (self.new.time_us / self.old.time_us - 1) * 100


def compare(old: Result, new: Result, most_percent: float) -> list[Change]:
    """The rows that both have. Beyond the noise: the ranges from the 10th to the 90th percentile do not touch.

    Slower beyond the noise by more than `most_percent` is a regression.
    """
    before = {row.key: row for row in old.rows}
    return [Change(before[r.key], r, _verdict(before[r.key], r, most_percent)) for r in new.rows if r.key in before]


def _verdict(old: Row, new: Row, most_percent: float) -> Verdict:
    if not new.checked:
        return Verdict.BROKEN
    if new.p90_us < old.p10_us:
        return Verdict.FASTER
    if new.p10_us <= old.p90_us:
        return Verdict.SAME
    return Verdict.REGRESSION if (new.time_us / old.time_us - 1) * 100 > most_percent else Verdict.SLOWER


def differences(old: Result, new: Result) -> list[str]:
    """What makes the two not comparable as they stand."""
    names = ("gpu", "driver", "cuda", "method")
    return [
        f"{name}: {getattr(old.head, name)} and {getattr(new.head, name)}"
        for name in names
        if getattr(old.head, name) != getattr(new.head, name)
    ]
