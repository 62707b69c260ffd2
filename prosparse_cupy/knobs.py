"""Knobs: what may differ between launches of one kernel without changing a bit of its result.

Each kernel has a record of its own: `legal` says what it can be launched with, `rule` which of it is used on a GPU and a shape
that nobody measured, `variants` what is worth measuring, and `shape` the grid. What was measured is data, see `measured`. What
decides the order of sums is no knob: rows are summed in one order whatever the launch, and `order_of_ffn_4` follows from the
shape.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, TypeVar

from .formats import BF12_ROWS, BF12_SLICES, SLICE_UNIT, VECTOR_BYTES, Format, vector_length
from .formula import RELU
from .problem import H100, KERNELS, WARP, Problem, Target, ceil_div

_MOST_WARPS = 32
_REGISTERS = 65536  # of a multiprocessor
_STATIC_BYTES = 48 * 1024  # of shared memory, which a block has without being asked
_RESERVED = 1024  # bytes of shared memory that a block costs besides; a multiprocessor has as much more than a block may have
_MOST_LISTED = 20480  # rows of a tile, which take 16 bits each of 48 KB of shared memory
_FEWEST_REGISTERS = 24  # of a thread, which no kernel needs fewer than
_FEWEST_KEPT = 5  # tokens that are kept
_PLACES = 8  # of their sums
_FEWEST_ROUNDS = 1.5  # groups of rows of a pair of warps
_MOST_OF_A_ROW = 20  # loads of a lane that has all of its part of a row
_PAIR_BARRIERS = 15  # that a block has beside the one of all its warps
_MOST_BLOCKS = 2**16
_MOST_LOADS = 64  # far more than registers hold; their loops are unrolled, and a table's million would keep NVRTC busy


Define = tuple[str, "int | str | None"]
"""An NVRTC define; None for one without a value."""
Shape = tuple[tuple[int, int, int], tuple[int, int, int]]
"""Grid and block."""


@dataclass(frozen=True)
class Knobs(ABC):
    """What all kernels have."""

    suffix: ClassVar[str] = ""
    """Of the kernel that is launched with them: "_mma" for one on tensor cores, see `tensor_cores`."""

    warps: int
    """Of a block."""
    min_blocks: int
    """Blocks that a multiprocessor must hold: bounds the registers."""

    @classmethod
    @abstractmethod
    def rule(cls, problem: Problem, target: Target) -> Knobs:
        """Those of a GPU and a shape that nobody measured."""

    @classmethod
    def variants(cls, problem: Problem, target: Target) -> Iterator[Knobs]:
        """Others that may be faster; not all need be legal."""
        return iter(())

    @abstractmethod
    def shape(self, problem: Problem) -> Shape:
        """Grid and block of a launch with them."""

    def shared_bytes(self, problem: Problem) -> int:
        """Dynamic shared memory of a block."""
        return 0

    def partial_bytes(self, problem: Problem) -> int:
        """Of sums that blocks leave for one another, behind `TICKET_BYTES`; 0 for a kernel whose blocks do not."""
        return 0

    def legal(self, problem: Problem, target: Target) -> str:
        """Why a kernel cannot be launched so, or nothing."""
        if self.shared_bytes(problem) > target.shared_bytes:
            return f"{self.shared_bytes(problem)} bytes of shared memory, a block has {target.shared_bytes}"
        if not 1 <= self.warps <= _MOST_WARPS:
            return f"{self.warps} warps a block, not 1 to {_MOST_WARPS}"
        if not self.min_blocks >= 1 or self.min_blocks * self.warps * WARP * _FEWEST_REGISTERS > _REGISTERS:
            return f"{self.min_blocks} blocks of {self.warps} warps do not fit a multiprocessor"
        return ""

    def defines(self, problem: Problem) -> tuple[Define, ...]:
        """As NVRTC gets them; a flag is defined or not, and so is a number that is zero."""
        values = ((field.name.upper(), getattr(self, field.name)) for field in fields(self))
        shared = (("SHARED_BYTES", self.shared_bytes(problem)),) if self.shared_bytes(problem) else ()
        return (
            *((name, None if value is True else value) for name, value in values if value is not False and value != 0),
            *shared,
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


R = TypeVar("R", bound="RowKnobs")


@dataclass(frozen=True)
class RowKnobs(Knobs):
    """Of `ffn_1`, which gives a warp a row, or several."""

    loads: int
    """16-byte loads of a row that a lane issues before it uses the first: a row in one batch, or in batches of an even number
    each. With several tokens, of the half of a row that is read at a time."""
    abreast: int = 1
    """Rows that a warp reads side by side, so that what it reads of the tokens serves them all."""

    @classmethod
    def rule(cls, problem: Problem, target: Target) -> RowKnobs:
        if problem.tokens > 4 or (problem.tokens > 2 and not problem.is_plain):  # multiplying costs more than reading
            loads, abreast = (2, 2) if problem.is_plain else (1, 4 if problem.tokens > 4 else 2)
            return RowKnobs(2, min_blocks=6 if problem.tokens > 4 else 8, loads=loads, abreast=abreast)
        if problem.tokens > 1:
            return _of_tokens(cls, problem)
        if not problem.is_plain:
            return RowKnobs(warps=2, min_blocks=8, loads=_loads(problem, most=10))
        # 20 loads cover a row of 5120 16-bit elements in one batch.
        return RowKnobs(warps=4, min_blocks=4, loads=_loads(problem, most=20))

    @classmethod
    def variants(cls, problem: Problem, target: Target) -> Iterator[RowKnobs]:
        if problem.tokens > 1:
            for loads in _some_half_loads(problem):
                for abreast in (1, 2, 4):
                    for min_blocks in (4, 6, 8, 12):
                        yield RowKnobs(2, min_blocks, loads, abreast)
            return
        for most in (8, 10, 16, 20):
            for warps, min_blocks in ((1, 8), (1, 16), (2, 8), (2, 10), (2, 4), (2, 6), (4, 4), (4, 5), (8, 2), (8, 3)):
                yield RowKnobs(warps, min_blocks, _loads(problem, most))

    def shape(self, problem: Problem) -> Shape:
        of_block = max(1, self.warps // _sharing(problem)) * self.abreast
        return (ceil_div(problem.d_ff, of_block), 1, 1), (WARP * self.warps, 1, 1)

    def legal(self, problem: Problem, target: Target) -> str:
        if self.loads > _MOST_LOADS:
            return f"{self.loads} loads, more than {_MOST_LOADS}"
        if problem.tokens > 1:
            return self._legal_with_tokens(problem) or super().legal(problem, target)
        if self.abreast != 1:
            return f"{self.abreast} rows abreast, with one token whose elements nobody shares"
        one_batch = problem.specialize and problem.lane_loads <= self.loads
        if self.loads < 1 or not (one_batch or self.loads % 2 == 0):
            return f"{self.loads} loads split a row into batches that do not begin with an even load"
        return super().legal(problem, target)

    def _legal_with_tokens(self, problem: Problem) -> str:
        places = 1 << (problem.tokens - 1).bit_length()
        if self.warps % 2:
            return f"{self.warps} warps: with several tokens they come in pairs"
        if self.loads < 1:
            return f"{self.loads} loads"
        if self.abreast < 1 or self.abreast & (self.abreast - 1) or self.abreast * places > WARP:
            return f"{self.abreast} rows abreast are no power of two, or too many for {problem.tokens} tokens"
        if (halves := self.warps * self.abreast * places * WARP * 4) > _STATIC_BYTES:
            return f"{halves} bytes of shared memory for the halves of rows, a kernel can declare {_STATIC_BYTES}"
        return ""


def _of_tokens(kind: type[R], problem: Problem, **more: Any) -> R:
    """Of several tokens: the warp's half of a row at once."""
    return kind(warps=2, min_blocks=8 if problem.is_plain else 10, loads=_half_loads(problem, most=10), **more)


def _half_loads(problem: Problem, most: int) -> int:
    """At most `most` loads: a lane's part of half a row at once, or in equal batches."""
    half = ceil_div(problem.lane_loads, 2) if problem.specialize else 8
    return ceil_div(half, ceil_div(half, most))


def _some_half_loads(problem: Problem) -> list[int]:
    """Those worth measuring."""
    return sorted({1, *(_half_loads(problem, most) for most in (2, 4, 5, 8, 10))})


def _sharing(problem: Problem) -> int:
    """Warps that read a row together."""
    return 1 if problem.tokens == 1 else 2


@dataclass(frozen=True)
class EarlyRowKnobs(RowKnobs):
    """Of `ffn_12`, whose successor reads what it has written."""

    early_successor: bool = False
    """Whether `ffn_4`, in a whole FFN, may start before this launch has written its results."""

    @classmethod
    def rule(cls, problem: Problem, target: Target) -> EarlyRowKnobs:
        early = problem.specialize and target.is_programmatic and problem.is_plain
        dense = RowKnobs.rule(problem, target)
        if problem.tokens > 1:
            return EarlyRowKnobs(dense.warps, dense.min_blocks, dense.loads, dense.abreast, early_successor=early)
        if not problem.is_plain and problem.lane_loads <= 12:  # a row in one batch
            return EarlyRowKnobs(warps=1, min_blocks=8, loads=_loads(problem, most=12), early_successor=early)
        return EarlyRowKnobs(dense.warps, dense.min_blocks, dense.loads, early_successor=early)

    @classmethod
    def variants(cls, problem: Problem, target: Target) -> Iterator[EarlyRowKnobs]:
        for knobs in RowKnobs.variants(problem, target):
            for early in (False, True):
                yield cls(knobs.warps, knobs.min_blocks, knobs.loads, knobs.abreast, early)

    def legal(self, problem: Problem, target: Target) -> str:
        if self.early_successor and not target.is_programmatic:
            return f"sm_{target.capability} has no programmatic launches"
        return super().legal(problem, target)

    def defines(self, problem: Problem) -> tuple[Define, ...]:
        knobs = self if problem.in_ffn else replace(self, early_successor=False)
        return super(EarlyRowKnobs, knobs).defines(problem)


@dataclass(frozen=True)
class KeptKnobs(Knobs):
    """Of `ffn_1_kept` and its like, whose blocks stay, keep all tokens as float32, and have a share of the rows each."""

    suffix: ClassVar[str] = "_kept"

    loads: int = 2
    """16-byte loads of each row that a lane has in flight."""
    abreast: int = 4
    """Rows that two warps read side by side."""
    blocks: int = H100.multiprocessors
    """That share the rows: one a multiprocessor."""

    @classmethod
    def rule(cls, problem: Problem, target: Target) -> KeptKnobs:
        return cls(warps=12, min_blocks=1, blocks=target.multiprocessors)

    @classmethod
    def variants(cls, problem: Problem, target: Target) -> Iterator[KeptKnobs]:
        for warps, loads in itertools.product((8, 12, 16), (1, 2)):
            yield cls(warps, 1, loads, blocks=target.multiprocessors)

    def pays(self, problem: Problem, target: Target) -> bool:
        """Whether these, the rule's, are faster than a warp for each row, as measured on Hopper alone: where warps have several
        groups of rows, since the last one, which not all have, takes as long; and of `ffn_123` from six tokens on, where most
        neurons are inactive: where none is, it loses."""
        rounds = ceil_div(problem.d_ff, self.abreast) / (self.blocks * self.warps // 2)
        enough = problem.tokens > _FEWEST_KEPT or problem.kernel != "ffn_123"
        return target.capability == H100.capability and enough and rounds > _FEWEST_ROUNDS

    def shape(self, problem: Problem) -> Shape:
        blocks = ceil_div(ceil_div(problem.d_ff, self.abreast), self.warps // 2)
        return (min(self.blocks, blocks), 1, 1), (WARP * self.warps, 1, 1)

    def legal(self, problem: Problem, target: Target) -> str:
        if problem.tokens < _FEWEST_KEPT or problem.dtype == "float32" or not problem.is_plain or not problem.specialize:
            return f"tokens are kept from {_FEWEST_KEPT} on, of 16 bits, with plain weights and dims that are compiled in"
        if self.warps % 2 or not 2 <= self.warps <= 2 * _PAIR_BARRIERS:
            return f"{self.warps} warps: they come in pairs, {_PAIR_BARRIERS} at most"
        if self.abreast not in (2, 4, 8):
            return f"{self.abreast} rows abreast, not 2, 4 or 8"
        if not 1 <= self.loads <= _MOST_LOADS or problem.vectors % (2 * WARP * self.loads) or problem.d_ff % self.abreast:
            return f"{problem.d_ff} rows of {problem.d_model} elements: not {self.abreast} abreast, {self.loads} loads each"
        if problem.kernel == "ffn_123" and problem.lane_loads > _MOST_OF_A_ROW:
            return f"rows of {problem.d_model} elements do not fit the registers beside those that are on their way"
        if not 1 <= self.blocks <= _MOST_BLOCKS:
            return f"{self.blocks} blocks, not 1 to {_MOST_BLOCKS}"
        return super().legal(problem, target)

    def shared_bytes(self, problem: Problem) -> int:
        """As `Kept` in `kept.cuh`: the tokens, and what warps pass on to each other."""
        return 4 * problem.tokens * problem.d_model + 2 * self.warps * (self.abreast // 2 * _PLACES) * WARP * 4


@dataclass(frozen=True)
class FusedRowKnobs(EarlyRowKnobs):
    """Of `ffn_123`, whose warp goes on to its neuron's other row."""

    def legal(self, problem: Problem, target: Target) -> str:
        if problem.tokens > 1 and self.warps != 2:
            return f"{self.warps} warps: with several tokens two share their rows"
        return super().legal(problem, target)

    @classmethod
    def rule(cls, problem: Problem, target: Target) -> FusedRowKnobs:
        # Blocks of few warps end early, so that the successor's come in. With ten loads a lane keeps its registers for four
        # blocks.
        early = _starts_early(problem, target)
        if problem.tokens > 4:
            loads, blocks = _half_loads(problem, most=8 if problem.is_plain else 5), 10 if problem.specialize else 8
            return FusedRowKnobs(2, blocks, loads, early_successor=early)
        if problem.tokens > 1:
            return _of_tokens(cls, problem, early_successor=early)
        if not problem.is_plain:
            return FusedRowKnobs(warps=2, min_blocks=8, loads=_loads(problem, most=10), early_successor=early)
        return FusedRowKnobs(warps=2 if early else 4, min_blocks=4, loads=_loads(problem, most=10), early_successor=early)


def _starts_early(problem: Problem, target: Target) -> bool:
    """Where the GPU holds a warp for every row, a successor that starts early keeps none of them out."""
    return problem.specialize and target.is_programmatic and problem.d_ff <= 32 * target.multiprocessors


@dataclass(frozen=True)
class SharedRowKnobs(RowKnobs):
    """Of `ffn_23`, whose warps may share the rows of a block."""

    rows: int = 0
    """Of a block; 0 gives every warp a row."""

    @classmethod
    def rule(cls, problem: Problem, target: Target) -> SharedRowKnobs:
        if problem.tokens > 1:
            loads = _half_loads(problem, most=10)
            is_large = problem.tokens > 4 or problem.dtype == "float32" or not problem.specialize
            return SharedRowKnobs(warps=2, min_blocks=8 if is_large else 16 if loads <= 8 else 12, loads=loads)
        if not problem.is_plain and BF12_SLICES in problem.formats:  # their words take registers
            return SharedRowKnobs(warps=8, min_blocks=2, loads=_loads(problem, most=10), rows=8)
        # Eight warps share eight rows: larger blocks finish sooner when almost nothing is active, but hold their registers
        # until their slowest row. A row that is one batch gains nothing from two warps.
        if problem.specialize and problem.lane_loads <= 8:
            return SharedRowKnobs(warps=8, min_blocks=4, loads=_loads(problem, most=8))
        loads = _loads(problem, most=10)
        rows, min_blocks = (8, 4) if loads <= 8 else (12, 3)  # registers of more loads leave room for three blocks
        if target.capability >= 100 and _spills_at_four_blocks(problem, loads):
            min_blocks = 3
        if loads > 8 and not problem.is_plain and (target.capability >= 100 or problem.activation != RELU):
            min_blocks = 2
        return SharedRowKnobs(warps=8, min_blocks=min_blocks, loads=loads, rows=rows)

    @classmethod
    def variants(cls, problem: Problem, target: Target) -> Iterator[SharedRowKnobs]:
        if problem.tokens > 1:
            for loads in _some_half_loads(problem):
                for warps, min_blocks, rows in (*((2, n, 0) for n in (4, 6, 8, 12, 16)), (8, 2, 8), (8, 3, 8), (16, 1, 16)):
                    yield SharedRowKnobs(warps, min_blocks, loads, rows=rows)
            return
        for most in (8, 10, 20):
            for rows in (0, 8, 10, 12, 16):
                for warps, min_blocks in ((4, 8), (8, 3), (8, 4), (16, 2)):
                    yield SharedRowKnobs(warps, min_blocks, _loads(problem, most), rows=rows)

    def shape(self, problem: Problem) -> Shape:
        of_block = self.rows or max(1, self.warps // _sharing(problem))
        return (ceil_div(problem.d_ff, of_block), 1, 1), (WARP * self.warps, 1, 1)

    def legal(self, problem: Problem, target: Target) -> str:
        if self.abreast != 1:
            return f"{self.abreast} rows abreast: its warps read a row each"
        if problem.tokens > 1 and not self.rows and self.warps != 2:
            return f"{self.warps} warps: with several tokens two share a row, or many the rows of a block"
        if self.rows and (self.warps % 2 or not 1 <= self.rows <= WARP):
            return f"{self.warps} warps cannot share {self.rows} rows: warps come in pairs, rows are at most {WARP}"
        return super().legal(problem, target)


def _spills_at_four_blocks(problem: Problem, loads: int) -> bool:
    """Whether ffn_23 spills 4 to 12 bytes on sm_100 and sm_120: a row then ends inside its second batch of eight loads."""
    whole = problem.vectors % (WARP * 2 * loads) == 0
    return problem.specialize and loads == 8 and problem.lane_loads <= 16 and not whole


def _loads(problem: Problem, most: int) -> int:
    """At most `most` loads: a row in one batch, or in equal ones of an even number each."""
    if not problem.specialize:
        return min(most, 16)
    loads = problem.lane_loads
    batches = ceil_div(loads, most)
    return loads if batches == 1 else 2 * ceil_div(loads, 2 * batches)


@dataclass(frozen=True)
class ColumnKnobs(Knobs):
    """Of `ffn_4`. The shares that its warps sum are part of the order of sums."""

    loads: int = 4
    """Rows that a lane reads at once."""
    lists: int = 1
    """Tokens, one or two, whose rows a warp reads side by side."""
    here: int = 1
    """Tokens of a block."""

    @classmethod
    def rule(cls, problem: Problem, target: Target) -> ColumnKnobs:
        # Rows that lie a power of two apart share memory channels, and four by four they meet there; those in 12 bits do not.
        # Where some multiprocessors hold two blocks, these have enough in flight with three.
        apart = problem.formats[0].row_bytes(problem.d_model, problem.dtype)
        order = order_of_ffn_4(problem)
        lanes, warps = order.lanes, order.warps
        blocks = ceil_div(problem.vectors, lanes)
        alone = blocks <= H100.multiprocessors
        if problem.tokens > 1:
            return cls._of_tokens(problem, target, alone)
        if not problem.specialize:
            loads = 4 if problem.is_plain else 3
        elif warps == _MOST_WARPS:
            loads = 5 if problem.is_plain else 3
        elif lanes >= SLICE_UNIT and 4 * blocks <= 3 * H100.multiprocessors:  # few must each have more in flight
            loads = 5
        elif problem.is_plain:
            loads = 5 if problem.dtype != "float32" and apart & (apart - 1) == 0 else 4
        else:
            loads = 4 if alone and BF12_SLICES in problem.formats else 3
        return ColumnKnobs(warps, min_blocks=_MOST_WARPS // warps, loads=loads)

    @classmethod
    def _of_tokens(cls, problem: Problem, target: Target, alone: bool) -> ColumnKnobs:
        """A block has one token; where a multiprocessor has one block, up to four, with twice as many warps if it has all. Of
        more than four, two tokens a block, their lists side by side, serve every sparsity; but 12 bits take the registers."""
        tokens, warps = problem.tokens, order_of_ffn_4(problem).warps
        blocks, newest = _MOST_WARPS // warps, target.capability >= 100
        if not problem.specialize:
            return cls(warps, min_blocks=1, loads=3, here=tokens)._fitting(problem, target)
        if tokens > 4 and problem.is_plain:
            return cls(warps, blocks, loads=3, lists=2, here=2)._fitting(problem, target)
        if not alone:  # with few loads at once three blocks of 16 warps have registers enough
            loads, more = (3, 1) if tokens > 4 else (2, 0 if problem.is_plain else 1)
            return cls(warps, blocks + more, loads)
        if tokens > 4:
            return cls(warps, blocks, loads=3, here=4)._fitting(problem, target)
        if 2 * warps <= _MOST_WARPS:
            lists, loads = (1, 6 if problem.is_plain else 4) if tokens == 2 else (2, 2)
            twice = cls(2 * warps, min_blocks=1, loads=loads, lists=lists, here=tokens)
            if twice.shared_bytes(problem) <= target.shared_bytes:
                return twice
        return cls(warps, blocks, loads=4 if problem.is_plain and not newest else 3, here=tokens)._fitting(problem, target)

    def _fitting(self, problem: Problem, target: Target) -> ColumnKnobs:
        """These, with one list where its blocks would not fit a multiprocessor with two, and so few tokens in a block that they
        fit its shared memory."""
        knobs = self
        if knobs.lists > 1 and knobs.min_blocks * (knobs.shared_bytes(problem) + _RESERVED) > target.shared_bytes + _RESERVED:
            knobs = replace(knobs, lists=1)
        while knobs.here > 1 and knobs.shared_bytes(problem) > target.shared_bytes:
            knobs = replace(knobs, here=knobs.here // 2)
        return knobs

    @classmethod
    def variants(cls, problem: Problem, target: Target) -> Iterator[ColumnKnobs]:
        warps, tokens = order_of_ffn_4(problem).warps, problem.tokens
        if tokens > 1:
            for here in sorted({tokens, ceil_div(tokens, 2), 1}, reverse=True):
                for of_block, lists in ((warps, 1), (warps, 2), (2 * warps, 1), (2 * warps, 2)):
                    for loads, min_blocks in itertools.product((2, 3, 4, 6), (1, 2, 3) if here == 1 else (1, 2)):
                        yield ColumnKnobs(of_block, min_blocks, loads, lists, here)
            return
        for loads in (2, 3, 4, 5, 6, 8):
            for min_blocks in (1, 2):
                yield ColumnKnobs(warps, min_blocks, loads)

    def shape(self, problem: Problem) -> Shape:
        slices = ceil_div(problem.vectors, order_of_ffn_4(problem).lanes)
        return (slices * ceil_div(problem.tokens, self.here), 1, 1), (WARP * self.warps, 1, 1)

    def legal(self, problem: Problem, target: Target) -> str:
        order = order_of_ffn_4(problem)
        if not 1 <= self.here <= problem.tokens:
            return f"{self.here} tokens of a block, of {problem.tokens}"
        if self.warps < 1 or self.warps % order.warps or self.warps > order.warps * self.here:
            return f"{self.warps} warps would change the order of sums: it is that of {order.warps}"
        if not 1 <= self.loads <= _MOST_LOADS:
            return f"{self.loads} loads, not 1 to {_MOST_LOADS}"
        if self.lists not in (1, 2) or (self.lists == 2 and self.here <= self.warps // order.warps):
            return f"{self.lists} lists, where a warp has {ceil_div(self.here, self.warps // order.warps)} tokens"
        if BF12_SLICES in problem.formats and order_of_ffn_4(problem).lanes < SLICE_UNIT:
            return f"slices are narrower than the {SLICE_UNIT} chunks that {BF12_SLICES.name} keeps together"
        return super().legal(problem, target)

    def defines(self, problem: Problem) -> tuple[Define, ...]:
        return (*order_of_ffn_4(problem).defines(), *super().defines(problem))

    def shared_bytes(self, problem: Problem) -> int:
        """As `Shared` in `ffn_4.cu` with a norm, where that is more than a block has without being asked."""
        order = order_of_ffn_4(problem)
        columns = order.lanes * vector_length(problem.dtype)
        lists, sums = 2 * self.lists * self.warps * order.listed, 4 * self.here * order.warps * (columns + 1)
        needed = _multiple(_multiple(lists, 4) + sums, VECTOR_BYTES)
        return needed if needed > _STATIC_BYTES else 0


class Order(NamedTuple):
    """What decides the order of `ffn_4`'s sums. It follows from shape and dtype, so that every GPU gives the same bits."""

    lanes: int
    """16-byte lanes of a block's slice of a row."""
    each: int
    """16-byte vectors of x1 that a thread looks at before its warp lists the active rows."""
    unit: int
    """Neighbouring vectors of x1 that go to one warp."""
    warps: int
    """Warps of a block, or shares of its warps, to which rows are dealt out."""
    listed: int
    """Rows of a tile that a warp has at most: its part of the tile, or of d_ff where a whole tile's list would not fit."""

    def defines(self) -> tuple[tuple[str, int], ...]:
        return tuple(("SHARES" if name == "warps" else name.upper(), value) for name, value in self._asdict().items())


def order_of_ffn_4(problem: Problem) -> Order:
    """The order of the sums for a shape."""
    lanes = _slice_lanes(problem)
    warps = _column_warps(problem, lanes)
    length, unit = vector_length(problem.dtype), _unit(problem, warps)
    part = length * WARP  # rows that a warp looks at with one vector a thread
    most = 7 if length == 4 else 5  # registers: eight spill on sm_80
    each, own = ceil_div(problem.d_ff, part * warps), ceil_div(ceil_div(problem.d_ff, unit * length), warps) * unit * length
    if each <= most and own * warps <= _MOST_LISTED:
        return Order(lanes, each, unit, warps, listed=each * part if each * part * warps <= _MOST_LISTED else own)
    tiles = ceil_div(each, min(most, _MOST_LISTED // (part * warps)))
    each = ceil_div(each, tiles)
    return Order(lanes, each, unit, warps, listed=each * part)


def _column_warps(problem: Problem, lanes: int) -> int:
    """32 where a third of an H100's multiprocessors get no block of four lanes: the others must each have more in flight."""
    return 32 if lanes >= SLICE_UNIT and 3 * ceil_div(problem.vectors, lanes) <= 2 * H100.multiprocessors else 16


def _multiple(number: int, of: int) -> int:
    return ceil_div(number, of) * of


def _slice_lanes(problem: Problem) -> int:
    """The fewest lanes that make at most five blocks for four multiprocessors of an H100; of two lanes, at most one for each.

    Blocks of two lanes read 32 bytes of a row, which memory serves worse than it serves few blocks.
    """
    lanes = 2 if ceil_div(problem.vectors, 2) <= H100.multiprocessors else 4
    while lanes < WARP and 4 * ceil_div(problem.vectors, lanes) > 5 * H100.multiprocessors:
        lanes *= 2
    return lanes


def _unit(problem: Problem, warps: int) -> int:
    """16 vectors if that loads the warps as evenly as 8 does: longer runs of rows read better, uneven warps wait."""
    vectors = problem.d_ff / vector_length(problem.dtype)
    shares = {unit: math.ceil(vectors / unit / warps) * unit for unit in (16, 8)}
    return 16 if shares[16] <= shares[8] else 8


def compressed_format(weight: str, d_model: int, d_ff: int) -> Format:
    """The compressed format that a weight, given by its define, is read fastest in."""
    lanes = order_of_ffn_4(Problem("ffn_4", d_model, d_ff, "bfloat16")).lanes
    return BF12_SLICES if weight == "W_DOWN" and lanes >= SLICE_UNIT else BF12_ROWS


def compressed_formats(kernel: str, d_model: int, d_ff: int) -> tuple[Format, ...]:
    """Those of all weights of a kernel."""
    return tuple(compressed_format(weight, d_model, d_ff) for weight in KERNELS[kernel].weights)


@dataclass(frozen=True)
class TransposeKnobs(Knobs):
    """Of `pack_down`: a warp is a row of a 32 x 32 tile."""

    @classmethod
    def rule(cls, problem: Problem, target: Target) -> TransposeKnobs:
        return TransposeKnobs(warps=8, min_blocks=1)

    def shape(self, problem: Problem) -> Shape:
        return (ceil_div(problem.d_ff, WARP), ceil_div(problem.d_model, WARP), 1), (WARP, self.warps, 1)

    def legal(self, problem: Problem, target: Target) -> str:
        if WARP % max(1, self.warps):
            return f"{self.warps} warps do not divide a tile of {WARP} rows"
        return super().legal(problem, target)


@dataclass(frozen=True)
class CopyKnobs(Knobs):
    """Of `decompress`, which gives a warp a row."""

    @classmethod
    def rule(cls, problem: Problem, target: Target) -> CopyKnobs:
        return CopyKnobs(warps=8, min_blocks=1)

    def shape(self, problem: Problem) -> Shape:
        return (ceil_div(problem.d_ff, self.warps), 1, 1), (WARP * self.warps, 1, 1)


KINDS: Mapping[str, type[Knobs]] = MappingProxyType(
    {
        "ffn_1": RowKnobs,
        "ffn_12": EarlyRowKnobs,
        "ffn_123": FusedRowKnobs,
        "ffn_23": SharedRowKnobs,
        "ffn_4": ColumnKnobs,
        "pack_down": TransposeKnobs,
        "decompress": CopyKnobs,
    }
)
"""The knobs of every kernel."""
KEPT = ("ffn_1", "ffn_12", "ffn_123")
"""The kernels that have one beside them whose blocks keep the tokens."""


def kinds(kernel: str) -> tuple[type[Knobs], ...]:
    """The knobs of every launch of a kernel that gives the same bits."""
    return (KINDS[kernel], KeptKnobs) if kernel in KEPT else (KINDS[kernel],)


def rule(problem: Problem, target: Target) -> Knobs:
    """The knobs of a GPU and a shape that nobody measured."""
    if problem.kernel in KEPT:
        kept = KeptKnobs.rule(problem, target)
        if kept.pays(problem, target) and not kept.legal(problem, target):
            return kept
    return KINDS[problem.kernel].rule(problem, target)


def candidates(problem: Problem, target: Target) -> Iterator[Knobs]:
    """Legal knobs that are worth measuring, the rule's first."""
    first = rule(problem, target)
    yield first
    seen = {first}
    for knobs in itertools.chain.from_iterable(kind.variants(problem, target) for kind in kinds(problem.kernel)):
        if knobs not in seen and not knobs.legal(problem, target):
            seen.add(knobs)
            yield knobs
