"""The matrices of a model beside its sparse FFNs: attention's, the head's, and those of MLPs that stay dense."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from ..bf12 import CHUNK
from ..compressed import LARGEST_RATIO, compress
from ..formats import VECTOR_BYTES
from .dispatch import DTYPES, decoded, does_more
from .linears import CompressedLinear, DecodingLinear, place_apart, place_together
from .mlp import SparseMLP
from .parallel import TensorParallel, local_of, parallel_of, sharding_of

_QKV = ("q_proj", "k_proj", "v_proj")
_GATE_UP = ("gate_proj", "up_proj")
_NUMBER = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class MatrixPatch:
    """What `patch_model` did with one matrix."""

    name: str
    decoding: bool
    """Whether one token, and a few, now go through `ffn_1`."""
    reason: str = ""
    """Why it was left as it was, or why it was not compressed."""
    ratio: float = 1.0
    """What it takes of a plain matrix's memory."""


def rows_of_report(matrices: Sequence[MatrixPatch]) -> list[tuple[str, ...]]:
    """Name, number, what was done and memory of the matrices that differ only in their layer's number."""
    counts = Counter((_NUMBER.sub(".*.", m.name), m.decoding, m.reason) for m in matrices)
    ratios = {key: [m.ratio for m in matrices if (_NUMBER.sub(".*.", m.name), m.decoding, m.reason) == key] for key in counts}
    return [
        (name, str(n), ("ffn_1" if decoding else "as before") + (f": {reason}" if reason else ""), f"{sum(r) / n:.1%}")
        for ((name, decoding, reason), n), r in zip(counts.items(), ratios.values(), strict=True)
    ]


def groups_of(model: nn.Module) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Name of a module and the names of those of its projections that read one input, for every such group."""
    for name, module in model.named_modules():
        if isinstance(module, SparseMLP):
            continue
        for group in (_QKV, _GATE_UP):
            if all(isinstance(getattr(module, p, None), nn.Module) for p in group):
                yield name, group
                other = "o_proj" if group is _QKV else "down_proj"
                if isinstance(getattr(module, other, None), nn.Module):
                    yield name, (other,)
    head = _head_of(model)
    if head is not None:
        holder, _, leaf = next(name for name, module in model.named_modules() if module is head).rpartition(".")
        yield holder, (leaf,)


def held_twice(model: nn.Module) -> frozenset[int]:
    """The ids of modules that are in two places of a model."""
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    return frozenset(module for module, count in places.items() if count > 1)


def _head_of(model: Any) -> nn.Module | None:
    """The matrix that makes logits."""
    try:
        head = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return head if isinstance(head, nn.Module) and any(module is head for module in model.modules()) else None


@torch.no_grad()
def replace_matrices(model: nn.Module, to_compress: bool, batch_invariant: bool) -> list[MatrixPatch]:
    """Let few tokens read each of these matrices through `ffn_1`, projections of one input as one; with a bar on a terminal."""
    console = Console(stderr=True)
    groups, shared, parallel = list(groups_of(model)), held_twice(model), parallel_of(model)
    shown = console.is_terminal and to_compress
    bar = track(groups, "compressing", console=console, transient=True, disable=not shown)
    done = [patch for holder, group in bar for patch in _replace_group(model, holder, group, to_compress, shared, parallel)]
    for module in model.modules():
        if isinstance(module, DecodingLinear):
            module.batch_invariant = batch_invariant
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # what the weights left goes back to the GPU
    return done


def _replace_group(
    model: nn.Module,
    holder: str,
    group: tuple[str, ...],
    to_compress: bool,
    shared: frozenset[int] = frozenset(),
    parallel: TensorParallel | None = None,
) -> Iterable[MatrixPatch]:
    """Processes that hold parts of a model, `parallel`, do the same with each matrix."""

    def any_of_all(flag: bool) -> bool:
        return flag if parallel is None else parallel.any(flag)

    module = model.get_submodule(holder)
    names = [f"{holder}.{leaf}".lstrip(".") for leaf in group]
    linears: list[Any] = [getattr(module, leaf) for leaf in group]
    reasons = ["the same module in two places" if id(linear) in shared else why_not(linear) for linear in linears]
    if parallel is not None:
        reasons = [parallel.agreed(reason) for reason in reasons]
    if any(reasons) or any_of_all(not _fit(linears, to_compress)):
        if len(group) > 1:
            return [p for leaf in group for p in _replace_group(model, holder, (leaf,), to_compress, shared, parallel)]
        return [MatrixPatch(names[0], False, reasons[0])]
    made, ratio, reason = _compressed(model, linears) if to_compress else ([], 1.0, "")
    if to_compress and parallel is not None and parallel.any(not made):
        made, ratio, reason = [], 1.0, reason or "plain, as in another process"
    if not made:
        if len(group) > 1:
            place_together(linears)
        made = [DecodingLinear.of(linear) for linear in linears]
    if any_of_all(any(_tried(linear) is None for linear in made)):
        for linear in linears:
            place_apart(linear)
        return [MatrixPatch(name, False, "ffn_1 does not take it") for name in names]
    for leaf, linear, new in zip(group, linears, made, strict=True):
        if isinstance(new, CompressedLinear):
            new.take_place_of(linear, leaf, module)
        else:
            new.train(linear.training)._replaced = (linear,)
            setattr(module, leaf, new)
    return [MatrixPatch(name, True, reason, ratio) for name in names]


def _fit(linears: Sequence[nn.Linear], to_compress: bool) -> bool:
    """Whether projections can be one matrix, each with its rows at a multiple of 16 bytes."""
    weights = [local_of(linear.weight) for linear in linears]
    words = max(1, weights[0].shape[1] // CHUNK) * 4  # of a row, the smallest part of a compressed one
    unaligned = to_compress and any(len(weight) * words % VECTOR_BYTES for weight in weights[:-1])
    alike = {(weight.shape[1], weight.dtype, weight.device, sharding_of(x)) for weight, x in zip(weights, linears, strict=True)}
    return len(alike) == 1 and not unaligned


def _tried(linear: DecodingLinear | CompressedLinear) -> Tensor | None:
    """The operator's result of some token; this compiles its kernel."""
    weight = linear if isinstance(linear, CompressedLinear) else local_of(linear.weight)
    example = linear.parts[0] if isinstance(linear, CompressedLinear) else local_of(linear.weight)
    dtype = torch.bfloat16 if isinstance(linear, CompressedLinear) else linear.weight.dtype
    with torch.autocast(example.device.type, enabled=False):
        return decoded(torch.ones(linear.in_features, dtype=dtype, device=example.device), weight)


def _compressed(model: nn.Module, linears: Sequence[nn.Linear]) -> tuple[list[Any], float, str]:
    """The matrices compressed as one and what they take of plain memory, or why they are not."""
    weights = [linear.weight for linear in linears]
    for other in model.modules():
        if not any(other is linear for linear in linears) and any(p is w for p in other._parameters.values() for w in weights):
            return [], 1.0, f"plain, shared with a {type(other).__name__}"
    parts = [local_of(w).detach() for w in weights]
    whole = compress(torch.cat(parts) if len(parts) > 1 else parts[0])
    if whole.ratio > LARGEST_RATIO:
        return [], 1.0, f"plain, {whole.ratio:.0%} of its size compressed"
    made, start = [], 0
    for part in parts:
        packed = whole if len(linears) == 1 else whole.rows(start, start + len(part))
        made.append(CompressedLinear.of_packed(packed, transposed=False))
        start += len(part)
        if not torch.equal(made[-1].weight.view(torch.int16), part.view(torch.int16)):
            raise RuntimeError("patch_model: a matrix did not come back to the bit: a defect, please report it")
    return made, whole.ratio, ""


@torch.no_grad()
def rejoin_matrices(model: nn.Module) -> None:
    """Where `CompressedLinear`s were set one by one: those of one input become one matrix, and plain matrices are replaced."""
    for holder, group in list(groups_of(model)):
        module = model.get_submodule(holder)
        linears: list[Any] = [getattr(module, leaf) for leaf in group]
        if len(group) == 1 or not all(isinstance(linear, CompressedLinear) for linear in linears):
            for leaf, linear in zip(group, linears, strict=True):
                if not isinstance(linear, CompressedLinear):
                    _replace_group(model, holder, (leaf,), False)
            continue
        plain = [linear.linear() for linear in linears]
        made, *_ = _compressed(model, plain) if _fit(plain, True) else ([],)
        for leaf, linear, new in zip(group, linears, made, strict=False):
            new.take_place_of(linear._replaced[0], leaf, module)


def put_back_matrices(model: nn.Module) -> None:
    """Undo `replace_matrices`, on the weights of now."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, (DecodingLinear, CompressedLinear)) or not module._replaced:
            continue
        before: Any = module._replaced[0]
        before.weight = module.put_back().weight if isinstance(module, CompressedLinear) else module.weight
        if isinstance(module, DecodingLinear):
            place_apart(before)
        model.set_submodule(name, before.train(module.training))


def why_not(linear: Any) -> str:
    """Why a projection must stay as it is, or nothing."""
    if type(linear) is not nn.Linear:
        return f"a {type(linear).__module__}.{type(linear).__qualname__}, not a torch.nn.Linear itself"
    if linear.bias is not None:
        return "has a bias"
    if isinstance(sharding := sharding_of(linear), str):
        return sharding
    weight = local_of(linear.weight)
    if type(weight.data) is not Tensor or weight.dtype not in DTYPES:
        return f"{weight.dtype} in a {type(weight.data).__name__}: bfloat16, float16 or float32 needed"
    if sharding is None and does_more(linear):
        return "has hooks, or a forward of its own (offloading, or a user's)"
    if weight.is_meta:
        return "on the meta device: load it first"
    if weight.device.type not in ("cuda", "cpu"):
        return f"on {weight.device}"
    if weight.numel() == 0:
        return f"empty: shape {tuple(weight.shape)}"
    vector = VECTOR_BYTES // weight.element_size()
    if weight.shape[1] % vector:
        return f"{weight.shape[1]} inputs, not a multiple of {vector}"
    if weight.data_ptr() % VECTOR_BYTES or not weight.is_contiguous():
        return "a view into other memory, strided or not aligned to 16 bytes"
    return ""
