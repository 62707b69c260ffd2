"""The shipped kernels, run on the host under AddressSanitizer and UBSan with the launches that a GPU would get."""

from __future__ import annotations

import hashlib

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


def _run_twice(host, kernel, shape, inputs, out, trailing=(), **more):
    """Under two orders of threads and blocks: the bits must not depend on them.

    `trailing` are the arguments behind the dims, and `more` goes to the `Problem`.
    """
    plan = plan_of(kernel, shape, **more)
    first, second = (host.run(plan, [*inputs, shape.d_ff, shape.d_model, *trailing], out, seed=seed) for seed in (1, 2))
    np.testing.assert_array_equal(bits(first), bits(second))
    return first


class _Half:
    """The first half of an FFN with an activation and biases, by each of its kernels."""

    def __init__(self, host, shape: Shape, activation: str, biased: bool, rng: np.random.Generator) -> None:
        self.host, self.shape, self.activation, self.biased = host, shape, activation, biased
        d_model, d_ff, dtype = shape.d_model, shape.d_ff, shape.dtype
        self.x, self.w_gate, self.w_up = (
            token(d_model, dtype, rng),
            weights(d_ff, d_model, dtype),
            weights(d_ff, d_model, dtype, 1),
        )
        self.gate_bias, self.up_bias = (token(d_ff, dtype, rng) if biased else None for _ in range(2))

    def _run(self, kernel: str, inputs: list, *biases: np.ndarray | None) -> np.ndarray:
        names = {"ffn_1": ("gate_bias",), "ffn_123": ("gate_bias", "up_bias")}.get(kernel, ("up_bias",))
        more = {"extras": names, "trailing": biases} if self.biased else {}
        if kernel != "ffn_1":
            more["activation"] = self.activation
        return _run_twice(self.host, kernel, self.shape, inputs, poisoned(self.shape.d_ff, self.shape.dtype), **more)

    def ffn_1(self, up: bool = False) -> np.ndarray:
        """The gate, or without a gate the up-projection."""
        w, bias = (self.w_up, self.up_bias) if up else (self.w_gate, self.gate_bias)
        return self._run("ffn_1", [self.x, w, None], bias)

    def ffn_12(self, threshold: float) -> np.ndarray:
        return self._run("ffn_12", [self.x, self.w_up, None, threshold], self.up_bias)

    def ffn_23(self, g: np.ndarray, w_up: np.ndarray, threshold: float) -> np.ndarray:
        return self._run("ffn_23", [g, self.x, w_up, None, threshold], self.up_bias)

    def ffn_123(self, w_up: np.ndarray, threshold: float) -> np.ndarray:
        return self._run("ffn_123", [self.x, self.w_gate, w_up, None, threshold], self.gate_bias, self.up_bias)


def _without_negative_zeros(out: np.ndarray) -> bool:
    return not np.signbit(out[out == 0].astype(np.float32)).any()


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


# Without constants one build runs every shape; with them one is enough, as the code is the same.
ONCE = [(264, 101)]
HALVES = [
    *(("bfloat16", activation, biased, False) for activation, biased in (("relu", True), ("relu2", True), ("drelu", True))),
    ("float32", "relu2", True, False),
    ("bfloat16", "drelu", True, True),
]


@pytest.mark.parametrize(
    ("dtype", "activation", "biased", "specialize"),
    [
        *((dtype, "relu2", True, False) for dtype in DTYPES),
        ("bfloat16", "relu", False, False),
        ("bfloat16", "relu", True, False),
        ("float16", "relu2", True, True),
    ],
)
def test_ffn_12_is_ffn_1_and_the_activation_to_the_bit(host, dtype, activation, biased, specialize):
    rng = np.random.default_rng(12)
    for d_model, d_ff in ONCE if specialize else SHAPES:
        half = _Half(host, Shape(d_model, d_ff, dtype, specialize), activation, biased, rng)
        dense = _Half(host, Shape(d_model, d_ff, dtype, False), activation, biased, rng)
        dense.x, dense.up_bias = half.x, half.up_bias
        g = dense.ffn_1(up=True)
        for threshold in (0.25, max(0.0, float(g.max()))):
            out = half.ffn_12(threshold)
            expected = exact_ffn_12(g, half.x, half.w_up, threshold, activation, half.up_bias)
            np.testing.assert_array_equal(bits(out), bits(expected))
    assert np.count_nonzero(out) >= 1, "the largest is at the threshold"


@pytest.mark.parametrize(("dtype", "activation", "biased", "specialize"), HALVES)
def test_every_half_with_a_gate(host, dtype, activation, biased, specialize):
    """ffn_123 is ffn_1 and ffn_23 to the bit, with each activation and with biases."""
    rng = np.random.default_rng(123)
    for d_model, d_ff in ONCE if specialize else [(264, 33), SHARED_ROWS[1]]:
        half = _Half(host, Shape(d_model, d_ff, dtype, False), activation, biased, rng)
        g = half.ffn_1()
        half.shape = Shape(d_model, d_ff, dtype, specialize)
        assert_rounded_sum(g, *exact_ffn_1(half.x, half.w_gate, half.gate_bias), d_model + 1)
        for threshold in (0.0, max(0.25, float(g.max()))):
            active, w_up = reference.active(g, threshold), half.w_up.copy()
            w_up[~active] = np.nan
            half.up_bias[~active] = np.nan
            two = half.ffn_23(g, w_up, threshold)
            exact, magnitude = exact_ffn_23(g, half.x, w_up, threshold, activation, half.up_bias)
            assert_rounded_sum(two, exact, magnitude, d_model + 2)
            assert not np.any(bits(two[~active])), "an inactive output is not +0"
            np.testing.assert_array_equal(bits(half.ffn_123(w_up, threshold)), bits(two))
            half.up_bias = token(d_ff, dtype, rng)
            if activation == "drelu":
                off = exact_ffn_1(half.x, half.w_up)[0] < -3
                np.testing.assert_array_equal(two[off & active].astype(np.float32), 0)
                assert _without_negative_zeros(two) and not (two.astype(np.float32) < 0).any()


def test_a_row_of_ffn_23_with_a_bias_has_the_same_bits_whatever_else_is_active(host):
    """Read by two warps or by one, with dReLU."""
    rng = np.random.default_rng(23)
    half = _Half(host, Shape(*SHARED_ROWS[0], "bfloat16", False), "drelu", True, rng)
    g = np.abs(half.ffn_1()) + DTYPES["bfloat16"].type(1)
    every = half.ffn_23(g, half.w_up, 0.0)
    assert np.count_nonzero(every) > 10 and np.count_nonzero(every == 0) > 10
    for stride in (len(g), 12, 3):
        active = np.arange(len(g)) % stride == rng.integers(stride)
        out = half.ffn_23(np.where(active, g, np.zeros_like(g)), half.w_up, 0.0)
        np.testing.assert_array_equal(bits(out), bits(np.where(active, every, np.zeros_like(every))))


def test_a_bias_of_zeros_changes_no_bit(host):
    rng = np.random.default_rng(0)
    shape = Shape(264, 101, "bfloat16", False)
    plain, zeros = (_Half(host, shape, "relu", biased, rng) for biased in (False, True))
    zeros.x, zeros.gate_bias[:], zeros.up_bias[:] = plain.x, 0, 0
    g = plain.ffn_1()
    for name, arguments in [
        ("ffn_1", ()),
        ("ffn_12", (0.1,)),
        ("ffn_23", (g, plain.w_up, 0.1)),
        ("ffn_123", (plain.w_up, 0.1)),
    ]:
        one, other = getattr(plain, name)(*arguments), getattr(zeros, name)(*arguments)
        np.testing.assert_array_equal(bits(one), bits(other), err_msg=name)
        assert np.any(bits(one)), "nothing was compared"


@pytest.mark.parametrize(("dtype", "activation"), [("bfloat16", "relu2"), ("bfloat16", "drelu"), ("float32", "relu2")])
def test_special_values_of_other_activations(host, dtype, activation):
    """Every special gate with every special up-projection, as the reference treats them: the kernels of the tests above."""
    tiny = {"bfloat16": 2.0**-133, "float16": 2.0**-24, "float32": 2.0**-149}[dtype]
    values = [np.nan, np.inf, -np.inf, 0.0, -0.0, tiny, -tiny, 0.25, 0.2490234375, -0.25, 1.5, -2.0, 2.0**-14, 300.0]
    gates, ups = (a.ravel() for a in np.meshgrid(*[np.array(values).astype(DTYPES[dtype])] * 2))
    half = _Half(host, Shape(8, len(gates), dtype, False), activation, True, np.random.default_rng(0))
    half.x, w_up = np.eye(8, dtype=DTYPES[dtype])[0], np.zeros((len(ups), 8), DTYPES[dtype])
    w_up[:, 0], half.up_bias = ups, np.zeros_like(ups)
    for threshold in (0.0, 0.25):
        out = half.ffn_23(gates, w_up, threshold)
        with np.errstate(all="ignore"):
            expected = reference.ffn_23(gates, half.x, w_up, threshold, activation=activation)
        off = ~reference.active(gates, threshold) | ((activation == "drelu") & (ups.astype(np.float32) <= 0))
        np.testing.assert_array_equal(out.astype(np.float32), expected.astype(np.float32))
        assert not np.any(bits(out[off])), "an inactive output is not +0"
        assert np.isnan(out[np.isnan(gates) & (ups.astype(np.float32) > 0)].astype(np.float32)).all()
        assert np.isnan(out[~off & np.isnan(ups)].astype(np.float32)).all(), "NaN in the up-projection stays visible"


@dtypes
def test_special_values_of_ffn_12(host, dtype):
    """Squared ReLU of every value: its square in float32, rounded once more."""
    rng = np.random.default_rng(1)
    tiny = {"bfloat16": 2.0**-133, "float16": 2.0**-24, "float32": 2.0**-149}[dtype]
    values = [np.nan, np.inf, -np.inf, 0.0, -0.0, tiny, -tiny, 0.25, 0.2490234375, 0.2509765625, -0.25, 300.0, 2.0**-70]
    g = np.concatenate([values, rng.standard_normal(88)]).astype(DTYPES[dtype])
    half = _Half(host, Shape(8, len(g), dtype, False), "relu2", True, rng)
    half.x, half.w_up = np.eye(8, dtype=DTYPES[dtype])[0], np.zeros((len(g), 8), DTYPES[dtype])
    half.w_up[:, 0], half.up_bias = g, np.zeros_like(g)
    for threshold in (0.0, 0.25):
        out, wide = half.ffn_12(threshold), g.astype(np.float32)
        with np.errstate(all="ignore"):
            active = ~(wide < threshold) & (wide != 0)
            expected = np.where(active, wide * wide, np.float32(0)).astype(DTYPES[dtype])
        np.testing.assert_array_equal(out.astype(np.float32), expected.astype(np.float32))
        assert not np.any(bits(out[~active])), "an inactive output is not +0"


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


def _ffn_4(host, shape, x1, w, bias=None, norm=None, eps=0.0):
    """With what is given of a bias and a norm."""
    extras = tuple(name for name, array in (("down_bias", bias), ("norm_weight", norm)) if array is not None)
    trailing = (0 if bias is None else bias, 0 if norm is None else norm, eps)
    return _run_twice(
        host, "ffn_4", shape, [x1, w, None], poisoned(shape.d_model, shape.dtype), trailing=trailing, extras=extras
    )


@pytest.mark.parametrize(
    ("dtype", "has_bias", "has_norm", "specialize"),
    [
        ("bfloat16", True, False, False),
        ("bfloat16", True, True, False),
        ("bfloat16", True, True, True),
        ("float16", False, True, False),
        ("float32", True, True, False),
    ],
)
def test_ffn_4_with_a_bias_and_a_norm(host, dtype, has_bias, has_norm, specialize):
    """NaN in weights of inactive neurons, the norm's too, does no harm, and of nothing active the bias is left."""
    d_model, d_ff = 40, 700
    shape, rng = Shape(d_model, d_ff, dtype, specialize), np.random.default_rng(4)
    for sparsity, eps in [(0.0, 0.5), (0.5, 0.0), (0.9, 1e-5), (1.0, 0.0), (1.0, 1e-5), ("one", 1e-5)]:
        eps = eps if has_norm else 0.0
        w, x1 = weights(d_ff, d_model, dtype).copy(), reference.fatrelu(gate(d_ff, dtype, sparsity, rng))
        x1 = (x1 * token(d_ff, dtype, rng)).astype(DTYPES[dtype])
        bias, norm = token(d_model, dtype, rng) if has_bias else None, norm_weight(d_ff, dtype, rng) if has_norm else None
        w[x1 == 0] = np.nan
        if has_norm:
            norm[x1 == 0] = np.nan
        out = _ffn_4(host, shape, x1, w, bias, norm, eps)
        assert_rounded_sum(out, *exact_ffn_4(x1, w, bias, norm, eps), terms_of_ffn_4(d_ff, normed=has_norm))
        if sparsity == 1.0:
            np.testing.assert_array_equal(out, bias if has_bias else np.zeros_like(out))


def test_a_bias_of_zeros_changes_no_bit_of_ffn_4(host):
    shape, rng = Shape(40, 700, "bfloat16", False), np.random.default_rng(0)
    w, x1 = weights(700, 40, "bfloat16"), reference.fatrelu(gate(700, "bfloat16", 0.7, rng)) * token(700, "bfloat16", rng)
    with_zeros = _ffn_4(host, shape, x1, w, np.zeros(40, w.dtype))
    np.testing.assert_array_equal(bits(with_zeros), bits(_ffn_4(host, shape, x1, w)))


def test_dims_as_constants_do_not_change_the_bits_of_a_norm(host):
    """Nor does what it is scaled by, a power of two: the mean and the sum scale with x1."""
    rng = np.random.default_rng(44)
    w, x1 = weights(700, 40, "bfloat16"), reference.fatrelu(gate(700, "bfloat16", 0.7, rng)) * token(700, "bfloat16", rng)
    bias, norm = token(40, "bfloat16", rng), norm_weight(700, "bfloat16", rng)
    one, other = (_ffn_4(host, Shape(40, 700, "bfloat16", s), x1, w, bias, norm, 0.0) for s in (True, False))
    np.testing.assert_array_equal(bits(one), bits(other))
    scaled = _ffn_4(host, Shape(40, 700, "bfloat16", False), x1 * DTYPES["bfloat16"].type(0.25), w, bias, norm, 0.0)
    np.testing.assert_array_equal(bits(scaled), bits(other))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_not_lost_in_a_norm(host, value):
    """Both leave NaN: infinity over infinity is none."""
    shape, rng = Shape(40, 700, "bfloat16", False), np.random.default_rng(5)
    x1 = token(700, "bfloat16", rng)
    x1[37] = value
    w, bias, norm = weights(700, 40, "bfloat16"), token(40, "bfloat16", rng), norm_weight(700, "bfloat16", rng)
    assert np.isnan(_ffn_4(host, shape, x1, w, bias, norm, 1e-5).astype(np.float32)).all()
    with np.errstate(all="ignore"):
        assert np.isnan(reference.ffn_4(x1, w, bias=bias, norm_weight=norm, norm_eps=1e-5).astype(np.float32)).all()


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


def test_the_largest_halves_stay_finite(host):
    """65519 and less round to 65504, 65520 to infinity: on the host the kernels round by themselves."""
    w = np.zeros((4, 8), np.float16)
    w[:, 0], w[:, 1] = 65504, (0, 15, 16, 0)
    w[3] = -w[1]
    x = np.asarray([1, 1, *[0] * 6], np.float16)
    out = _run_twice(host, "ffn_1", Shape(8, 4, "float16"), [x, w, None], poisoned(4, "float16"))
    np.testing.assert_array_equal(out, np.asarray([65504, 65504, np.inf, -65504], np.float16))


# Of results on fixed inputs. Whoever changes the order of a sum changes these, and tells so under *Numerics* in the changelog.
BITS = {
    ("ffn_1", "bfloat16"): "b949f2926dcc2ead",
    ("ffn_1", "float16"): "6663005e2183b3d2",
    ("ffn_1", "float32"): "05f7f681273a3c79",
    ("ffn_12", "bfloat16"): "e1ab5c1eb5b5a931",
    ("ffn_12", "float16"): "386106e9004ab1ae",
    ("ffn_12", "float32"): "2b194c48cde63086",
    ("ffn_123", "bfloat16"): "bbc8481783b83d16",
    ("ffn_123", "float16"): "cde44e3d22e35eef",
    ("ffn_123", "float32"): "8ee96760a1100ada",
    ("ffn_23", "bfloat16"): "f5185eff76d624bb",
    ("ffn_23", "float16"): "5578ac07fdad4b36",
    ("ffn_23", "float32"): "0586cfb5fbb8fb7a",
    ("ffn_4", "bfloat16"): "843766b4e78dbc13",
    ("ffn_4", "float16"): "e5c832311322a32d",
    ("ffn_4", "float32"): "7c3c7ef732495ede",
}


def _fixed(shape: tuple[int, ...], dtype: str, seed: int) -> np.ndarray:
    """Numbers from -1 to 1, by integer arithmetic alone: no library may change them."""
    mixed = (np.arange(np.prod(shape), dtype=np.uint64) + np.uint64(1 + 7919 * seed)) * np.uint64(0x9E3779B97F4A7C15)
    return ((mixed >> np.uint64(40)).astype(np.float64) / 2**23 - 1).reshape(shape).astype(np.float32).astype(DTYPES[dtype])


@dtypes
@pytest.mark.parametrize("kernel", ["ffn_1", "ffn_12", "ffn_123", "ffn_23", "ffn_4"])
def test_sums_keep_their_order(host, kernel, dtype):
    d_model, d_ff = {"ffn_4": (40, 700), "ffn_23": (2312, 41)}.get(kernel, (264, 101))  # built for tests above
    x, w_gate, w_up = _fixed((d_model,), dtype, 1), _fixed((d_ff, d_model), dtype, 2), _fixed((d_ff, d_model), dtype, 3)
    g, x1 = _fixed((d_ff,), dtype, 4), _fixed((d_ff,), dtype, 5)
    inputs = {
        "ffn_1": [x, w_gate, None],
        "ffn_12": [x, w_up, None, 0.25],
        "ffn_123": [x, w_gate, w_up, None, 0.25],
        "ffn_23": [g, x, w_up, None, 0.25],
        "ffn_4": [x1, w_up, None],
    }[kernel]
    x1[x1 < 0] = 0
    out = _run_twice(host, kernel, Shape(d_model, d_ff, dtype), inputs, poisoned(d_model if kernel == "ffn_4" else d_ff, dtype))
    assert np.count_nonzero(out) > out.size / 4
    assert hashlib.sha256(bits(out).tobytes()).hexdigest()[:16] == BITS[kernel, dtype]
