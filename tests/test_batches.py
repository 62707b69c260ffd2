"""Several tokens a call: each has, to the bit, the result that it has alone, whatever stands beside it.

On NumPy arrays, which run the reference, and on the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from checks import (
    DTYPES,
    assert_rounded_sum,
    bits,
    exact_ffn_1,
    exact_ffn_4,
    exact_ffn_12,
    exact_ffn_23,
    gate,
    norm_weight,
    poisoned,
    terms_of_ffn_4,
    token,
    weights,
)
from gpu_arrays import OnCupy, OnNumpy, OnTorch

import prosparse_cupy as psc
from prosparse_cupy import reference
from prosparse_cupy.testing import synthetic, truth

T = 0.25
# (d_model, d_ff): smallest, no multiple of any tile, rows longer than a warp reads in one batch.
SHAPES = [(8, 1), (16, 33), (264, 101), (40, 700), (2312, 41)]
# Of the tokens of a call: empty ones among full ones.
SPARSITIES = [0.9, 1.0, 0.0, 0.5, "one", 0.99, 1.0, 0.7]
Which = int | slice | list[int]
ALL = slice(None)


places = pytest.mark.parametrize("on", [OnNumpy(), pytest.param(OnCupy(), marks=pytest.mark.gpu)], ids=["numpy", "cupy"])


@dataclass(frozen=True)
class Kind:
    """What an FFN computes, and how its weights are kept."""

    activation: str = "relu"
    gated: bool = True
    biased: bool = False
    normed: bool = False
    compressed: bool = False

    @property
    def operators(self) -> tuple[str, ...]:
        halves = ("ffn_1", "ffn_23", "ffn_123") if self.gated else ("ffn_12",)
        return (*halves, "ffn_4", "sparse_ffn", "SparseFFN")

    def __str__(self) -> str:
        return "-".join([self.activation, *(n for n in ("biased", "normed", "compressed") if getattr(self, n))]) + (
            "" if self.gated else "-ungated"
        )


class Block:
    """An FFN and tokens for it, and each operator on any of the tokens."""

    def __init__(
        self,
        on: Any,
        dims: tuple[int, int],
        dtype: str,
        tokens: int,
        kind: Kind,
        specialize: bool = True,
        rng: np.random.Generator | None = None,
    ) -> None:
        rng = rng or np.random.default_rng()
        self.on, self.kind, self.specialize, self.dtype, self.tokens = on, kind, specialize, dtype, tokens
        self.d_model, self.d_ff = d_model, d_ff = dims
        self.x = np.stack([token(d_model, dtype, rng) for _ in range(tokens)])
        sparsities = [SPARSITIES[i % len(SPARSITIES)] for i in rng.integers(8) + np.arange(tokens)]
        self.gate = np.stack([gate(d_ff, dtype, sparsity, rng, T) for sparsity in sparsities])
        ups = np.stack([token(d_ff, dtype, rng) for _ in range(tokens)])
        self.x1 = np.where(reference.active(self.gate, T), self.gate * ups, np.zeros_like(ups)).astype(DTYPES[dtype])
        self.w = {name: weights(d_ff, d_model, dtype, i).copy() for i, name in enumerate(("w_gate", "w_up", "w_down_t"))}
        self.extras = {
            "gate_bias": token(d_ff, dtype, rng) if kind.biased and kind.gated else None,
            "up_bias": token(d_ff, dtype, rng) if kind.biased else None,
            "down_bias": token(d_model, dtype, rng) if kind.biased else None,
            "norm_weight": norm_weight(d_ff, dtype, rng) if kind.normed else None,
        }
        self.eps = 1e-5 if kind.normed else 0.0
        self.put()

    def put(self) -> None:
        """Give the library its weights, after a change too."""
        layouts = {"w_down_t": "slices"}
        self.put_w = {name: self.on.put(w) for name, w in self.w.items()}
        if self.kind.compressed:
            self.put_w = {name: psc.compress(w, layout=layouts.get(name, "rows")) for name, w in self.put_w.items()}
        self.put_extras = {name: None if a is None else self.on.put(a) for name, a in self.extras.items()}

    def __call__(self, operator: str, which: Which = ALL, **vectors: np.ndarray) -> np.ndarray:
        """The result for these tokens; of one, `which` is its number. Other `vectors` may stand for the block's."""
        x, g, x1 = (
            self.on.put(np.ascontiguousarray(vectors.get(name, own)[which]))
            for name, own in (("x", self.x), ("gate", self.gate), ("x1", self.x1))
        )
        size = self.d_model if operator in ("ffn_4", "sparse_ffn", "SparseFFN") else self.d_ff
        out = self.on.put(poisoned((*x.shape[:-1], size), self.dtype))
        assert self._call(operator, x, g, x1, out) is out
        return self.on.get(out)

    def _call(self, operator: str, x: Any, g: Any, x1: Any, out: Any) -> Any:
        w, e = self.put_w, self.put_extras
        more = {"out": out, "specialize": self.specialize}
        act = {"activation": self.kind.activation}
        down = {"norm_weight": e["norm_weight"], "norm_eps": self.eps}
        if operator == "ffn_1":
            return psc.ffn_1(x, w["w_gate"], bias=e["gate_bias"], **more)
        if operator == "ffn_12":
            return psc.ffn_12(x, w["w_up"], T, bias=e["up_bias"], **act, **more)
        if operator == "ffn_23":
            return psc.ffn_23(g, x, w["w_up"], T, bias=e["up_bias"], **act, **more)
        if operator == "ffn_123":
            biases = {"gate_bias": e["gate_bias"], "up_bias": e["up_bias"]}
            return psc.ffn_123(x, w["w_gate"], w["w_up"], T, **biases, **act, **more)
        if operator == "ffn_4":
            return psc.ffn_4(x1, w["w_down_t"], bias=e["down_bias"], **down, **more)
        every = {name: a for name, a in e.items() if name != "gate_bias" or self.kind.gated}
        ws = (w["w_gate"] if self.kind.gated else None, w["w_up"], w["w_down_t"])
        if operator == "sparse_ffn":
            return psc.sparse_ffn(x, *ws, T, **every, norm_eps=self.eps, **act, **more)
        return psc.SparseFFN(*ws, T, **every, norm_eps=self.eps, **act, specialize=self.specialize)(x, out=out)

    def check(self, operator: str, out: np.ndarray) -> None:
        """Every token against float64, or where kernels must agree to the bit, against them."""
        e, act = self.extras, self.kind.activation
        if operator == "ffn_123":
            np.testing.assert_array_equal(bits(out), bits(self("ffn_23", gate=self("ffn_1"))))
            return
        if operator in ("sparse_ffn", "SparseFFN"):
            x1 = self("ffn_123" if self.kind.gated else "ffn_12")
            np.testing.assert_array_equal(bits(out), bits(self("ffn_4", x1=x1)))
            return
        for t in range(self.tokens):
            if operator == "ffn_1":
                exact = exact_ffn_1(self.x[t], self.w["w_gate"], e["gate_bias"])
                assert_rounded_sum(out[t], *exact, self.d_model + 1)
            elif operator == "ffn_12":
                pre = self._up_projection(t)
                exact_x1 = exact_ffn_12(pre, self.x[t], self.w["w_up"], T, act, e["up_bias"])
                np.testing.assert_array_equal(bits(out[t]), bits(exact_x1))
            elif operator == "ffn_23":
                exact = exact_ffn_23(self.gate[t], self.x[t], self.w["w_up"], T, act, e["up_bias"])
                assert_rounded_sum(out[t], *exact, self.d_model + 2)
                assert not bits(out[t][~reference.active(self.gate[t], T)]).any(), "an inactive output is not +0"
            else:
                exact = exact_ffn_4(self.x1[t], self.w["w_down_t"], e["down_bias"], e["norm_weight"], self.eps)
                assert_rounded_sum(out[t], *exact, terms_of_ffn_4(self.d_ff, normed=self.kind.normed))
                if not self.x1[t].astype(np.float32).any():
                    expected = np.zeros_like(out[t]) if e["down_bias"] is None else e["down_bias"]
                    np.testing.assert_array_equal(out[t], expected)

    def _up_projection(self, t: int) -> np.ndarray:
        x, w, bias = self.on.put(self.x[t]), self.on.put(self.w["w_up"]), self.put_extras["up_bias"]
        return self.on.get(psc.ffn_1(x, w, bias=bias, specialize=self.specialize))


def _every_way(block: Block) -> None:
    """Each operator is right for every token, and each token has the bits that it has alone."""
    for operator in block.kind.operators:
        out = block(operator)
        block.check(operator, out)
        for t in range(block.tokens):
            np.testing.assert_array_equal(bits(out[t]), bits(block(operator, t)), err_msg=f"{operator}, token {t}")


RELU, DRELU = Kind(), Kind("drelu", biased=True)
KINDS = [RELU, DRELU, Kind("relu2", normed=True), Kind("relu2", gated=False, biased=True)]


@places
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("tokens", range(1, 9))
def test_every_number_of_tokens(on, tokens, kind):
    for dims in SHAPES:
        _every_way(Block(on, dims, "bfloat16", tokens, kind, specialize=False))


@places
@pytest.mark.parametrize("kind", [RELU, Kind("relu2", biased=True, normed=True), Kind("drelu"), Kind(gated=False)], ids=str)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("tokens", [2, 3, 8])
def test_other_dtypes(on, tokens, dtype, kind):
    for dims in SHAPES:
        _every_way(Block(on, dims, dtype, tokens, kind, specialize=False))


@places
@pytest.mark.parametrize("kind", [Kind(compressed=True), Kind("relu2", gated=False, biased=True, compressed=True)], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 8])
def test_compressed_weights(on, tokens, kind):
    """Which have the bits of plain ones."""
    for dims in [*SHAPES, (2680, 20)]:  # slices of the last lie in units
        block = Block(on, dims, "bfloat16", tokens, kind, specialize=dims == SHAPES[2])
        _every_way(block)
        together = [block(operator) for operator in kind.operators]
        block.put_w = {name: on.put(w) for name, w in block.w.items()}
        for operator, out in zip(kind.operators, together, strict=True):
            np.testing.assert_array_equal(bits(out), bits(block(operator)), err_msg=operator)


@pytest.mark.gpu
@pytest.mark.parametrize(("dims", "dtype"), [((264, 101), "bfloat16"), ((4104, 1007), "bfloat16"), ((2560, 133), "float32")])
@pytest.mark.parametrize("tokens", [2, 5, 8])
def test_dims_as_constants(tokens, dims, dtype):
    """Which change no bit."""
    for kind in (RELU, Kind("relu2", gated=False, biased=True, normed=True)):
        block = Block(OnCupy(), dims, dtype, tokens, kind)
        _every_way(block)
        outs = [block(operator) for operator in kind.operators]
        block.specialize = False
        for operator, out in zip(kind.operators, outs, strict=True):
            np.testing.assert_array_equal(bits(out), bits(block(operator)), err_msg=operator)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [2, 4, 8])
@pytest.mark.parametrize(("d_model", "d_ff"), [(4096, 11008), (5120, 13824)])
def test_tokens_of_real_models(d_model, d_ff, tokens):
    """Independent and correlated masks at 89 %, plain and compressed."""
    import cupy

    on, rng = OnCupy(), np.random.default_rng()
    x = on.put(np.stack([token(d_model, "bfloat16", rng) for _ in range(tokens)]))
    ws = [on.put(weights(d_ff, d_model, "bfloat16", seed)) for seed in range(3)]
    for share in (0.0, synthetic.SHARE):
        masks = synthetic.correlated_masks(d_ff, 0.89, tokens, rng, share)
        synthetic.steer(ws[0], x, cupy.asarray(synthetic.gate_of(masks, T, rng)))
        np.testing.assert_array_equal(reference.active(on.get(psc.ffn_1(x, ws[0])), T), masks)
        out = on.put(poisoned((tokens, d_model), "bfloat16"))
        assert psc.sparse_ffn(x, *ws, T, out=out) is out
        for t in range(tokens):
            np.testing.assert_array_equal(bits(on.get(psc.sparse_ffn(x[t], *ws, T))), bits(on.get(out[t])))
        x1 = truth.up(truth.rounded(truth.dot(ws[0], x), x), ws[1], x, masks)
        assert truth.relative_error(out, truth.down(truth.rounded(x1, x), ws[2])) < 0.01
        packed = [psc.compress(w, layout=layout) for w, layout in zip(ws, ("rows", "rows", "slices"), strict=True)]
        np.testing.assert_array_equal(bits(on.get(psc.SparseFFN(*packed, T)(x))), bits(on.get(out)))


@pytest.mark.gpu
def test_torch_tensors(torch):
    block, to = Block(OnCupy(), (264, 101), "bfloat16", 5, RELU), OnTorch()
    x, ws = to.put(block.x), [to.put(w) for w in block.w.values()]
    y = psc.sparse_ffn(x, *ws, T)
    assert type(y) is torch.Tensor and y.shape == x.shape
    np.testing.assert_array_equal(bits(to.get(y)), bits(block("sparse_ffn")))
    np.testing.assert_array_equal(bits(to.get(psc.SparseFFN(*ws, T)(x[1:4]))), bits(block("sparse_ffn")[1:4]))


# Who is active


def _steered(on: Any, masks: np.ndarray, dtype: str = "bfloat16", **kind: Any) -> Block:
    """A block whose tokens have these masks."""
    rng = np.random.default_rng()
    block = Block(on, (264, masks.shape[1]), dtype, len(masks), Kind(**kind), specialize=False)
    first = "w_gate" if block.kind.gated else "w_up"
    gates = synthetic.gate_of(masks, T, rng)
    synthetic.steer(block.w[first], block.x, gates)
    block.gate = gates.astype(DTYPES[dtype])
    block.put()
    return block


@places
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_with_nothing_active_among_full_ones(on, dtype, gated):
    masks = np.zeros((5, 101), bool)
    masks[0], masks[2, 17], masks[3, ::2] = True, True, True
    block = _steered(on, masks, dtype, gated=gated)
    x1 = block("ffn_123" if gated else "ffn_12")
    np.testing.assert_array_equal(x1.astype(np.float32) != 0, masks)
    assert not bits(x1[~masks]).any(), "an inactive output is not +0"
    for operator in ("sparse_ffn", "SparseFFN"):
        y = block(operator)
        assert not bits(y[[1, 4]]).any(), "y of nothing is not +0"
        assert (np.abs(y[[0, 2, 3]].astype(np.float32)).max(axis=1) > 0).all()
    _every_way(block)


@places
@pytest.mark.parametrize("kind", [RELU, DRELU, Kind("relu2", normed=True, gated=False)], ids=str)
@pytest.mark.parametrize("tokens", [2, 5, 8])
def test_equal_tokens_have_equal_rows(on, tokens, kind):
    block = Block(on, (264, 101), "bfloat16", tokens, kind, specialize=False)
    for vectors in (block.x, block.gate, block.x1):
        vectors[:] = vectors[0]
    for operator in kind.operators:
        out = block(operator)
        np.testing.assert_array_equal(bits(out), bits(np.stack([out[0]] * tokens)))


@places
@pytest.mark.parametrize("activation", ["relu", "relu2", "drelu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_weights_of_neurons_that_only_others_need(on, dtype, activation):
    """Their x1 are +0 to the sign, their y do not see them, and the bits of both are those without NaN."""
    masks = np.random.default_rng().random((4, 101)) < 0.5
    masks[:, :8] = [[True] * 8, [False] * 8, [False, True] * 4, [False] * 8]
    block = _steered(on, masks, dtype, activation=activation, biased=True, normed=True)
    block.extras["gate_bias"][:], block.extras["down_bias"][:] = 0, 0
    block.put()
    clean = {operator: block(operator) for operator in ("ffn_23", "ffn_123", "ffn_4", "sparse_ffn")}
    poison = masks[0] & ~masks[1] & ~masks[3]
    assert poison[:8:2].all()
    for array in (block.w["w_up"], block.w["w_down_t"], block.extras["up_bias"], block.extras["norm_weight"]):
        array[poison] = np.nan
    block.x1 = np.where(masks, block.x1 + DTYPES[dtype].type(1), np.zeros_like(block.x1))
    block.put()
    spared = [t for t in range(4) if not (masks[t] & poison).any()]
    assert {1, 3} <= {*spared} and 0 not in spared
    for operator in ("ffn_23", "ffn_123"):
        x1 = block(operator)
        assert not bits(x1[~masks]).any(), "an inactive output is not +0"
        assert np.isfinite(x1[spared].astype(np.float32)).all() and np.isnan(x1[0].astype(np.float32)).any()
        np.testing.assert_array_equal(bits(x1[spared]), bits(clean[operator][spared]))
    for operator in ("ffn_4", "sparse_ffn"):
        y = block(operator)
        assert np.isfinite(y[spared].astype(np.float32)).all() and np.isnan(y[0].astype(np.float32)).all()
    np.testing.assert_array_equal(bits(y[spared]), bits(clean["sparse_ffn"][spared]))


@places
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_special_values_stay_with_their_token(on, value):
    block = Block(on, (264, 101), "bfloat16", 3, Kind(normed=True), specialize=False)
    block.gate[:] = np.abs(block.gate) + DTYPES["bfloat16"].type(1)
    clean = {operator: block(operator) for operator in block.kind.operators}
    block.x[1, 7] = block.x1[1, 7] = value
    with np.errstate(invalid="ignore"):
        for operator, before in clean.items():
            out = block(operator)
            np.testing.assert_array_equal(bits(out[[0, 2]]), bits(before[[0, 2]]), err_msg=operator)
            assert not np.isfinite(out[1].astype(np.float32)).all(), operator


# What is refused


def test_wrong_numbers_of_tokens():
    x, w, g = np.ones((3, 16), np.float32), np.ones((33, 16), np.float32), np.ones((3, 33), np.float32)
    ffn = psc.SparseFFN(w, w, w)
    for call, message in [
        (lambda: psc.ffn_23(g, x[:2], w), r"ffn_23: x must have the leading dims of gate, \(3,\), got \(2,\): reshape one"),
        (lambda: psc.ffn_23(g, x[0], w), r"ffn_23: x must have the leading dims of gate, \(3,\), got \(\): reshape one"),
        (lambda: psc.ffn_1(x, w, out=g[:2]), r"ffn_1: out must have the leading dims of x, \(3,\), got \(2,\)"),
        (lambda: psc.ffn_4(g, w, out=x[0]), r"ffn_4: out must have the leading dims of x1, \(3,\), got \(\)"),
        (lambda: psc.sparse_ffn(x, w, w, w, out=x[:1].copy()), r"sparse_ffn: out must have the leading dims of x, \(3,\), got"),
        (lambda: ffn(x, out=x[:1].copy()), r"SparseFFN: out must have the leading dims of x, \(3,\), got \(1,\)"),
        (
            lambda: ffn(np.ones((0, 16), np.float32)),
            r"SparseFFN: x must hold one token, .* got 0 tokens: there must be",
        ),
        (
            lambda: ffn(np.ones((9, 16), np.float32)),
            r"SparseFFN: x must hold .* 1 to 8, .* got 9 tokens: more are for the",
        ),
        (lambda: psc.ffn_4(np.ones((9, 33), np.float32), w), r"ffn_4: x1 must hold .* got 9 tokens: .* dense path, x @ w\.T"),
        (lambda: psc.ffn_1(x[None], w), r"ffn_1: x must be 1-D, or 2-D with one token per row, got shape \(1, 3, 16\)"),
        (lambda: psc.ffn_1(x, w, bias=g), r"ffn_1: bias must have shape \(d_ff,\) = \(33,\), got \(3, 33\)"),
        (lambda: psc.ffn_4(g, w, norm_weight=g), r"ffn_4: norm_weight must have shape \(d_ff,\) = \(33,\), got \(3, 33\)"),
    ]:
        with pytest.raises(ValueError, match=f"^{message}"):
            call()


@pytest.mark.gpu
def test_batches_of_many_sizes_after_one_another():
    """One bound FFN, whose scratch grows and is shared, in a graph and outside."""
    import cupy

    on, block = OnCupy(), Block(OnCupy(), (264, 1007), "bfloat16", 8, RELU)
    ffn, x = psc.SparseFFN(*block.put_w.values(), T), on.put(block.x)
    expected = block("sparse_ffn")
    for tokens in (8, 1, 3, 8, 2, 5, 1, 8):
        np.testing.assert_array_equal(bits(on.get(ffn(x[:tokens]))), bits(expected[:tokens]))
    outs = {tokens: on.put(poisoned((tokens, 264), "bfloat16")) for tokens in (2, 8, 1)}
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        for tokens, out in outs.items():
            ffn(x[:tokens], out=out)
        graph = stream.end_capture()
        graph.launch(stream)
    stream.synchronize()
    for tokens, out in outs.items():
        np.testing.assert_array_equal(bits(on.get(out)), bits(expected[:tokens]))
