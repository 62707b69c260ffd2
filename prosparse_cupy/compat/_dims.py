"""The check that dims given as numbers are those of the arrays."""

from __future__ import annotations

from typing import Any


def check_dims(operator: str, array: str, weights: Any, expected: dict[str, int]) -> None:
    """ValueError if `weights` is not shaped as the numbers passed with it say."""
    shape = tuple(getattr(weights, "shape", ()))
    if shape != tuple(expected.values()):
        raise ValueError(
            f"{operator}: {array} must have shape ({', '.join(expected)}) = {tuple(expected.values())} by the dims passed "
            f"with it, got {shape}: pass the arrays' own dims"
        )
