"""Compressed weights: bfloat16 in 12 bits without loss, in arrays of the caller's library."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Generic, Literal, TypeAlias

import numpy as np

from . import bf12
from .compiler import decompression_of
from .formats import BF12_ROWS, BF12_SLICES, VECTOR_BYTES, Format
from .knobs import compressed_format
from .libraries import HOST, A, Description, Family, family_of
from .problem import LARGEST_DIMS

Layout = Literal["rows", "slices"]
LARGEST_RATIO = 0.8
"""Of a matrix that is worth compressing."""

_WEIGHTS: Mapping[str, str] = MappingProxyType({"rows": "W_GATE", "slices": "W_DOWN"})  # one that is read so
_LAYOUTS: Mapping[Format, bf12.Layout] = MappingProxyType({BF12_ROWS: bf12.ROWS, BF12_SLICES: bf12.SLICES})


class CompressedWeight(Generic[A]):
    """A (d_ff, d_model) bfloat16 weight in 12 bits, as `compress` makes it. Every operator takes it in place of the array.

    It holds ordinary arrays of the library that it was made from, so it pickles and copies as they do. They are not to be
    written to.
    """

    def __init__(self, shape: tuple[int, int], layout: Layout, packed: bf12.Packed, escapes: int) -> None:
        self._shape, self._packed, self._escapes = shape, packed, escapes
        self._layout: Layout = layout
        self._nbytes: int = sum(_size(a) for a in self.arrays)
        self._addresses: tuple[int, ...] | None = None
        self._parts: tuple[Format, tuple[int, ...]] | None = None
        self._description: Description | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(d_ff, d_model)"""
        return self._shape

    @property
    def dtype(self) -> Any:
        """The library's bfloat16."""
        return self._packed.escapes.dtype

    @property
    def layout(self) -> Layout:
        """Whether it is laid out for kernels that read rows, or for `ffn_4`."""
        return self._layout

    @property
    def arrays(self) -> tuple[A, ...]:
        """What it consists of."""
        return (*self._packed.words, self._packed.escapes)

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays."""
        return self._nbytes

    @property
    def ratio(self) -> float:
        """Its bytes as a share of the plain weight's: 0.75 and what escapes."""
        return self._nbytes / (2 * self._shape[0] * self._shape[1])

    @property
    def escapes(self) -> int:
        """Chunks of 8 weights that are kept as they are, since an exponent lies outside the window."""
        return self._escapes

    def decompress(self, *, out: A | None = None) -> A:
        """The weight, bit for bit, in `out` or a new array.

        Raises
        ------
        ValueError, TypeError
            `out` is of another library, shape, dtype or device, not C-contiguous, or on a GPU and not at a multiple of 16
            bytes.
        """
        family, (_, _, device, _) = self.family, self.description
        if out is not None:
            _check_out(family, out, self.description)
        result: A = family.empty_bfloat16(self._shape, self._packed.escapes) if out is None else out
        if device == HOST:
            with family.numerics(self._packed.escapes) as (xp, view):
                words = tuple(view(a).view(np.uint32) for a in self._packed.words)
                packed = self._packed._replace(words=words, escapes=view(self._packed.escapes).view(np.uint16))
                bf12.unpack(xp, packed, _LAYOUTS[self.format], view(result).view(np.uint16))
            return result
        address = family.address(result)
        if address == 0:
            raise TypeError(f"decompress: out must be a plain array in memory, got {family.why_no_memory(result)}")
        if address % VECTOR_BYTES:
            raise ValueError(f"decompress: out must start at a multiple of {VECTOR_BYTES} bytes, got address {address:#x}")
        kernel = decompression_of(self.format, self._shape, device)
        kernel.launch(family.stream(device), False, *self.addresses, address, *self._shape)
        return result

    def to(self, device: Any) -> CompressedWeight[A]:
        """The same on another device, for torch tensors: ``packed.to("cuda:1")``.

        Raises
        ------
        TypeError
            Its arrays are not torch tensors.
        """
        if self.family.name != "torch":
            raise TypeError(
                f"to: only weights in torch tensors move, this one is in {self.family.name} arrays: compress it there"
            )
        arrays: tuple[Any, ...] = self.arrays
        moved = [array.to(device) for array in arrays]
        packed = self._packed._replace(words=tuple(moved[:-1]), escapes=moved[-1])
        return CompressedWeight(self._shape, self._layout, packed, self._escapes)

    def rows(self, start: int, stop: int) -> CompressedWeight[A]:
        """Rows `start` to `stop` as a weight of their own that shares this one's memory, as a slice of an array does.

        Raises
        ------
        ValueError
            There are no such rows, they do not start at a multiple of 16 bytes, or the layout is "slices", whose rows are not
            apart.
        """
        d_ff, d_model = self._shape
        if self._layout != "rows":
            raise ValueError('rows: a weight of layout "slices" cannot be taken apart: compress its rows by themselves')
        if not 0 <= start < stop <= d_ff:
            raise ValueError(f"rows: must lie in 0 to {d_ff}, got {start} to {stop}")
        if start * (d_model // bf12.CHUNK) * 4 % VECTOR_BYTES:
            raise ValueError(f"rows: row {start} does not start at a multiple of {VECTOR_BYTES} bytes")
        words: Any = self._packed.words
        packed = self._packed._replace(words=tuple(array[start:stop] for array in words))
        return CompressedWeight((stop - start, d_model), self._layout, packed, self._escapes)

    def on_host(self) -> CompressedWeight[Any]:
        """The same in NumPy arrays, of CuPy's."""
        arrays: tuple[Any, ...] = self.arrays
        moved = [array.get() for array in arrays]
        packed = self._packed._replace(words=tuple(moved[:-1]), escapes=moved[-1])
        return CompressedWeight(self._shape, self._layout, packed, self._escapes)

    def __repr__(self) -> str:
        return (
            f"CompressedWeight({self._shape[0]} x {self._shape[1]}, {self._layout}, {self.nbytes} bytes, {self.ratio:.4f} of "
            f"plain, {self.escapes} escapes)"
        )

    # What the operators ask.

    @property
    def family(self) -> Family:
        """Of its arrays."""
        kind: type = type(self._packed.escapes)
        return family_of(kind)

    @property
    def format(self) -> Format:
        """As the kernels know it."""
        return _format_of(self._layout, self._shape)

    @property
    def base(self) -> int:
        """Of its window of exponents."""
        return self._packed.base

    @property
    def addresses(self) -> tuple[int, ...]:
        """What a kernel gets of it: the addresses of its arrays, and its base. That is never 0, as no address is."""
        if self._addresses is None:
            self._addresses = *self.family.addresses(self.arrays), self._packed.base | 1 << 32
        return self._addresses

    @property
    def misfit(self) -> str:
        """Why its arrays cannot be what it says they are, or nothing: for arrays that have come from elsewhere."""
        d_ff, d_model = self._shape
        most = tuple(LARGEST_DIMS.values())
        if not (0 < d_ff <= most[0] and 0 < d_model <= most[1]) or d_model % bf12.CHUNK:
            return f"there is no weight of shape {self._shape}"
        if not 0 <= self.base <= bf12.LARGEST_BASE:
            return f"its base is {self.base}, not 0 to {bf12.LARGEST_BASE}"
        chunks = d_model // bf12.CHUNK
        if not 0 <= self._escapes <= most[0] * chunks:  # rows of a larger matrix have all of its escapes
            return f"it has {self._escapes} escapes in rows of {chunks} chunks"
        words = ((shape, "int32") for shape in _LAYOUTS[self.format].shapes(d_ff, chunks))
        wanted = [*words, ((max(1, self._escapes), bf12.CHUNK), "bfloat16")]
        family, device = self.family, self.description[2]
        found = [family.describe(array) for array in self.arrays]
        for i, (shape, dtype) in enumerate(wanted):
            expected = (shape, dtype, device, True)
            got = (tuple(found[i][0]), found[i][1].removeprefix("torch."), *found[i][2:]) if i < len(found) else None
            if got != expected:
                return f"part {i} must be (shape, dtype, GPU, C-contiguous) {expected}, got {got}"
        if len(found) > len(wanted):
            return f"it has {len(found)} parts, not {len(wanted)}"
        unaligned = [i for i, address in enumerate(self.addresses[:-1]) if address % VECTOR_BYTES and device != HOST]
        return f"part {unaligned[0]} does not start at a multiple of {VECTOR_BYTES} bytes" if unaligned else ""

    def strays(self) -> int:
        """Chunks that escape to a place that there is not, in arrays without `misfit` that have come from elsewhere.

        It reads all words, so it is asked once, when weights are loaded; launches rely on it.
        """
        with self.family.numerics(self._packed.escapes) as (xp, view):
            words = tuple(view(a).view(np.uint32) for a in self._packed.words)
            return bf12.strays(xp, self._packed._replace(words=words), _LAYOUTS[self.format], self._escapes)

    @property
    def parts(self) -> tuple[Format, tuple[int, ...]]:
        """Its format, and the bytes at each of its addresses."""
        if self._parts is None:
            self._parts = self.format, (*map(_size, self.arrays), 0)
        return self._parts

    @property
    def description(self) -> Description:
        """As of the array that it stands for."""
        if self._description is None:
            self._description = self._shape, *self.family.describe(self._packed.escapes)[1:3], True
        return self._description

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_addresses": None, "_parts": None, "_description": None}


@lru_cache(maxsize=256)
def _format_of(layout: Layout, shape: tuple[int, ...]) -> Format:
    d_ff, d_model = shape
    return compressed_format(_WEIGHTS[layout], d_model, d_ff)


def is_too_narrow(d_model: int, d_ff: int) -> bool:
    """Whether `ffn_4` reads a plain weight of these dims faster than a compressed one."""
    return compressed_format("W_DOWN", d_model, d_ff) is not BF12_SLICES


Weight: TypeAlias = "A | CompressedWeight[A]"
"""What an operator takes as a weight."""


def compress(w: A, *, layout: Layout = "rows") -> CompressedWeight[A]:
    """A bfloat16 weight in 12 bits, without loss: `decompress` gives the same bits back, whatever they are.

    Weights whose exponents take many values stay larger, since every chunk of 8 with an exponent outside a window of 16 is kept
    as it is beside its place: look at `ratio`.

    Parameters
    ----------
    w : array, (d_ff, d_model)
        ``gate_proj.weight`` or ``up_proj.weight`` as they are, or `pack_down` of ``down_proj.weight``; bfloat16, C-contiguous,
        `d_model` a multiple of 8. It may be freed afterwards.
    layout : {"rows", "slices"}
        "rows" for `w_gate` and `w_up`, "slices" for `w_down_t`, which is where each is read fastest; the results are the same.

    Returns
    -------
    CompressedWeight
        In arrays of the library and on the device of `w`.

    Raises
    ------
    TypeError
        `w` is no array, or not bfloat16: float16 and float32 have too many mantissa bits for this to pay.
    ValueError
        `w` is no C-contiguous matrix, or its dims are not supported.
    """
    family = _family_of_weight(w)
    try:
        (shape, dtype, _, contiguous), address = family.describe(w), family.address(w)
    except (RuntimeError, NotImplementedError):  # torch's, of tensors without strides or memory
        shape, dtype, contiguous, address = (), "", False, 0
    if address == 0 and 0 not in shape:
        raise TypeError(f"compress: w must be a plain array in memory, got {family.why_no_memory(w)}")
    if dtype != "bfloat16":
        raise TypeError(
            f"compress: w must be bfloat16, got {dtype}: other dtypes keep more bits of mantissa, which do not compress "
            "without loss"
        )
    if layout not in _WEIGHTS:
        raise ValueError(f'compress: layout must be "rows" or "slices", got {layout!r}')
    most = tuple(LARGEST_DIMS.values())
    if len(shape) != 2 or 0 in shape or shape[1] % bf12.CHUNK or shape[0] > most[0] or shape[1] > most[1]:
        raise ValueError(
            f"compress: w must have shape (d_ff, d_model), at most {most}, with d_model a multiple of {bf12.CHUNK}, got "
            f"{tuple(shape)}"
        )
    if not contiguous:
        raise ValueError("compress: w must be C-contiguous, got a strided view: call pack_down(w_down) for a down-projection")
    with family.numerics(w) as (xp, view):
        packed = bf12.pack(xp, view(w).view(np.uint16), _LAYOUTS[_format_of(layout, shape)])
        escapes = len(packed.escapes)
        kept = packed.escapes if escapes else xp.zeros((1, bf12.CHUNK), np.uint16)  # an empty array has no address
        words = tuple(family.own(a.view(np.int32), w) for a in packed.words)
        own = packed._replace(words=words, escapes=family.own(kept, w))
    return CompressedWeight((shape[0], shape[1]), layout, own, escapes)


def _family_of_weight(w: Any) -> Family:
    """The family of an array to be compressed."""
    try:
        kind: type = type(w)
        family = family_of(kind)
    except TypeError as error:
        raise TypeError(f"compress: w must be a NumPy or CuPy array or a torch tensor, got {error}") from None
    if family.is_foreign:
        raise TypeError(f"compress: w must be a NumPy or CuPy array or a torch tensor, got {family.name}: convert it first")
    return family


def plain(array: Any) -> Any:
    """A NumPy weight as the reference takes it: decompressed if it is compressed."""
    return array.decompress() if isinstance(array, CompressedWeight) else array


def _size(array: Any) -> int:
    return int(array.nbytes)


def _check_out(family: Family, out: Any, expected: tuple[Any, ...]) -> None:
    try:
        kind: type = type(out)
        same = family_of(kind) is family
    except TypeError:
        same = False
    if not same:
        raise TypeError(f"decompress: out must be a {family.name} array, as the compressed one is, got {type(out).__name__}")
    shape, dtype, device, contiguous = family.describe(out)
    found = (tuple(shape), dtype, device, contiguous)
    if found != expected:
        raise ValueError(f"decompress: out must have (shape, dtype, GPU, C-contiguous) {expected}, got {found}")
