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
    sm_count: int = 132
    """Multiprocessors of the GPU; the default is an H100 SXM."""
    capability: int = 90
    """Compute capability as major * 10 + minor."""


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


def ffn_1(shape: Shape) -> Launch:
    """Launch of the gate GEMV."""
    # 20 loads cover a row of 5120 16-bit elements in one pass: 13B, H100: 46.5 µs; 8 loads: 48.8. At least 4 blocks of 4 warps
    # an SM leave 128 registers, enough to keep them in flight.
    warps = 4
    defines = _defines(shape, WARPS=warps, MIN_BLOCKS=4, LOADS=_row_loads(shape, most=20))
    return Launch("ffn_1", (_ceil_div(shape.d_ff, warps), 1, 1), (WARP * warps, 1, 1), defines, "PPPii")


def ffn_23(shape: Shape) -> Launch:
    """Launch of the fused (FAT)ReLU and up-projection."""
    # One block an SM, 12 sets of rows. H100, µs, at 7B 89 % / 13B 89 % / 7B 99 %: 6.5 / 8.8 / 3.9; 3 sets 6.8 / 9.2 / 4.1; two
    # blocks of 8 warps 6.8 / 9.2 / 4.0; a warp a row without a list 6.0 / 8.6 / 4.3.
    warps = 16
    sets = min(12, shape.sm_count)
    each = _vectors_per_thread(shape, warps, sets)
    # For sm_100 and later the compiler needs more registers than there are for 16 loads.
    loads = _row_loads(shape, most=20 if shape.capability < 100 else 10)
    defines = _defines(shape, WARPS=warps, MIN_BLOCKS=1, LOADS=loads, SETS=sets, EACH=each)
    return Launch("ffn_23", (shape.sm_count // sets * sets, 1, 1), (WARP * warps, 1, 1), defines, "PPPPfii")


def ffn_4(shape: Shape) -> Launch:
    """Launch of the down-projection."""
    # H100, µs, at 7B 89 % / 7B 0 % / 13B 89 %: 16 warps x 4 loads x 4 lanes 7.1 / 33.3 / 9.5; 6 loads 7.0 / 33.5 / 10.1;
    # 8 lanes and clusters of 2 blocks 8.4 / 34.8 / 11.1; 16 lanes and clusters of 4 8.4 / 34.9 / 10.6.
    warps, lanes = 16, 4
    chunks = shape.d_model // vector_length(shape.dtype)
    each = _vectors_per_thread(shape, warps, sets=1)
    defines = _defines(shape, WARPS=warps, MIN_BLOCKS=2, LOADS=4, LANES=lanes, SETS=1, EACH=each)
    return Launch("ffn_4", (_ceil_div(chunks, lanes), 1, 1), (WARP * warps, 1, 1), defines, "PPPii")


def _vectors_per_thread(shape: Shape, warps: int, sets: int) -> int:
    """16-byte vectors of gate or x1 that a thread looks at before its block lists the active rows: at most 32 rows."""
    most = WARP // vector_length(shape.dtype)
    if not shape.specialize:
        return most if sets == 1 else 1
    vectors = _ceil_div(shape.d_ff, vector_length(shape.dtype))
    return min(most, _ceil_div(vectors, sets * warps * WARP))


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
