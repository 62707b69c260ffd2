"""`torch.ops.prosparse`: the operators in torch's dispatcher, so that `torch.compile` and `torch.export` see them whole.

`ffn_1`, `ffn_12`, `ffn_123`, `ffn_23`, `ffn_4` and `sparse_ffn` take what the functions of the same name in `prosparse_cupy`
take, one token or up to 8, and each has an overload `.out` that writes to `out` and returns nothing, and an overload `.parts`
whose weights may be compressed: the dispatcher takes tensors and numbers alone, so each weight is a list of tensors
(`parts_of`), and `facts` the numbers of all (`facts_of`). With `partial`, `ffn_1`, `ffn_4` and `sparse_ffn` leave their result
in float32, to be added to those of other GPUs. `decompress` makes a weight plain. CUDA tensors go to the kernels, CPU tensors
to the reference. Inference only: a tensor that requires grad is refused while gradients are recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from .. import ffn, ops
from ..arguments import Operand, Signature
from ..compressed import CompressedWeight
from ..ffn import SPARSE_FFN
from ..ops import FFN_1, FFN_4, FFN_12, FFN_23, FFN_123
from ..tensor_cores import ON_TENSOR_CORES
from .compressed import checked_packed_of, on_host, weight_of

_SIGNATURES = {s.operator: s for s in (FFN_1, FFN_12, FFN_123, FFN_23, FFN_4, SPARSE_FFN)}
_ON_TENSOR_CORES = (*ON_TENSOR_CORES, "sparse_ffn")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_PARTIAL = ", bool partial=False"
_LIBRARY = torch.library.Library("prosparse", "DEF")


def _register(name: str) -> None:
    """Both overloads of an operator: schema, CUDA, CPU and fake implementation."""
    signature = _SIGNATURES[name]
    inputs = ", ".join(f"{_kind(name, operand)} {operand.name}" for operand in signature.inputs)
    more = _more(signature)
    _LIBRARY.define(f"{name}({inputs}{more}{_PARTIAL * signature.output.may_be_partial}) -> Tensor", tags=_TAGS)
    _LIBRARY.define(f"{name}.out({inputs}{more}, Tensor(a!) out) -> ()", tags=_TAGS)
    operator = getattr(ffn if name == "sparse_ffn" else ops, name)
    for key, run in (("CUDA", operator), ("CPU", _on_host(operator))):
        call = _refusing_grad(name, _perhaps_partial(signature, run))
        _LIBRARY.impl(name, call, key)
        _LIBRARY.impl(f"{name}.out", _returning_nothing(call), key)
    call = _refusing_grad(name, _fake(signature))
    torch.library.register_fake(f"prosparse::{name}", call, lib=_LIBRARY)
    torch.library.register_fake(f"prosparse::{name}.out", _returning_nothing(call), lib=_LIBRARY)


def _kind(name: str, operand: Operand) -> str:
    return "Tensor?" if (name, operand.name) == ("sparse_ffn", "w_gate") else "Tensor"


def _more(signature: Signature) -> str:
    """The arguments of a schema behind the arrays: a threshold, then keywords."""
    keywords = ['str activation="relu"'] * signature.has_threshold
    keywords += [f"Tensor? {operand.name}=None" for operand in signature.optional]
    keywords += ["float norm_eps=0.0"] * any(operand.extra == "norm_weight" for operand in signature.optional)
    keywords += ["bool batch_invariant=True"] * (signature.operator in _ON_TENSOR_CORES)
    return ", float threshold=0.0" * signature.has_threshold + ", *, " + ", ".join(keywords)


def _register_parts(name: str) -> None:
    """The overload for weights in parts."""
    signature = _SIGNATURES[name]
    inputs = ", ".join(f"Tensor{'[]' if operand.define else ''} {operand.name}" for operand in signature.inputs)
    more = _more(signature) + _PARTIAL * signature.output.may_be_partial
    _LIBRARY.define(f"{name}.parts({inputs}, int[] facts{more}) -> Tensor", tags=_TAGS)
    operator = getattr(ffn if name == "sparse_ffn" else ops, name)
    for key, run in (("CUDA", operator), ("CPU", _on_host(operator))):
        _LIBRARY.impl(f"{name}.parts", _refusing_grad(name, _of_parts(signature, _perhaps_partial(signature, run))), key)
    fake = _refusing_grad(name, _fake_of_parts(signature))
    torch.library.register_fake(f"prosparse::{name}.parts", fake, lib=_LIBRARY)


def _of_parts(signature: Signature, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    inputs = signature.inputs

    def call(*arguments: Any, out: Tensor | None, **keywords: Any) -> Tensor:
        given, facts = [*arguments[: len(inputs)]], [*arguments[len(inputs)]]
        for i, operand in enumerate(inputs):
            if operand.define:
                given[i], facts = weight_of(given[i], tuple(facts[:3])) if given[i] else None, facts[3:]
        return run(*given, *arguments[len(inputs) + 1 :], out=out, **keywords)

    return call


def _fake_of_parts(signature: Signature) -> Callable[..., Tensor]:
    """As `_fake`, of a plain weight's shape or of what its facts say."""
    axis = _axis(signature)

    def call(*arguments: Any, out: Tensor | None, partial: bool = False, **keywords: Any) -> Tensor:
        first, weight, facts = arguments[0], arguments[len(signature.inputs) - 1], arguments[len(signature.inputs)]
        size = weight[0].shape[axis] if facts[-3] < 0 else facts[-2 + axis]
        result: Tensor = first.new_empty((*first.shape[:-1], size), dtype=_dtype_of(first, partial))
        return result

    return call


def _register_decompress() -> None:
    _LIBRARY.define("decompress(Tensor[] parts, int[] facts) -> Tensor", tags=_TAGS)

    def call(parts: list[Tensor], facts: list[int]) -> Tensor:
        return checked_packed_of(parts, tuple(facts)).decompress()

    for key in ("CUDA", "CPU"):
        _LIBRARY.impl("decompress", call, key)
    torch.library.register_fake(
        "prosparse::decompress",
        lambda parts, facts: parts[0].new_empty((facts[1], facts[2]), dtype=torch.bfloat16),
        lib=_LIBRARY,
    )


def _refusing_grad(name: str, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*arguments: Any, out: Tensor | None = None, **keywords: Any) -> Tensor:
        if torch.is_grad_enabled():
            _refuse_grad(name, (*arguments, *keywords.values()))
        return run(*arguments, out=out, **keywords)

    return call


def _returning_nothing(call: Callable[..., Tensor]) -> Callable[..., None]:
    def call_out(*arguments: Any, out: Tensor, **keywords: Any) -> None:
        call(*arguments, out=out, **keywords)

    return call_out


def _perhaps_partial(signature: Signature, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An operator that can be asked to leave its result in float32."""
    axis = _axis(signature)

    def call(*arguments: Any, out: Tensor | None, partial: bool = False, **keywords: Any) -> Tensor:
        if partial and out is None:
            first, weight = arguments[0], arguments[len(signature.inputs) - 1]
            out = first.new_empty((*first.shape[:-1], weight.shape[axis]), dtype=torch.float32)
        return run(*arguments, out=out, **keywords)

    return call


def _axis(signature: Signature) -> int:
    """Which dim of a weight the result has."""
    return ("d_ff", "d_model").index(signature.output.dims[0])


def _dtype_of(first: Tensor, partial: bool) -> torch.dtype:
    return torch.float32 if partial else first.dtype


def _on_host(operator: Callable[..., np.ndarray]) -> Callable[..., Tensor]:
    def seen(argument: Any) -> Any:
        return on_host(argument, as_numpy) if isinstance(argument, (Tensor, CompressedWeight)) else argument

    def call(*arguments: Any, out: Tensor | None, **keywords: Any) -> Tensor:
        more = {name: seen(argument) for name, argument in keywords.items()}
        return from_numpy(operator(*map(seen, arguments), out=None if out is None else as_numpy(out), **more))

    return call


def _fake(signature: Signature) -> Callable[..., Tensor]:
    """The shape, dtype and device of a result: the first input's leading dims, then d_model or d_ff as the weights have it."""
    axis = _axis(signature)

    def call(*arguments: Any, out: Tensor | None, partial: bool = False, **keywords: Any) -> Tensor:
        first, weights = arguments[0], arguments[len(signature.inputs) - 1]
        # Also runs if one of them is on the meta device: a result on another device would be memory that nobody wrote.
        names = (*(o.name for o in signature.inputs), "out", *keywords)
        given = zip(names, (*arguments[: len(signature.inputs)], out, *keywords.values()), strict=True)
        for name, tensor in given:
            if isinstance(tensor, Tensor) and tensor.device != first.device:
                raise ValueError(
                    f"{signature.operator}: {name} must be on the device of {signature.inputs[0].name}, {first.device}, got "
                    f"{tensor.device}: move it there"
                )
        result: Tensor = first.new_empty((*first.shape[:-1], weights.shape[axis]), dtype=_dtype_of(first, partial))
        return result

    return call


def _refuse_grad(name: str, arguments: tuple[Any, ...]) -> None:
    for argument in arguments:
        if isinstance(argument, Tensor) and argument.requires_grad:
            raise RuntimeError(
                f"prosparse::{name} is for inference: got a tensor that requires grad while gradients are recorded; call it "
                "under torch.inference_mode() or torch.no_grad(), or detach() the tensors"
            )


def as_numpy(tensor: Tensor) -> np.ndarray:
    """A CPU tensor's memory as a NumPy array; bfloat16 as `ml_dtypes.bfloat16`."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def from_numpy(array: np.ndarray) -> Tensor:
    """The inverse of `as_numpy`."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


for _name in _SIGNATURES:
    _register(_name)
    _register_parts(_name)
_register_decompress()
