"""What a launch depends on: a `Problem`, and the GPU as a `Target`. Pure data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from .formats import PLAIN, Format, vector_length
from .formula import RELU

WARP = 32
WEIGHTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"ffn_1": ("W_GATE",), "ffn_123": ("W_GATE", "W_UP"), "ffn_23": ("W_UP",), "ffn_4": ("W_DOWN",), "pack_down": ()}
)
"""The weights of every kernel, by the define that says their format, in the order of its arguments."""


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
    formats: tuple[Format, ...] = ()
    """Of the kernel's weights, in the order of its arguments; plain ones if it is not said."""
    activation: str = RELU
    """The part of the formula that kernels are compiled for; a threshold comes with the launch."""

    def __post_init__(self) -> None:
        weights = len(WEIGHTS[self.kernel])
        if not self.formats:
            object.__setattr__(self, "formats", (PLAIN,) * weights)
        if len(self.formats) != weights:
            raise ValueError(f"{self.kernel} has {weights} weights, got {len(self.formats)} formats")

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
