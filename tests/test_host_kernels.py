"""The shipped kernels, run on the host under AddressSanitizer and UBSan with the launches that a GPU would get."""

from __future__ import annotations

import numpy as np
import pytest
from checks import (
    DTYPES,
    assert_rounded_sum,
    bits,
    exact_ffn_1,
    exact_ffn_4,
    exact_ffn_23,
    gate,
    poisoned,
    token,
    weights,
)
from plans import Shape, plan_of

from prosparse_cupy import reference

# (d_model, d_ff): smallest, below and above a warp's 32 vectors, no multiple of any tile, one more than a pass over a row. More
# rows are more blocks of the same.
SHAPES = [(8, 1), (8, 3), (16, 33), (264, 101), (40, 70), (1032, 9)]
# Of ffn_4, whose blocks have 16 to 128 columns each: more columns are more blocks of the same. Of 700 rows every warp has
# several.
SHAPES_OF_FFN_4 = [(8, 1), (8, 3), (16, 33), (24, 101), (40, 700)]
# Rows so long that warps of ffn_23 share them: 8 of a block and 12.
SHARED_ROWS = [(2312, 41), (4104, 29)]
SPARSITIES = [0.0, 0.5, 0.9, 1.0, "one"]
both = pytest.mark.parametrize("specialize", [True, False], ids=["specialised", "dynamic"])
shapes = pytest.mark.parametrize(("d_model", "d_ff"), SHAPES)
shapes_of_ffn_23 = pytest.mark.parametrize(("d_model", "d_ff"), [*SHAPES, *SHARED_ROWS])
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def _run_twice(host, kernel, shape, inputs, out, **options):
    """Under two orders of threads and blocks: the bits must not depend on them."""
    plan = plan_of(kernel, shape)
    first, second = (host.run(plan, [*inputs, shape.d_ff, shape.d_model], out, seed=seed, **options) for seed in (1, 2))
    np.testing.assert_array_equal(bits(first), bits(second))
    return first


@both
@dtypes
@shapes
def test_ffn_1(host, d_model, d_ff, dtype, specialize):
    rng = np.random.default_rng(d_model * d_ff)
    x, w = token(d_model, dtype, rng), weights(d_ff, d_model, dtype)
    out = _run_twice(host, "ffn_1", Shape(d_model, d_ff, dtype, specialize), [x, w, None], poisoned(d_ff, dtype))
    assert_rounded_sum(out, *exact_ffn_1(x, w), d_model)


@both
@dtypes
@shapes_of_ffn_23
def test_ffn_23(host, d_model, d_ff, dtype, specialize):
    shape = Shape(d_model, d_ff, dtype, specialize)
    rng = np.random.default_rng(d_model * d_ff)
    for threshold in (0.0, 0.25):
        for sparsity in SPARSITIES:
            x, w = token(d_model, dtype, rng), weights(d_ff, d_model, dtype).copy()
            g = gate(d_ff, dtype, sparsity, rng, threshold)
            w[~reference.active(g, threshold)] = np.nan
            out = _run_twice(host, "ffn_23", shape, [g, x, w, None, threshold], poisoned(d_ff, dtype))
            assert_rounded_sum(out, *exact_ffn_23(g, x, w, threshold), d_model + 1)
            assert not np.any(bits(out[~reference.active(g, threshold)])), "an inactive output is not +0"


@dtypes
@shapes_of_ffn_23
def test_dims_as_constants_do_not_change_the_bits_of_a_row(host, d_model, d_ff, dtype):
    rng = np.random.default_rng(d_model * d_ff)
    x, w, g = token(d_model, dtype, rng), weights(d_ff, d_model, dtype), gate(d_ff, dtype, 0.7, rng, 0.25)
    for kernel, inputs in (("ffn_1", [x, w, None]), ("ffn_123", [x, w, w, None, 0.0]), ("ffn_23", [g, x, w, None, 0.25])):
        one, other = (
            _run_twice(host, kernel, Shape(d_model, d_ff, dtype, specialize), inputs, poisoned(d_ff, dtype))
            for specialize in (True, False)
        )
        np.testing.assert_array_equal(bits(one), bits(other))


@both
@dtypes
@pytest.mark.parametrize(("d_model", "d_ff"), SHARED_ROWS)
def test_a_row_of_ffn_23_has_the_same_bits_whatever_else_is_active(host, d_model, d_ff, dtype, specialize):
    """One, four and all rows of a block: read by two warps each, or by one."""
    shape = Shape(d_model, d_ff, dtype, specialize)
    rng = np.random.default_rng(d_model * d_ff)
    x, w, g = token(d_model, dtype, rng), weights(d_ff, d_model, dtype), np.abs(token(d_ff, dtype, rng)) + DTYPES[dtype].type(1)
    every = _run_twice(host, "ffn_23", shape, [g, x, w, None, 0.0], poisoned(d_ff, dtype))
    for stride in (d_ff, 12, 3, 2):
        active = np.arange(d_ff) % stride == rng.integers(stride)
        some = np.where(active, g, np.zeros_like(g))
        out = _run_twice(host, "ffn_23", shape, [some, x, w, None, 0.0], poisoned(d_ff, dtype))
        np.testing.assert_array_equal(bits(out), bits(np.where(active, every, np.zeros_like(every))))


@both
@dtypes
@shapes_of_ffn_23
def test_ffn_123_is_ffn_1_and_ffn_23_to_the_bit(host, d_model, d_ff, dtype, specialize):
    shape = Shape(d_model, d_ff, dtype, specialize)
    rng = np.random.default_rng(d_model * d_ff)
    x, w_gate, w_up = token(d_model, dtype, rng), weights(d_ff, d_model, dtype), weights(d_ff, d_model, dtype, seed=1).copy()
    g = _run_twice(host, "ffn_1", shape, [x, w_gate, None], poisoned(d_ff, dtype))
    for threshold in (0.0, 0.25, float(g.max())):
        w_up[~reference.active(g, threshold)] = np.nan
        one = _run_twice(host, "ffn_123", shape, [x, w_gate, w_up, None, threshold], poisoned(d_ff, dtype))
        two = _run_twice(host, "ffn_23", shape, [g, x, w_up, None, threshold], poisoned(d_ff, dtype))
        np.testing.assert_array_equal(bits(one), bits(two))
        assert_rounded_sum(one, *exact_ffn_23(g, x, w_up, threshold), d_model + 1)


@both
@dtypes
@pytest.mark.parametrize(("d_model", "d_ff"), SHAPES_OF_FFN_4)
def test_ffn_4(host, d_model, d_ff, dtype, specialize):
    shape = Shape(d_model, d_ff, dtype, specialize)
    rng = np.random.default_rng(d_model * d_ff)
    for sparsity in SPARSITIES:
        w = weights(d_ff, d_model, dtype).copy()
        x1 = reference.fatrelu(gate(d_ff, dtype, sparsity, rng)) * token(d_ff, dtype, rng)
        w[x1 == 0] = np.nan
        out = _run_twice(host, "ffn_4", shape, [x1, w, None], poisoned(d_model, dtype))
        assert_rounded_sum(out, *exact_ffn_4(x1, w), d_ff)


@dtypes
@pytest.mark.parametrize(("d_model", "d_ff"), [(40, 700), (24, 101)])
def test_dims_as_constants_do_not_change_the_bits_of_ffn_4(host, d_model, d_ff, dtype):
    rng = np.random.default_rng(d_model * d_ff)
    w, x1 = weights(d_ff, d_model, dtype), reference.fatrelu(gate(d_ff, dtype, 0.7, rng)) * token(d_ff, dtype, rng)
    one, other = (
        _run_twice(host, "ffn_4", Shape(d_model, d_ff, dtype, specialize), [x1, w, None], poisoned(d_model, dtype))
        for specialize in (True, False)
    )
    np.testing.assert_array_equal(bits(one), bits(other))


@both
@pytest.mark.parametrize("tokens", [2, 3, 8])
def test_a_token_of_ffn_1_has_the_bits_that_it_has_alone(host, tokens, specialize):
    """The kernel takes several tokens, as no operator does yet."""
    shape, rng = Shape(264, 37, "bfloat16", specialize), np.random.default_rng(tokens)
    w, x = weights(37, 264, "bfloat16"), np.stack([token(264, "bfloat16", rng) for _ in range(tokens)])
    plan = plan_of("ffn_1", shape, tokens=tokens)
    together = host.run(plan, [x, w, None, 37, 264], poisoned((tokens, 37), "bfloat16"))
    alone = [_run_twice(host, "ffn_1", shape, [row, w, None], poisoned(37, "bfloat16")) for row in x]
    np.testing.assert_array_equal(bits(together), bits(np.stack(alone)))


@both
def test_ffn_4_lists_more_rows_than_a_tile(host, specialize):
    """More rows than the kernel lists at a time: the list is written twice and must not be overwritten too early."""
    d_model, dtype, d_ff = 8, "bfloat16", 2 * 32 * 512 + 5
    rng = np.random.default_rng(0)
    w, x1 = weights(d_ff, d_model, dtype), token(d_ff, dtype, rng) * (rng.random(d_ff) < 0.02)
    out = _run_twice(
        host, "ffn_4", Shape(d_model, d_ff, dtype, specialize), [x1.astype(w.dtype), w, None], poisoned(d_model, dtype)
    )
    assert_rounded_sum(out, *exact_ffn_4(x1.astype(w.dtype), w), d_ff)


@both
@dtypes
@shapes
def test_pack_down(host, d_model, d_ff, dtype, specialize):
    w = weights(d_model, d_ff, dtype)
    out = _run_twice(host, "pack_down", Shape(d_model, d_ff, dtype, specialize), [w, None], poisoned((d_ff, d_model), dtype))
    np.testing.assert_array_equal(bits(out), bits(w.T))


@dtypes
def test_special_values(host, dtype):
    """NaN, infinities, subnormals, -0 and the threshold itself, as the reference treats them."""
    info = np.finfo(np.float32) if dtype == "float32" else None
    tiny = float(info.smallest_subnormal) if info else {"bfloat16": 2.0**-133, "float16": 2.0**-24}[dtype]
    values = [np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, tiny, -tiny, 0.25, 0.2490234375, 0.2509765625, -0.25, 1.0, -1.0]
    g = np.array(values, np.float64).astype(DTYPES[dtype])
    d_model = 8
    x, w = np.ones(d_model, DTYPES[dtype]), np.ones((len(g), d_model), DTYPES[dtype])
    for threshold in (0.0, 0.25):
        for specialize in (True, False):  # a row a warp, and warps that share rows
            shape = Shape(d_model, len(g), dtype, specialize)
            out = _run_twice(host, "ffn_23", shape, [g, x, w, None, threshold], poisoned(len(g), dtype))
            np.testing.assert_array_equal(out.astype(np.float32), reference.ffn_23(g, x, w, threshold).astype(np.float32))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_conversions_round_to_nearest_even(host, dtype):
    """The twins of the PTX conversions against NumPy's, over values at, around and between every kind of boundary."""
    rng = np.random.default_rng(3)
    patterns = rng.integers(0, 2**16, 4096, dtype=np.uint16)
    edges = np.array([0, 0x8000, 1, 0x8001, 0x3FF, 0x400, 0x7BFF, 0x7C00, 0x7F7F, 0x7F80, 0xFF80], np.uint16)
    g = np.concatenate([edges, patterns]).view(DTYPES[dtype])
    # Products with 1 + 2**-7 and 1.5 + 1.5 * 2**-7 fall on, between and halfway between neighbours.
    for weight in (1.0, 1.5):
        x = np.zeros(8, DTYPES[dtype])
        x[0] = weight
        w = np.zeros((len(g), 8), DTYPES[dtype])
        w[:, 0] = np.float32(1 + 2**-7)
        out = host.run(
            plan_of("ffn_23", Shape(8, len(g), dtype)),
            [g, x, w, None, 0.0, len(g), 8],
            poisoned(len(g), dtype),
        )
        active = reference.active(g, 0.0)
        with np.errstate(all="ignore"):
            dot = np.float32(x[0]) * w[:, 0].astype(np.float32)
            expected = np.where(active, g.astype(np.float32) * dot, np.float32(0)).astype(DTYPES[dtype])
        np.testing.assert_array_equal(out.astype(np.float32), expected.astype(np.float32))
