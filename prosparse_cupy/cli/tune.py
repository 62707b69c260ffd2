"""Tuning: launches that may be faster are checked to give the rule's bits and timed; the fastest that loses nowhere is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import compiler
from ..compiler import KernelCompileError
from ..device import current_device
from ..knobs import Knobs, candidates, compressed_formats
from ..measured import Measured
from ..models import Model
from ..problem import Problem
from ..testing import timing, truth
from ..testing.dense import Dense
from ..testing.layers import CORRELATED, Layers, Timed

# What a kernel is timed in: ffn_123's launch decides when ffn_4's can start.
TIMED_IN = {"ffn_1": "ffn_1", "ffn_123": "sparse_ffn", "ffn_23": "ffn_23", "ffn_4": "ffn_4"}
TIMED_IN_WITHOUT_A_GATE = {"ffn_12": "sparse_ffn", "ffn_4": "ffn_4"}
_LEAST_CALLS = 64
_LEAST_GAIN = 0.005  # of the rule's time: less is noise
_HOT = "hot"
_ELSEWHERE = (0.0, 0.5, 0.97, 0.99, 1.0)  # sparsities at which what is kept must not lose; of several tokens, also correlated
_MOST_LOSS = 0.005  # of the rule's time there: no more, since some launches lose a few percent more in another process
_FINALISTS = 8

Tell = Callable[[str, int, int], None]
"""Is told what is being done, how many candidates are done, and how many there are."""


class TuningError(RuntimeError):
    """A launch gave other bits than the rule's: a defect of a kernel, which must not be used."""


@dataclass(frozen=True)
class _Candidate:
    knobs: Knobs
    kernels: tuple[Any, ...]
    """Kept, since a graph does not keep its kernels loaded."""
    replay: timing.Call


def tune(
    model: Model, dtype: str, dense: Dense, commit: str, tell: Tell, weights: str = "plain", tokens: int = 1
) -> list[Measured]:
    """The fastest knobs of every kernel for a model's dims on CuPy's current GPU; `weights` may also be bf12."""
    layers, found = Layers(model, dtype, dense, tokens=tokens), []
    for kernel in TIMED_IN if model.gated else TIMED_IN_WITHOUT_A_GATE:
        problem = _problem(kernel, model, dtype, weights, tokens)
        found.append(_tune_kernel(problem, layers, model.sparsity, commit, tell))
    return found


def _problem(kernel: str, model: Model, dtype: str, weights: str, tokens: int) -> Problem:
    formats = () if weights == "plain" else compressed_formats(kernel, model.d_model, model.d_ff)
    return Problem(kernel, model.d_model, model.d_ff, dtype, tokens=tokens, formats=formats)


def _timed_in(problem: Problem) -> str:
    return (TIMED_IN | TIMED_IN_WITHOUT_A_GATE)[problem.kernel]


def _weights(problem: Problem) -> str:
    return "plain" if problem.is_plain else "bf12"


def _tune_kernel(problem: Problem, layers: Layers, sparsity: float, commit: str, tell: Tell) -> Measured:
    """The knobs that are fastest at this sparsity among those that are no slower than the rule's elsewhere."""
    every = list(candidates(problem, compiler.target_of(current_device())))
    timed = layers.calls(_timed_in(problem), _HOT, sparsity, _weights(problem))
    tried = _tried(problem, every, timed, lambda done: tell(problem.kernel, done, len(every)))
    quick = _times(tried, _repeated(timed), repeats=8)
    finalists = [tried[0], *sorted(tried[1:], key=lambda c: quick[c.knobs])[:_FINALISTS]]
    times = _times(finalists, _repeated(timed), repeats=40)
    rules, gaining = times[every[0]], (1 - _LEAST_GAIN) * times[every[0]]
    left = [c.knobs for c in finalists if c.knobs == every[0] or times[c.knobs] <= gaining]
    elsewhere = [*([(CORRELATED, sparsity)] if problem.tokens > 1 else []), *((_HOT, share) for share in _ELSEWHERE)]
    for mask, share in elsewhere if problem.kernel != "ffn_1" else ():  # the gate does not know what will be active
        if len(left) == 1:
            break
        timed = layers.calls(_timed_in(problem), mask, share, _weights(problem))
        there = _times(_tried(problem, left, timed), _repeated(timed), repeats=24)
        left = [knobs for knobs in left if there[knobs] <= (1 + _MOST_LOSS) * there[every[0]]]
    best = min(left, key=lambda knobs: times[knobs])
    return Measured(problem, best, round(times[best], 3), round(rules, 3), commit)


def _tried(
    problem: Problem, every: Sequence[Knobs], timed: Sequence[Timed], tell: Callable[[int], None] = lambda done: None
) -> list[_Candidate]:
    """Those of these knobs that compile; all of them leave the bits of the first, the rule's, which must compile."""
    tried, expected = list[_Candidate](), list[bytes]()
    for done, knobs in enumerate(every):
        tell(done)
        try:
            candidate, outputs = _try(problem, knobs, timed)
        except KernelCompileError:
            if knobs == every[0]:
                raise
            continue
        expected = expected or outputs
        if outputs != expected:
            raise TuningError(f"{problem.kernel}: {knobs} gives other bits than {every[0]}: please report this")
        tried.append(candidate)
    return tried


def _try(problem: Problem, knobs: Knobs, timed: Sequence[Timed]) -> tuple[_Candidate, list[bytes]]:
    """A graph of the calls with these knobs, and the bits that they leave."""
    with compiler.trying(problem, knobs) as kernels:
        timed[0].call()  # compiles, which a capture forbids
        for t in timed:
            t.out.view(np.uint8).fill(0xFF)
        replay = timing.capture([t.call for t in timed] * (_repeated(timed) // len(timed)))
        replay()
        outputs = [truth.to_numpy(t.out).tobytes() for t in timed]
    return _Candidate(knobs, tuple(kernels), replay), outputs


def _repeated(timed: Sequence[Timed]) -> int:
    """Calls in a graph."""
    return -(-_LEAST_CALLS // len(timed)) * len(timed)


def _times(tried: Sequence[_Candidate], number: int, repeats: int) -> dict[Knobs, float]:
    """Microseconds a call, the candidates in turns."""
    names = {str(i): c for i, c in enumerate(tried)}
    replays = {name: c.replay for name, c in names.items()}
    times = timing.interleave(replays, timing.graph_clock, dict.fromkeys(replays, number), repeats)
    return {names[name].knobs: t.median for name, t in times.items()}
