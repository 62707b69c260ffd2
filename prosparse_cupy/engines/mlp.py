"""The MLPs of an engine's model, whose projections are its own layers: which of them decode sparsely, and how.

Every engine has classes for its projections that shard the weights over GPUs, and often one matrix for gate and up. Whether a
layer is what it looks like is tried as `patch_model` tries it: on a view of the layer with its own code and activation, whose
projections are `torch.nn.Linear` of the same weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..crossover import most_tokens
from ..families import FAMILIES, MLPFamily
from ..formula import Formula, UnsupportedFormula, formula_of
from ..torch.acceptance import forget_tensors, why_another_formula, why_outside_the_contract
from ..torch.families import mixtures
from ..torch.mlp import pack, unpack
from ..torch.patch import LayerPatch, PatchReport, other_parameters, own_formula, why_dense
from .ffn import plain


@dataclass(frozen=True)
class Engine:
    """What is to be known of an engine's layers."""

    linear: type[nn.Module]
    """The base class of its projections."""
    kernels: type[nn.Module]
    """The base class of modules whose kernels may not know float64."""
    why_dense: Callable[[Any, bool], str]
    """Why the weight of a projection, which is the down-projection or not, cannot be read as it is, or nothing."""
    all_reduce: Callable[[Tensor], Tensor]
    """The sum of a tensor over the GPUs that share a layer."""
    keep: Callable[[Any], None] = lambda layer: None
    """Have the engine leave the weight of a projection as it is from now on."""


class Plan(NamedTuple):
    """How an MLP runs now: what its `forward` reads."""

    first: tuple[str, ...]
    """The projections that read x."""
    down: str
    layers: tuple[nn.Module, ...]
    """All of them, as they were tried."""
    threshold: float
    activation: str
    gated: bool
    all_reduce: Callable[[Tensor], Tensor] | None
    dense: Callable[..., Any]
    """The `forward` of before."""


def names_zeros(config: Any) -> bool:
    """Whether a model's config names an activation that leaves zeros, by any family's key."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for family in FAMILIES:
        _, activation, parameter = family.said(text)
        try:
            formula_of(activation, parameter)
        except UnsupportedFormula:
            continue
        return True
    return False


@torch.no_grad()
def sparsify(model: nn.Module, config: Any, engine: Engine) -> PatchReport:
    """Have the FFNs of a loaded model decode sparsely where they compute a formula that leaves zeros.

    Up to 8 tokens at once then go through the sparse operators, more through torch's matrix products, both inside
    `torch.ops.prosparse.ffn`. The weight of the down-projection is laid out anew, once; parameters keep their names, shapes and
    values, so weights can be loaded again in place.

    Parameters
    ----------
    model : torch.nn.Module
        Loaded; its weights as the checkpoint has them.
    config : object
        The model's, as transformers has it.
    engine : Engine
        What its layers are.

    Returns
    -------
    PatchReport
        Per MLP what was done, and why others are left dense.
    """
    mixed = tuple(f"{name}." for name in mixtures(model))
    layers, warm = list[LayerPatch](), set[Any]()
    try:
        for name, mlp, family in mlps(model, engine):
            if name.startswith(mixed):
                layers.append(LayerPatch(name, False, 0.0, "inside a mixture of experts"))
                continue
            found = _sparsified(model, name, mlp, family, config, engine)
            if isinstance(found, str):
                layers.append(LayerPatch(name, False, 0.0, found))
                continue
            layers.append(LayerPatch(name, True, found[0].threshold, "", *found))
            _warm_up(mlp, warm)
    finally:
        forget_tensors()
    return PatchReport(tuple(layers))


def mlps(model: nn.Module, engine: Engine) -> Iterator[tuple[str, Any, MLPFamily]]:
    """Name, module and family of every MLP whose projections are the engine's."""
    for name, module in list(model.named_modules()):
        family = next((v for family in FAMILIES for v in _variants(family) if _is_of(module, v, engine)), None)
        if family is not None:
            yield name, module, family


def _variants(family: MLPFamily) -> Iterator[MLPFamily]:
    """A family as engines have it: gate and up in one matrix, or not."""
    if family.is_inside:
        return
    yield replace(family, linears=_STAND_INS)
    if family.gate is not None:
        merged = f"merged_proj_{len(family.gate)}_{family.gate}_{len(family.up)}_{family.up}"
        for fused in ("gate_up_proj", merged):
            yield replace(family, gate=None, fused=fused, linears=_STAND_INS)


def _is_of(module: nn.Module, family: MLPFamily, engine: Engine) -> bool:
    if family.classes and not any(kind.__name__ in family.classes for kind in type(module).__mro__):
        return False
    others = (family.activation,) if family.norm is None else (family.activation, family.norm)
    if not all(isinstance(module._modules.get(part), nn.Module) for part in others):
        return False
    return all(isinstance(module._modules.get(part), engine.linear) for part in family.projections)


def _sparsified(
    model: nn.Module, name: str, mlp: Any, family: MLPFamily, config: Any, engine: Engine
) -> tuple[Formula, str] | str:
    """Have an MLP decode sparsely: its formula and a note on its config. Or why it stays as it is."""
    for part in family.projections:
        if reason := engine.why_dense(getattr(mlp, part), part == family.down):
            return f"{part}: {reason}"
    if len({getattr(mlp, part).bias is None for part in family.projections[:-1]}) > 1:
        return "only one of gate and up has a bias"
    if family.norm is not None:
        return "a norm before its down-projection is not known here"
    if mlp._forward_hooks or mlp._forward_pre_hooks:
        return "it has hooks"
    if more := other_parameters(mlp, family):
        return f"it has parameters of its own: {', '.join(more)}"
    own = mlp.__dict__.get("forward")
    if own is not None and getattr(own, "__self__", None) is not mlp:
        return "it has a forward of its own"
    view = _view(mlp, family, config, engine)
    try:
        if reason := why_dense(view, family):
            return reason
        formula, note = own_formula(model, name, view, family, None)
        if reason := why_another_formula(view, family, formula):
            return reason
    except ValueError as error:  # the config's activation leaves no zeros, or lacks its threshold
        return str(error).removeprefix(f"patch_model: {name}: ").removesuffix("; nothing was changed")
    plan = _plan(mlp, family, formula, engine)
    pack(plan.layers[-1])
    try:
        view = _view(mlp, family, config, engine)
        reason = next(
            (
                why
                for way in (_few, _many)
                if (why := why_outside_the_contract(view, family, formula, way(mlp, plan), formula, None))
            ),
            "",
        )
    except (ImportError, RuntimeError, TypeError, ValueError) as error:  # no CuPy, no memory, a kernel that does not compile
        reason = f"its kernels do not run ({' '.join([type(error).__name__, *str(error).splitlines()[:1]])})"
    if reason:
        unpack(plan.layers[-1])
        return reason
    for layer in plan.layers:
        engine.keep(layer)
    mlp._prosparse = plan
    mlp.forward = MethodType(_forward, mlp)
    return formula, note


def _few(mlp: Any, plan: Plan) -> Callable[[Tensor], Tensor]:
    """What the operator makes of few tokens."""
    return lambda x: partial_sum(mlp, plan, x)


def _many(mlp: Any, plan: Plan) -> Callable[[Tensor], Tensor]:
    """What it makes of them among others, too many for the sparse kernels."""
    return lambda x: partial_sum(mlp, plan, x.repeat(most_tokens("sparse_ffn") + 1, 1))[: len(x)]


def _plan(mlp: Any, family: MLPFamily, formula: Formula, engine: Engine) -> Plan:
    *first, down = family.projections
    layers = tuple(getattr(mlp, part) for part in family.projections)
    reduces = getattr(layers[-1], "reduce_results", False) and getattr(layers[-1], "tp_size", 1) > 1
    all_reduce = engine.all_reduce if reduces else None
    return Plan(tuple(first), down, layers, formula.threshold, formula.activation, formula.gated, all_reduce, mlp.forward)


def _forward(self: Any, *arguments: Any, **keywords: Any) -> Any:
    """The FFN of its one argument, tokens (..., d_model): in the place of an MLP's `forward`."""
    plan: Plan = self._prosparse
    given = (*arguments, *keywords.values())
    now = [getattr(self, name) for name in (*plan.first, plan.down)]
    if len(given) != 1 or any(a is not b for a, b in zip(now, plan.layers, strict=True)):  # or an adapter took a layer's place
        return plan.dense(*arguments, **keywords)
    y = partial_sum(self, plan, given[0])
    return y if plan.all_reduce is None else plan.all_reduce(y)


def partial_sum(mlp: Any, plan: Plan, x: Tensor) -> Tensor:
    """The FFN of tokens `x` on this GPU's neurons, whose sum over the GPUs is the FFN.

    It has the dtype of the model, as the engine's own row-parallel layers have it before they sum.
    """
    first = [getattr(mlp, name) for name in plan.first]
    biases = [layer.bias for layer in first if layer.bias is not None]
    down = getattr(mlp, plan.down)
    y: Tensor = torch.ops.prosparse.ffn(
        x,
        [layer.weight for layer in first],
        down.weight,
        plan.threshold,
        activation=plan.activation,
        gated=plan.gated,
        b_in=biases or None,
        b_down=_down_bias(down),
    )
    return y


def _down_bias(down: Any) -> Tensor | None:
    """The bias that this GPU adds: one of those that share a layer does."""
    bias: Tensor | None = down.bias
    return None if getattr(down, "tp_rank", 0) else bias


def _warm_up(mlp: Any, done: set[Any]) -> None:
    """Compile the kernels of every number of tokens, since nothing may be compiled while a CUDA graph is captured."""
    plan: Plan = mlp._prosparse
    weight = plain(plan.layers[0].weight)  # type: ignore[arg-type]
    down = plain(plan.layers[-1].weight)  # type: ignore[arg-type]
    has_biases = tuple(layer.bias is not None for layer in plan.layers)
    key = weight.shape, down.shape, weight.dtype, has_biases, plan.threshold, plan.activation, plan.gated
    if not weight.is_cuda or key in done:
        return
    done.add(key)
    for tokens in range(1, most_tokens("sparse_ffn") + 1):
        partial_sum(mlp, plan, weight.new_zeros(tokens, weight.shape[1]))


class _Projection(nn.Linear):
    """A projection of an engine as torch has it."""

    tp_size = 1

    @property
    def output_sizes(self) -> list[int]:
        return [self.out_features // 2] * 2


class _ProjectionAndBias(_Projection):
    """The same of those that also return a bias that was not added."""

    def forward(self, input: Tensor) -> Any:
        return super().forward(input), None


_STAND_INS = (_Projection.__name__, _ProjectionAndBias.__name__)


class _InFloat32(nn.Module):
    """A module whose kernels do not know float64, in float32 where float64 is asked for."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.module(x.float() if x.dtype == torch.float64 else x)
        return y.to(x.dtype)


def _view(mlp: Any, family: MLPFamily, config: Any, engine: Engine) -> Any:
    """An MLP with its own code and activation, on projections that are `nn.Linear` of the same weights."""
    view = copy.copy(mlp)
    view._modules = {
        name: _InFloat32(child) if isinstance(child, engine.kernels) and not isinstance(child, engine.linear) else child
        for name, child in mlp._modules.items()
    }
    for name in family.projections:
        view._modules[name] = _stand_in(getattr(mlp, name), name == family.down)
    own = view.__dict__.pop("forward", None)
    if own is not None:  # code that an engine has written anew belongs to the instance
        view.__class__ = type(type(mlp).__name__, (type(mlp),), {"forward": own.__func__})
    view.config = config
    return view


def _stand_in(layer: Any, is_down: bool) -> _Projection:
    kind = _ProjectionAndBias if getattr(layer, "return_bias", True) else _Projection
    weight, bias = plain(layer.weight), _down_bias(layer) if is_down else layer.bias
    linear = kind(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(plain(bias), requires_grad=False)
    return linear
