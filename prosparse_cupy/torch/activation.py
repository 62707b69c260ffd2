"""Activations that leave zeros, for torch, and FATReLU's name in Hugging Face transformers."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn

from ..families import FAMILIES
from ..formula import RELU, RELU2, Formula, check_threshold, largest_inactive, said_by

_DTYPES = {
    torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
    torch.float16: np.dtype(np.float16),
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
}


class FATReLU(nn.Module):
    """``x if x >= threshold else 0``: ReLU with its threshold moved up (arXiv 2402.13516, activation threshold shifting).

    One elementwise kernel. It keeps ``x == threshold`` and NaN, as the operators do, and compares with the threshold as
    float32.

    Parameters
    ----------
    threshold : float, optional
        T, finite and >= 0; 0 is ReLU. None: to be set before the first call, as `register_fatrelu` does.
    """

    def __init__(self, threshold: float | None = None) -> None:
        super().__init__()
        self._below: dict[torch.dtype, float] = {}
        self._threshold: float | None = None
        if threshold is not None:
            self.threshold = threshold

    @property
    def threshold(self) -> float | None:
        """T, or None where it was never set."""
        return self._threshold

    @threshold.setter
    def threshold(self, threshold: float) -> None:
        self._threshold = check_threshold("FATReLU", threshold)
        self._below = {dtype: largest_inactive(self._threshold, numpy_dtype) for dtype, numpy_dtype in _DTYPES.items()}

    def forward(self, x: Tensor) -> Tensor:
        if self._threshold is None:
            raise RuntimeError("FATReLU has no threshold: set it from the config's hidden_act_param (activation.threshold = T)")
        return nn.functional.threshold(x, self._below[x.dtype], 0.0)

    def extra_repr(self) -> str:
        return f"threshold={self._threshold}"


class SquaredReLU(FATReLU):
    """``x**2 if x >= threshold else 0``: what Nemotron, Arcee, Persimmon, nanochat and BitNet call ``relu2``, with a threshold.

    Parameters
    ----------
    threshold : float, default 0.0
        T, finite and >= 0.
    """

    def __init__(self, threshold: float = 0.0) -> None:
        super().__init__(threshold)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square()


_MODULES: dict[type[nn.Module], str] = {FATReLU: RELU, SquaredReLU: RELU2}


def module_of(formula: Formula) -> FATReLU:
    """The activation of a formula as a module."""
    return (SquaredReLU if formula.activation == RELU2 else FATReLU)(formula.threshold)


def activation_of(module: nn.Module | None) -> tuple[str, float] | None:
    """Name and threshold of a module that `module_of` makes, if it is one."""
    kind: Any = type(module)
    name = _MODULES.get(kind)
    if name is None:
        return None
    known: Any = module
    threshold = known._threshold  # not by the property, which costs half a microsecond a token
    return None if threshold is None else (name, threshold)


def combined(activation: nn.Module, gates: Tensor, ups: Tensor, rectifies_up: bool) -> Tensor:
    """Formulas 2 and 3 of gates and up-projections; dReLU rectifies both."""
    product: Tensor = activation(gates) * (torch.relu(ups) if rectifies_up else ups)
    return product


_registered = False


def register_fatrelu() -> None:
    """Make stock Hugging Face models load a config whose `hidden_act` is ``fatrelu``.

    Adds ``fatrelu`` to transformers' `ACT2FN`; each `FATReLU` then takes its threshold from the config of the first module
    that it becomes a part of and that has one: `hidden_act_param`, or what the name of the activation is with ``_param``
    (OPT: `activation_function_param`). Calling it again does nothing.

    Raises
    ------
    ImportError
        transformers is not installed.

    Examples
    --------
    >>> register_fatrelu()
    >>> model = AutoModelForCausalLM.from_pretrained(folder)
    """
    global _registered
    from transformers.activations import ACT2FN

    if not _registered:
        ACT2FN["fatrelu"] = FATReLU
        nn.modules.module.register_module_module_registration_hook(_take_threshold)
        _registered = True


def _take_threshold(module: nn.Module, name: str, submodule: Any) -> None:
    """Give FATReLUs without a threshold in what is registered the one of the module's config, which their own may not hold."""
    config = module.__dict__.get("config")  # not by getattr: a module that is being made may not answer yet
    if config is None or not isinstance(submodule, nn.Module):
        return
    keys = dict.fromkeys(key for family in FAMILIES for key in family.config_keys)
    threshold = next((told for _, told in (said_by(config, key) for key in keys) if told is not None), None)
    if threshold is not None:
        for part in submodule.modules():
            if isinstance(part, FATReLU) and part.threshold is None:
                part.threshold = threshold
