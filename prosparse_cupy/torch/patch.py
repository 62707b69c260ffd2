"""Patch a loaded Hugging Face model: its FFNs whose activation leaves zeros decode sparsely."""

from __future__ import annotations

import copy
import math
import zlib
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from ..bf12 import CHUNK
from ..compressed import LARGEST_RATIO, is_too_narrow
from ..crossover import MOST_TOKENS_OF_ANY
from ..families import LLAMA_LIKE, MLPFamily
from ..formats import VECTOR_BYTES
from ..formula import ACTIVATIONS, DRELU, FATRELU, RELU, Formula, UnsupportedFormula, check_threshold, formula_of
from ._text import table
from .acceptance import forget_tensors, lacks_threshold, run, why_another_formula, why_outside_the_contract
from .activation import FATReLU, activation_of, module_of
from .dispatch import DTYPES, does_more
from .families import check_module, check_tokens, mixtures, mlps
from .halves import SparseDown, SparseUp
from .linears import CompressedLinear, DecodingLinear
from .matrices import MatrixPatch, groups_of, held_twice, put_back_matrices, replace_matrices, rows_of_report
from .mlp import PROJECTIONS, SparseGatedMLP, SparseMLP, is_plain_linear, rounds_twice, unpack
from .parallel import Style, TensorParallel, as_one, local_of, parallel_of, sharding_of_all, with_all
from .runner import Runner
from .sparsity import SparsityMeter
from .steps import release_generation


@dataclass(frozen=True)
class LayerPatch:
    """What `patch_model` did with one MLP."""

    name: str
    sparse: bool
    """Whether few tokens at once now go through the sparse operators."""
    threshold: float
    reason: str = ""
    """Why it was left dense."""
    formula: Formula | None = None
    """What it computes, where it decodes sparsely."""
    note: str = ""
    """What the config says, where the code computes something else."""
    ratio: float = 1.0
    """What its weights take of plain ones' memory; below 1 where they are compressed."""
    plain: str = ""
    """Which of its weights were not compressed, and why, where that was asked for."""
    sparsity: float = math.nan
    """Share of its neurons that the example leaves at zero; NaN without an example, and of a dense layer."""
    most_tokens: int = MOST_TOKENS_OF_ANY
    """Up to so many tokens at once go through the sparse operators, where it is sparse; of an FFN inside a layer, as OPT's is,
    those of its second half."""


@dataclass(frozen=True)
class PatchReport:
    """What `patch_model` did, layer by layer and matrix by matrix; `print` shows tables."""

    layers: tuple[LayerPatch, ...]
    matrices: tuple[MatrixPatch, ...] = ()
    """The matrices beside the sparse layers', where they were asked for."""

    @property
    def sparse(self) -> tuple[LayerPatch, ...]:
        return tuple(layer for layer in self.layers if layer.sparse)

    @property
    def decoding(self) -> tuple[MatrixPatch, ...]:
        """The matrices that `ffn_1` now reads."""
        return tuple(matrix for matrix in self.matrices if matrix.decoding)

    def __str__(self) -> str:
        if not self.matrices:
            return self._layers
        title = f"{len(self.decoding)} of {len(self.matrices)} other matrices decode through ffn_1"
        heads = "matrix", "number", "decoding", "weights"
        return f"{self._layers}\n{table(title, heads, rows_of_report(self.matrices))}"

    @property
    def _layers(self) -> str:
        title = f"{len(self.sparse)} of {len(self.layers)} MLPs decode sparsely"
        heads = ["layer", "decoding", "threshold"]
        rows = [[x.name, _said_of(x), f"{x.threshold:g}"] for x in self.layers]
        sparse = self.sparse
        if any(x.ratio < 1 or x.plain for x in sparse):
            title += f", their weights in {sum(x.ratio for x in sparse) / len(sparse):.1%} of the memory"
            heads += ["weights", "left plain"]
            rows = [[*row, f"{x.ratio:.1%}", x.plain] for row, x in zip(rows, self.layers, strict=True)]
        if not all(math.isnan(x.sparsity) for x in sparse):
            heads += ["sparsity", "tokens at once"]
            rows = [[*row, *_known_of(x)] for row, x in zip(rows, self.layers, strict=True)]
        return table(title, tuple(heads), [tuple(row) for row in rows])


def _known_of(layer: LayerPatch) -> tuple[str, str]:
    if math.isnan(layer.sparsity):
        return "", ""
    return f"{layer.sparsity:.1%}", f"1 to {layer.most_tokens}" if layer.most_tokens > 1 else "1"


def _said_of(layer: LayerPatch) -> str:
    if not layer.sparse:
        return f"dense: {layer.reason}"
    kind = "" if layer.formula in (None, Formula(layer.threshold)) else f": {layer.formula}"
    return f"sparse{kind}" + f" ({layer.note})" * bool(layer.note)


def patch_model(
    model: nn.Module,
    threshold: float | None = None,
    *,
    compress: bool = False,
    linears: bool = True,
    batch_invariant: bool = True,
    example: Tensor | None = None,
) -> PatchReport:
    """Let every FFN of a model whose activation leaves zeros decode sparsely, and its other matrices fast.

    What comes out is exactly as before, within rounding. `FAMILIES` says which modules are looked at: those with `gate_proj`,
    `up_proj` and `down_proj` (LLaMA, Mistral, Qwen2, MiniCPM and remote code like them), with a fused `gate_up_proj`, and
    without a gate (Nemotron, Arcee, Jais-2, Persimmon, Falcon, nanochat, OPT); `register_family` adds to them. Up to 8 tokens
    at a time, of one text or of several, go through the sparse operators, more (prefill) through the dense path on the same
    weights.

    The other matrices, those of attention, the head that makes logits, and those of MLPs that stay dense, are read through
    `ffn_1` for few tokens, which is faster than the vendor's library. Projections of one input (`q_proj`, `k_proj`, `v_proj`)
    are moved side by side in memory, so that `generate` reads them as one. So a model whose activation has no zeros, SiLU for
    instance, decodes faster too.

    The model is patched in place. Nothing is taken for granted. A layer's code is run in float64 on random weights, at several
    input scales, and must give what a formula gives: the one that its config names, or else another that is known, which the
    report then tells apart. Its own output and the sparse one must be as close to float64 as the dense path in the same dtype,
    within a factor of two and one ulp, of tokens alone and of eight at once. Otherwise the layer is left dense, and the report
    says why. Trying it also compiles its kernels, those for one token and for eight.

    Patch before `torch.compile` and before a CUDA graph is captured: both keep what they saw. On the CPU few tokens go through
    the NumPy reference: right, and slow.

    A model that transformers has loaded with ``tp_plan="auto"`` under ``torchrun`` is patched in every process, by the same
    call: each then computes its own neurons' part of y, in float32, and y is rounded once when the parts are added. A layer is
    patched in all processes or in none.

    Parameters
    ----------
    model : torch.nn.Module
        Loaded, on its device, in bfloat16, float16 or float32.
    threshold : float, optional
        FATReLU's T in place of the config's: this moves the activation of the model, and so changes what it says. The layer's
        code must still compute its formula; where the config has no threshold, with this one.
    compress : bool, default False
        Hold the weights in 12 bits instead of 16, without loss (`prosparse_cupy.compress`): the same numbers in three
        quarters of the memory, and faster in a CUDA graph. For bfloat16 models and for inference: compressed weights are no
        parameters. One matrix at a time is compressed. Prefill decompresses a matrix for the time of its call. State dicts and
        ``save_pretrained`` hold the plain weights, in host memory. A matrix that would not get below 80 % of its size stays
        plain, and so does a `down_proj` of a model too narrow for compression to pay (`d_model` of 2112 and less), and a head
        that is the embedding too.
    linears : bool, default True
        Also take the other matrices; False leaves all but the sparse FFNs as they are.
    batch_invariant : bool, default True
        Whether a token has the bits that it has alone, so that a text depends neither on what is generated beside it nor on how
        many tokens are verified at once. False lets 5 to 8 tokens at a time go to tensor cores, as for `sparse_ffn`: faster,
        and as close to float64, but a near tie between two tokens may then fall the other way in a batch. With an `example`,
        layers that are too dense for several tokens to pay take the dense path for them.
    example : torch.Tensor, (1, tokens) int64, optional
        A page of such text as the model will write: the model is run on it, and each layer is also tried on the hidden state
        that it then gets. Once patched it is run on it again, which tells how sparse each layer is on average.

    Returns
    -------
    PatchReport
        Per layer what was done; MLPs that are quantised, offloaded, on the meta device or have hooks, and mixtures of experts
        are left dense, with the reason.

    Raises
    ------
    TypeError
        `model` is no module, `example` no tensor of token numbers, or a switch no bool.
    ValueError
        An `example` of another shape, nothing to patch, an activation without zeros (with ``linears=False``, or with a
        `threshold`), a `fatrelu` config without its threshold, a model that is patched already, one to be compressed whose
        weights are not bfloat16, or, of a model in several processes, calls that differ and a group without NCCL on GPUs.
        Nothing has been changed.
    RuntimeError
        Another process of a model that is in several has failed; the message is its. Or a streamer or criterion of `generate`
        called it on the model that is writing; other threads that generate with the model or patch it are waited for.
    """
    check_module("patch_model", model)
    with Runner.of(model).alone("patch_model"), as_one(model):
        return _patched(model, _Asked(threshold, compress, linears, batch_invariant), example)


class _Asked(NamedTuple):
    """What `patch_model` is asked for."""

    threshold: float | None
    compress: bool
    linears: bool
    batch_invariant: bool


def _patched(model: nn.Module, asked: _Asked, example: Tensor | None) -> PatchReport:
    parallel = parallel_of(model)
    _, compress, linears, batch_invariant = asked
    plan = with_all(parallel, lambda: _planned(model, asked, example))
    if parallel is not None:
        _check_together(parallel, model, plan, asked, example)
        plan = _agreed(parallel, plan)
    hidden = {} if example is None else _hidden_states(model, plan.found, example)
    release_generation(model)
    layers, matrices = [LayerPatch(name, False, 0.0, "a mixture of experts") for name in plan.mixed], list[MatrixPatch]()
    try:
        for (name, mlp, family), was in zip(plan.found, plan.own, strict=True):
            if isinstance(was, str):
                layers.append(LayerPatch(name, False, 0.0, was))
                continue
            formula, note = was
            becomes = formula if plan.threshold is None else replace(formula, threshold=plan.threshold)
            reason = _replace(model, name, mlp, family, formula, becomes, hidden.get(name), parallel, batch_invariant)
            layers.append(LayerPatch(name, not reason, becomes.threshold, reason, None if reason else becomes, note))
        if compress:
            uncompressed = layers
            layers = with_all(parallel, lambda: _compress_all(model, uncompressed))
        if linears:
            matrices = with_all(parallel, lambda: replace_matrices(model, compress, batch_invariant))
        if example is not None:
            layers = _with_sparsity(model, layers, example)
    except BaseException:  # no GPU memory, a kernel that does not compile, Ctrl-C
        _unpatch(model)
        raise
    finally:
        forget_tensors()
    return PatchReport(tuple(layers), tuple(matrices))


def _with_sparsity(model: nn.Module, layers: list[LayerPatch], example: Tensor) -> list[LayerPatch]:
    """Tell sparse layers what share of their neurons a text leaves at zero, and say so in the report."""
    sparse = {layer.name: layer for layer in layers if layer.sparse}
    if not sparse:
        return layers
    with SparsityMeter(model, sparse) as meter, torch.no_grad():
        model(example)
    found = {layer.name: layer.sparsity for layer in meter.report().layers if layer.tokens}
    for name, mlp, family in mlps(model):
        if name in found:
            module = mlp if isinstance(mlp, SparseMLP) else getattr(mlp, family.down)
            module.sparsity = found[name]
            sparse[name] = replace(sparse[name], sparsity=found[name], most_tokens=module.most_tokens)
    return [sparse.get(layer.name, layer) for layer in layers]


_OURS = (SparseMLP, DecodingLinear, CompressedLinear, SparseUp, SparseDown)


class _Plan(NamedTuple):
    """What is known of a model before anything is changed."""

    found: list[tuple[str, Any, MLPFamily]]
    mixed: list[str]
    """Mixtures of experts."""
    own: list[tuple[Formula, str] | str]
    """Of each MLP found: its formula and a note, or why it stays dense."""
    threshold: float | None


def _planned(model: nn.Module, asked: _Asked, example: Tensor | None) -> _Plan:
    """What `patch_model` is to do; ValueError where that cannot be done."""
    threshold, compress, linears, _ = asked
    for switch in ("compress", "linears", "batch_invariant"):
        if not isinstance(value := getattr(asked, switch), bool):
            raise TypeError(f"patch_model: {switch} must be True or False, got {value!r:.60}")
    if example is not None:
        check_tokens("patch_model", "example", example, model)
    found = list(mlps(model))
    mixed = list(mixtures(model))
    if not found and not (linears and any(groups_of(model))):
        raise ValueError(
            f"patch_model: {type(model).__name__} has no module with {', '.join(PROJECTIONS)} or another family's "
            "projections: nothing to patch"
        )
    if found and found[0][0] == "" and not found[0][2].is_inside:
        raise ValueError("patch_model: this is an MLP, not a model with some: put it in a torch.nn.Sequential")
    if any(isinstance(m, _OURS) for m in model.modules()):
        raise ValueError("patch_model: the model is patched already: call unpatch_model(model) first")
    given = None if threshold is None else check_threshold("patch_model", threshold)
    if compress:
        _check_compressible(model, found, linears)
    shared = held_twice(model)
    own = [
        "the same module in two places" if id(mlp) in shared else _own_or_dense(model, name, mlp, family, given, linears)
        for name, mlp, family in found
    ]
    return _Plan(found, mixed, own, given)


def _check_together(parallel: TensorParallel, model: nn.Module, plan: _Plan, asked: _Asked, example: Tensor | None) -> None:
    """ValueError in all processes where their calls differ, or their group cannot serve."""
    facts = {
        "threshold": plan.threshold,
        "compress": asked.compress,
        "linears": asked.linears,
        "batch_invariant": asked.batch_invariant,
        "the shape of example": getattr(example, "shape", None),
        "the checksum of example": None if example is None else zlib.crc32(example.cpu().numpy().tobytes()),
    }
    layers = [name for name, *_ in plan.found]
    parallel.refuse_others("patch_model", {**facts, "the list of layers": layers})
    device = next(local_of(p).device for p in model.parameters())
    if reason := parallel.agreed(parallel.why_not_on(device)):
        raise ValueError(f"patch_model: {reason}")


def _agreed(parallel: TensorParallel, plan: _Plan) -> _Plan:
    """A plan in which a layer that stays dense in one process stays dense in all."""
    said = parallel.told([own if isinstance(own, str) else "" for own in plan.own])
    own = [
        next((f"{reason} (rank {rank} of {parallel.size})" for rank, reason in enumerate(reasons) if reason), mine)
        for mine, reasons in zip(plan.own, zip(*said, strict=True), strict=True)
    ]
    return plan._replace(own=own)


def _own_or_dense(
    model: nn.Module, name: str, mlp: Any, family: MLPFamily, given: float | None, linears: bool
) -> tuple[Formula, str] | str:
    """The formula of an MLP and a note on what its config says; or, if its matrices can be taken, why it stays dense."""
    try:
        return own_formula(model, name, mlp, family, given)
    except _NotSparse as error:
        if given is not None or not linears:
            raise
        return error.reason


class _NotSparse(ValueError):
    """An activation that leaves no zeros."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


@torch.no_grad()
def _hidden_states(model: nn.Module, found: Sequence[tuple[str, nn.Module, MLPFamily]], example: Tensor) -> dict[str, Tensor]:
    """What each MLP reads of the last token of a text."""
    states: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            given = next((a for a in (*arguments, *keywords.values()) if isinstance(a, Tensor)), None)
            if given is not None:
                states[name] = given.detach().reshape(-1, given.shape[-1])[-1].clone()

        return hook

    with ExitStack() as hooks:
        for name, mlp, family in found:
            reader = getattr(mlp, family.up) if family.is_inside else mlp
            hooks.callback(reader.register_forward_pre_hook(keep(name), with_kwargs=True).remove)
        model(example)
    return states


def _check_compressible(model: nn.Module, found: list[tuple[str, Any, MLPFamily]], linears: bool) -> None:
    """ValueError if weights have a dtype that does not compress."""
    weights = [(name, getattr(getattr(mlp, family.down), "weight", None)) for name, mlp, family in found]
    if linears:
        named = [(holder, leaf) for holder, group in groups_of(model) for leaf in group]
        modules = ((f"{holder}.{leaf}".lstrip("."), getattr(model.get_submodule(holder), leaf)) for holder, leaf in named)
        weights += [(name, module.weight) for name, module in modules if type(module) is nn.Linear]
    for name, weight in weights:
        dtype = getattr(weight, "dtype", None)
        if dtype in (torch.float16, torch.float32):
            raise ValueError(
                f"patch_model: {name}: compress=True needs bfloat16 weights, got {dtype}: other dtypes keep more bits of "
                "mantissa, which do not compress without loss; nothing was changed"
            )


def _compress_all(model: nn.Module, layers: list[LayerPatch]) -> list[LayerPatch]:
    """Compress the weights of the layers that decode sparsely, with a bar on a terminal."""
    console = Console(stderr=True)
    bar = track(layers, "compressing", console=console, transient=True, disable=not console.is_terminal)
    ties, made = _ties(model), dict[int, CompressedLinear]()
    done = [_compressed(model.get_submodule(layer.name), layer, ties, made) if layer.sparse else layer for layer in bar]
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # the plain weights' memory goes back to the GPU
    return done


def _ties(model: nn.Module) -> dict[int, object]:
    """Of each parameter that several modules have, by its id, what the compressed ones in its place have in common."""
    held = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    return {parameter: object() for parameter, count in held.items() if count > 1}


@torch.no_grad()
def _compressed(sparse: Any, layer: LayerPatch, ties: dict[int, object], made: dict[int, CompressedLinear]) -> LayerPatch:
    """A layer whose weights have been compressed, one after the other, where that pays in all processes that share it.

    `made` has the compressed ones by the ids of the projections whose places they took: layers may share a projection.
    """
    if not isinstance(sparse, SparseMLP):
        return replace(layer, plain="inside a layer")
    before, plain = 0, 0.0
    left = list[str]()
    for name in sparse.family.projections:
        linear = getattr(sparse, name)
        if isinstance(known := made.get(id(linear), linear), CompressedLinear):
            for holder in (sparse, sparse.replaced):
                setattr(holder, name, known)
            before, plain = (
                before + linear.in_features * linear.out_features,
                plain + known.packed.ratio * linear.in_features * linear.out_features,
            )
            continue
        weight, transposed = local_of(linear.weight), name == sparse.family.down
        before += weight.numel()
        if name == sparse.family.fused and sparse.d_ff * (sparse.d_model // CHUNK) * 4 % VECTOR_BYTES:
            left.append(f"{name}: compressed, its lower half does not start at a multiple of {VECTOR_BYTES} bytes")
            plain += weight.numel()
            continue
        if rounds_twice(linear):
            left.append(f"{name}: a {type(linear).__name__} rounds before it adds its bias")
            plain += weight.numel()
            continue
        if transposed and is_too_narrow(sparse.d_model, sparse.d_ff):
            left.append(f"{name}: d_model {sparse.d_model} is too narrow")
            plain += weight.numel()
            continue
        packed = CompressedLinear(weight, transposed=transposed, bias=linear.bias)
        ratio = packed.packed.ratio
        is_large = ratio > LARGEST_RATIO
        if is_large if sparse.parallel is None else sparse.parallel.any(is_large):
            left.append(f"{name}: {ratio:.0%} of its size")
            plain += weight.numel()
            continue
        if not torch.equal(packed.weight.view(torch.int16), weight.view(torch.int16)):
            raise RuntimeError(f"patch_model: {layer.name}.{name} did not come back to the bit: a defect, please report it")
        plain += ratio * weight.numel()
        made[id(linear)] = packed
        packed.tie = ties.get(id(linear.weight))
        packed.take_place_of(linear, name, sparse, sparse.replaced)
        del linear, weight
    return replace(layer, ratio=plain / before, plain=", ".join(left))


def unpatch_model(model: nn.Module) -> None:
    """Undo `patch_model`: the MLPs of before, on the weights of now in `nn.Linear`'s layout. Others are left alone.

    Compressed weights become plain ones again, bit for bit, a matrix at a time, and those that were moved side by side get
    memory of their own.

    Projections that were replaced since then, by LoRA adapters for instance, stay. Where it is interrupted or finds no memory
    for plain weights, the model computes what it did, and the next call does the rest.

    Raises
    ------
    TypeError
        `model` is no module.
    RuntimeError
        A streamer or criterion of `generate` called it on the model that is writing. Other threads are waited for.
    """
    check_module("unpatch_model", model)
    with Runner.of(model).alone("unpatch_model"):
        _unpatch(model)


def _unpatch(model: nn.Module) -> None:
    release_generation(model)
    tied: dict[object, Any] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, SparseMLP) and module.replaced is not None:
            _put_back(model, name, module, tied)
    _put_back_halves(model)
    put_back_matrices(model)


def own_formula(model: nn.Module, name: str, mlp: Any, family: MLPFamily, given: float | None) -> tuple[Formula, str]:
    """What an MLP computes, and a note where its config says something else.

    The formula that its config names is believed for now if it is a known one. If it is not, the code is tried for all that are
    known. `given` is the threshold that a config does not say. ValueError if the activation leaves no zeros.
    """
    mlp = _tried_in_place_of(mlp, family)
    config: Any = getattr(mlp, "config", None) or getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    key, activation, parameter = family.said(config)
    own: Any = getattr(mlp, family.activation, None)
    gated, normed = family.gated, family.norm is not None
    said = f"the config says {key}={activation!r}"
    if key_is_missing := activation is None:
        activation = {nn.ReLU: RELU, FATReLU: FATRELU}.get(type(own), type(own).__name__)
        said = (
            f"the config has no {key}, and {family.activation} is a {activation}"
            if own is not None
            else "nothing names the activation"
        )
    if isinstance(own, FATReLU) and own.threshold is not None:
        parameter = own.threshold
    if parameter is None and activation == FATRELU and given is None:
        raise ValueError(
            f"patch_model: {name}: {said}, but the config has no {key}_param, its threshold: pass "
            "patch_model(model, threshold=T); nothing was changed"
        )
    if (known := activation_of(own)) is not None:  # it says by itself what it computes
        formula = Formula(known[1], known[0], gated, normed)
        differs = activation not in (None, known[0], FATRELU) or (activation == known[0] == RELU and known[1] > 0)
        return formula, f"{said}, its {family.activation} is {formula}" if differs and activation != type(own).__name__ else ""
    try:
        formula = formula_of(activation, given if parameter is None else parameter, gated=gated, normed=normed)
    except UnsupportedFormula as error:
        is_tried = not why_dense(mlp, family)
        found = _tried(mlp, family, None, given) if is_tried else None
        if found is None:
            why = f"{said}: {error}"
            if is_tried and own is None and key_is_missing:
                of_relu = why_another_formula(mlp, family, Formula(0.0, RELU, gated, normed))
                why = f"{said}, and its code computes none of {', '.join(ACTIVATIONS)}: {of_relu}"
            raise _NotSparse(f"patch_model: {name}: {why}; nothing was changed", why) from None
        return found, f"{said}, its code computes {_called(found)}"
    if not formula.threshold and not why_dense(mlp, family) and why_another_formula(mlp, family, formula):
        found = _tried(mlp, family, formula, given)
        if found is not None:
            return found, f"{said}, its code computes {_called(found)}"
    return formula, ""


def _called(formula: Formula) -> str:
    return str(formula) if formula.threshold else formula.activation


def _tried(mlp: Any, family: MLPFamily, but: Formula | None, given: float | None) -> Formula | None:
    """The formula, but for one that was tried, that an MLP's code computes, if it is a known one, with a threshold that is
    given or without one."""
    names = [name for name in ACTIVATIONS if family.gated or name != DRELU]
    for threshold, name in product([0.0, given] if given else [0.0], names):
        formula = Formula(threshold, name, family.gated, family.norm is not None)
        with torch.no_grad():
            if formula != but and not why_another_formula(mlp, family, formula):
                return formula
    return None


def why_dense(mlp: Any, family: MLPFamily) -> str:
    """Why an MLP cannot be patched, or nothing."""
    if isinstance(parallel := _parallel_of_mlp(mlp, family), str):
        return parallel
    mlp = _tried_in_place_of(mlp, family)
    names = family.projections
    linears = [getattr(mlp, p) for p in names]
    for name, linear in zip(names, linears, strict=True):
        if not is_plain_linear(linear, family):
            return f"{name} is a {type(linear).__module__}.{type(linear).__qualname__}, not a torch.nn.Linear itself"
        if linear.bias is not None and family.fused == name:
            return f"{name} has a bias"
        if type(linear.weight.data) is not torch.Tensor or linear.weight.dtype not in DTYPES:
            return (
                f"{name} is {linear.weight.dtype} in a {type(linear.weight.data).__name__}: bfloat16, float16 or float32 needed"
            )
    if family.norm is not None and not isinstance(getattr(getattr(mlp, family.norm), "weight", None), Tensor):
        return f"{family.norm} has no weight"
    weights = [linear.weight for linear in linears]
    watched = linears if family.is_inside else list(mlp.modules())
    if any(does_more(m) for m in watched):
        return "it has hooks, or a forward of its own (offloading, or a user's)"
    if any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p for m in watched):
        return "it has dropout"
    if any(w.is_meta for w in weights):
        return "its weights are on the meta device: load them first"
    biases = [linear.bias for linear in linears if linear.bias is not None]
    vectors = biases if family.norm is None else [*biases, getattr(mlp, family.norm).weight]
    if len({(w.device, w.dtype) for w in (*weights, *vectors)}) > 1:
        return "its weights have different devices or dtypes"
    lengths = [linear.out_features for linear in linears if linear.bias is not None] + [linears[-1].in_features]
    if any(v.shape != (n,) or not v.is_contiguous() for v, n in zip(vectors, lengths, strict=False)):
        return "a bias, or the weight of its norm, is no contiguous vector with a value for each output"
    if weights[0].device.type not in ("cuda", "cpu"):
        return f"its weights are on {weights[0].device}"
    rows = weights[-1].shape[1] * (2 if family.fused is not None else 1)
    if any(w.shape != (rows, weights[-1].shape[0]) for w in weights[:-1]):
        return f"its weights do not fit each other: {', '.join(str(tuple(w.shape)) for w in weights)}"
    if weights[0].numel() == 0:
        return f"it has no neurons: {names[0]}.weight has shape {tuple(weights[0].shape)}"
    vector = VECTOR_BYTES // weights[0].element_size()
    if weights[0].shape[1] % vector:
        return f"d_model is {weights[0].shape[1]}, not a multiple of {vector}"
    if any(w.data_ptr() % VECTOR_BYTES for w in weights) or not all(w.is_contiguous() for w in weights[:-1]):
        return "its weights are views into other memory, strided or not aligned to 16 bytes"
    return ""


def other_parameters(mlp: nn.Module, family: MLPFamily) -> list[str]:
    """Names of parameters and buffers that a family does not know of, and that a patched module would not have."""
    known = {f"{part}.{leaf}" for part in family.projections for leaf in ("weight", "bias")} | {f"{family.norm}.weight"}
    return [name for name, _ in (*mlp.named_parameters(), *mlp.named_buffers()) if name not in known]


@torch.no_grad()
def _replace(
    model: nn.Module,
    name: str,
    mlp: Any,
    family: MLPFamily,
    was: Formula,
    becomes: Formula,
    hidden: Tensor | None,
    parallel: TensorParallel | None,
    batch_invariant: bool,
) -> str:
    """Have an MLP decode sparsely, or say why that is not what it computes and leave it as it is.

    `parallel` is whose processes hold parts of the model: all replace an MLP, or none.
    """
    if parallel is None:
        return _why_not_replaced(mlp, mlp, family, was, becomes, hidden, batch_invariant, model, name)
    # No part of a layer is run by several processes while one may fail.
    with parallel.together():
        reason = _why_not_replaced(_tried_in_place_of(mlp, family), mlp, family, was, becomes, hidden, batch_invariant)
    reason = parallel.agreed(reason)
    if family.is_inside:
        if reason:
            _put_back_halves(mlp)
            put_back_matrices(mlp)
    elif not reason:
        is_shard = isinstance(_parallel_of_mlp(mlp, family), TensorParallel)
        with parallel.together():  # which lays a matrix out anew
            model.set_submodule(name, made_sparse(mlp, family, becomes, parallel if is_shard else None, batch_invariant))
    return reason


def _why_not_replaced(
    tried: Any,
    mlp: Any,
    family: MLPFamily,
    was: Formula,
    becomes: Formula,
    hidden: Tensor | None,
    batch_invariant: bool,
    model: nn.Module | None = None,
    name: str = "",
) -> str:
    """Why the sparse module does not compute what `tried` does, or nothing. It then is in the place of `name` in a model.

    `tried` is `mlp`, or of one that is split this process's part.
    """
    if reason := why_dense(mlp, family):
        return reason
    with torch.autocast(getattr(tried, family.up if family.fused is None else family.fused).weight.device.type, enabled=False):
        if reason := why_another_formula(tried, family, was):
            return reason
        if not family.is_inside and (more := other_parameters(mlp, family)):
            return f"it has parameters of its own: {', '.join(more)}"
        if family.is_inside:
            return _replace_halves(mlp, family, was, becomes, hidden, batch_invariant)
        sparse = made_sparse(tried, family, becomes, batch_invariant=batch_invariant)
        if model is not None:
            model.set_submodule(name, sparse)
        reason = why_outside_the_contract(tried, family, was, sparse, becomes, hidden)
    if reason and model is not None:
        _put_back(model, name, sparse)
    return reason


_STYLES: dict[bool, Style] = {False: "colwise", True: "rowwise"}


def _parallel_of_mlp(mlp: Any, family: MLPFamily) -> TensorParallel | str | None:
    """Whose shard an MLP is, None if it is whole, or why such a shard stays dense."""
    styles: list[Style] = [_STYLES[name == family.down] for name in family.projections]
    found = sharding_of_all([getattr(mlp, name) for name in family.projections], styles)
    if isinstance(found, TensorParallel) and (family.norm is not None or family.is_inside or family.fused is not None):
        return "split over several processes, and its norm needs all neurons" if family.norm else "split inside a layer"
    return found


def _tried_in_place_of(mlp: Any, family: MLPFamily) -> Any:
    """An MLP itself, or of one that is split a copy that computes this process's part alone, without `down`'s bias."""
    if not isinstance(_parallel_of_mlp(mlp, family), TensorParallel):
        return mlp
    other = copy.copy(mlp)
    other._modules = dict(mlp._modules)
    for name in family.projections:
        linear = getattr(mlp, name)
        weight = local_of(linear.weight).detach()
        new = type(linear)(weight.shape[1], weight.shape[0], bias=False, device="meta")
        new.weight = nn.Parameter(weight, requires_grad=False)
        if linear.bias is not None and name != family.down:
            new.bias = nn.Parameter(local_of(linear.bias).detach(), requires_grad=False)
        other._modules[name] = new
    return other


def made_sparse(
    mlp: nn.Module,
    family: MLPFamily,
    formula: Formula,
    parallel: TensorParallel | None = None,
    batch_invariant: bool = True,
) -> SparseMLP:
    """The module that takes an MLP's place."""
    sparse: SparseMLP
    if family == LLAMA_LIKE and formula == Formula(formula.threshold):
        sparse = SparseGatedMLP.from_mlp(mlp, formula.threshold)
        sparse.parallel = parallel
    else:
        sparse = SparseMLP.of(mlp, family, formula, parallel)
    sparse.batch_invariant = batch_invariant
    return sparse


def _put_back(model: nn.Module, name: str, sparse: SparseMLP, tied: dict[object, Any] | None = None) -> None:
    """The MLP of before; `tied` has the parameters that were one with others, as far as these have been put back."""
    unpack(sparse.down)
    before: Any = sparse.replaced
    for projection in sparse.family.projections:
        linear = getattr(sparse, projection)
        if isinstance(linear, CompressedLinear):
            tie, linear = linear.tie, linear.put_back()
            if tie is not None and tied is not None:
                linear.weight = tied.setdefault(tie, linear.weight)
            setattr(sparse, projection, linear)
        setattr(before, projection, linear)
    if sparse.family.norm is not None:
        setattr(before, sparse.family.norm, getattr(sparse, sparse.family.norm))
    model.set_submodule(name, before.train(sparse.training))


def _replace_halves(
    layer: Any, family: MLPFamily, was: Formula, becomes: Formula, hidden: Tensor | None, batch_invariant: bool
) -> str:
    """The same of projections inside a layer, which stays."""
    up, down = getattr(layer, family.up), getattr(layer, family.down)
    before = getattr(layer, family.activation, None)
    if reason := why_outside_the_contract(layer, family, was, None, was, hidden):
        return reason
    if was.activation == RELU and isinstance(before, nn.Module):
        if becomes != was or lacks_threshold(layer, family):
            setattr(layer, family.activation, module_of(becomes).train(before.training))
        setattr(layer, family.up, SparseUp(up, layer, family, becomes.threshold, before))
    elif becomes != was:
        return f"inside a layer only the threshold of a ReLU can be moved, not that of {was}"
    elif up.bias is None:  # an activation that must not be applied twice stays the layer's
        decoding = DecodingLinear.of(up)
        decoding._replaced, decoding.batch_invariant = (up,), batch_invariant
        setattr(layer, family.up, decoding)
    setattr(layer, family.down, SparseDown(down))
    getattr(layer, family.down).batch_invariant = batch_invariant
    reason = why_outside_the_contract(layer, family, becomes, lambda x: run(layer, family, x), becomes, hidden)
    if reason:
        _put_back_halves(layer)
        put_back_matrices(layer)
    return reason


def _put_back_halves(module: nn.Module) -> None:
    """Those of a layer, or of a whole model, also where an adapter holds them by now."""
    for name, half in list(module.named_modules()):
        if isinstance(half, SparseUp):
            half.put_back_activation()
        elif isinstance(half, SparseDown):
            unpack(half)
        else:
            continue
        module.set_submodule(name, half.linear())
