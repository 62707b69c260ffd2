"""Settings measured: ours and the dense path timed in turn, then every output that the timed calls left is checked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from prosparse_cupy import compiler
from prosparse_cupy.device import current_device, gpu
from prosparse_cupy.models import Model
from prosparse_cupy.problem import Target
from prosparse_cupy.testing import timing
from prosparse_cupy.testing.dense import Dense
from prosparse_cupy.testing.layers import Layers
from prosparse_cupy.testing.measure import DENSE, OURS, SINGLES, VARYING, Calls, all_right, errors, graph_times, variants

from .conditions import Yardsticks
from .results import Row

GRAPH, WALLCLOCK = "graph", "wallclock"
EAGER = "dense eager"


@dataclass(frozen=True)
class Setting:
    """One row to be measured."""

    op: str
    model: Model
    label: str
    dtype: str
    mask: str
    sparsity: float
    weights: str = "plain"
    """Of the sparse side: `plain` or `bf12`."""
    with_dense: bool = False
    """Whether the dense path gets rows of its own: in a graph, and launched eagerly."""
    tokens: int = 1
    """Of a call, each with a mask of this sparsity."""
    with_singles: bool = False
    """Whether a whole FFN of several tokens gets a row of as many calls of one token each."""
    with_varying: bool = False
    """Whether an operator of several tokens gets a row of calls that are not batch-invariant."""


@contextmanager
def portable() -> Iterator[None]:
    """Kernels as an sm_80 GPU gets them: no Hopper instructions, no programmatic launches."""
    device = current_device()
    with compiler.pretending(device, Target(80, gpu(device).multiprocessors)):
        yield


def measure(layers: Layers, setting: Setting, dense: Dense, yard: Yardsticks, method: str, repeats: int) -> list[Row]:
    """A row of ours, and one of the first release where it is installed; `checked` after the timing, on every output timed."""
    timed = layers.calls(setting.op, setting.mask, setting.sparsity, setting.weights)
    if method == WALLCLOCK:
        timed = timed[:1]
    calls, outs = variants(timed, setting.with_singles, setting.with_varying)
    times = graph_times(calls, outs, dense, repeats) if method == GRAPH else _wallclock_times(calls, repeats)
    if setting.with_dense:
        eager = {EAGER: lambda: [call() for call in calls[DENSE]]}
        times |= timing.interleave(eager, timing.graph_clock, {EAGER: len(timed)}, repeats)
        outs[EAGER] = outs[DENSE]
    found = errors(timed, outs)
    if setting.tokens == 1:
        active = round(setting.model.d_ff * (1 - setting.sparsity))
    else:  # of any token, which differs a little from call to call
        active = round(float(np.mean([t.active for t in timed])))
    nbytes = layers.touched(setting.op, active, setting.weights)
    epsilon = float(ml_dtypes.finfo(layers.dtype).eps)
    return [
        Row(
            op=setting.op,
            variant=variant,
            model=setting.label,
            d_model=setting.model.d_model,
            d_ff=setting.model.d_ff,
            dtype=setting.dtype,
            batch=setting.tokens,
            mask=setting.mask,
            sparsity=setting.sparsity,
            layers=layers.count,
            time_us=times[variant].median,
            p10_us=times[variant].p10,
            p90_us=times[variant].p90,
            dense_us=times[DENSE].median,
            bytes=nbytes,
            # One launch however many an operator makes: what it spends on more of them is not at the floor.
            floor_us=yard.floor_us(nbytes),
            error=max(found[variant]),
            dense_error=max(found[DENSE]),
            checked=all_right(found, variant, epsilon),
            noisy=times[variant].is_noisy or times[DENSE].is_noisy,
            weights=setting.weights if variant in (OURS, SINGLES, VARYING) else "plain",
        )
        for variant in times
        if variant != DENSE or setting.with_dense
    ]


def _wallclock_times(calls: Calls, repeats: int) -> dict[str, timing.Times]:
    one = {variant: several[0] for variant, several in calls.items()}
    return timing.interleave(one, timing.wall_clock, dict.fromkeys(one, 1), 10 * repeats)
