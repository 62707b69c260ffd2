"""Launch shapes as data: which kernel, on what grid, compiled with which constants. No CuPy, no GPU.

One function per kernel, all pure functions of the layer's shape, so that a plan can be checked, tested or run elsewhere (the
host build of the tests does) without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import NamedTuple

ITEMSIZE = MappingProxyType({"bfloat16": 2, "float16": 2, "float32": 4})
VECTOR_BYTES = 16
WARP = 32


@dataclass(frozen=True)
class Launch:
    """One kernel launch, apart from the pointers."""

    kernel: str
    """Stem of the `.cu` file and name of the `extern "C"` symbol."""
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    defines: tuple[tuple[str, int | None], ...]
    """NVRTC defines; None for one without a value."""
    arguments: str
    """Kernel parameters as `struct` characters: P pointer, f float32, i int32."""
    shared_bytes: int = 0
    """Dynamic shared memory."""


class Shape(NamedTuple):
    """What a launch depends on."""

    d_model: int
    d_ff: int
    dtype: str
    specialize: bool = True
    """ROW_OPT and COL_OPT as constants (True), or both dims passed at launch."""


def vector_length(dtype: str) -> int:
    """Elements of a 16-byte vector: what d_model must be a multiple of."""
    return VECTOR_BYTES // ITEMSIZE[dtype]


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _defines(shape: Shape, **constants: int) -> tuple[tuple[str, int | None], ...]:
    dims = (("ROW_OPT", shape.d_ff), ("COL_OPT", shape.d_model)) if shape.specialize else ()
    return ((f"DTYPE_{shape.dtype.upper()}", None), *dims, *constants.items())


def _row_loads(shape: Shape, most: int) -> int:
    """16-byte loads a lane issues before it uses the first, so that all passes over a row are equally long."""
    if not shape.specialize:
        return min(most, 16)
    chunks_per_lane = _ceil_div(shape.d_model // vector_length(shape.dtype), WARP)
    return _ceil_div(chunks_per_lane, _ceil_div(chunks_per_lane, most))


def _row_per_warp(kernel: str, shape: Shape, arguments: str, most_loads: int) -> Launch:
    # ffn_23 at 7B, 89 %, H100: 6.1 µs with 4 warps a block and at least 4 blocks an SM (128 registers), 6.4 with 6 blocks;
    # 8 warps 7.9, 2 warps 6.6; two rows a warp 6.9.
    warps = 4
    defines = _defines(shape, WARPS=warps, MIN_BLOCKS=4, LOADS=_row_loads(shape, most_loads))
    return Launch(kernel, (_ceil_div(shape.d_ff, warps), 1, 1), (WARP * warps, 1, 1), defines, arguments)


def ffn_1(shape: Shape) -> Launch:
    """Launch of the gate GEMV."""
    # 20 loads cover a row of 5120 16-bit elements in one pass: 13B, H100: 46.5 µs; 8 loads: 48.8.
    return _row_per_warp("ffn_1", shape, "PPPii", most_loads=20)


def ffn_23(shape: Shape) -> Launch:
    """Launch of the fused (FAT)ReLU and up-projection."""
    # Two passes over a row leave registers for more blocks at a time. H100, 89 %, two passes and one: 7B 6.1 µs and 6.7,
    # 13B 8.4 and 8.7.
    return _row_per_warp("ffn_23", shape, "PPPPfii", most_loads=10)


def ffn_4(shape: Shape) -> Launch:
    """Launch of the down-projection."""
    # H100, µs, at 7B 89 % / 7B 0 % / 13B 89 %: 16 warps x 4 loads x 4 lanes 7.1 / 33.3 / 9.5; 6 loads 7.0 / 33.5 / 10.1;
    # 8 lanes and clusters of 2 blocks 8.4 / 34.8 / 11.1; 16 lanes and clusters of 4 8.4 / 34.9 / 10.6; 8 warps 9.1 / 44.6 /
    # 11.8.
    warps, lanes, length = 16, 4, vector_length(shape.dtype)
    most = WARP // length  # a bit a row
    each = min(most, _ceil_div(shape.d_ff, length * warps * WARP)) if shape.specialize else most
    defines = _defines(shape, WARPS=warps, MIN_BLOCKS=2, LOADS=4, LANES=lanes, EACH=each)
    return Launch("ffn_4", (_ceil_div(shape.d_model // length, lanes), 1, 1), (WARP * warps, 1, 1), defines, "PPPii")


def pack_down(shape: Shape) -> Launch:
    """Launch of the transpose that packs the down-projection weight."""
    rows = 8
    grid = (_ceil_div(shape.d_ff, WARP), _ceil_div(shape.d_model, WARP), 1)
    return Launch("pack_down", grid, (WARP, rows, 1), _defines(shape, ROWS=rows), "PPii")


KERNELS: MappingProxyType[str, Callable[[Shape], Launch]] = MappingProxyType(
    {"ffn_1": ffn_1, "ffn_23": ffn_23, "ffn_4": ffn_4, "pack_down": pack_down}
)


@cache
def plan(kernel: str, shape: Shape) -> Launch:
    """The launch of `kernel` for `shape`."""
    return KERNELS[kernel](shape)
