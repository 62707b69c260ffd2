"""How results are judged, and the random inputs they are judged on."""

from __future__ import annotations

from functools import lru_cache

import ml_dtypes
import numpy as np

from prosparse_cupy.testing import synthetic

DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}

# (d_model, d_ff) of the GPU tests: the published models', and shapes that are odd or tiny.
LARGE = [(4096, 11008), (5120, 13824), (1536, 3840)]
SMALL = [(4104, 1007), (8, 1), (16, 3), (264, 101), (40, 5000)]
SPARSITIES = [0.0, 0.5, 0.9, 0.99, 1.0, "one"]


def ulp(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Distance between neighbours of `dtype` at each value, float64."""
    info = ml_dtypes.finfo(dtype)
    exponent = np.floor(np.log2(np.maximum(np.abs(values.astype(np.float64)), float(info.smallest_normal))))
    return 2.0 ** (exponent - info.nmant)


def assert_rounded_sum(out: np.ndarray, exact: np.ndarray, magnitude: np.ndarray, terms: int) -> None:
    """`out` is `exact` summed in float32 in any order and rounded once.

    The bound is the textbook one: `terms` additions err by at most terms * 2**-24 of the sum of the terms' magnitudes, and the
    rounding by half an ulp (one where the sum moved over a binade).
    """
    error = np.abs(out.astype(np.float64) - exact)
    bound = (terms + 2) * 2.0**-24 * magnitude + ulp(exact, out.dtype)
    worst = np.argmax(error - bound)
    assert np.all(error <= bound), f"element {worst}: {out.flat[worst]} for {exact.flat[worst]}, bound {bound.flat[worst]}"


def assert_no_worse_than_vendor(out: np.ndarray, vendor: np.ndarray, exact: np.ndarray) -> None:
    """At most twice the vendor's error, plus one ulp of the largest result; NaN fails."""
    ours, theirs = (np.abs(a.astype(np.float64) - exact).max() for a in (out, vendor))
    slack = float(ulp(np.abs(exact).max(keepdims=True), out.dtype).max())
    assert ours <= 2 * theirs + slack, f"error {ours:.3g}, the vendor's {theirs:.3g}"
    assert np.isfinite(ours)
    norms = [np.linalg.norm(a.astype(np.float64) - exact) for a in (out, vendor)]
    epsilon = float(ml_dtypes.finfo(out.dtype).eps)
    assert norms[0] <= 2 * norms[1] + epsilon * np.linalg.norm(exact)


def bits(array: np.ndarray) -> np.ndarray:
    """The array's bytes, to compare NaN and signed zeros too."""
    return np.ascontiguousarray(array).view(np.uint8)


def exact_ffn_1(x: np.ndarray, w_gate: np.ndarray, bias: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Float64 gate and the sum of its terms' magnitudes, of which a bias is one."""
    a, w = x.astype(np.float64), w_gate.astype(np.float64)
    total, magnitude = w @ a, np.abs(w) @ np.abs(a)
    if bias is None:
        return total, magnitude
    return total + bias.astype(np.float64), magnitude + np.abs(bias.astype(np.float64))


def active(gate: np.ndarray, threshold: float = 0.0) -> np.ndarray:
    """The neurons that are active, as docs/numerics.md says it, in float64: every float32 is one."""
    wide = gate.astype(np.float64)
    return ~(wide < float(np.float32(threshold))) & (wide != 0)


def exact_activation(g: np.ndarray, threshold: float = 0.0, activation: str = "relu") -> np.ndarray:
    """s of rounded gates, as float64: squared ReLU squares in float32."""
    on = active(g, threshold)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        s = np.square(g.astype(np.float32)) if activation == "relu2" else g
        return np.where(on, s.astype(np.float64), 0.0)


def exact_ffn_12(
    g: np.ndarray,
    x: np.ndarray,
    w_up: np.ndarray,
    threshold: float = 0.0,
    activation: str = "relu",
    bias: np.ndarray | None = None,
) -> np.ndarray:
    """x1 to the bit, of the rounded pre-activation `g`, which is first held against its own truth.

    One rounding lies before the activation, so that no bound on x1 alone would be tight.
    """
    assert_rounded_sum(g, *exact_ffn_1(x, w_up, bias), len(x) + 1)
    with np.errstate(over="ignore"):
        return exact_activation(g, threshold, activation).astype(g.dtype)


def exact_ffn_23(
    gate: np.ndarray,
    x: np.ndarray,
    w_up: np.ndarray,
    threshold: float = 0.0,
    activation: str = "relu",
    bias: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Float64 x1 and the sum of its terms' magnitudes, from formulas 2 and 3 as written."""
    on = active(gate, threshold)
    s = exact_activation(gate, threshold, activation)
    up, magnitude = exact_ffn_1(x, w_up[on], None if bias is None else bias[on])
    if activation == "drelu":
        up = np.maximum(up, 0.0)  # an error of the sum is at most what it was
    x1, total = np.zeros(len(gate)), np.zeros(len(gate))
    x1[on], total[on] = s[on] * up, np.abs(s[on]) * magnitude
    return x1, total


def exact_ffn_4(
    x1: np.ndarray,
    w_down_t: np.ndarray,
    bias: np.ndarray | None = None,
    norm_weight: np.ndarray | None = None,
    norm_eps: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Float64 y and the sum of its terms' magnitudes."""
    on = np.flatnonzero(x1.astype(np.float32))
    a, w = x1[on].astype(np.float64), w_down_t[on].astype(np.float64)
    if norm_weight is not None and len(on):
        a = a * norm_weight[on].astype(np.float64) / np.sqrt((a @ a) / len(x1) + norm_eps)
    y, magnitude = a @ w, np.abs(a) @ np.abs(w)
    if bias is None:
        return y, magnitude
    return y + bias.astype(np.float64), magnitude + np.abs(bias.astype(np.float64))


def terms_of_ffn_4(d_ff: int, *, normed: bool = False) -> int:
    """Roundings on the way to y: the bias, and with a norm as many as d_ff of its mean, halved by the root, and six more."""
    return d_ff + 1 + normed * (d_ff // 2 + 7)


def norm_weight(d_ff: int, dtype: str, rng: np.random.Generator) -> np.ndarray:
    """Weights of a norm, near one, with some negative."""
    sign = np.where(rng.random(d_ff) < 0.1, -1, 1)
    return (sign * (1 + 0.2 * rng.standard_normal(d_ff))).astype(DTYPES[dtype])


@lru_cache(maxsize=12)
def weights(d_ff: int, d_model: int, dtype: str, seed: int = 0) -> np.ndarray:
    """A read-only (d_ff, d_model) matrix, signed."""
    rng = np.random.default_rng([seed, d_ff, d_model])
    matrix = synthetic.weights(d_ff, d_model, DTYPES[dtype], rng)
    matrix.flags.writeable = False
    return matrix


def token(size: int, dtype: str, rng: np.random.Generator) -> np.ndarray:
    """A signed random vector."""
    return rng.standard_normal(size, dtype=np.float32).astype(DTYPES[dtype])


def gate(d_ff: int, dtype: str, sparsity: float | str, rng: np.random.Generator, threshold: float = 0.0) -> np.ndarray:
    """A gate with a hot-neuron mask of this sparsity or "one" active row, with zeros, -0 and gates equal to the threshold."""
    if sparsity == "one":
        mask = np.arange(d_ff) == rng.integers(d_ff)
    else:
        mask = synthetic.hot_mask(synthetic.popularity(d_ff, rng), sparsity, rng)
    values = synthetic.gate_of(mask, threshold, rng).astype(DTYPES[dtype])
    off, on = np.flatnonzero(~mask), np.flatnonzero(mask)
    values[off[::7]], values[off[1::7]] = 0.0, -0.0
    if threshold:
        values[on[::5]] = threshold
    return values


def poisoned(shape: tuple[int, ...] | int, dtype: str) -> np.ndarray:
    """An output full of NaN, so that an element nobody wrote shows."""
    return np.full(shape, np.nan, np.float32).astype(DTYPES[dtype])
