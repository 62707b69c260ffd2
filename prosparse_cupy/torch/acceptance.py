"""Whether an MLP computes the formula that it is to be replaced by: its code, then its own weights and dtype."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import cycle, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..arguments import MOST_TOKENS
from ..families import MLPFamily
from ..formula import DRELU, Formula
from ..numerics import within_contract
from .activation import FATReLU, combined, module_of
from .mlp import eps_of

_NEURONS = 256  # of the copy whose code is tried
_LONG = 17  # times as many tokens are a prompt, whose code may be another
_GATES = (1e-4, 0.01, 1.0, 100.0, 1e4, 1e6)  # sizes of its gates, so that a clamp, an offset or a leak shows at one of them
_LARGEST_DIFFERENCE = 2.0**-16  # code that goes through float32 on its way is well below, another formula well above
_SCALES = (0.1, 1.0, 10.0)  # of the inputs that the layer's own weights are tried on
_ROWS_AT_ONCE = 2048  # a block of rows in float64 is at most some tens of MB


class Tensors(NamedTuple):
    """What an MLP's formula is computed from, in `nn.Linear`'s layout."""

    up: Tensor
    down: Tensor
    gate: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_eps: float = 0.0


def tensors_of(module: Any, family: MLPFamily) -> Tensors:
    """Those of an MLP, or of the module that has taken its place."""
    down = getattr(module, family.down)
    norm = getattr(module, family.norm) if family.norm is not None else None
    more = (None, 0.0) if norm is None else (norm.weight, eps_of(norm))
    if family.fused is not None:
        gate, up = getattr(module, family.fused).weight.chunk(2)
        return Tensors(up, down.weight, gate, None, down.bias, None, *more)
    linear = getattr(module, family.up)
    if family.gate is None:
        return Tensors(linear.weight, down.weight, None, linear.bias, down.bias, None, *more)
    gate = getattr(module, family.gate)
    return Tensors(linear.weight, down.weight, gate.weight, linear.bias, down.bias, gate.bias, *more)


def run(module: Any, family: MLPFamily, x: Tensor, *, apart: bool = False) -> Tensor:
    """What an MLP makes of tokens `x`, (tokens, d_model): of one text, or `apart`, of as many texts.

    Where its parts belong to a whole layer, the layer is run, and `x` is put in the place of what its up-projection reads.
    """
    axis = 1 if apart else 0
    texts = x.unsqueeze(axis)
    if not family.is_inside:
        found: Any = module(texts)
        if not isinstance(found, Tensor) or found.shape != texts.shape:
            got = f"one of {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise _NoTensor(f"its code does not return one tensor of its input's shape, but {got}")
        return found.squeeze(axis)
    up, down = getattr(module, family.up), getattr(module, family.down)
    with _hooked(up.register_forward_pre_hook(lambda _, given: (x.view(given[0].shape),))):
        handle = down.register_forward_hook(_stop)
        with _hooked(handle):
            try:
                module(torch.zeros_like(texts, dtype=_dtype_around(module, (up, down))))
            except _Stopped as stopped:
                return stopped.output.reshape(x.shape[0], -1)
    raise _NoTensor(f"its code never calls its {family.down}")


def _dtype_around(layer: nn.Module, parts: tuple[nn.Module, ...]) -> torch.dtype:
    """Of a layer's other parameters."""
    own = {id(p) for part in parts for p in part.parameters()}
    return next((p.dtype for p in layer.parameters() if id(p) not in own), torch.float32)


class _NoTensor(Exception):
    """What code that is run as an FFN does otherwise."""


class _Stopped(Exception):
    def __init__(self, output: Tensor) -> None:
        super().__init__("the down-projection was called")
        self.output = output


def _stop(module: nn.Module, arguments: Any, output: Tensor) -> None:
    raise _Stopped(output)


@contextmanager
def _hooked(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def why_another_formula(mlp: Any, family: MLPFamily, formula: Formula) -> str:
    """What `mlp` computes other than a formula, or nothing.

    Its code is run in float64 on fewer neurons with random weights, so rounding explains nothing and no weights hide anything;
    and on as many tokens as the operators take, of one text and of several, so that code that mixes tokens shows. Where it is
    replaced as a whole also on more of one text, which the sparse module computes too: code may treat a prompt otherwise.
    """
    own = tensors_of(mlp, family)
    device, d_model = own.up.device, own.up.shape[1]
    drawn, tokens = random_tensors(device, d_model)
    kept: Any = {name: new for name, old, new in zip(Tensors._fields, own, drawn, strict=False) if old is not None}
    tensors = Tensors(**kept, norm_eps=own.norm_eps)
    small = _with_tensors(mlp, family, tensors, formula)
    if not family.is_inside:
        small.training = True  # what it does in training alone it would no longer do
    sizes = _GATES[:-1] if formula.normed else _GATES  # norms take squares in float32, which would overflow
    gates = tuple(islice(cycle(sizes + (formula.threshold,) * (formula.threshold > 0)), MOST_TOKENS))
    x = torch.stack([size * token for size, token in zip(gates, tokens, strict=True)])
    try:
        founds = [("output", run(small, family, x)), ("output of several texts", run(small, family, x, apart=True))]
        if not family.is_inside:
            prompt = run(small, family, x.repeat(_LONG, 1))
            founds += [(f"output of {len(prompt)} tokens at once", part) for part in prompt.split(len(x))]
    except _NoTensor as error:
        return str(error)
    except Exception as error:  # whatever its code raises on what the formula would take
        said = " ".join([type(error).__name__, *str(error).splitlines()[:1]])
        return f"its code does not run on {_NEURONS} neurons in float64 ({said})"
    exact = _exact(x, tensors, formula)
    for what, output in founds:
        found = output.double()
        differences = (found - exact).norm(dim=1)
        for size_of_gates, difference, size in zip(gates, differences.tolist(), found.norm(dim=1).tolist(), strict=True):
            if not difference <= _LARGEST_DIFFERENCE * size:
                return f"{_differs(what, formula, difference, size)}, with gates of size {size_of_gates:g}"
    return ""


def _differs(what: str, formula: Formula, difference: float, size: float) -> str:
    if not size:
        return f"its {what} is zero where that of {formula} is not"
    return f"its {what} differs from that of {formula} by {difference / size:.2g} of its norm"


@lru_cache(maxsize=2)
def random_tensors(device: torch.device, d_model: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Random `Tensors` of few neurons, all but the epsilon, and tokens: drawn once for all layers, see `forget_tensors`."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, device="cpu", generator=generator).to(device)

    up, gate = (random(_NEURONS, d_model) / d_model**0.5 for _ in range(2))
    down = random(d_model, _NEURONS)
    vectors = random(_NEURONS), random(d_model), random(_NEURONS), random(_NEURONS)
    return (up, down, gate, *vectors), tuple(random(d_model) for _ in range(MOST_TOKENS))


def forget_tensors() -> None:
    """Free what `random_tensors` keeps."""
    random_tensors.cache_clear()


def _with_tensors(mlp: Any, family: MLPFamily, tensors: Tensors, formula: Formula) -> Any:
    """A shallow copy of `mlp` with these weights, and the threshold where its FATReLU lacks one."""
    other = copy.copy(mlp)
    other._modules = dict(mlp._modules)
    other.__dict__.pop("forward", None)  # the class's, but bound to `mlp`, where accelerate has left one behind

    def linear(name: str, weight: Tensor, bias: Tensor | None) -> None:
        kind = type(getattr(mlp, name)) if type(getattr(mlp, name)).__name__ in family.linears else nn.Linear
        new = kind(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        new.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            new.bias = nn.Parameter(bias, requires_grad=False)
        other._modules[name] = new

    if family.fused is not None and tensors.gate is not None:
        linear(family.fused, torch.cat([tensors.gate, tensors.up]), None)
    else:
        if family.gate is not None and tensors.gate is not None:
            linear(family.gate, tensors.gate, tensors.gate_bias)
        linear(family.up, tensors.up, tensors.up_bias)
    linear(family.down, tensors.down, tensors.down_bias)
    if family.norm is not None and tensors.norm_weight is not None:
        norm = copy.copy(getattr(mlp, family.norm))
        norm.__dict__.pop("forward", None)
        norm._parameters = {**norm._parameters, "weight": nn.Parameter(tensors.norm_weight, requires_grad=False)}
        if hasattr(norm, "normalized_shape"):
            norm.normalized_shape, norm.eps = tuple(tensors.norm_weight.shape), tensors.norm_eps
        other._modules[family.norm] = norm
    if lacks_threshold(mlp, family):
        other._modules[family.activation] = FATReLU(formula.threshold)
    return other


def why_outside_the_contract(
    mlp: Any,
    family: MLPFamily,
    formula: Formula,
    sparse: Callable[[Tensor], Tensor] | None,
    becomes: Formula,
    hidden: Tensor | None,
) -> str:
    """Why the output of `sparse`, if given, or of the `mlp` of `formula` that it replaces is not the formula's within rounding.

    Both are compared with float64 on the layer's own weights, on random inputs of several sizes and on `hidden`, a token's real
    hidden state, if it is given: tokens alone, and as many at once as the operators take, of one text and of several. As a
    vector an output may have twice the error of the dense path in the same dtype, plus one ulp.
    """
    tensors = tensors_of(mlp, family)
    x, named = _tokens(tensors.up, hidden)
    alone = len(_SCALES) + (hidden is not None)
    exact = _Exact.of(x, named, tensors, formula)
    if sparse is not None:
        moved = exact if becomes == formula else _Exact.of(x, named, tensors, becomes)
        if reason := _compare("sparse output", torch.cat([sparse(row[None]) for row in x[:alone]]), moved):
            return reason
        if reason := _compare(f"sparse output of {MOST_TOKENS} tokens at once", sparse(x), moved):
            return reason
    before = mlp if not lacks_threshold(mlp, family) else _with_tensors(mlp, family, tensors, formula)
    return (
        _compare("output", run(before, family, x), exact)
        or _compare("output of one token", run(before, family, x[:1]), exact.of_first(x, tensors))
        or _compare("output of several texts", run(before, family, x, apart=True), exact)
    )


def _tokens(like: Tensor, hidden: Tensor | None) -> tuple[Tensor, list[str]]:
    """As many tokens as the operators take, and their names; those to be tried alone come first."""
    scales = tuple(islice(cycle(_SCALES), MOST_TOKENS))
    x = torch.randn(MOST_TOKENS, like.shape[1], device="cpu", generator=torch.Generator().manual_seed(1))
    x = (x * torch.tensor(scales, device="cpu")[:, None]).to(like)
    named = [f"inputs of scale {scale:g}" for scale in scales]
    if hidden is not None:
        x[len(_SCALES)], named[len(_SCALES)] = hidden.detach().reshape(-1).to(x), "the hidden state that was given"
    return x, named


class _Exact(NamedTuple):
    """A formula of tokens in float64, and by the vendor's library in the weights' dtype."""

    formula: Formula
    named: list[str]
    exact: Tensor
    dense: Tensor

    @classmethod
    def of(cls, x: Tensor, named: list[str], tensors: Tensors, formula: Formula) -> _Exact:
        return cls(formula, named, _exact(x, tensors, formula), _dense(x, tensors, formula))

    def of_first(self, x: Tensor, tensors: Tensors) -> _Exact:
        """The same of the first token alone, which the vendor's library computes otherwise."""
        return self._replace(exact=self.exact[:1], dense=_dense(x[:1], tensors, self.formula))


def _compare(what: str, output: Tensor, of: _Exact) -> str:
    """Why the outputs of the first tokens are not those of the formula within the contract, or nothing."""
    exact, dense = of.exact[: len(output)], of.dense[: len(output)]
    # float16 may overflow at the largest scale, on the way too
    usable = (exact.abs().amax(dim=1) <= torch.finfo(dense.dtype).max) & dense.isfinite().all(dim=1)
    if not bool(usable.any()):
        return "its output is not finite on random inputs: are its weights?"
    errors = (output.double() - exact).norm(dim=1)
    dense_errors, epsilon = (dense.double() - exact).norm(dim=1), torch.finfo(dense.dtype).eps
    for which, usable_, error, dense_error, size in zip(
        of.named, usable.tolist(), errors.tolist(), dense_errors.tolist(), exact.norm(dim=1).tolist(), strict=False
    ):
        if usable_ and not within_contract(error, dense_error, epsilon, size):
            return f"{_differs(what, of.formula, error, size)}, at {which}"
    return ""


def lacks_threshold(mlp: nn.Module, family: MLPFamily) -> bool:
    """Whether `mlp` cannot run, since its FATReLU was made for a config that names no threshold."""
    activation = getattr(mlp, family.activation, None)
    return isinstance(activation, FATReLU) and activation.threshold is None


def _dense(x: Tensor, t: Tensors, formula: Formula) -> Tensor:
    """The formula of tokens `x` by the vendor's library in their dtype."""
    linear, activation = nn.functional.linear, module_of(formula)
    up = linear(x, t.up, t.up_bias)
    if t.gate is None:
        x1 = activation(up)
    else:
        x1 = combined(activation, linear(x, t.gate, t.gate_bias), up, formula.activation == DRELU)
    if t.norm_weight is not None:
        wide = x1.float()
        x1 = t.norm_weight * (wide * torch.rsqrt(wide.square().mean(dim=1, keepdim=True) + t.norm_eps)).to(x1.dtype)
    return linear(x1, t.down, t.down_bias)


def _exact(x: Tensor, t: Tensors, formula: Formula) -> Tensor:
    """The formula of tokens `x`, (tokens, d_model), in float64, rounded where the operators round (float64: nowhere)."""
    wide, dtype, activation = x.double(), x.dtype, module_of(formula)
    up = _by_rows(wide, t.up, t.up_bias)
    if t.gate is None:
        x1 = activation(up.to(dtype).double())
    else:
        gate = _by_rows(wide, t.gate, t.gate_bias).to(dtype).double()
        x1 = combined(activation, gate, up, formula.activation == DRELU)
    x1 = x1.to(dtype).double()
    if t.norm_weight is not None:
        x1 = t.norm_weight.double() * x1 * torch.rsqrt(x1.square().mean(dim=1, keepdim=True) + t.norm_eps)
    return _by_rows(x1, t.down, t.down_bias)


def _by_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    parts = range(0, len(weight), _ROWS_AT_ONCE)
    product = torch.cat([x @ weight[i : i + _ROWS_AT_ONCE].double().t() for i in parts], dim=1)
    return product if bias is None else product + bias.double()
