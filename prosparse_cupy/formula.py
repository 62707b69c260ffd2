"""The formula of a block: what it computes between its projections, and what a model's config says of it.

The one place in Python that knows an activation; ``kernels/activation.cuh`` is the one in the kernels. NumPy only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt

_LARGEST_THRESHOLD = float(np.finfo(np.float32).max)
RELU, FATRELU = "relu", "fatrelu"
"""`hidden_act` of configs whose block is sparse."""


class UnsupportedFormula(ValueError):
    """A config names something else than ReLU or FATReLU, or not all of it; the message says what."""


@dataclass(frozen=True)
class Formula:
    """A gated block, ``x1 = s * up`` with ``s = gate if active else 0``: formulas 2 and 3.

    A neuron is active iff ``not (gate < threshold) and gate != 0``, compared as float32. `threshold` 0 is ReLU, above it is
    FATReLU's T (arXiv 2402.13516, activation threshold shifting).
    """

    threshold: float = 0.0

    def active(self, gate: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Which neurons are active. NaN is."""
        wide = gate.astype(np.float32)
        found: npt.NDArray[np.bool_] = np.logical_and(~(wide < np.float32(self.threshold)), wide != 0)
        return found

    def activate(self, gate: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Formula 2: `gate` where it is active, +0 elsewhere."""
        return np.where(self.active(gate), gate, np.zeros_like(gate))

    def combine(self, gate: npt.NDArray[Any], up: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Formulas 2 and 3 before x1 is rounded, in the dtype of `up`: the product of active neurons, +0 of others."""
        return np.where(self.active(gate), gate.astype(up.dtype) * up, np.zeros_like(up))

    def __str__(self) -> str:
        return f"fatrelu({self.threshold:g})" if self.threshold else RELU


def largest_inactive(threshold: float, dtype: npt.DTypeLike) -> float:
    """The largest number of `dtype` below T as float32: for code that keeps what is greater, not what is equal."""
    if threshold == 0.0:
        return 0.0
    kind = np.dtype(dtype)
    wanted = np.float32(threshold)
    kept: Any = wanted.astype(kind)
    if kept < wanted:
        kept = np.nextafter(kept, np.array(np.inf, kind))
    return float(np.nextafter(kept, np.zeros((), kind)))


def check_threshold(operator: str, threshold: float) -> float:
    """FATReLU's T as a float that is finite as float32 and not negative (-0 becomes +0)."""
    if not isinstance(threshold, (float, int, Real)):
        fix = f"{threshold!r}: pass a float"
        if hasattr(threshold, "shape"):
            fix = f"{type(threshold).__name__}: call float() yourself, which waits for the GPU if it is an array there"
        raise TypeError(f"{operator}: threshold must be a Python number, got {fix}")
    try:
        value = float(threshold) + 0.0
    except OverflowError:  # an int beyond all floats
        value = math.inf
    if not 0.0 <= value <= _LARGEST_THRESHOLD:
        raise ValueError(f"{operator}: threshold must be finite as float32 and >= 0, got {value}")
    return value


def said_by(config: object) -> tuple[Any, Any]:
    """What a model's config, an object or a mapping, says of its activation: its name and its parameter; None if nothing."""
    keys = ("hidden_act", "hidden_act_param")
    if isinstance(config, Mapping):
        return config.get(keys[0]), config.get(keys[1])
    return getattr(config, keys[0], None), getattr(config, keys[1], None)


def formula_of(activation: object, parameter: object) -> Formula:
    """The formula that a name and a parameter as `said_by` finds them stand for, or `UnsupportedFormula`."""
    if activation not in (RELU, FATRELU):
        raise UnsupportedFormula("gated FFNs with relu or fatrelu are what this version runs sparsely")
    if activation == RELU:
        return Formula()
    if parameter is None:
        raise UnsupportedFormula("it has no hidden_act_param, FATReLU's threshold")
    if not isinstance(parameter, (int, float)) or isinstance(parameter, bool) or not 0 <= parameter <= _LARGEST_THRESHOLD:
        got = f"{parameter!r:.40}"
        raise UnsupportedFormula(f"hidden_act_param, FATReLU's threshold, must be >= 0 and finite as float32, got {got}")
    return Formula(float(parameter))
