"""Launch shapes as data: which kernel, on what grid, compiled with which constants. No CuPy, no GPU.

One function per kernel, all pure functions of the layer's shape, so that a plan can be checked, tested or run elsewhere (the
host build of the tests does) without a GPU.
"""

from __future__ import annotations

import math
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
    programmatic: bool = False
    """Whether it may start while its predecessor on the stream ends (programmatic dependent launch)."""


class Target(NamedTuple):
    """What a launch depends on of the GPU."""

    capability: int
    """Compute capability as major * 10 + minor: 90 for an H100."""
    multiprocessors: int


H100 = Target(90, 132)


class Shape(NamedTuple):
    """What a launch depends on."""

    d_model: int
    d_ff: int
    dtype: str
    specialize: bool = True
    """ROW_OPT and COL_OPT as constants (True), or both dims passed at launch."""
    target: Target = H100

    @property
    def is_programmatic(self) -> bool:
        """Whether the GPU has programmatic dependent launch: Hopper and later."""
        return self.target.capability >= 90


def vector_length(dtype: str) -> int:
    """Elements of a 16-byte vector: what d_model must be a multiple of."""
    return VECTOR_BYTES // ITEMSIZE[dtype]


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _defines(shape: Shape, **constants: int | None) -> tuple[tuple[str, int | None], ...]:
    dims = (("ROW_OPT", shape.d_ff), ("COL_OPT", shape.d_model)) if shape.specialize else ()
    fixed = (("TOKENS", 1), ("ACTIVATION_RELU", None), ("W_GATE", "Plain"), ("W_UP", "Plain"), ("W_DOWN", "Plain"))
    return ((f"DTYPE_{shape.dtype.upper()}", None), *dims, *fixed, *constants.items())


def _operator(kernel: str, shape: Shape, blocks: int, warps: int, arguments: str, **constants: int | None) -> Launch:
    programmatic: dict[str, int | None] = {"PROGRAMMATIC": None} if shape.is_programmatic else {}
    defines = _defines(shape, WARPS=warps, **constants, **programmatic)
    return Launch(kernel, (blocks, 1, 1), (WARP * warps, 1, 1), defines, arguments, programmatic=shape.is_programmatic)


def _row_loads(shape: Shape, most: int) -> int:
    """16-byte loads a lane issues before it uses the first: a row in one batch, or in equal ones of an even number each."""
    if not shape.specialize:
        return min(most, 16)
    loads = _lane_loads(shape)
    batches = _ceil_div(loads, most)
    return loads if batches == 1 else 2 * _ceil_div(loads, 2 * batches)


def _lane_loads(shape: Shape) -> int:
    """A lane's part of a row, in 16-byte loads."""
    return _ceil_div(shape.d_model // vector_length(shape.dtype), WARP)


def _row_per_warp(kernel: str, shape: Shape, arguments: str, warps: int, most_loads: int, **constants: int | None) -> Launch:
    blocks, loads = _ceil_div(shape.d_ff, warps), _row_loads(shape, most_loads)
    return _operator(kernel, shape, blocks, warps, arguments, MIN_BLOCKS=4, LOADS=loads, **constants)


def ffn_1(shape: Shape) -> Launch:
    """Launch of the gate GEMV."""
    # 20 loads cover a row of 5120 16-bit elements in one batch: 13B, H100: 46.5 µs; 8 loads: 48.8.
    return _row_per_warp("ffn_1", shape, "PPPii", warps=4, most_loads=20)


def ffn_123(shape: Shape) -> Launch:
    """Launch of the gate GEMV, (FAT)ReLU and up-projection in one."""
    # H100, 89 %, with ffn_4 after it, µs at 7B / 13B: 40.0 / 60.6; a row in one batch of loads 40.1 / 60.4, on which NVRTC 12.9
    # crashes for float32; 5 blocks an SM 40.1 / 61.3; 8 warps a block 41.0 / 62.3.
    if _all_rows_at_once(shape):
        return _row_per_warp("ffn_123", shape, "PPPPfii", warps=2, most_loads=10, EARLY_SUCCESSOR=None)
    return _row_per_warp("ffn_123", shape, "PPPPfii", warps=4, most_loads=10)


def _all_rows_at_once(shape: Shape) -> bool:
    """Whether the GPU holds a warp for every row: blocks of the successor then come in without keeping others out."""
    # H100, ffn_123 and ffn_4, µs at 1B 97 % / 88 % / 66 % / 0 %: 4 warps a block 8.3 / 9.0 / 11.1 / 16.3; 2 warps and the
    # successor let in after the last read 8.3 / 8.9 / 11.0 / 16.4, before the first 8.0 / 8.7 / 11.2 / 17.3.
    return shape.specialize and shape.is_programmatic and shape.d_ff <= 32 * shape.target.multiprocessors


def ffn_23(shape: Shape) -> Launch:
    """Launch of the fused (FAT)ReLU and up-projection."""
    # The GPU starts about 1.4 blocks a ns, so small blocks queue, and a large block keeps its place until its last row is done.
    # H100, µs at 99 % / 89 % / 66 % / 0 %. 7B: 8 warps with 8 rows 3.0 / 5.5 / 12.3 / 30.6; 10 rows 2.8 / 5.4 / 12.3 / 31.8;
    # 16 rows 2.5 / 5.6 / 13.1 / 31.0; a row a warp 3.6 / 5.6 / 12.3 / 30.5. 13B: 12 rows 3.3 / 7.9 / 18.5 / 47.4; 10 rows 3.5 /
    # 7.9 / 18.3 / 48.0; 16 rows 3.0 / 7.9 / 19.1 / 48.2. 1B, whose rows are one batch, 88 %: a row a warp 2.3; 8 rows 2.5.
    warps, loads = 8, _row_loads(shape, most=10)
    if shape.specialize and _lane_loads(shape) <= 8:
        return _row_per_warp("ffn_23", shape, "PPPPfii", warps, most_loads=8)
    rows, min_blocks = (8, 4) if loads <= 8 else (12, 3)  # registers of more loads leave room for 3 blocks an SM
    if shape.target.capability >= 100 and _spills_at_four_blocks(shape, loads):
        min_blocks = 3
    blocks = _ceil_div(shape.d_ff, rows)
    return _operator("ffn_23", shape, blocks, warps, "PPPPfii", MIN_BLOCKS=min_blocks, LOADS=loads, ROWS=rows)


def _spills_at_four_blocks(shape: Shape, loads: int) -> bool:
    """Whether ffn_23 spills 4 to 12 bytes on sm_100 and sm_120: where a row ends inside its second batch of eight loads."""
    whole = shape.d_model % (vector_length(shape.dtype) * WARP * 2 * loads) == 0
    return shape.specialize and loads == 8 and _lane_loads(shape) <= 16 and not whole


def ffn_4(shape: Shape) -> Launch:
    """Launch of the down-projection."""
    # H100, µs at 7B 89 % / 7B 0 % / 13B 89 % / 13B 0 %: 16 warps x 4 loads 6.2 / 33.0 / 8.65 / 54.2; 6 loads 6.1 / 33.0 / 9.3 /
    # 59.8; 3 loads 6.45 / 34.9 / 8.7 / 55.7; 12 warps 6.55 / 36.0 / 9.3 / 57.2; 20 warps 6.4 / 32.6 / 8.8 / 55.3.
    warps, length = 16, vector_length(shape.dtype)
    lanes, most = _slice_lanes(shape), min(WARP // length, 7)  # most: a bit a row, and registers (8 spill on sm_80)
    each = min(most, _ceil_div(shape.d_ff, length * warps * WARP)) if shape.specialize else most
    blocks = _ceil_div(shape.d_model // length, lanes)
    return _operator(
        "ffn_4", shape, blocks, warps, "PPPii", MIN_BLOCKS=2, LOADS=4, LANES=lanes, EACH=each, UNIT=_unit(shape, warps)
    )


def _unit(shape: Shape, warps: int) -> int:
    """Neighbouring vectors of x1 that go to one warp of ffn_4: 16 where that loads the warps as evenly as 8 does."""
    # Longer runs of rows read better, uneven warps wait. H100, units of 16 and 8, 0 % sparsity, µs: 13B (7 of 6.75 units, 14 of
    # 13.5) 53.0 and 54.0, 7B (6 of 5.4, 11 of 10.75) 34.3 and 33.2; 4 at 7B, 89 %: 6.6 instead of 6.2.
    if not shape.specialize:
        return 8
    vectors = shape.d_ff / vector_length(shape.dtype)
    shares = {unit: math.ceil(vectors / unit / warps) * unit for unit in (16, 8)}
    return 16 if shares[16] <= shares[8] else 8


def _slice_lanes(shape: Shape) -> int:
    """16-byte lanes of a block's slice of a row: the fewest, two at least, that make at most 5 blocks for 4 multiprocessors."""
    # H100, 89 %, µs: 7B 4 lanes (128 blocks) 6.35, 2 lanes (256) 6.8; 13B 4 lanes (160) 8.65, 2 lanes (320) 10.8, 8 lanes (80)
    # 9.5; 1B 2 lanes (96) 2.7, 4 lanes (48) 3.1, 1 lane (192) 3.3.
    if not shape.specialize:
        return 4
    chunks, lanes = shape.d_model // vector_length(shape.dtype), 2
    while lanes < WARP and 4 * _ceil_div(chunks, lanes) > 5 * shape.target.multiprocessors:
        lanes *= 2
    return lanes


def pack_down(shape: Shape) -> Launch:
    """Launch of the transpose that packs the down-projection weight."""
    rows = 8
    grid = (_ceil_div(shape.d_ff, WARP), _ceil_div(shape.d_model, WARP), 1)
    return Launch("pack_down", grid, (WARP, rows, 1), _defines(shape, ROWS=rows), "PPii")


KERNELS: MappingProxyType[str, Callable[[Shape], Launch]] = MappingProxyType(
    {"ffn_1": ffn_1, "ffn_123": ffn_123, "ffn_23": ffn_23, "ffn_4": ffn_4, "pack_down": pack_down}
)


@cache
def plan(kernel: str, shape: Shape) -> Launch:
    """The launch of `kernel` for `shape`."""
    return KERNELS[kernel](shape)
