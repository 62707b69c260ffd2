"""The shipped kernels with several tokens, on the host under the sanitizers: each token is, to the bit, as it is alone."""

from __future__ import annotations

import copy
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
from plans import Shape, plan_of

from prosparse_cupy import bf12, reference
from prosparse_cupy.formats import BF12_SLICES, Format
from prosparse_cupy.knobs import FusedRowKnobs, Knobs, compressed_format
from prosparse_cupy.problem import KERNELS
from prosparse_cupy.testing import synthetic

T = 0.25
HALVES = ("ffn_1", "ffn_12", "ffn_23", "ffn_123")
# (d_model, d_ff): smallest, no multiple of any tile, rows that warps of ffn_23 share.
SHAPES = [(8, 1), (8, 3), (264, 101), (4104, 29)]
SHAPES_OF_FFN_4 = [(8, 1), (24, 101), (40, 700)]
# Of the tokens of a call: empty ones among full ones.
SPARSITIES = [0.9, 1.0, 0.0, 0.5, "one", 0.99, 1.0, 0.7]


class _Batch:
    """Tokens, and what kernels take beside them."""

    def __init__(self, host, shape: Shape, tokens: int, rng: np.random.Generator, activation: str = "relu") -> None:
        self.host, self.shape, self.tokens, self.activation = host, shape, tokens, activation
        d_model, d_ff, dtype = shape.d_model, shape.d_ff, shape.dtype
        start = int(rng.integers(len(SPARSITIES)))
        sparsities = [SPARSITIES[(start + t) % len(SPARSITIES)] for t in range(tokens)]
        self.x = np.stack([token(d_model, dtype, rng) for _ in range(tokens)])
        self.gate = np.stack([gate(d_ff, dtype, sparsity, rng, T) for sparsity in sparsities])
        ups = np.stack([token(d_ff, dtype, rng) for _ in range(tokens)])
        self.x1 = np.where(reference.active(self.gate, T), self.gate * ups, np.zeros_like(ups)).astype(DTYPES[dtype])
        self.w: list[Any] = [weights(d_ff, d_model, dtype, seed).copy() for seed in range(3)]
        self.extras: dict[str, np.ndarray] = {}
        self.eps = 0.0

    def with_biases(self, rng: np.random.Generator, norm: bool = False) -> _Batch:
        d_model, d_ff, dtype = self.shape.d_model, self.shape.d_ff, self.shape.dtype
        self.extras = {name: token(d_ff, dtype, rng) for name in ("gate_bias", "up_bias")}
        self.extras["down_bias"] = token(d_model, dtype, rng)
        if norm:
            self.extras["norm_weight"], self.eps = norm_weight(d_ff, dtype, rng), 1e-5
        return self

    def run(
        self,
        kernel: str,
        which: list[int] | None = None,
        *,
        seed: int = 1,
        formats: tuple = (),
        knobs: Knobs | None = None,
    ) -> np.ndarray:
        """A kernel on all tokens or on these."""
        every = slice(None) if which is None else which
        x, g, x1 = (np.ascontiguousarray(a[every]) for a in (self.x, self.gate, self.x1))
        w_gate, w_up, w_down = self.w
        inputs = {
            "ffn_1": [x, w_gate, None],
            "ffn_12": [x, w_up, None, T],
            "ffn_23": [g, x, w_up, None, T],
            "ffn_123": [x, w_gate, w_up, None, T],
            "ffn_4": [x1, w_down, None],
        }[kernel]
        interface = KERNELS[kernel]
        present = tuple(name for name in interface.optional if name in self.extras)
        trailing = [self.extras.get(name, 0) for name in interface.optional] + [self.eps] * (kernel == "ffn_4")
        more = {"activation": self.activation} if interface.has_activation else {}
        plan = plan_of(kernel, self.shape, knobs, tokens=len(x), extras=present, formats=formats, **more)
        size = self.shape.d_model if kernel == "ffn_4" else self.shape.d_ff
        out = poisoned((len(x), size), self.shape.dtype)
        return self.host.run(plan, [*inputs, self.shape.d_ff, self.shape.d_model, *trailing], out, seed=seed)

    def checked(self, kernel: str) -> np.ndarray:
        """The result of all tokens, under two orders of threads; each is right, and has the bits that it has alone."""
        together = self.run(kernel)
        np.testing.assert_array_equal(bits(together), bits(self.run(kernel, seed=2)))
        for t, out in enumerate(together):
            np.testing.assert_array_equal(bits(out), bits(self.run(kernel, [t])[0]), err_msg=f"{kernel}, token {t}")
            self._check(kernel, t, out)
        return together

    def _check(self, kernel: str, t: int, out: np.ndarray) -> None:
        x, g, x1 = self.x[t], self.gate[t], self.x1[t]
        w_gate, w_up, w_down = self.w
        gate_bias, up_bias, down_bias, norm = (
            self.extras.get(name) for name in ("gate_bias", "up_bias", "down_bias", "norm_weight")
        )
        d_ff = self.shape.d_ff
        if kernel == "ffn_4":
            exact = exact_ffn_4(x1, w_down, down_bias, norm, self.eps)
            assert_rounded_sum(out, *exact, terms_of_ffn_4(d_ff, normed=norm is not None))
        elif kernel == "ffn_1":
            assert_rounded_sum(out, *exact_ffn_1(x, w_gate, gate_bias), len(x) + 1)
        elif kernel == "ffn_12":
            exact_x1 = exact_ffn_12(self._up_projection(t), x, w_up, T, self.activation, up_bias)
            np.testing.assert_array_equal(bits(out), bits(exact_x1))
        else:
            g = self.run("ffn_1", [t])[0] if kernel == "ffn_123" else g
            assert_rounded_sum(out, *exact_ffn_23(g, x, w_up, T, self.activation, up_bias), len(x) + 2)
            assert not bits(out[~reference.active(g, T)]).any(), "an inactive output is not +0"

    def _up_projection(self, t: int) -> np.ndarray:
        """Of a token alone, by ffn_1."""
        other = copy.copy(self)
        other.w = [self.w[1], *self.w[1:]]
        other.extras = {"gate_bias": self.extras["up_bias"]} if self.extras else {}
        return other.run("ffn_1", [t])[0]


@pytest.mark.parametrize("kernel", HALVES)
@pytest.mark.parametrize("tokens", [2, 3, 8])
def test_halves(host, tokens, kernel):
    rng = np.random.default_rng(tokens)
    for dims in SHAPES:
        _Batch(host, Shape(*dims, "bfloat16", False), tokens, rng).checked(kernel)


@pytest.mark.parametrize(
    ("tokens", "dtype", "activation", "specialize"),
    [
        (2, "bfloat16", "drelu", False),
        (8, "bfloat16", "drelu", False),
        (3, "bfloat16", "relu2", True),
        (5, "float16", "relu2", False),
        (8, "float32", "drelu", False),
    ],
)
def test_halves_with_biases(host, tokens, dtype, activation, specialize):
    rng = np.random.default_rng(tokens)
    for dims in [SHAPES[2], (256, 5)] if specialize else SHAPES:  # the latter are whole loads of one warp and half ones of two
        batch = _Batch(host, Shape(*dims, dtype, specialize), tokens, rng, activation).with_biases(rng)
        for kernel in ("ffn_23", "ffn_123", *(["ffn_12"] if activation == "relu2" else [])):
            batch.checked(kernel)


@pytest.mark.parametrize(
    ("tokens", "abreast", "dtype", "activation", "dims"),
    [
        (8, 4, "bfloat16", "drelu", None),
        (5, 2, "float16", "relu2", None),
        (3, 4, "bfloat16", "relu2", SHAPES[2]),
        (3, 2, "bfloat16", "relu2", (256, 10)),  # whole groups of rows, which the kernel knows
    ],
)
def test_neurons_of_a_warp_of_ffn_123_have_the_bits_of_one_alone(host, tokens, abreast, dtype, activation, dims):
    """Whichever of them are active for whom: no launch that was measured has a warp with several, but `tune` tries them.

    The last warp has fewer neurons than others, and the last neuron is active. Of every seven one is inactive for all tokens,
    and its row and its bias are NaN.
    """
    rng, knobs = np.random.default_rng([tokens, abreast]), FusedRowKnobs(2, min_blocks=4, loads=2, abreast=abreast)
    for d_model, d_ff in SHAPES[:3] if dims is None else [dims]:
        batch = _Batch(host, Shape(d_model, d_ff, dtype, dims is not None), tokens, rng, activation).with_biases(rng)
        off = np.arange(d_ff) % 7 == 3
        batch.extras["gate_bias"][off], batch.extras["gate_bias"][-1] = -100, 100
        batch.w[1][off] = batch.extras["up_bias"][off] = np.nan
        g = batch.run("ffn_1")
        active = reference.active(g, T)
        assert active[:, -1].all() and not active[:, off].any()
        together = batch.run("ffn_123", knobs=knobs)
        np.testing.assert_array_equal(bits(together), bits(batch.run("ffn_123")))
        np.testing.assert_array_equal(bits(together), bits(batch.run("ffn_123", knobs=knobs, seed=2)))
        for t, out in enumerate(together):
            exact = exact_ffn_23(g[t], batch.x[t], batch.w[1], T, activation, batch.extras["up_bias"])
            assert_rounded_sum(out, *exact, d_model + 2)
            assert not bits(out[~active[t]]).any(), "an inactive output is not +0"


@pytest.mark.parametrize(
    ("tokens", "dtype", "norm", "specialize"),
    [
        (2, "bfloat16", False, False),
        (8, "bfloat16", False, False),
        (3, "bfloat16", True, False),
        (8, "bfloat16", True, True),
        (5, "float16", True, False),
        (8, "float32", True, False),
        (5, "bfloat16", True, True),  # blocks of two tokens, of which the last has one
        (7, "float32", False, True),
    ],
)
def test_ffn_4(host, tokens, dtype, norm, specialize):
    rng = np.random.default_rng(tokens)
    for dims in SHAPES_OF_FFN_4[1:] if specialize else SHAPES_OF_FFN_4:
        batch = _Batch(host, Shape(*dims, dtype, specialize), tokens, rng)
        for _ in range(2):  # as it is, then with a bias and perhaps a norm
            y = batch.checked("ffn_4")
            for out in y[~batch.x1.astype(np.float32).any(axis=1)]:
                np.testing.assert_array_equal(out, batch.extras.get("down_bias", np.zeros_like(out)))
            batch.with_biases(rng, norm)


@pytest.mark.parametrize("tokens", [2, 8])
def test_ffn_4_lists_more_rows_than_a_tile(host, tokens):
    rng = np.random.default_rng(0)
    batch = _Batch(host, Shape(8, 2 * 32 * 512 + 5, "bfloat16", False), tokens, rng)
    batch.x1 = np.where(rng.random(batch.x1.shape) < 0.02, batch.x1 + DTYPES["bfloat16"].type(1), np.zeros_like(batch.x1))
    batch.checked("ffn_4")


@pytest.mark.parametrize(
    ("tokens", "dims", "specialize"),
    [
        (2, (264, 101), False),
        (8, (264, 101), False),
        (3, (264, 101), True),
        (7, (264, 101), True),
        (8, (2120, 20), False),
        (3, (2120, 20), True),
    ],
)
def test_compressed_weights_give_the_bits_of_plain_ones(host, tokens, dims, specialize):
    rng = np.random.default_rng(tokens)
    batch = _Batch(host, Shape(*dims, "bfloat16", specialize), tokens, rng)
    for w in batch.w:
        w.view(np.uint16)[rng.random(w.shape) < 0.01] = 0x0001  # escapes
    kernels = (*HALVES, "ffn_4") if dims[0] < 2120 else ("ffn_4",)  # whose slices then lie in units
    plain = {kernel: batch.run(kernel) for kernel in kernels}
    of = {name: compressed_format(name, *dims) for name in ("W_GATE", "W_UP", "W_DOWN")}
    batch.w = [_packed(w, format_) for w, format_ in zip(batch.w, of.values(), strict=True)]
    for kernel, expected in plain.items():
        found = batch.run(kernel, formats=tuple(of[name] for name in KERNELS[kernel].weights))
        np.testing.assert_array_equal(bits(found), bits(expected), err_msg=kernel)
        assert np.any(bits(expected)), "nothing was compared"


def _packed(w: np.ndarray, format_: Format) -> tuple:
    packed = bf12.pack(np, w.view(np.uint16), bf12.SLICES if format_ is BF12_SLICES else bf12.ROWS)
    return (*packed.words, packed.escapes, packed.base)


@pytest.mark.parametrize("kernel", ["ffn_23", "ffn_123", "ffn_12"])
@pytest.mark.parametrize("tokens", [3, 8])
def test_nan_weights_of_neurons_that_only_others_need(host, tokens, kernel):
    """Rows that some warp reads for one token: another's x1 is +0 to the sign."""
    rng = np.random.default_rng(tokens)
    masks = rng.random((tokens, 101)) < 0.5
    masks[0, :8], masks[1:, :8:2] = True, False
    batch = _Batch(host, Shape(264, 101, "bfloat16", False), tokens, rng)
    values = synthetic.gate_of(masks, T, rng)
    synthetic.steer(batch.w[1 if kernel == "ffn_12" else 0], batch.x, values)
    batch.gate = values.astype(DTYPES["bfloat16"])
    clean = batch.run(kernel)
    np.testing.assert_array_equal(clean.astype(np.float32) != 0, masks)
    if kernel == "ffn_12":  # which reads its rows for every token: NaN in them is every token's
        return
    poison = masks[0] & ~masks[1]
    batch.w[1][poison] = np.nan
    found = batch.run(kernel)
    assert not bits(found[~masks]).any(), "an inactive output is not +0"
    assert np.isnan(found[masks & poison].astype(np.float32)).all()
    np.testing.assert_array_equal(bits(found[:, ~poison]), bits(clean[:, ~poison]))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("tokens", [3, 8])
def test_nan_weights_of_inputs_that_only_others_have(host, tokens, norm):
    rng = np.random.default_rng(tokens)
    batch = _Batch(host, Shape(40, 700, "bfloat16", False), tokens, rng).with_biases(rng, norm)
    batch.x1 = np.where(rng.random(batch.x1.shape) < 0.5, batch.x1 + DTYPES["bfloat16"].type(1), np.zeros_like(batch.x1))
    clean = batch.run("ffn_4")
    poison = (batch.x1[0] != 0) & (batch.x1[1] == 0)
    batch.w[2][poison] = np.nan
    if norm:
        batch.extras["norm_weight"][poison] = np.nan
    found, hit = batch.run("ffn_4"), (batch.x1[:, poison] != 0).any(axis=1)
    assert hit[0] and not hit[1]
    np.testing.assert_array_equal(bits(found[~hit]), bits(clean[~hit]))
    assert np.isnan(found[hit].astype(np.float32)).all()


@pytest.mark.parametrize("kernel", [*HALVES, "ffn_4"])
def test_equal_tokens_have_equal_rows(host, kernel):
    for tokens in (2, 3, 8):
        batch = _Batch(host, Shape(264, 101, "bfloat16", False), tokens, np.random.default_rng(tokens))
        for vectors in (batch.x, batch.gate, batch.x1):
            vectors[:] = vectors[0]
        out = batch.run(kernel)
        np.testing.assert_array_equal(bits(out), bits(np.stack([out[0]] * tokens)))
