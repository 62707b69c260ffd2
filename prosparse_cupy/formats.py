"""Formats: how a weight matrix lies in memory. Each has a header in `kernels/`, named after it, that reads it.

Pure data, no CuPy. Also what every format shares: the dtypes and the 16-byte vectors that kernels read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

ITEMSIZE: Mapping[str, int] = MappingProxyType({"bfloat16": 2, "float16": 2, "float32": 4})
"""Bytes of an element, by dtype."""
VECTOR_BYTES = 16
"""What a lane reads at once, and what every array of a kernel is aligned to."""


def vector_length(dtype: str) -> int:
    """Elements of a 16-byte vector: what d_model must be a multiple of."""
    return VECTOR_BYTES // ITEMSIZE[dtype]


@dataclass(frozen=True)
class Format:
    """One format of weights.

    `struct` is its struct in ``kernels/<name>.cuh``, which the kernels get as the define of a weight (``-DW_UP=Plain``).
    """

    name: str
    struct: str
    pointers: int = 1
    """What a kernel gets for a matrix: its arrays' addresses, and numbers."""
    dtypes: tuple[str, ...] = tuple(ITEMSIZE)

    def row_bytes(self, d_model: int, dtype: str) -> int:
        """Bytes that a neuron's row takes in memory."""
        return d_model * ITEMSIZE[dtype]


class _InTwelveBits(Format):
    """Escapes are not counted among the bytes of a row."""

    def row_bytes(self, d_model: int, dtype: str) -> int:
        return d_model * 3 // 2


PLAIN = Format("plain", "Plain")
"""Row-major, as `torch.nn.Linear` has it."""
BF12_ROWS = _InTwelveBits("bf12-rows", "Bf12Rows", pointers=4, dtypes=("bfloat16",))
"""bfloat16 without loss in 12 bits (`bf12`), for kernels that read whole rows."""
BF12_SLICES = _InTwelveBits("bf12-slices", "Bf12Slices", pointers=3, dtypes=("bfloat16",))
"""The same for `ffn_4`, whose blocks read a slice of every row."""
SLICE_UNIT = 4
"""Chunks of 8 weights of a slice that lie together: `ffn_4` with narrower slices reads `BF12_ROWS`."""
FORMATS: Mapping[str, Format] = MappingProxyType({f.name: f for f in (PLAIN, BF12_ROWS, BF12_SLICES)})
