"""Which modules of a model are MLPs, and of which family."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..families import FAMILIES, MLPFamily
from .mlp import SparseMLP


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
    """Names of mixture-of-experts blocks: modules that hold `experts`, or one whose class is called so."""
    found = "\0"
    for name, module in model.named_modules():
        if name.startswith(f"{found}."):  # a part of the block
            continue
        if isinstance(getattr(module, "experts", None), nn.Module) or any(
            type(child).__name__.endswith("Experts") for child in module.children()
        ):
            found = name
            yield name


def check_module(function: str, model: nn.Module) -> None:
    """TypeError for what is no module, such as the name of one."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{function}: model must be a torch.nn.Module, got {type(model).__name__}: load it first, for example with "
            "transformers.AutoModelForCausalLM.from_pretrained"
        )


def check_tokens(function: str, argument: str, tokens: object, model: nn.Module) -> None:
    """TypeError or ValueError for what no model takes: token numbers, (texts, tokens), are for one that embeds them."""
    if not isinstance(tokens, Tensor):
        fix = "call a tokenizer on it, with return_tensors='pt'" if isinstance(tokens, str) else "torch.tensor() makes one"
        raise TypeError(f"{function}: {argument} must be a torch.Tensor of token numbers, got {type(tokens).__name__}: {fix}")
    if not tokens.numel():
        raise ValueError(f"{function}: {argument} must have tokens, got the shape {tuple(tokens.shape)}")
    if not hasattr(model, "get_input_embeddings"):  # a part of one, which takes hidden states
        return
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise TypeError(f"{function}: {argument} must be token numbers, of an integer dtype, got {tokens.dtype}")
    if tokens.dim() != 2:
        fix = f": {argument}[None] has it" if tokens.dim() == 1 else ""
        raise ValueError(f"{function}: {argument} must have the shape (texts, tokens), got {tuple(tokens.shape)}{fix}")


def mlps(model: nn.Module) -> Iterator[tuple[str, Any, MLPFamily]]:
    """Name, module and family of every MLP, patched or not, but for the experts of mixtures."""
    experts = tuple(f"{name}.experts." if name else "experts." for name in mixtures(model))
    for name, module in model.named_modules():
        if f"{name}.".startswith(experts):
            continue
        family = module.family if isinstance(module, SparseMLP) else family_of_module(module)
        if family is not None:
            yield name, module, family
