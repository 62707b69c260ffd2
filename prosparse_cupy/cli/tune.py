"""Tuning: every legal launch of a kernel is checked to give the rule's bits, timed, and the fastest kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import compiler
from ..compiler import KernelCompileError
from ..device import current_device
from ..knobs import Knobs, candidates, rule
from ..measured import Measured
from ..models import Model
from ..problem import Problem
from ..testing import timing, truth
from ..testing.dense import Dense
from ..testing.layers import Layers, Timed

# What a kernel is timed in: ffn_123's launch decides when ffn_4's can start.
TIMED_IN = {"ffn_1": "ffn_1", "ffn_123": "sparse_ffn", "ffn_23": "ffn_23", "ffn_4": "ffn_4"}
_KERNELS = {"sparse_ffn": ("ffn_123", "ffn_4")}
_LEAST_CALLS = 64
_LEAST_GAIN = 0.005  # of the rule's time: less is noise
_MOST_LOSS = 0.02  # with nothing sparse
_FINALISTS = 4

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


def tune(model: Model, dtype: str, dense: Dense, commit: str, tell: Tell) -> list[Measured]:
    """The fastest knobs of every kernel for a model's dims on CuPy's current GPU."""
    layers, found = Layers(model, dtype, dense), []
    for kernel in TIMED_IN:
        problem = Problem(kernel, model.d_model, model.d_ff, dtype)
        found.append(_tune_kernel(problem, layers, model.sparsity, commit, tell))
    return found


def _tune_kernel(problem: Problem, layers: Layers, sparsity: float, commit: str, tell: Tell) -> Measured:
    target = compiler.target_of(current_device())
    sparse = layers.calls(TIMED_IN[problem.kernel], "hot", sparsity)
    every, tried = list(candidates(problem, target)), list[_Candidate]()
    expected = None
    for done, knobs in enumerate(every):
        tell(problem.kernel, done, len(every))
        candidate, outputs = _try(problem, knobs, sparse)
        if candidate is None:
            continue
        expected = outputs if expected is None else expected
        if outputs != expected:
            raise TuningError(f"{problem.kernel}: {knobs} gives other bits than {rule(problem, target)}: please report this")
        tried.append(candidate)
    number = _repeated(sparse)
    quick = _times(tried, number, repeats=8)
    finalists = [tried[0], *sorted(tried[1:], key=lambda c: quick[c.knobs])[:_FINALISTS]]
    precise = _times(finalists, number, repeats=40)
    full = layers.calls(TIMED_IN[problem.kernel], "hot", 0.0)  # from here on the layers' masks are those
    dense_times = _times([_try(problem, c.knobs, full)[0] or c for c in finalists], _repeated(full), repeats=24)
    first = finalists[0].knobs
    allowed = [c.knobs for c in finalists if dense_times[c.knobs] <= (1 + _MOST_LOSS) * dense_times[first]]
    best = min(allowed, key=lambda knobs: precise[knobs])
    if precise[best] > (1 - _LEAST_GAIN) * precise[first]:
        best = first
    return Measured(problem, best, round(precise[best], 3), round(precise[first], 3), commit)


def _try(problem: Problem, knobs: Knobs, timed: Sequence[Timed]) -> tuple[_Candidate | None, list[bytes]]:
    """A graph of the calls with these knobs, and the bits that they leave; None if the kernel does not compile."""
    with compiler.trying(problem, knobs):
        try:
            names = _KERNELS.get(TIMED_IN[problem.kernel], (problem.kernel,))
            problems = (Problem(name, problem.d_model, problem.d_ff, problem.dtype) for name in names)
            kernels = tuple(compiler.load(p, current_device()) for p in problems)
        except KernelCompileError:
            return None, []
        for t in timed:
            t.out.view(np.uint8).fill(0xFF)
        replay = timing.capture([t.call for t in timed] * (_repeated(timed) // len(timed)))
        replay()
        outputs = [truth.to_numpy(t.out).tobytes() for t in timed]
    return _Candidate(knobs, kernels, replay), outputs


def _repeated(timed: Sequence[Timed]) -> int:
    """Calls in a graph."""
    return -(-_LEAST_CALLS // len(timed)) * len(timed)


def _times(tried: Sequence[_Candidate], number: int, repeats: int) -> dict[Knobs, float]:
    """Microseconds a call, the candidates in turns."""
    names = {str(i): c for i, c in enumerate(tried)}
    replays = {name: c.replay for name, c in names.items()}
    times = timing.interleave(replays, timing.graph_clock, dict.fromkeys(replays, number), repeats)
    return {names[name].knobs: t.median for name, t in times.items()}
