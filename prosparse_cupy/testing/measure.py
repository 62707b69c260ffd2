"""Ours and the dense path timed in turns, then every output that the timed calls left is checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..numerics import within_contract
from . import timing, truth
from .dense import Dense
from .layers import Timed

OURS, DENSE, FIRST, SINGLES, VARYING = "prosparse", "dense", "first release", "eight calls", "tensor cores"
"""`SINGLES` are calls of one token each, which is what one call of eight tokens saves; `VARYING` are not batch-invariant."""
_OURS = (OURS, SINGLES, VARYING)  # which launch through CuPy
_LEAST_CALLS = 64  # in a graph, whose own launch costs 4 µs

Calls = dict[str, list[Callable[[], Any]]]


def variants(
    timed: Sequence[Timed], with_singles: bool = False, with_varying: bool = False
) -> tuple[Calls, dict[str, list[Any]]]:
    """The calls of each way, and the outputs that they leave: those of one token each and varying ones only if asked for."""
    calls: Calls = {OURS: [t.call for t in timed], DENSE: [t.dense for t in timed]}
    outs = {OURS: [t.out for t in timed], DENSE: [t.dense_out for t in timed]}
    first = [t.first for t in timed if t.first is not None]
    if len(first) == len(timed):
        calls[FIRST], outs[FIRST] = first, [t.first_out for t in timed]
    if with_singles:
        calls[SINGLES], outs[SINGLES] = [t.singles for t in timed if t.singles], [t.singles_out for t in timed]
    if with_varying:
        calls[VARYING], outs[VARYING] = [t.varying for t in timed if t.varying], [t.varying_out for t in timed]
    return calls, outs


def graph_times(calls: Calls, outs: dict[str, list[Any]], dense: Dense, repeats: int) -> dict[str, timing.Times]:
    """Microseconds a call of each way, in CUDA graphs of all its calls."""
    number = len(calls[OURS])
    again = -(-_LEAST_CALLS // number)
    replays = {way: (timing.capture if way in _OURS else dense.capture)(several * again) for way, several in calls.items()}
    for out in (out for way in calls if way in _OURS for out in outs[way]):  # a capture's proves nothing about the replays
        out.view(np.uint8).fill(0xFF)
    return timing.interleave(replays, timing.graph_clock, dict.fromkeys(replays, again * number), repeats)


def all_right(found: dict[str, list[float]], way: str, epsilon: float) -> bool:
    """Whether every call of a way is within the contract, given its `errors` and those of the dense path."""
    return all(within_contract(error, dense, epsilon) for error, dense in zip(found[way], found[DENSE], strict=True))


def errors(timed: Sequence[Timed], outs: dict[str, list[Any]]) -> dict[str, list[float]]:
    """`truth.relative_error` of every call by way."""
    found: dict[str, list[float]] = {way: [] for way in outs}
    for i, t in enumerate(timed):
        exact = t.exact()
        for way, several in outs.items():
            found[way].append(truth.relative_error(several[i], exact))
    return found
