"""Time of work on the GPU: many calls in one CUDA graph, replayed, variants in turns, per call.

A graph leaves out the host's launch overhead. Pass calls that touch different memory, several times the L2 cache in all, or the
time is that of a warm cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..device import cupy
from ..driver import without_collections

Call = Callable[[], Any]
Clock = Callable[[Call], float]
"""Runs a call and returns the microseconds that it took."""

NOISY = 0.05
"""Spread above which a time is marked."""
_MOST_ROUNDS = 3
_TURN = 8
_UNCOUNTED = 2


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


def summarise(samples: npt.ArrayLike) -> Times:
    """Median, 10th and 90th percentile."""
    p10, median, p90 = np.percentile(np.asarray(samples), [10, 50, 90])
    return Times(float(median), float(p10), float(p90))


def interleave(variants: Mapping[str, Call], clock: Clock, calls: Mapping[str, int], repeats: int) -> dict[str, Times]:
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
            times = summarise(values)
            if name not in best or times.spread < best[name].spread:
                best[name] = times
        if not any(times.is_noisy for times in best.values()):
            break
    return best


def capture(calls: Sequence[Call]) -> Call:
    """Run each call (launches through CuPy) once, then return a function that replays all of them as one CUDA graph."""
    cp = cupy()
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()
    with stream:
        for call in calls:
            call()
        stream.synchronize()
        with without_collections():
            stream.begin_capture()
            for call in calls:
                call()
            graph = stream.end_capture()
    return lambda: graph.launch(cp.cuda.Stream.null)


def replay_times(replay: Call, calls: int, repeats: int = 100, warmup: int = 5) -> npt.NDArray[np.float64]:
    """Microseconds per call of each of `repeats` replays of a graph of `calls` calls."""
    cp = cupy()
    for _ in range(warmup):
        replay()
    null, times = cp.cuda.Stream.null, []
    for _ in range(repeats):
        start, end = cp.cuda.Event(), cp.cuda.Event()
        start.record(null)
        replay()
        end.record(null)
        end.synchronize()
        times.append(cp.cuda.get_elapsed_time(start, end) * 1e3 / calls)
    return np.array(times)


def graph_clock(replay: Call) -> float:
    """Microseconds between two events around a replay."""
    return float(replay_times(replay, 1, repeats=1, warmup=0)[0])


def wall_clock(call: Call) -> float:
    """Microseconds of the host's clock around a launch and the wait for it, as the paper times."""
    device = cupy().cuda.Device()
    device.synchronize()
    start = time.perf_counter()
    call()
    device.synchronize()
    return (time.perf_counter() - start) * 1e6


def host_clock(call: Call) -> float:
    """Microseconds of the host's clock around a call that waits for nothing."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e6
