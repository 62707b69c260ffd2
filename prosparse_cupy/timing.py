"""Time of work on the GPU: many calls in one CUDA graph, replayed, per call.

A graph leaves out the host's launch overhead. Pass calls that touch different memory, several times the L2 cache in all, or the
time is that of a warm cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ._gpu import cupy

Call = Callable[[], Any]


def capture(calls: Sequence[Call]) -> Call:
    """Run each call (launches through CuPy) once, then return a function that replays all of them as one CUDA graph."""
    cp = cupy()
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()
    with stream:
        for call in calls:
            call()
        stream.synchronize()
        stream.begin_capture()
        for call in calls:
            call()
        graph = stream.end_capture()
    return lambda: graph.launch(cp.cuda.Stream.null)


def replay_times(replay: Call, calls: int, repeats: int = 100, warmup: int = 5) -> np.ndarray:
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
