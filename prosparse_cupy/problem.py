"""What a launch depends on: a `Problem`, and the GPU as a `Target`. Pure data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .formats import PLAIN, Format, vector_length
from .formula import Formula

WARP = 32
_RELU = Formula()


class Target(NamedTuple):
    """What a launch depends on of the GPU."""

    capability: int
    """Compute capability as major * 10 + minor: 90 for an H100."""
    multiprocessors: int
    name: str = ""
    """As the driver says it; names the GPU's measured table."""

    @property
    def is_programmatic(self) -> bool:
        """Whether it has programmatic dependent launch: Hopper and later."""
        return self.capability >= 90


H100 = Target(90, 132, "NVIDIA H100 80GB HBM3")


@dataclass(frozen=True)
class Problem:
    """One kernel on one shape."""

    kernel: str
    """Stem of the `.cu` file."""
    d_model: int
    d_ff: int
    dtype: str
    specialize: bool = True
    """ROW_OPT and COL_OPT as constants (True), or both dims passed at launch."""
    tokens: int = 1
    formats: tuple[Format, ...] = (PLAIN, PLAIN)
    """Of the kernel's weights, in the order of its arguments."""
    formula: Formula = _RELU

    @property
    def vectors(self) -> int:
        """16-byte vectors of a token."""
        return self.d_model // vector_length(self.dtype)

    @property
    def lane_loads(self) -> int:
        """A lane's part of a row that one warp reads, in 16-byte loads."""
        return ceil_div(self.vectors, WARP)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
