"""How tokens get from a module to the operators: whether they do all that calling the modules would, then the call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..crossover import MOST_TOKENS_OF_ANY
from ..formats import ITEMSIZE, VECTOR_BYTES
from ..ops import ffn_1
from .compressed import FACTS_OF_PLAIN, Facts

if TYPE_CHECKING:
    from .linears import CompressedLinear

TorchWeight: TypeAlias = "Tensor | CompressedLinear"
"""A weight of a module: a parameter, or the module of a compressed one."""

DTYPES: tuple[torch.dtype, ...] = tuple(getattr(torch, name) for name in ITEMSIZE)
_PLAIN = (Tensor, nn.Parameter)
_GLOBAL_HOOKS = nn.modules.module._global_forward_hooks
_GLOBAL_PRE_HOOKS = nn.modules.module._global_forward_pre_hooks
_LINEAR_FORWARD = nn.Linear.forward
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # not there before torch 2.7


def forward_is_torchs() -> bool:
    """Whether calling an `nn.Linear` is what torch says: no global hooks, and no other `forward`."""
    return not (_GLOBAL_HOOKS or _GLOBAL_PRE_HOOKS) and nn.Linear.forward is _LINEAR_FORWARD


def does_more(module: nn.Module) -> bool:
    """Whether calling a module does more than its class says: hooks, or a `forward` of its own, as accelerate sets it."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or has_own_forward(module)


def has_own_forward(module: nn.Module) -> bool:
    """Whether calling a module calls another `forward` than its class's, and that does more than move inputs."""
    own = module.__dict__.get("forward")  # accelerate leaves the class's behind, bound, when its hooks are removed
    if own is None or getattr(own, "__func__", None) is type(module).forward:
        return False
    return not _only_moves(module, own)


def _only_moves(module: nn.Module, forward: Any) -> bool:
    """Whether a module's own `forward` is accelerate's, which moves inputs to the device that its weights stay on.

    So a model is spread over several GPUs by ``device_map``. What the operators get is on the weights' device already, or they
    refuse it and the module is called.
    """
    hook: Any = module.__dict__.get("_hf_hook")
    before = module.__dict__.get("_old_forward")
    if type(hook).__name__ != "AlignDevicesHook" or not type(hook).__module__.startswith("accelerate."):
        return False
    is_its = getattr(getattr(forward, "func", None), "__module__", None) == type(hook).__module__
    device = hook.execution_device
    if not is_its or hook.offload or device is None or getattr(before, "__func__", None) is not type(module).forward:
        return False
    to = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return all(p is None or _stays(p.device, to) for p in module._parameters.values())


def _stays(device: torch.device, to: torch.device) -> bool:
    """Whether a tensor of this device is left where it is by a move. One to "cuda" goes to the current GPU."""
    if to.index is None and device.type == to.type == "cuda":
        return device.index == torch.cuda.current_device()
    return device == to


def is_watched() -> bool:
    """Whether torch notes what is called: only calls through its dispatcher are seen then."""
    watched = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    return watched or torch._C._len_torch_dispatch_stack() > 0


def is_cast(x: Tensor) -> bool:
    """Whether autocast has the projections compute in another dtype."""
    kind = "cuda" if x.is_cuda else "cpu"
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != x.dtype


def is_recorded(x: Tensor, weights: Iterable[TorchWeight | None]) -> bool:
    """Whether derivatives are taken through these tensors, backward or forward."""
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and (x.requires_grad or any(isinstance(w, Tensor) and w.requires_grad for w in weights))


def few_tokens(x: Tensor, most: int) -> Tensor | None:
    """The tokens of x, (..., d), as an operator takes several, (B, d), or None if there are none or more than `most`.

    Not for one token, which modules hand over as (d,): ``x.flatten()`` costs less.
    """
    if x.is_nested or not x.dim() or not (d := x.shape[-1]) or not (tokens := x.numel() // d):
        return None
    if not _pays(tokens, most):
        return None
    return x.reshape(-1, d).contiguous()  # the last tokens of several texts are rows far apart


def _pays(tokens: int, most: int) -> bool:
    """Whether there are at most so many tokens, which code that torch compiles or exports may leave open."""
    if not torch.compiler.is_compiling():
        return tokens <= most
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # which brings SymPy, half a second

    if statically_known_true(tokens <= most):
        return True
    if _is_exporting() or statically_known_true(tokens > most):
        return False  # an exported program has one path, and it must be right for any number
    return tokens <= MOST_TOKENS_OF_ANY


def decoded(
    tokens: Tensor, weight: TorchWeight, bias: Tensor | None = None, *, partial: bool = False, batch_invariant: bool = True
) -> Tensor | None:
    """``tokens @ weight.T + bias`` by `ffn_1`, or None where only torch does what is asked.

    `tokens` is (d,), or (B, d) with as many as the operator takes. If `partial`, the result stays in float32.
    """
    how = {} if batch_invariant else {"batch_invariant": False}
    if not forward_is_torchs() or is_cast(tokens) or is_recorded(tokens, (weight, bias)):
        return None
    if tokens.is_cuda and not is_watched():
        try:
            out = tokens.new_empty((*tokens.shape[:-1], weight.shape[0]), dtype=torch.float32) if partial else None
            y: Tensor = ffn_1(tokens, plain_or_packed(weight), bias=bias, batch_invariant=batch_invariant, out=out)
            return y
        except (TypeError, ValueError):  # what the operator refuses, torch does, or refuses as it always did
            return None
    if not is_taken(tokens, weight, extras=() if bias is None else (bias,)):
        return None
    more = {"partial": True} if partial else {}
    return dispatched("ffn_1", tokens, (weight,), bias=bias, **how, **more)


def plain_or_packed(weight: TorchWeight) -> Any:
    """A weight as the operators take it."""
    return weight if isinstance(weight, Tensor) else weight.packed


def dispatched(name: str, x: Tensor, weights: tuple[TorchWeight | None, ...], *threshold: float, **keywords: Any) -> Tensor:
    """An operator through torch's dispatcher; a weight is None where a block has no gate."""
    operator = getattr(torch.ops.prosparse, name)
    if all(w is None or isinstance(w, Tensor) for w in weights):
        plain: Tensor = operator.default(x, *weights, *threshold, **keywords)
        return plain
    facts = [fact for w in weights for fact in _facts_of(w)]
    result: Tensor = operator.parts(x, *map(_parts_of, weights), facts, *threshold, **keywords)
    return result


def _facts_of(weight: TorchWeight | None) -> Facts:
    return FACTS_OF_PLAIN if weight is None or isinstance(weight, Tensor) else weight.facts


def _parts_of(weight: TorchWeight | None) -> list[Tensor]:
    if weight is None:
        return []
    return [weight] if isinstance(weight, Tensor) else weight.parts


def is_taken(token: Tensor, *weights: TorchWeight, extras: Iterable[Tensor] = (), axis: int = -1) -> bool:
    """Whether `torch.ops.prosparse` takes a token with these (d_ff, d_model) weights, and biases or a norm's weight.

    `token` is (d,), or (B, d) with as many as the operators take. `axis` says which of the weights' dims is d.
    """
    dtype, device, shape = token.dtype, token.get_device(), weights[0].shape
    if dtype not in DTYPES or token.shape[-1] != shape[axis] or shape[-1] % (VECTOR_BYTES // dtype.itemsize):
        return False
    if not token.is_contiguous():
        return False
    for w in weights:
        if not isinstance(w, Tensor):
            if dtype != torch.bfloat16 or w.parts[0].get_device() != device or w.shape != tuple(shape):
                return False
        elif w.dtype != dtype or w.get_device() != device or w.shape != shape or not w.is_contiguous():
            return False
    for extra in extras:
        if extra.dtype != dtype or extra.get_device() != device or extra.dim() != 1 or not extra.is_contiguous():
            return False
    if not token.is_cuda and token.device.type != "cpu":
        return False
    return torch.compiler.is_compiling() or _have_memory(token, *(part for w in weights for part in _arrays_of(w)))


def _arrays_of(weight: TorchWeight) -> list[Tensor]:
    return [weight] if isinstance(weight, Tensor) else weight.parts[:-1]


def _have_memory(*tensors: Tensor) -> bool:
    """Whether these are plain tensors at addresses that kernels can read 16 bytes at a time."""
    try:
        return all(type(t) in _PLAIN and t.data_ptr() and t.data_ptr() % VECTOR_BYTES == 0 for t in tensors)
    except RuntimeError:  # torch's, of tensors inside vmap and the like
        return False
