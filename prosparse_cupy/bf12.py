"""bfloat16 weights in 12 bits without loss: the formats that ``kernels/bf12.cuh`` reads, made and undone. NumPy or CuPy.

A bfloat16 is a sign, 8 bits of exponent and 7 of mantissa, and the exponents of a matrix take few values. A matrix has a window
of 16 consecutive exponents, from ``2 * base`` on; a weight whose exponent lies in it is its sign, its mantissa and a code of 4
bits. Weights are taken in chunks of 8. A chunk that has an exponent outside the window escapes: it is kept as it is, and its
place says where. Every bit pattern survives, NaN included.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

CHUNK = 8
"""Weights that are read and escape together."""
WINDOW = 16
"""Exponents of a matrix that have a code."""
ESCAPE = 0x88888888
"""The upper word of a chunk that escapes; one that would have it by itself escapes too."""
LARGEST_BASE = (256 - WINDOW) // 2
_ROWS_AT_ONCE = 1024
# Weights of a chunk, the byte of a word where their upper bits are, and how far that word is rotated left first.
_UPPER = tuple(
    (weight, 8 * byte, turn) for turn, four in ((0, (0, 1, 4, 5)), (4, (2, 3, 6, 7))) for byte, weight in enumerate(four)
)


class Packed(NamedTuple):
    """A (d_ff, d_model) matrix in 12 bits."""

    words: tuple[Any, ...]
    """Arrays of uint32, as the layout has them."""
    escapes: Any
    """(n, 8) uint16: the chunks that escape, row by row."""
    base: int
    """Half of the window's smallest exponent."""


class Layout(ABC):
    """Where the three words of a chunk lie: two low ones, the first its number if it escapes, and a high one."""

    @abstractmethod
    def shapes(self, rows: int, chunks: int) -> tuple[tuple[int, ...], ...]:
        """Of the arrays for that many rows of chunks."""

    def empty(self, xp: ModuleType, rows: int, chunks: int) -> tuple[Any, ...]:
        """The arrays."""
        return tuple(xp.empty(shape, np.uint32) for shape in self.shapes(rows, chunks))

    @abstractmethod
    def put(self, arrays: tuple[Any, ...], part: slice, words: Any) -> None:
        """Store the words of some rows, (rows, chunks, 3)."""

    @abstractmethod
    def get(self, xp: ModuleType, arrays: tuple[Any, ...], part: slice, chunks: int | None) -> Any:
        """The words of some rows; with None for `chunks` those that fill a row too."""

    @abstractmethod
    def number(self, xp: ModuleType, arrays: tuple[Any, ...], rows: Any, columns: Any) -> None:
        """Number the chunks at these places, in their order."""


class Rows(Layout):
    """For kernels that read whole rows: the low words of all chunks, and the high words of all."""

    def shapes(self, rows: int, chunks: int) -> tuple[tuple[int, ...], ...]:
        return (rows, chunks, 2), (rows, chunks)

    def put(self, arrays: tuple[Any, ...], part: slice, words: Any) -> None:
        arrays[0][part], arrays[1][part] = words[..., :2], words[..., 2]

    def get(self, xp: ModuleType, arrays: tuple[Any, ...], part: slice, chunks: int | None) -> Any:
        return xp.concatenate([arrays[0][part], arrays[1][part][..., None]], axis=2)

    def number(self, xp: ModuleType, arrays: tuple[Any, ...], rows: Any, columns: Any) -> None:
        arrays[0][rows, columns, 0] = xp.arange(len(rows), dtype=np.uint32)


class Slices(Layout):
    """For kernels that read a slice of every row: units of four chunks, twelve words, in the order in which lanes read them.

    The last unit of a row is filled with zeros.
    """

    UNIT = 4
    ORDER = np.array([0, 1, 2, 5, 3, 4, 6, 7, 9, 10, 11, 8])
    """Word by word, which of the unit's words lies there: word w of chunk c is 3 c + w."""

    def shapes(self, rows: int, chunks: int) -> tuple[tuple[int, ...], ...]:
        return ((rows, -(-chunks // self.UNIT), 3 * self.UNIT),)

    def put(self, arrays: tuple[Any, ...], part: slice, words: Any) -> None:
        (units,) = arrays
        units[part] = 0
        for place, word in enumerate(self.ORDER.tolist()):
            of_units = words[:, word // 3 :: self.UNIT, word % 3]
            units[part, : of_units.shape[1], place] = of_units

    def get(self, xp: ModuleType, arrays: tuple[Any, ...], part: slice, chunks: int | None) -> Any:
        units = arrays[0][part]
        return units[..., self.ORDER.argsort()].reshape(len(units), -1, 3)[:, :chunks]

    def number(self, xp: ModuleType, arrays: tuple[Any, ...], rows: Any, columns: Any) -> None:
        place = xp.asarray(self.ORDER.argsort()[::3])[columns % self.UNIT]
        arrays[0][rows, columns // self.UNIT, place] = xp.arange(len(rows), dtype=np.uint32)


ROWS, SLICES = Rows(), Slices()


def pack(xp: ModuleType, bits: Any, layout: Layout) -> Packed:
    """A matrix in 12 bits, given as its (d_ff, d_model) uint16 bit patterns; `xp` is NumPy or CuPy, whose arrays these are."""
    d_ff, d_model = bits.shape
    chunks, base = d_model // CHUNK, _base(xp, bits)
    arrays = layout.empty(xp, d_ff, chunks)
    found = []
    for part in _parts(d_ff):
        words = _words(xp, bits[part], base)
        layout.put(arrays, part, words)
        row, column = xp.nonzero(words[..., 2] == np.uint32(ESCAPE))
        found.append(xp.stack([row + part.start, column]))
    rows, columns = xp.concatenate(found, axis=1)
    layout.number(xp, arrays, rows, columns)
    return Packed(arrays, bits.reshape(d_ff, chunks, CHUNK)[rows, columns], base)


def unpack(xp: ModuleType, packed: Packed, layout: Layout, out: Any) -> None:
    """The matrix's bit patterns into `out`, (d_ff, d_model) uint16."""
    for part in _parts(len(out)):
        words = layout.get(xp, packed.words, part, out.shape[1] // CHUNK)
        bits, high = xp.ascontiguousarray(words[..., :2]).view(np.uint8).astype(np.uint16), words[..., 2]
        for weight, byte, turn in _UPPER:
            turned = high if turn == 0 else high << np.uint32(turn) | high >> np.uint32(32 - turn)
            bits[..., weight] |= ((turned >> np.uint32(byte) & 0x87) + np.uint32(packed.base)).astype(np.uint16) << 8
        escaped = high == np.uint32(ESCAPE)
        bits[escaped] = packed.escapes[words[..., 0][escaped]]
        out[part] = bits.reshape(len(bits), -1)


def strays(xp: ModuleType, packed: Packed, layout: Layout, escapes: int) -> int:
    """How many chunks escape to a place that there is not: a kernel would read behind the escapes.

    The words that fill a row count too, since kernels read them.
    """
    found, first_outside = 0, np.uint32(min(escapes, 0xFFFFFFFF))
    for part in _parts(len(packed.words[0])):
        words = layout.get(xp, packed.words, part, None)
        found += int(((words[..., 2] == np.uint32(ESCAPE)) & (words[..., 0] >= first_outside)).sum())
    return found


def _parts(rows: int) -> list[slice]:
    return [slice(first, min(first + _ROWS_AT_ONCE, rows)) for first in range(0, rows, _ROWS_AT_ONCE)]


def _base(xp: ModuleType, bits: Any) -> int:
    """The window that holds the most weights, the lowest of equals."""
    counts = xp.zeros(256, np.int64)
    for part in _parts(len(bits)):
        counts += xp.bincount((bits[part] >> 7 & 0xFF).ravel(), minlength=256)
    upto = np.concatenate([[0], np.cumsum(counts.get() if hasattr(counts, "get") else counts)])
    held = upto[WINDOW::2] - upto[: 2 * LARGEST_BASE + 1 : 2]
    return int(held.argmax())


def _words(xp: ModuleType, bits: Any, base: int) -> Any:
    """The three words of each chunk of some rows; chunks that escape have zeros and `ESCAPE`."""
    codes = (bits >> 7 & 0xFF).astype(np.int16) - np.int16(2 * base)
    fits = ((codes >= 0) & (codes < WINDOW)).reshape(len(bits), -1, CHUNK).all(axis=2)
    low = (codes.astype(np.uint8) << 7 | (bits & 0x7F).astype(np.uint8)).astype(np.uint8)
    upper = (bits >> 15 << 7 | codes.astype(np.uint16) >> 1 & 7).astype(np.uint32).reshape(len(bits), -1, CHUNK)
    words = xp.zeros((*fits.shape, 3), np.uint32)
    words[..., :2] = low.view(np.uint32).reshape(*fits.shape, 2)
    for weight, byte, turn in _UPPER:
        placed = upper[..., weight] << np.uint32(byte)
        words[..., 2] |= placed if turn == 0 else placed >> np.uint32(turn) | placed << np.uint32(32 - turn)
    words[~fits | (words[..., 2] == np.uint32(ESCAPE))] = xp.asarray([0, 0, ESCAPE], dtype=np.uint32)
    return words
