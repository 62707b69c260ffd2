"""Results in float32: what `ffn_1`, `ffn_4` and the FFN leave of a shard. Rounded, they are the ordinary results."""

from __future__ import annotations

import numpy as np
import pytest
from checks import DTYPES, assert_rounded_sum, bits, exact_ffn_1, exact_ffn_4, gate, norm_weight, poisoned, token, ulp, weights
from gpu_arrays import OnCupy
from plans import Shape, plan_of

import prosparse_cupy as psc

SIXTEEN = ("bfloat16", "float16")
SHAPES = [(8, 1), (264, 101), (40, 700)]


def _x1(tokens: int, d_ff: int, dtype: str, rng: np.random.Generator) -> np.ndarray:
    active = np.stack([gate(d_ff, dtype, 0.7, rng) for _ in range(tokens)])
    return np.where(active > 0, active * token(d_ff, dtype, rng), np.zeros_like(active)).astype(DTYPES[dtype])


def _rounds_to(partial: np.ndarray, full: np.ndarray) -> None:
    assert partial.dtype == np.float32 and partial.shape == full.shape
    np.testing.assert_array_equal(bits(partial.astype(full.dtype)), bits(full))
    if full.size > 40:  # it has more than the rounded one
        assert np.any(partial != full.astype(np.float32))


def _within_an_ulp(partial: np.ndarray, full: np.ndarray) -> None:
    """The reference adds in float64, so its results by way of float32 are rounded twice."""
    assert np.all(np.abs(partial.astype(np.float64) - full.astype(np.float64)) <= ulp(full, full.dtype))


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize(("d_model", "d_ff"), SHAPES)
def test_the_kernels_leave_what_they_would_round(host, d_model, d_ff, dtype, tokens):
    rng = np.random.default_rng()
    shape = Shape(d_model, d_ff, dtype, specialize=False)
    w, x = weights(d_ff, d_model, dtype), np.stack([token(d_model, dtype, rng) for _ in range(tokens)])
    x1, bias = _x1(tokens, d_ff, dtype, rng), token(d_model, dtype, rng)
    for kernel, inputs, width, extras, trailing in (
        ("ffn_1", [x, w, None], d_ff, (), [0]),
        ("ffn_4", [x1, w, None], d_model, ("down_bias",), [bias, 0, 0.0]),
    ):
        given = [*inputs, d_ff, d_model, *trailing]
        full = host.run(plan_of(kernel, shape, tokens=tokens, extras=extras), given, poisoned((tokens, width), dtype))
        plan = plan_of(kernel, shape, tokens=tokens, extras=extras, partial=True)
        _rounds_to(host.run(plan, given, poisoned((tokens, width), "float32")), full)


def test_a_result_in_float32_asks_for_no_other_knobs():
    for kernel in ("ffn_1", "ffn_4"):
        full, partial = (plan_of(kernel, Shape(4096, 11008, "bfloat16"), partial=p) for p in (False, True))
        assert (full.grid, full.block, full.shared_bytes) == (partial.grid, partial.block, partial.shared_bytes)
        assert set(partial.defines) - set(full.defines) == {("PARTIAL", None)}


@pytest.mark.parametrize("lead", [(), (3,)])
@pytest.mark.parametrize("dtype", SIXTEEN)
def test_shards_add_up_to_the_whole(dtype, lead):
    rng = np.random.default_rng()
    d_model, d_ff = 64, 101
    x = rng.standard_normal((*lead, d_model)).astype(DTYPES[dtype])
    w = [weights(d_ff, d_model, dtype, seed) for seed in range(3)]
    total = np.zeros((*lead, d_model), np.float32)
    for rows in np.array_split(np.arange(d_ff), 3):
        out = np.full_like(total, np.nan)
        assert psc.sparse_ffn(x, *(a[rows] for a in w), out=out) is out
        total += out
        bound = psc.SparseFFN(*(np.ascontiguousarray(a[rows]) for a in w))
        np.testing.assert_array_equal(bound(x, out=np.full_like(total, np.nan)), out)
    whole = psc.sparse_ffn(x, *w, out=np.full_like(total, np.nan))
    np.testing.assert_allclose(total, whole, rtol=1e-5, atol=1e-5)
    _within_an_ulp(whole, psc.sparse_ffn(x, *w))
    gates = psc.ffn_1(x, w[0], out=np.full((*lead, d_ff), np.nan, np.float32))
    _within_an_ulp(gates, psc.ffn_1(x, w[0]))


def test_only_sums_stay_in_float32():
    x, w = token(64, "bfloat16", np.random.default_rng()), weights(8, 64, "bfloat16")
    for call in (
        lambda out: psc.ffn_12(x, w, out=out),
        lambda out: psc.ffn_123(x, w, w, out=out),
        lambda out: psc.ffn_23(psc.ffn_1(x, w), x, w, out=out),
    ):
        with pytest.raises(TypeError, match="out must have the dtype of"):
            call(np.zeros(8, np.float32))
    with pytest.raises(TypeError, match="out must have the dtype of x, bfloat16, got float16"):
        psc.ffn_1(x, w, out=np.zeros(8, np.float16))
    with pytest.raises(TypeError, match="out must have the dtype of x, float16, got bfloat16"):
        psc.ffn_1(x.astype(np.float16), w.astype(np.float16), out=np.zeros(8, DTYPES["bfloat16"]))


def test_a_result_in_float32_may_not_reach_into_an_input():
    """It is twice as long as one in the dtype."""
    memory = np.zeros(4 * 64 + 2 * 64, np.uint8)
    out, x = memory[: 4 * 64].view(np.float32), memory[3 * 64 : 3 * 64 + 2 * 64].view(DTYPES["bfloat16"])
    with pytest.raises(ValueError, match="out must not share memory with x"):
        psc.ffn_1(x, weights(64, 64, "bfloat16"), out=out)


@pytest.mark.parametrize("lead", [(), (3,)])
def test_torch_operators(lead):
    torch = pytest.importorskip("torch")
    from prosparse_cupy.torch.compressed import facts_of, parts_of

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*lead, 64, generator=generator).bfloat16()
    gates, ups, downs = (torch.randn(16, 64, generator=generator).bfloat16() for _ in range(3))
    full = torch.ops.prosparse.sparse_ffn(x, gates, ups, downs)
    partial = torch.ops.prosparse.sparse_ffn(x, gates, ups, downs, partial=True)
    assert partial.dtype == torch.float32 and torch.equal(partial.bfloat16(), full) and not torch.equal(partial, full.float())
    packed = [psc.compress(w, layout=layout) for w, layout in zip((gates, ups, downs), ("rows", "rows", "slices"), strict=True)]
    facts = [fact for weight in packed for fact in facts_of(weight)]
    parts = torch.ops.prosparse.sparse_ffn.parts(x, *map(parts_of, packed), facts, partial=True)
    assert torch.equal(parts, partial)
    assert torch.equal(torch.ops.prosparse.ffn_1(x, gates, partial=True).bfloat16(), torch.ops.prosparse.ffn_1(x, gates))
    for name, arguments in (
        ("sparse_ffn", (x, gates, ups, downs)),
        ("ffn_1", (x, gates)),
        ("ffn_4", (torch.relu(torch.randn(*lead, 16, generator=generator)).bfloat16(), downs)),
    ):
        operator = getattr(torch.ops.prosparse, name).default
        torch.library.opcheck(operator, arguments, {"partial": True}, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 2, 8])
@pytest.mark.parametrize("dtype", [*SIXTEEN, "float32"])
@pytest.mark.parametrize(("d_model", "d_ff"), [*SHAPES, (4096, 11008)])
def test_on_the_gpu(d_model, d_ff, dtype, tokens):
    on, rng = OnCupy(), np.random.default_rng()
    w, x = weights(d_ff, d_model, dtype), np.stack([token(d_model, dtype, rng) for _ in range(tokens)])
    x1, norm, bias = _x1(tokens, d_ff, dtype, rng), norm_weight(d_ff, dtype, rng), token(d_model, dtype, rng)
    for specialize in (True, False):
        out = on.put(poisoned((tokens, d_ff), "float32"))
        assert psc.ffn_1(on.put(x), on.put(w), out=out, specialize=specialize) is out
        full = on.get(psc.ffn_1(on.put(x), on.put(w), specialize=specialize))
        np.testing.assert_array_equal(bits(on.get(out).astype(full.dtype)), bits(full))
        for t in range(tokens):
            assert_rounded_sum(on.get(out)[t], *exact_ffn_1(x[t], w), d_model)
        for more in ({}, {"bias": on.put(bias)}, {"norm_weight": on.put(norm), "norm_eps": 1e-5}):
            out = on.put(poisoned((tokens, d_model), "float32"))
            psc.ffn_4(on.put(x1), on.put(w), out=out, specialize=specialize, **more)
            full = on.get(psc.ffn_4(on.put(x1), on.put(w), specialize=specialize, **more))
            np.testing.assert_array_equal(bits(on.get(out).astype(full.dtype)), bits(full))
        for t in range(tokens):
            plain = on.put(poisoned((tokens, d_model), "float32"))
            psc.ffn_4(on.put(x1), on.put(w), out=plain, specialize=specialize)
            assert_rounded_sum(on.get(plain)[t], *exact_ffn_4(x1[t], w), d_ff)
        ffn = [on.put(a) for a in (w, weights(d_ff, d_model, dtype, 1), weights(d_ff, d_model, dtype, 2))]
        out = on.put(poisoned((tokens, d_model), "float32"))
        psc.sparse_ffn(on.put(x), *ffn, out=out, specialize=specialize)
        full = on.get(psc.sparse_ffn(on.put(x), *ffn, specialize=specialize))
        np.testing.assert_array_equal(bits(on.get(out).astype(full.dtype)), bits(full))


@pytest.mark.gpu
def test_compressed_weights_on_the_gpu():
    on, rng = OnCupy(), np.random.default_rng()
    d_model, d_ff = 4096, 1000
    x1, w = _x1(1, d_ff, "bfloat16", rng)[0], weights(d_ff, d_model, "bfloat16")
    for layout in ("rows", "slices"):
        packed = psc.compress(on.put(w), layout=layout)
        out = on.put(poisoned(d_model, "float32"))
        psc.ffn_4(on.put(x1), packed, out=out)
        expected = on.put(poisoned(d_model, "float32"))
        psc.ffn_4(on.put(x1), on.put(w), out=expected)
        np.testing.assert_array_equal(bits(on.get(out)), bits(on.get(expected)))
