"""Arrays of more than 2**31 elements or vectors, where a 32-bit product would come out wrong: they take up to 60 GB of a GPU.

All is zero but what lies at the far end, so the results are known without an oracle.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from checks import DTYPES, bits, token

import prosparse_cupy as psc
from prosparse_cupy import bf12

pytestmark = pytest.mark.large
BFLOAT16 = DTYPES["bfloat16"]
FAR = 2**31  # of what a kernel counts in
ROWS = 306_783_384  # seven times as many are more than 2**31; whole vectors
WIDE = 2**20  # columns, the most there may be
TALL = FAR // (WIDE // 8) + 1  # rows of so many columns that have more than 2**31 vectors


@pytest.fixture
def cp() -> Any:
    """CuPy, with all of the GPU's memory that others have left."""
    cupy = pytest.importorskip("cupy")
    cupy.get_default_memory_pool().free_all_blocks()
    yield cupy
    cupy.get_default_memory_pool().free_all_blocks()


def _zeros(cp: Any, nbytes: int) -> Any:
    """Bytes of zeros, or a skip where the GPU has not as many and 8 GB more."""
    free = cp.cuda.runtime.memGetInfo()[0]
    if free < nbytes + 8 * 2**30:
        pytest.skip(f"needs {nbytes / 2**30:.0f} GB of the GPU and some more, {free / 2**30:.0f} are free")
    return cp.zeros(nbytes, np.uint8)


def _put(array: Any, at: Any, value: Any) -> None:
    """Store bfloat16 as bits: CuPy does little else with it."""
    array.view(np.int16)[at] = value.view(np.int16) if hasattr(value, "view") else int(np.array(value, BFLOAT16).view(np.int16))


def _is_zero(array: Any) -> bool:
    return not bool(array.view(np.int16).any())


def _one(cp: Any, rows: int, value: float) -> Any:
    """A vector of zeros that ends in a value."""
    vector = _zeros(cp, 2 * rows).view(BFLOAT16)
    _put(vector, -1, value)
    return vector


def _matrix(cp: Any, rows: int, columns: int, last: np.ndarray) -> Any:
    """Zeros, and a last row."""
    matrix = _zeros(cp, 2 * rows * columns).view(BFLOAT16).reshape(rows, columns)
    _put(matrix, -1, cp.asarray(last))
    return matrix


def _last(d_model: int) -> tuple[np.ndarray, np.ndarray, float]:
    """A token, a row that is nonzero in few places, and their product."""
    rng = np.random.default_rng()
    x, row = token(d_model, "bfloat16", rng), np.zeros(d_model, BFLOAT16)
    row[[0, d_model // 2, d_model - 1]] = [1.0, 2.0, 0.5]
    return x, row, float(row.astype(np.float64) @ x.astype(np.float64))


def _assert_last(found: Any, expected: float) -> None:
    """Zeros, and at the end a sum that has been rounded once."""
    assert _is_zero(found[:-1])
    np.testing.assert_allclose(float(found[-1:].get()[0]), expected, rtol=2**-8)


@pytest.mark.parametrize("operator", ["ffn_1", "ffn_23", "ffn_123"])
def test_rows_behind_2_31_vectors(cp, operator):
    x, row, product = _last(WIDE)
    product = abs(product)
    x = x if float(row.astype(np.float64) @ x.astype(np.float64)) > 0 else -x
    w = _matrix(cp, TALL, WIDE, row)
    gate = _one(cp, TALL, 1)
    given = cp.asarray(x)
    if operator == "ffn_1":
        _assert_last(psc.ffn_1(given, w), product)
    elif operator == "ffn_23":
        _assert_last(psc.ffn_23(gate, given, w), product)
    else:
        _assert_last(psc.ffn_123(given, w, w), product**2)


def test_columns_behind_2_31_vectors(cp):
    row = token(WIDE, "bfloat16", np.random.default_rng())
    w = _matrix(cp, TALL, WIDE, row)
    x1 = _one(cp, TALL, 2)
    np.testing.assert_array_equal(psc.ffn_4(x1, w).get().astype(np.float32), 2 * row.astype(np.float32))


@pytest.mark.parametrize("layout", ["rows", "slices"])
def test_compressed_rows_behind_2_31_chunks(cp, layout):
    """Made by hand: what `compress` would look at takes more memory."""
    tall = TALL if layout == "rows" else TALL * 4 // 3 + 1  # a unit of slices is three vectors of four chunks
    row = token(WIDE, "bfloat16", np.random.default_rng())
    one = psc.compress(cp.asarray(np.stack([row])), layout=layout)
    words = []
    for array in one.arrays[:-1]:
        whole = _zeros(cp, array.nbytes * tall).view(array.dtype).reshape(tall, *array.shape[1:])
        whole[-1] = array[0]
        words.append(whole)
    packed = bf12.Packed(tuple(words), one.arrays[-1], one.base)
    w = psc.CompressedWeight((tall, WIDE), layout, packed, one.escapes)
    x1 = _one(cp, tall, 2)
    np.testing.assert_array_equal(psc.ffn_4(x1, w).get().astype(np.float32), 2 * row.astype(np.float32))
    x = np.zeros(WIDE, BFLOAT16)
    x[[1, WIDE - 1]] = 1.0
    gate = _one(cp, tall, 1)
    expected = float(row[1]) + float(row[-1])
    np.testing.assert_allclose(float(psc.ffn_23(gate, cp.asarray(x), w)[-1:].get()[0]), expected, rtol=2**-8)


def test_decompressing_rows_behind_2_31_chunks(cp):
    row = token(WIDE, "bfloat16", np.random.default_rng())
    one = psc.compress(cp.asarray(np.stack([row])))
    words = []
    for array in one.arrays[:-1]:
        whole = _zeros(cp, array.nbytes * TALL).view(array.dtype).reshape(TALL, *array.shape[1:])
        whole[-1] = array[0]
        words.append(whole)
    out = _zeros(cp, 2 * TALL * WIDE).view(BFLOAT16).reshape(TALL, WIDE)
    w = psc.CompressedWeight((TALL, WIDE), "rows", bf12.Packed(tuple(words), one.arrays[-1], one.base), one.escapes)
    assert w.decompress(out=out) is out
    np.testing.assert_array_equal(bits(out[-1].get()), bits(row))


@pytest.mark.parametrize("operator", ["ffn_1", "ffn_12", "ffn_123", "ffn_23", "ffn_4"])
def test_tokens_behind_2_31_elements(cp, operator):
    """The last neuron of the last of eight tokens."""
    x, row, _ = _last(8)
    xs = cp.asarray(np.stack([np.zeros_like(x)] * 7 + [np.abs(x)]))
    product = float(row.astype(np.float64) @ np.abs(x).astype(np.float64))
    w = _matrix(cp, ROWS, 8, row)
    if operator == "ffn_4":
        x1 = _zeros(cp, 2 * 8 * ROWS).view(BFLOAT16).reshape(8, ROWS)
        _put(x1, (7, -1), 2)
        y = psc.ffn_4(x1, w).get().astype(np.float32)
        assert not y[:7].any()
        np.testing.assert_array_equal(y[7], 2 * row.astype(np.float32))
        return
    out = _zeros(cp, 2 * 8 * ROWS).view(BFLOAT16).reshape(8, ROWS)
    out.view(np.int16).fill(-1)  # NaN
    if operator == "ffn_23":
        gate = _zeros(cp, 2 * 8 * ROWS).view(BFLOAT16).reshape(8, ROWS)
        _put(gate, (7, -1), 1)
        found = psc.ffn_23(gate, xs, w, out=out)
    else:
        given = (w, w) if operator == "ffn_123" else (w,)
        found = getattr(psc, operator)(xs, *given, out=out)
        product = product**2 if operator == "ffn_123" else product
    assert _is_zero(found[:7])
    _assert_last(found[7], product)


def test_packing_behind_2_31_elements(cp):
    rows, columns = 2**16 + 8, 2**15 + 8
    w = _zeros(cp, 2 * rows * columns).view(BFLOAT16).reshape(columns, rows)  # (d_model, d_ff)
    for at, value in (((-1, -1), 1), ((-1, 0), 2), ((0, -1), 3)):
        _put(w, at, value)
    packed = psc.pack_down(w)
    assert [float(packed[at].get()) for at in ((-1, -1), (0, -1), (-1, 0))] == [1, 2, 3]
    assert int(cp.count_nonzero(packed.view(np.int16))) == 3
