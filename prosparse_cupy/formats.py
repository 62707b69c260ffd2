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
    """Arrays that a matrix consists of."""

    def row_bytes(self, d_model: int, dtype: str) -> int:
        """Bytes that a neuron's row takes in memory."""
        return d_model * ITEMSIZE[dtype]


PLAIN = Format("plain", "Plain")
"""Row-major, as `torch.nn.Linear` has it."""
FORMATS: Mapping[str, Format] = MappingProxyType({f.name: f for f in (PLAIN,)})
