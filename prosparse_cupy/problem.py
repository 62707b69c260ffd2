"""What a launch depends on: a `Problem`, and the GPU as a `Target`. Pure data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple

from .formats import PLAIN, Format, vector_length
from .formula import RELU

WARP = 32
LARGEST_DIMS: Mapping[str, int] = MappingProxyType({"d_ff": 2**31 - 2**17, "d_model": 2**20})
"""Rows are counted in 32 bits, past the last one by up to a tile; pack_down's grid ends at 65535 blocks of 32 columns."""


@dataclass(frozen=True)
class Interface:
    """What a kernel takes, in the order of its arguments, and how it may be launched."""

    parameters: tuple[str, ...]
    """Vectors, weights (``W_*``, which is also the define that says their format), `threshold`, the dims, and then what a call
    may have or not (`OPTIONAL`), of which the define in capitals tells which."""
    is_programmatic: bool = True
    """Whether it may start while its predecessor on the stream ends, where the GPU can do that."""
    may_be_partial: bool = False
    """Whether it can leave its result in float32."""

    @property
    def weights(self) -> tuple[str, ...]:
        return tuple(p for p in self.parameters if p.startswith("W_"))

    @property
    def optional(self) -> tuple[str, ...]:
        return tuple(p for p in self.parameters if p in OPTIONAL)

    @property
    def has_activation(self) -> bool:
        return "threshold" in self.parameters


OPTIONAL = ("gate_bias", "up_bias", "down_bias", "norm_weight")
"""Vectors that an FFN may have or not."""
_DIMS = ("d_ff", "d_model")
KERNELS: Mapping[str, Interface] = MappingProxyType(
    {
        "ffn_1": Interface(("x", "W_GATE", "gate", *_DIMS, "gate_bias"), may_be_partial=True),
        "ffn_12": Interface(("x", "W_UP", "x1", "threshold", *_DIMS, "up_bias")),
        "ffn_123": Interface(("x", "W_GATE", "W_UP", "x1", "threshold", *_DIMS, "gate_bias", "up_bias")),
        "ffn_23": Interface(("gate", "x", "W_UP", "x1", "threshold", *_DIMS, "up_bias")),
        "ffn_4": Interface(("x1", "W_DOWN", "y", *_DIMS, "down_bias", "norm_weight", "norm_eps"), may_be_partial=True),
        "pack_down": Interface(("w_down", "w_down_t", *_DIMS), is_programmatic=False),
        "decompress": Interface(("W_PACKED", "w", *_DIMS), is_programmatic=False),
    }
)
"""Every kernel."""


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

    @property
    def shared_bytes(self) -> int:
        """Shared memory that a block can have (CUDA C++ Programming Guide, Technical Specifications per Compute Capability)."""
        return 1024 * {80: 163, 87: 163, 90: 227, 100: 227, 101: 227, 103: 227, 110: 227}.get(self.capability, 99)


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
    extras: tuple[str, ...] = ()
    """Which of the kernel's `OPTIONAL` arguments a call has."""
    partial: bool = False
    """Whether the result stays in float32, to be added to those of other GPUs, where the dtype is another."""
    batch_invariant: bool = True
    """Whether a token has the bits that it has alone. If not, tensor cores may add several up in another order."""
    in_ffn: bool = False
    """Whether `ffn_4` is launched right behind it: whoever else may write before waiting, into what is still read."""

    def __post_init__(self) -> None:
        weights = len(KERNELS[self.kernel].weights)
        if not self.formats:
            object.__setattr__(self, "formats", (PLAIN,) * weights)
        if len(self.formats) != weights:
            raise ValueError(f"{self.kernel} has {weights} weights, got {len(self.formats)} formats")
        for format_ in self.formats:
            if self.dtype not in format_.dtypes:
                allowed = " or ".join(format_.dtypes)
                raise ValueError(f"{self.kernel}: weights in the format {format_.name} must be {allowed}, got {self.dtype}")

    @property
    def measured(self) -> Problem:
        """The problem whose knobs serve this one too: activation, biases, norm and a result in float32 cost next to nothing,
        and the knobs say what holds in an FFN."""
        is_own = self.activation == RELU and not (self.extras or self.partial or self.in_ffn) and self.batch_invariant
        if is_own:
            return self
        return replace(self, activation=RELU, extras=(), partial=False, batch_invariant=True, in_ffn=False)

    @property
    def is_plain(self) -> bool:
        """Whether all weights lie in memory as they are."""
        return all(format_ is PLAIN for format_ in self.formats)

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
