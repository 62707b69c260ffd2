"""What the numbers promise, as a rule: how far an output may be from float64. Pure."""

from __future__ import annotations


def within_contract(error: float, dense_error: float, epsilon: float, size: float = 1.0) -> bool:
    """Whether an output is right: at most twice the dense path's error in the same dtype, plus one ulp.

    `error` and `dense_error` are Euclidean distances from the float64 result, `size` its norm (1 if they are relative),
    `epsilon` the dtype's. NaN is not right.
    """
    return error <= 2 * dense_error + epsilon * size
