"""Settings measured: ours and the dense path timed in turn, then every output that the timed calls left is checked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
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
OURS, FIRST, EAGER = "prosparse", "first release", "dense eager"
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
    with_dense: bool = False
    """Whether the dense path gets rows of its own: in a graph, and launched eagerly."""


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


def measure(layers: Layers, setting: Setting, dense: Dense, yard: Yardsticks, method: str, repeats: int) -> list[Row]:
    """A row of ours, and one of the first release where it is installed; `checked` after the timing, on every output timed."""
    timed = layers.calls(setting.op, setting.mask, setting.sparsity)
    if method == WALLCLOCK:
        timed = timed[:1]
    calls: dict[str, list[Callable]] = {OURS: [t.call for t in timed], "dense": [t.dense for t in timed]}
    outs = {OURS: [t.out for t in timed], "dense": [t.dense_out for t in timed]}
    if all(t.first is not None for t in timed):
        calls[FIRST], outs[FIRST] = [t.first for t in timed], [t.first_out for t in timed]
    times = (_graph_times if method == GRAPH else _wallclock_times)(calls, outs, dense, repeats)
    if setting.with_dense:
        eager = {EAGER: lambda: [call() for call in calls["dense"]]}
        times |= interleave(eager, graph_clock, {EAGER: len(timed)}, repeats)
        outs[EAGER] = outs["dense"]
    errors = _errors(timed, outs)
    active = round(setting.model.d_ff * (1 - setting.sparsity))
    nbytes = layers.touched(setting.op, active)
    epsilon = float(ml_dtypes.finfo(layers.dtype).eps)
    return [
        Row(
            op=setting.op,
            variant=variant,
            model=setting.label,
            d_model=setting.model.d_model,
            d_ff=setting.model.d_ff,
            dtype=setting.dtype,
            batch=1,
            mask=setting.mask,
            sparsity=setting.sparsity,
            layers=layers.count,
            time_us=times[variant].median,
            p10_us=times[variant].p10,
            p90_us=times[variant].p90,
            dense_us=times["dense"].median,
            bytes=nbytes,
            # One launch however many an operator makes: what it spends on more of them is not at the floor.
            floor_us=yard.floor_us(nbytes),
            error=max(errors[variant]),
            dense_error=max(errors["dense"]),
            checked=all(e <= 2 * d + epsilon for e, d in zip(errors[variant], errors["dense"], strict=True)),  # NaN is not
            noisy=times[variant].is_noisy or times["dense"].is_noisy,
        )
        for variant in times
        if variant != "dense" or setting.with_dense
    ]


def _graph_times(calls: dict[str, list[Callable]], outs: dict[str, list], dense: Dense, repeats: int) -> dict[str, Times]:
    number = len(calls[OURS])
    again = -(-_LEAST_CALLS // number)
    replays = {
        variant: (timing.capture if variant == OURS else dense.capture)(several * again) for variant, several in calls.items()
    }
    for out in outs[OURS]:  # what the capture left there proves nothing about the replays
        out.view(np.uint8).fill(0xFF)
    return interleave(replays, graph_clock, dict.fromkeys(replays, again * number), repeats)


def _wallclock_times(calls: dict[str, list[Callable]], outs: dict[str, list], dense: Dense, repeats: int) -> dict[str, Times]:
    one = {variant: several[0] for variant, several in calls.items()}
    return interleave(one, wall_clock, dict.fromkeys(one, 1), 10 * repeats)


def _errors(timed: list[Timed], outs: dict[str, list]) -> dict[str, list[float]]:
    """‖out - float64‖ / ‖float64‖ of every call by variant; where the exact result is zero, ‖out‖."""
    errors: dict[str, list[float]] = {variant: [] for variant in outs}
    for i, t in enumerate(timed):
        exact = t.exact()
        norm = float(np.linalg.norm(exact)) or 1.0
        for variant, several in outs.items():
            out = cupy().asnumpy(several[i].astype(np.float32)).astype(np.float64)
            errors[variant].append(float(np.linalg.norm(out - exact)) / norm)
    return errors
