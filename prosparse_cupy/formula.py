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
RELU, FATRELU, RELU2, DRELU = "relu", "fatrelu", "relu2", "drelu"
ACTIVATIONS = (RELU, RELU2, DRELU)
"""What kernels are compiled for. FATReLU is ReLU with a threshold above zero."""


class UnsupportedFormula(ValueError):
    """A config names an activation that leaves no zeros, or not all of it; the message says what."""


@dataclass(frozen=True)
class Formula:
    """What an FFN computes between its projections: formulas 2 and 3, and a norm before formula 4.

    With a gate ``x1 = act(gate) * up``, without one ``x1 = act(up)``. A neuron is active iff ``not (g < threshold) and
    g != 0``, compared as float32, where g is the gate or, without one, the up-projection; x1 is +0 of any other.
    """

    threshold: float = 0.0
    """0 is the plain activation; above, FATReLU's T (arXiv 2402.13516, activation threshold shifting)."""
    activation: str = RELU
    """relu: g. relu2: g squared, in float32. drelu: g, and ``up`` is rectified too (arXiv 2406.05955)."""
    gated: bool = True
    normed: bool = False
    """Whether x1 is divided by its root mean square over all neurons and multiplied by a weight per neuron."""

    def active(self, gate: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Which neurons are active, by their gates. NaN is."""
        wide = gate.astype(np.float32)
        found: npt.NDArray[np.bool_] = np.logical_and(~(wide < np.float32(self.threshold)), wide != 0)
        return found

    def activate(self, gate: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Formula 2 in the dtype of `gate`: the activation of active neurons, +0 of others."""
        with np.errstate(over="ignore", under="ignore"):
            return np.where(self.active(gate), self._activated(gate).astype(gate.dtype), np.zeros_like(gate))

    def combine(self, gate: npt.NDArray[Any], up: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Formulas 2 and 3 before x1 is rounded, in the dtype of `up`: the product of active neurons, +0 of others."""
        active = self.active(gate)
        if self.activation == DRELU:
            active &= ~(up <= 0)
        return np.where(active, self._activated(gate).astype(up.dtype) * up, np.zeros_like(up))

    def _activated(self, gate: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """s of active neurons."""
        if self.activation != RELU2:
            return gate
        with np.errstate(over="ignore", under="ignore"):
            squared: npt.NDArray[Any] = np.square(gate.astype(np.float32))
        return squared if gate.dtype != np.float64 else np.square(gate)

    def __str__(self) -> str:
        kind = f"fat{self.activation}({self.threshold:g})" if self.threshold else self.activation
        return ", ".join([kind, *["no gate"] * (not self.gated), *["norm"] * self.normed])


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
    if type(threshold) is not float and (isinstance(threshold, bool) or not isinstance(threshold, (float, int, Real))):
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


def check_activation(operator: str, activation: str, *, gated: bool = True) -> str:
    """An activation that kernels know, or ValueError."""
    if activation == RELU:  # the rule, at every call
        return activation
    known = ACTIVATIONS if gated else (RELU, RELU2)
    if activation not in known:
        fix = ""
        if activation == FATRELU:
            fix = ": FATReLU is activation='relu' with a threshold"
        elif activation == DRELU:
            fix = ": dReLU needs a gate"
        raise ValueError(f"{operator}: activation must be {' or '.join(map(repr, known))}, got {activation!r:.40}{fix}")
    return activation


def check_norm_eps(operator: str, norm_eps: float, has_norm: bool) -> float:
    """What a norm adds to a mean of squares: finite as float32 and not negative, and 0 without a norm."""
    if type(norm_eps) is float and norm_eps == 0.0:  # the rule, at every call
        return 0.0
    if isinstance(norm_eps, bool) or not isinstance(norm_eps, (float, int, Real)):
        raise TypeError(f"{operator}: norm_eps must be a Python number, got {type(norm_eps).__name__}: pass a float")
    try:
        value = float(norm_eps)
    except OverflowError:  # an int beyond all floats
        value = math.inf
    if not 0.0 <= value <= _LARGEST_THRESHOLD:
        raise ValueError(f"{operator}: norm_eps must be finite as float32 and >= 0, got {value}")
    if value and not has_norm:
        raise ValueError(f"{operator}: norm_eps={value:g} without a norm: pass norm_weight too, or leave norm_eps out")
    return value


def said_by(config: object, key: str = "hidden_act") -> tuple[Any, Any]:
    """What a model's config, an object or a mapping, says of its activation: its name and its parameter; None if nothing."""
    keys = (key, f"{key}_param")
    if isinstance(config, Mapping):
        return config.get(keys[0]), config.get(keys[1])
    return getattr(config, keys[0], None), getattr(config, keys[1], None)


def formula_of(activation: object, parameter: object, *, gated: bool = True, normed: bool = False) -> Formula:
    """The formula that a name and a parameter as `said_by` finds them stand for, or `UnsupportedFormula`."""
    activation = RELU2 if activation == "sqrelu" else activation
    if activation not in (RELU, FATRELU, RELU2):
        why = "it is none that is known" if activation != DRELU and "relu" in str(activation) else "it leaves no zeros"
        raise UnsupportedFormula(f"{why}: relu, fatrelu, relu2 and dReLU are what this version runs sparsely")
    if activation != FATRELU:
        return Formula(0.0, str(activation), gated, normed)
    if parameter is None:
        raise UnsupportedFormula("it has no hidden_act_param, FATReLU's threshold")
    if not isinstance(parameter, (int, float)) or isinstance(parameter, bool) or not 0 <= parameter <= _LARGEST_THRESHOLD:
        got = f"{parameter!r:.40}"
        raise UnsupportedFormula(f"hidden_act_param, FATReLU's threshold, must be >= 0 and finite as float32, got {got}")
    return Formula(float(parameter), RELU, gated, normed)
