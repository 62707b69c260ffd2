"""Which modules of a model are MLPs, and of which family."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..families import FAMILIES, MLPFamily


def family_of_module(module: nn.Module) -> MLPFamily | None:
    """The family that a module is an MLP of, if any."""
    return next((family for family in FAMILIES if _is_of(module, family)), None)


def _is_of(module: nn.Module, family: MLPFamily) -> bool:
    """By its class's name and its parts."""
    if family.classes and not any(kind.__name__ in family.classes for kind in type(module).__mro__):
        return False
    needed = list(family.projections)
    if family.norm is not None:
        needed.append(family.norm)
    if family.gate is None and not family.is_inside and not family.classes:
        needed.append(family.activation)
    return all(isinstance(getattr(module, part, None), nn.Module) for part in needed)


def mixtures(model: nn.Module) -> Iterator[str]:
    """Names of mixture-of-experts blocks: modules that hold `experts`."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "experts", None), nn.Module):
            yield name
