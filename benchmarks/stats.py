"""What repeated times come to, and the timing loop itself. No GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

NOISY = 0.05
"""Spread above which a time is marked."""
_MOST_ROUNDS = 3
_TURN = 8
_UNCOUNTED = 2

Clock = Callable[[Callable[[], object]], float]
"""Runs a call and returns the microseconds that it took."""


class Times(NamedTuple):
    """Microseconds of one call over many repeats."""

    median: float
    p10: float
    p90: float

    @property
    def spread(self) -> float:
        return (self.p90 - self.p10) / self.median

    @property
    def is_noisy(self) -> bool:
        return not self.spread <= NOISY


def summarise(samples: np.ndarray) -> Times:
    """Median, 10th and 90th percentile."""
    p10, median, p90 = np.percentile(samples, [10, 50, 90])
    return Times(float(median), float(p10), float(p90))


def interleave(
    variants: Mapping[str, Callable[[], object]], clock: Clock, calls: Mapping[str, int], repeats: int
) -> dict[str, Times]:
    """Time the variants in turns, so that a change of the GPU's clock meets all of them alike; per call.

    A turn is `_TURN` repeats of one variant after two that do not count: the first ones find the vectors, which an operator's
    predecessor has just written in real use, evicted by the variant before. A variant whose spread is above `NOISY` is what its
    quietest of up to three rounds says.
    """
    best: dict[str, Times] = {}
    for _ in range(_MOST_ROUNDS):
        samples: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(-(-repeats // _TURN)):
            for name, call in variants.items():
                turn = [clock(call) / calls[name] for _ in range(_TURN + _UNCOUNTED)]
                samples[name] += turn[_UNCOUNTED:]
        for name, values in samples.items():
            times = summarise(np.array(values))
            if name not in best or times.spread < best[name].spread:
                best[name] = times
        if not any(times.is_noisy for times in best.values()):
            break
    return best
