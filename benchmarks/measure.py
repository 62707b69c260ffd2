"""Settings measured: check first, then time ours and the dense path in turn, then check what the timed calls left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from prosparse_cupy import _compile, timing
from prosparse_cupy._dense import Dense
from prosparse_cupy._gpu import cupy
from prosparse_cupy.models import Model

from .conditions import Yardsticks
from .layers import Layers, Timed
from .results import Row
from .stats import Times, interleave

GRAPH, WALLCLOCK = "graph", "wallclock"
_LEAST_CALLS = 64  # in a graph, whose own launch costs 4 µs


@dataclass(frozen=True)
class Setting:
    """One row to be measured."""

    op: str
    model: Model
    label: str
    dtype: str
    mask: str
    sparsity: float


def graph_clock(replay: Callable[[], object]) -> float:
    """Microseconds between two events around a replay."""
    return float(timing.replay_times(replay, 1, repeats=1, warmup=0)[0])


def wall_clock(call: Callable[[], object]) -> float:
    """Microseconds of the host's clock around a launch and the wait for it, as the paper times."""
    device = cupy().cuda.Device()
    device.synchronize()
    start = time.perf_counter()
    call()
    device.synchronize()
    return (time.perf_counter() - start) * 1e6


@contextmanager
def portable() -> Iterator[None]:
    """Kernels as an sm_80 GPU gets them: no Hopper instructions, no programmatic launches."""
    real = _compile.gpu
    _compile.gpu = lambda index: real(index)._replace(capability=80)
    _compile.load.cache_clear()
    try:
        yield
    finally:
        _compile.gpu = real
        _compile.load.cache_clear()


def measure(layers: Layers, setting: Setting, dense: Dense, yard: Yardsticks, method: str, repeats: int) -> Row:
    """One row; `checked` is whether every output was right after the timing."""
    timed = layers.calls(setting.op, setting.mask, setting.sparsity)
    times = (_graph_times if method == GRAPH else _wallclock_times)(timed, dense, repeats)
    if method == WALLCLOCK:
        timed = timed[:1]
    error, dense_error, right = _errors(timed, setting.dtype)
    active = round(setting.model.d_ff * (1 - setting.sparsity))
    nbytes = layers.touched(setting.op, active)
    ours, theirs = times["ours"], times["dense"]
    # The floor has one launch however many a variant makes: what it spends on more of them is not at the floor.
    return Row(
        op=setting.op,
        variant="prosparse",
        model=setting.label,
        d_model=setting.model.d_model,
        d_ff=setting.model.d_ff,
        dtype=setting.dtype,
        batch=1,
        mask=setting.mask,
        sparsity=setting.sparsity,
        layers=layers.count,
        time_us=ours.median,
        p10_us=ours.p10,
        p90_us=ours.p90,
        dense_us=theirs.median,
        bytes=nbytes,
        floor_us=yard.floor_us(nbytes),
        error=error,
        dense_error=dense_error,
        checked=right,
        noisy=ours.is_noisy or theirs.is_noisy,
    )


def _graph_times(timed: list[Timed], dense: Dense, repeats: int) -> dict[str, Times]:
    again = -(-_LEAST_CALLS // len(timed))
    replays = {
        "ours": timing.capture([t.call for t in timed] * again),
        "dense": dense.capture([t.dense for t in timed] * again),
    }
    for t in timed:  # what the capture left there proves nothing about the replays
        t.out.view(np.uint8).fill(0xFF)
    return interleave(replays, graph_clock, dict.fromkeys(replays, again * len(timed)), repeats)


def _wallclock_times(timed: list[Timed], dense: Dense, repeats: int) -> dict[str, Times]:
    calls = {"ours": timed[0].call, "dense": timed[0].dense}
    return interleave(calls, wall_clock, dict.fromkeys(calls, 1), 10 * repeats)


def _errors(timed: Iterable[Timed], dtype: str) -> tuple[float, float, bool]:
    """Largest error of ours and of the dense path, and whether each of ours is within twice the dense path's and an eps."""
    epsilon = float(ml_dtypes.finfo(np.dtype(getattr(ml_dtypes, dtype, dtype))).eps)
    worst, worst_dense, right = 0.0, 0.0, True
    for t in timed:
        exact = t.exact()
        norm = float(np.linalg.norm(exact)) or 1.0
        ours, theirs = (
            float(np.linalg.norm(cupy().asnumpy(out.astype(np.float32)).astype(np.float64) - exact)) / norm
            for out in (t.out, t.dense_out)
        )
        right &= ours <= 2 * theirs + epsilon  # NaN is not
        worst, worst_dense = max(worst, ours), max(worst_dense, theirs)
    return worst, worst_dense, bool(right)
