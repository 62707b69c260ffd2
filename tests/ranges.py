"""What an operator may return for any numbers at all: intervals around the float64 result.

Where the numbers are ordinary, an interval is the bound of `checks.assert_rounded_sum`, and a result must lie between its ends
as the dtype rounds them. Where they are not, it says which results are right: NaN must come out, may, or must not; sums that
can overflow float32 on the way may be anything; subnormal numbers may count as zero (docs/numerics.md). Of integers that
float32 holds, sums are exact, and so is the interval.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from checks import active, exact_activation

_U = 2.0**-24
_LARGEST = float(np.finfo(np.float32).max)
_NORMAL = 2.0**-126
"""Smaller float32 numbers are subnormal."""


class Range(NamedTuple):
    """Of each result, before it is rounded to its dtype."""

    low: np.ndarray
    high: np.ndarray
    may_be_nan: np.ndarray
    must_be_nan: np.ndarray

    @classmethod
    def of(cls, low: np.ndarray, high: np.ndarray, may_be_nan: np.ndarray | bool = False) -> Range:
        """Where an end is NaN, the result must be."""
        must = np.isnan(low) | np.isnan(high)
        return cls(low, high, np.broadcast_to(may_be_nan, must.shape) | must, must)

    def where(self, condition: np.ndarray, other: Range) -> Range:
        return Range(*(np.where(condition, mine, others) for mine, others in zip(self, other, strict=True)))

    def widened(self, relative: float, absolute: float | np.ndarray) -> Range:
        """Further by this; infinite ends stay."""
        low, high = (
            np.where(np.isfinite(end), end + sign * (relative * np.abs(end) + absolute), end)
            for sign, end in ((-1, self.low), (1, self.high))
        )
        return Range(low, high, self.may_be_nan, self.must_be_nan)

    def plus(self, bias: np.ndarray) -> Range:
        """With a bias, and one more rounding."""
        beyond = np.abs(np.stack([self.low, self.high])).max(axis=0) >= _LARGEST  # it may be infinite before the bias
        must = self.must_be_nan | np.isnan(bias) | (np.isinf(self.low) & (self.low == self.high) & (bias == -self.low))
        may = self.may_be_nan | must | (beyond & np.isinf(bias))
        low = np.where(beyond & (self.low <= -_LARGEST), -np.inf, self.low + bias)
        high = np.where(beyond & (self.high >= _LARGEST), np.inf, self.high + bias)
        size = np.abs(np.stack([self.low, self.high])).max(axis=0) + np.abs(bias)
        return Range(low, high, may, must).widened(0, np.where(np.isfinite(size), 2 * _U * size + 2 * _NORMAL, 0))

    def misfit(self, out: np.ndarray) -> str:
        """The first element that is not in its interval, or nothing."""
        wide = out.astype(np.float64)
        low, high = _rounded(self.low, out.dtype).min(axis=0), _rounded(self.high, out.dtype).max(axis=0)
        inside = np.where(np.isnan(wide), self.may_be_nan, ~self.must_be_nan & (low <= wide) & (wide <= high))
        wrong = np.flatnonzero(~inside)
        if not len(wrong):
            return ""
        i = wrong[0]
        nan = "must be NaN" if self.must_be_nan[i] else "or NaN" if self.may_be_nan[i] else "and not NaN"
        least, most = float(low[i]), float(high[i])
        return f"element {i} of {len(out)} is {float(wide[i])}, not from {least} to {most}, {nan}; {len(wrong)} are wrong"


def _anything(shape: tuple[int, ...]) -> Range:
    return Range(np.full(shape, -np.inf), np.full(shape, np.inf), np.ones(shape, bool), np.zeros(shape, bool))


def _rounded(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """From float64, as the reference rounds, and by way of float32, as kernels do."""
    return np.stack([values.astype(dtype), values.astype(np.float32).astype(dtype)]).astype(np.float64)


def _products(matrix: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """``matrix @ vector``, term by term if some are not finite: libraries may leave out zeros, which make NaN of infinity."""
    if np.isfinite(matrix).all() and np.isfinite(vector).all():
        return matrix @ vector
    return (matrix * vector).sum(axis=1)


def _finite_products(sizes: np.ndarray, small: np.ndarray) -> np.ndarray:
    """The sums of ``sizes * small``, both at least zero, of the terms whose small part is not zero."""
    return np.where(small > 0, sizes * small, 0.0).sum(axis=1)


def _only_subnormals(values: np.ndarray) -> np.ndarray:
    return np.where(np.abs(values) < _NORMAL, np.abs(values), 0.0)


def _are_integers(*arrays: np.ndarray) -> bool:
    return all(np.array_equal(a, np.rint(a)) for a in arrays)


def sums(matrix: np.ndarray, vector: np.ndarray, bias: np.ndarray | None = None) -> Range:
    """``matrix @ vector + bias`` in float32, in any order."""
    w, v = matrix.astype(np.float64), vector.astype(np.float64)
    exact, magnitude, terms = _products(w, v), _products(np.abs(w), np.abs(v)), w.shape[1]
    if bias is not None:
        b = bias.astype(np.float64)
        exact, magnitude, terms = exact + b, magnitude + np.abs(b), terms + 1
    if _are_integers(w, v, *(() if bias is None else (b,))) and np.all(magnitude < 2**24):
        return Range.of(exact, exact)
    flushed = np.full(exact.shape, 2.0 * (terms + 1) * _NORMAL)  # of sums and products, and of a bias
    small_v, small_w = _only_subnormals(v), _only_subnormals(w)
    if small_v.any():
        flushed += _finite_products(np.abs(w), small_v)
    if small_w.any():
        flushed += _finite_products(np.abs(v)[None], small_w)
    bound = (terms + 2) * _U * magnitude + flushed
    found = Range.of(exact - bound, exact + bound)
    infinite = np.isinf(exact)
    if infinite.any() or not np.isfinite(bound).all():
        # An infinity stays one unless what is finite overflows to the other, or it meets a subnormal that counts as zero.
        finite = _products(np.where(np.isfinite(w), np.abs(w), 0), np.where(np.isfinite(v), np.abs(v), 0))
        spoilt = ~np.isfinite(flushed) | (finite + (0 if bias is None else np.nan_to_num(np.abs(b), posinf=0)) >= _LARGEST)
        found = Range.of(exact, exact, spoilt).where(infinite, found)
    overflows = np.isfinite(magnitude) & (magnitude + bound >= _LARGEST * (1 - 2.0**-20))
    return _anything(exact.shape).where(overflows, found)


def ffn_1(x: np.ndarray, w_gate: np.ndarray, bias: np.ndarray | None = None) -> Range:
    """The gate of a token."""
    return sums(w_gate, x, bias)


def ffn_12(g: np.ndarray, threshold: float, activation: str) -> Range:
    """x1 of the rounded pre-activation `g`: to the bit, but that squares which are subnormal may be zero."""
    s = exact_activation(g, threshold, activation)
    if activation != "relu2":
        return Range.of(s, s)
    return Range.of(np.where(s < _NORMAL, 0.0, s), s)


def ffn_23(
    gate: np.ndarray,
    x: np.ndarray,
    w_up: np.ndarray,
    threshold: float,
    activation: str,
    bias: np.ndarray | None = None,
) -> Range:
    """x1 of a token, of the neurons that are active; +0 of the others."""
    on = active(gate, threshold)
    s = exact_activation(gate, threshold, activation)[on]  # above zero, or NaN
    up = sums(w_up[on], x, None if bias is None else bias[on])
    rectified = activation == "drelu"
    low, high = (np.maximum(end, 0.0) if rectified else end for end in up[:2])  # NaN stays
    is_small = (s < _NORMAL) | (gate[on].astype(np.float64) < _NORMAL)  # and may count as zero
    ends = np.stack([a * b for a in (np.where(is_small, 0.0, s), s) for b in (low, high)])
    least, most = np.fmin.reduce(ends), np.fmax.reduce(ends)  # NaN only if all are
    if rectified:
        least, most = (np.where(low == 0, extreme(0.0, end), end) for extreme, end in ((np.fmin, least), (np.fmax, most)))
    is_exact = np.array_equal(up.low, up.high) and _are_integers(s, up.low) and np.all(np.abs(s * up.low) < 2**24)
    of_zero = (np.isinf(s) & (low <= 0) & (high >= 0)) | (is_small & (np.isinf(low) | np.isinf(high)))
    found = Range.of(least, most, up.may_be_nan | of_zero | np.isnan(s)).widened(*((0, 0) if is_exact else (2 * _U, _NORMAL)))
    if rectified:
        nothing, surely_off = np.zeros(len(s)), (up.high <= 0) & ~up.may_be_nan
        found = Range.of(nothing, nothing).where(surely_off, found)
    whole = Range.of(np.zeros(len(gate)), np.zeros(len(gate)))
    for every, some in zip(whole, found, strict=True):
        every[on] = some
    return whole


def ffn_4(
    x1: np.ndarray,
    w_down_t: np.ndarray,
    bias: np.ndarray | None = None,
    norm_weight: np.ndarray | None = None,
    norm_eps: float = 0.0,
) -> Range:
    """y of a token, of the inputs that are not zero."""
    on = np.flatnonzero(x1.astype(np.float64))
    w = w_down_t[on].T
    if norm_weight is None or not len(on):
        return sums(w, x1[on], bias)
    values, columns = x1[on].astype(np.float64), w.shape[0]
    if not np.isfinite(values).all():  # nor is the mean, and infinity times 1 / infinity is NaN
        return Range.of(*[np.full(columns, np.nan)] * 2)
    weighted = values * norm_weight[on].astype(np.float64)
    mean = float(np.square(values).sum()) / len(x1)
    relative = (len(x1) + 8) * _U
    least = mean * (1 - relative) - 2 * _NORMAL + norm_eps * (1 - 4 * _U)  # squares may count as zero
    most = mean * (1 + relative) + norm_eps * (1 + 4 * _U)
    if most * len(x1) >= _LARGEST * (1 - 2.0**-10) or np.any(np.abs(weighted[np.isfinite(weighted)]) >= _LARGEST * (1 - _U)):
        return _anything((columns,))  # the sum of the squares overflows, or a product with a weight
    # The product with the weight is rounded. If it is small or made of what is, it may count as zero: NaN, times infinity.
    of_small = (_only_subnormals(values) > 0) | (_only_subnormals(norm_weight[on].astype(np.float64)) > 0)
    is_zero = of_small | (np.abs(weighted) < 2 * _NORMAL)
    lost = np.where(is_zero, np.abs(weighted), 2 * _U * np.abs(weighted)) + _NORMAL
    slack = _finite_products(np.abs(w.astype(np.float64)), np.where(np.isfinite(lost), lost, 0))
    total = sums(w, weighted).widened(0, slack)
    spoilt = np.any(of_small & np.isinf(weighted)) | np.any(np.isinf(w) & is_zero, axis=1)
    total = total._replace(may_be_nan=total.may_be_nan | spoilt)
    scales = 1 / np.sqrt(most) * (1 - 8 * _U), np.inf if least <= 0 else 1 / np.sqrt(least) * (1 + 8 * _U)
    low = np.where(total.low < 0, total.low * scales[1], total.low * scales[0])
    high = np.where(total.high > 0, total.high * scales[1], total.high * scales[0])
    found = Range(low, high, *total[2:]).widened(4 * _U, 2 * _NORMAL)
    return found if bias is None else found.plus(bias.astype(np.float64))
