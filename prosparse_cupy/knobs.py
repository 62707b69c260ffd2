"""Knobs: what may differ between launches of one kernel without changing a bit of its result.

`legal` says what a kernel can be launched with, `rule` which of it is used on a GPU and a shape that nobody measured, and
`candidates` what is worth measuring. What was measured is data, see `measured`. What decides the order of sums is no knob: rows
are summed in one order whatever the launch, and `order_of_ffn_4` follows from the shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, NamedTuple

from .formats import vector_length
from .problem import H100, WARP, Problem, Target, ceil_div

_MOST_WARPS = 32
_REGISTERS = 65536  # of a multiprocessor
_FEWEST_REGISTERS = 24  # of a thread, which no kernel needs fewer than


@dataclass(frozen=True)
class Knobs:
    """What all kernels have."""

    warps: int
    """Of a block."""
    min_blocks: int
    """Blocks that a multiprocessor must hold: bounds the registers."""

    def legal(self, problem: Problem, target: Target) -> str:
        """Why a kernel cannot be launched so, or nothing."""
        if not 1 <= self.warps <= _MOST_WARPS:
            return f"{self.warps} warps a block, not 1 to {_MOST_WARPS}"
        if not self.min_blocks >= 1 or self.min_blocks * self.warps * WARP * _FEWEST_REGISTERS > _REGISTERS:
            return f"{self.min_blocks} blocks of {self.warps} warps do not fit a multiprocessor"
        return ""

    def defines(self) -> tuple[tuple[str, int | None], ...]:
        """As NVRTC gets them; a flag is defined or not, and so is a number that is zero."""
        values = ((field.name.upper(), getattr(self, field.name)) for field in fields(self))
        return tuple((name, None if value is True else value) for name, value in values if value is not False and value != 0)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class RowKnobs(Knobs):
    """Of kernels that give a warp a row: `ffn_1` and `ffn_123`."""

    loads: int
    """16-byte loads that a lane issues before it uses the first: a row in one batch, or in batches of an even number each."""
    early_successor: bool = False
    """Whether the next launch may start before this one has written its results."""

    def legal(self, problem: Problem, target: Target) -> str:
        one_batch = problem.specialize and problem.lane_loads <= self.loads
        if self.loads < 1 or not (one_batch or self.loads % 2 == 0):
            return f"{self.loads} loads split a row into batches that do not begin with an even load"
        if self.early_successor and problem.kernel != "ffn_123":
            return f"{problem.kernel} never starts its successor early"
        if self.early_successor and not target.is_programmatic:
            return f"sm_{target.capability} has no programmatic launches"
        return super().legal(problem, target)


@dataclass(frozen=True)
class SharedRowKnobs(RowKnobs):
    """Of `ffn_23`, whose warps may share the rows of a block."""

    rows: int = 0
    """Of a block; 0 gives every warp a row."""

    def legal(self, problem: Problem, target: Target) -> str:
        if self.rows and (self.warps % 2 or not 1 <= self.rows <= WARP):
            return f"{self.warps} warps cannot share {self.rows} rows: warps come in pairs, rows are at most {WARP}"
        return super().legal(problem, target)


@dataclass(frozen=True)
class ColumnKnobs(Knobs):
    """Of `ffn_4`. Its warps are part of the order of sums."""

    WARPS: ClassVar[int] = 16
    loads: int = 4
    """Rows that a lane reads at once."""

    def legal(self, problem: Problem, target: Target) -> str:
        if self.warps != self.WARPS:
            return f"{self.warps} warps would change the order of sums: {self.WARPS} have"
        if self.loads < 1:
            return f"{self.loads} loads"
        return super().legal(problem, target)


@dataclass(frozen=True)
class TransposeKnobs(Knobs):
    """Of `pack_down`: a warp is a row of a 32 x 32 tile."""

    def legal(self, problem: Problem, target: Target) -> str:
        if WARP % max(1, self.warps):
            return f"{self.warps} warps do not divide a tile of {WARP} rows"
        return super().legal(problem, target)


KINDS: dict[str, type[Knobs]] = {
    "ffn_1": RowKnobs,
    "ffn_123": RowKnobs,
    "ffn_23": SharedRowKnobs,
    "ffn_4": ColumnKnobs,
    "pack_down": TransposeKnobs,
}
"""Every kernel, and the knobs that it has."""


def rule(problem: Problem, target: Target) -> Knobs:
    """The knobs of a GPU and a shape that nobody measured."""
    return _RULES[problem.kernel](problem, target)


def _ffn_1(problem: Problem, target: Target) -> RowKnobs:
    # 20 loads cover a row of 5120 16-bit elements in one batch.
    return RowKnobs(warps=4, min_blocks=4, loads=_loads(problem, most=20))


def _ffn_123(problem: Problem, target: Target) -> RowKnobs:
    # Blocks of few warps end early, so that the successor's come in. With ten loads a lane keeps its registers for four blocks.
    early = _all_rows_at_once(problem, target)
    return RowKnobs(warps=2 if early else 4, min_blocks=4, loads=_loads(problem, most=10), early_successor=early)


def _all_rows_at_once(problem: Problem, target: Target) -> bool:
    """Whether the GPU holds a warp for every row: a successor that starts early then keeps none of them out."""
    return problem.specialize and target.is_programmatic and problem.d_ff <= 32 * target.multiprocessors


def _ffn_23(problem: Problem, target: Target) -> SharedRowKnobs:
    # Eight warps share eight rows: larger blocks finish sooner when almost nothing is active, but hold their registers until
    # their slowest row. A row that is one batch gains nothing from two warps.
    if problem.specialize and problem.lane_loads <= 8:
        return SharedRowKnobs(warps=8, min_blocks=4, loads=_loads(problem, most=8))
    loads = _loads(problem, most=10)
    rows, min_blocks = (8, 4) if loads <= 8 else (12, 3)  # registers of more loads leave room for three blocks
    if target.capability >= 100 and _spills_at_four_blocks(problem, loads):
        min_blocks = 3
    return SharedRowKnobs(warps=8, min_blocks=min_blocks, loads=loads, rows=rows)


def _spills_at_four_blocks(problem: Problem, loads: int) -> bool:
    """Whether ffn_23 spills 4 to 12 bytes on sm_100 and sm_120: a row then ends inside its second batch of eight loads."""
    whole = problem.vectors % (WARP * 2 * loads) == 0
    return problem.specialize and loads == 8 and problem.lane_loads <= 16 and not whole


def _ffn_4(problem: Problem, target: Target) -> ColumnKnobs:
    return ColumnKnobs(warps=ColumnKnobs.WARPS, min_blocks=2, loads=4)


def _pack_down(problem: Problem, target: Target) -> TransposeKnobs:
    return TransposeKnobs(warps=8, min_blocks=1)


_RULES = {"ffn_1": _ffn_1, "ffn_123": _ffn_123, "ffn_23": _ffn_23, "ffn_4": _ffn_4, "pack_down": _pack_down}


def _loads(problem: Problem, most: int) -> int:
    """At most `most` loads: a row in one batch, or in equal ones of an even number each."""
    if not problem.specialize:
        return min(most, 16)
    loads = problem.lane_loads
    batches = ceil_div(loads, most)
    return loads if batches == 1 else 2 * ceil_div(loads, 2 * batches)


class Order(NamedTuple):
    """What decides the order of `ffn_4`'s sums. It follows from shape and dtype, so that every GPU gives the same bits."""

    lanes: int
    """16-byte lanes of a block's slice of a row."""
    each: int
    """16-byte vectors of x1 that a thread looks at before its warp lists the active rows."""
    unit: int
    """Neighbouring vectors of x1 that go to one warp."""

    def defines(self) -> tuple[tuple[str, int], ...]:
        return tuple((name.upper(), value) for name, value in self._asdict().items())


def order_of_ffn_4(problem: Problem) -> Order:
    """The order of the sums for a shape."""
    length, threads = vector_length(problem.dtype), WARP * ColumnKnobs.WARPS
    most = min(WARP // length, 7)  # a bit a row, and registers: eight spill on sm_80
    each = min(most, ceil_div(problem.d_ff, length * threads))
    return Order(_slice_lanes(problem), each, _unit(problem))


def _slice_lanes(problem: Problem) -> int:
    """The fewest lanes, two at least, that make at most five blocks for four multiprocessors of an H100."""
    lanes = 2
    while lanes < WARP and 4 * ceil_div(problem.vectors, lanes) > 5 * H100.multiprocessors:
        lanes *= 2
    return lanes


def _unit(problem: Problem) -> int:
    """16 vectors if that loads the warps as evenly as 8 does: longer runs of rows read better, uneven warps wait."""
    vectors = problem.d_ff / vector_length(problem.dtype)
    shares = {unit: math.ceil(vectors / unit / ColumnKnobs.WARPS) * unit for unit in (16, 8)}
    return 16 if shares[16] <= shares[8] else 8


def candidates(problem: Problem, target: Target) -> Iterator[Knobs]:
    """Legal knobs that are worth measuring, the rule's first."""
    first = rule(problem, target)
    yield first
    seen = {first}
    for knobs in _variants(problem, target):
        if knobs not in seen and not knobs.legal(problem, target):
            seen.add(knobs)
            yield knobs


def _variants(problem: Problem, target: Target) -> Iterator[Knobs]:
    kernel = problem.kernel
    if kernel in ("ffn_1", "ffn_123"):
        for most in (8, 10, 16, 20):
            for warps, min_blocks in ((1, 8), (2, 8), (2, 4), (4, 4), (4, 5), (8, 2), (8, 3)):
                for early in (False, True) if kernel == "ffn_123" else (False,):
                    yield RowKnobs(warps, min_blocks, _loads(problem, most), early)
    elif kernel == "ffn_23":
        for most in (8, 10, 20):
            for rows in (0, 8, 10, 12, 16):
                for warps, min_blocks in ((4, 8), (8, 3), (8, 4), (16, 2)):
                    yield SharedRowKnobs(warps, min_blocks, _loads(problem, most), rows=rows)
    elif kernel == "ffn_4":
        for loads in (2, 3, 4, 5, 6, 8):
            for min_blocks in (1, 2):
                yield ColumnKnobs(ColumnKnobs.WARPS, min_blocks, loads)
