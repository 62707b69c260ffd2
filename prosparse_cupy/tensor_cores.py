"""Launches on tensor cores, for callers who do without batch invariance: the bits of a token then depend on the call it is in.

Several tokens are several products of each weight. In the order in which a token is added up alone they cost more than reading
the weight, from five tokens on; on tensor cores they cost nothing. The order of sums follows from the shape alone, so the same
call gives the same bits again; another GPU may lack the shared memory for a shape, or have tensor cores that add otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from .formats import vector_length
from .knobs import Knobs, Shape
from .problem import H100, WARP, Problem, Target, ceil_div

FEWEST_TOKENS = 5
"""From which on they pay."""
FEWEST_OF_GATE = 7
"""From which on they pay for the gate of a whole FFN: with fewer, `ffn_123`, which never writes a gate to memory, is faster."""
TICKET_BYTES = 4096
"""Of counters in front of partial sums: zero before a launch and after it, whatever its shape."""
_TOKENS = 8  # of a product
_WARPS = 16  # of a block; they decide the order of sums
_MOST_PARTS = 8  # of a slice, whose sums the last block reads at once
_MOST_STEPS = 10  # 16-byte vectors of a token, and of a row, that a thread has in registers
_MOST_ROWS = 65536  # that 16 bits tell apart
_TICKET = 4  # bytes


@dataclass(frozen=True)
class _OnTensorCores(Knobs):
    suffix: ClassVar[str] = "_mma"

    unit: int = 2
    """16-byte vectors that belong together."""

    def legal(self, problem: Problem, target: Target) -> str:
        if problem.batch_invariant:
            return "tensor cores do not keep the bits that a token has alone"
        if problem.tokens < FEWEST_TOKENS or problem.dtype == "float32" or not problem.is_plain or not problem.specialize:
            return (
                f"tensor cores are for {FEWEST_TOKENS} to {_TOKENS} tokens of 16 bits, plain weights, dims that are compiled in"
            )
        if self.warps != _WARPS:
            return f"{self.warps} warps would change the order of sums: it is that of {_WARPS}"
        if not 1 <= self.unit <= WARP or WARP % self.unit:
            return f"units of {self.unit} vectors"
        return super().legal(problem, target)


@dataclass(frozen=True)
class TileKnobs(_OnTensorCores):
    """Of `ffn_1_mma`, whose blocks have an equal share of the rows each and their part of the tokens in registers."""

    blocks: int = H100.multiprocessors
    """That share the rows: one a multiprocessor."""
    early_successor: bool = False
    """Whether the next launch may start with the last sums."""

    @classmethod
    def rule(cls, problem: Problem, target: Target) -> TileKnobs:
        return cls(_WARPS, min_blocks=1, blocks=target.multiprocessors, early_successor=target.is_programmatic)

    def shape(self, problem: Problem) -> Shape:
        return (min(self.blocks, ceil_div(problem.d_ff, 8)), 1, 1), (WARP * self.warps, 1, 1)

    def legal(self, problem: Problem, target: Target) -> str:
        if ceil_div(problem.vectors, 4 * _WARPS) > _MOST_STEPS:
            return f"rows of {problem.d_model} elements do not fit the registers beside the tokens"
        if self.early_successor and not target.is_programmatic:
            return f"sm_{target.capability} has no programmatic launches"
        return super().legal(problem, target)


@dataclass(frozen=True)
class SliceKnobs(_OnTensorCores):
    """Of `ffn_4_mma`, whose blocks have a slice of the columns and a part of the rows."""

    words: int = 8
    """Of 32 bits of a row that a lane reads: a slice is 16 times as many columns."""
    parts: int = 1
    """Blocks that share a slice, each with a part of the rows."""

    @classmethod
    def rule(cls, problem: Problem, target: Target) -> SliceKnobs:
        """As many parts as an H100 has multiprocessors for; slices of 128 columns, of 64 where there would be fewer than 32."""
        words = 8 if problem.d_model % 128 == 0 and problem.d_model >= 32 * 128 else 4
        slices = max(1, problem.d_model // (16 * words))
        return cls(_WARPS, min_blocks=1, words=words, parts=min(_MOST_PARTS, max(1, H100.multiprocessors // slices)))

    def shape(self, problem: Problem) -> Shape:
        return (self.parts * problem.d_model // self._columns, 1, 1), (WARP * self.warps, 1, 1)

    def legal(self, problem: Problem, target: Target) -> str:
        own = SliceKnobs.rule(problem, target)
        if (self.words, self.parts, self.unit) != (own.words, own.parts, own.unit):
            return f"{self} would change the order of sums: it is that of {own}"
        if "norm_weight" in problem.extras:
            return "x1 is normalised by ffn_4 alone"
        if problem.d_model % self._columns or problem.d_model // self._columns * _TICKET > TICKET_BYTES:
            return f"{problem.d_model} columns are not slices of {self._columns}, {TICKET_BYTES // _TICKET} at most"
        if problem.d_ff % vector_length(problem.dtype) or problem.d_ff > _MOST_ROWS:
            return f"{problem.d_ff} rows are not whole vectors, or more than {_MOST_ROWS}"
        return super().legal(problem, target)

    @property
    def _columns(self) -> int:
        return 16 * self.words

    def shared_bytes(self, problem: Problem) -> int:
        """As `Listed` in `ffn_4_mma.cu`, one a warp: x1 of the rows of a share, and later their sums; and their numbers."""
        units = ceil_div(problem.d_ff // vector_length(problem.dtype), self.unit)
        rows = ceil_div(units, self.parts * self.warps) * self.unit * vector_length(problem.dtype)
        most = ceil_div(rows, 16) * 16
        listed = max(16 * most, 4 * _TOKENS * self._columns) + 2 * most
        return self.warps * ceil_div(listed, 16) * 16

    def partial_bytes(self, problem: Problem) -> int:
        return 4 * self.parts * _TOKENS * problem.d_model if self.parts > 1 else 16  # which nobody uses


ON_TENSOR_CORES: Mapping[str, type[_OnTensorCores]] = MappingProxyType({"ffn_1": TileKnobs, "ffn_4": SliceKnobs})
"""The knobs of the kernels that have one for tensor cores beside them."""


def keeps_bits(kernel: str, tokens: int, batch_invariant: bool) -> bool:
    """Whether a call that asks for batch invariance, or not, has it in any case: what a `Problem` says."""
    return batch_invariant or tokens < FEWEST_TOKENS or kernel not in ON_TENSOR_CORES


def knobs_on_tensor_cores(problem: Problem, target: Target) -> Knobs | None:
    """Those of a problem that tensor cores may do and can."""
    kind = ON_TENSOR_CORES.get(problem.kernel)
    if problem.batch_invariant or kind is None:
        return None
    knobs = kind.rule(problem, target)
    return None if knobs.legal(problem, target) else knobs
