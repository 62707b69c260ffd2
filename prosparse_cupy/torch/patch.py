"""Patch a loaded Hugging Face model: its gated ReLU FFNs decode sparsely."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from ..compressed import LARGEST_RATIO, is_too_narrow
from ..formats import VECTOR_BYTES
from ..formula import FATRELU, RELU, UnsupportedFormula, check_threshold, formula_of, said_by
from ._text import table
from .acceptance import why_another_formula, why_outside_the_contract
from .activation import FATReLU
from .dispatch import DTYPES, does_more
from .linears import CompressedLinear, DecodingLinear
from .matrices import MatrixPatch, groups_of, put_back_matrices, replace_matrices, rows_of_report
from .mlp import PROJECTIONS, SparseGatedMLP, unpack
from .steps import release_generation


@dataclass(frozen=True)
class LayerPatch:
    """What `patch_model` did with one gated MLP."""

    name: str
    sparse: bool
    """Whether one token now goes through the sparse operators."""
    threshold: float
    reason: str = ""
    """Why it was left dense."""
    ratio: float = 1.0
    """What its weights take of plain ones' memory; below 1 where they are compressed."""
    plain: str = ""
    """Which of its weights were not compressed, and why, where that was asked for."""


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
        title = f"{len(self.sparse)} of {len(self.layers)} gated MLPs decode sparsely"
        heads = ["layer", "decoding", "threshold"]
        rows = [[x.name, "sparse" if x.sparse else f"dense: {x.reason}", f"{x.threshold:g}"] for x in self.layers]
        sparse = self.sparse
        if any(x.ratio < 1 or x.plain for x in sparse):
            title += f", their weights in {sum(x.ratio for x in sparse) / len(sparse):.1%} of the memory"
            heads += ["weights", "left plain"]
            rows = [[*row, f"{x.ratio:.1%}", x.plain] for row, x in zip(rows, self.layers, strict=True)]
        return table(title, tuple(heads), [tuple(row) for row in rows])


def patch_model(
    model: nn.Module, threshold: float | None = None, *, compress: bool = False, linears: bool = True
) -> PatchReport:
    """Let every gated ReLU MLP of a model decode sparsely, and its other matrices fast; exactly as before, within rounding.

    An MLP is gated if it has `gate_proj`, `up_proj` and `down_proj`, as in LLaMA, Mistral, Qwen2, MiniCPM, and remote code like
    them. Its activation comes from the config, `hidden_act` (``relu``, or ``fatrelu`` with `hidden_act_param`). One token at a
    time goes through the sparse operators, longer inputs (prefill) through the dense path on the same weights.

    The other matrices, those of attention, the head that makes logits, and those of MLPs that stay dense, are read through
    `ffn_1` for one token, which is faster than the vendor's library. Projections of one input (`q_proj`, `k_proj`, `v_proj`)
    are moved side by side in memory, so that `generate` reads them as one. So a model whose activation has no zeros, SiLU for
    instance, decodes faster too.

    The model is patched in place. Nothing is taken for granted. A layer's code is run in float64 on random weights, at several
    input scales, and must give what the formula gives; its own output and the sparse one must be as close to float64 as the
    dense path in the same dtype, within a factor of two and one ulp. Otherwise the layer is left dense, and the report says
    why. Trying it also compiles its kernels.

    Patch before `torch.compile` and before a CUDA graph is captured: both keep what they saw. On the CPU one token goes through
    the NumPy reference: right, and slow.

    Parameters
    ----------
    model : torch.nn.Module
        Loaded, on its device, in bfloat16, float16 or float32.
    threshold : float, optional
        FATReLU's T in place of the config's: this moves the activation of the model, and so changes what it says. The layer's
        code must still be ReLU or FATReLU as its config says; where the config has no threshold, this one.
    compress : bool, default False
        Hold the weights in 12 bits instead of 16, without loss (`prosparse_cupy.compress`): the same numbers in three
        quarters of the memory, and faster in a CUDA graph. For bfloat16 models and for inference: compressed weights are no
        parameters. One matrix at a time is compressed. Prefill decompresses a matrix for the time of its call. State dicts and
        ``save_pretrained`` hold the plain weights, in host memory. A matrix that would not get below 80 % of its size stays
        plain, and so does a `down_proj` of a model too narrow for compression to pay (`d_model` of 2640 and less), and a head
        that is the embedding too.
    linears : bool, default True
        Also take the other matrices; False leaves all but the sparse FFNs as they are.

    Returns
    -------
    PatchReport
        Per layer what was done; MLPs with biases, quantised, offloaded or meta weights, or hooks are left dense, with the
        reason.

    Raises
    ------
    TypeError
        `model` is no module.
    ValueError
        Nothing to patch, an activation that is not ReLU (with ``linears=False``, or with a `threshold`), a `fatrelu` config
        without its threshold, a model that is patched already, or one to be compressed whose weights are not bfloat16. Nothing
        has been changed.
    """
    check_module("patch_model", model)
    found = list(gated_mlps(model))
    if not found and not (linears and any(groups_of(model))):
        raise ValueError(f"patch_model: {type(model).__name__} has no module with {', '.join(PROJECTIONS)}: nothing to patch")
    if found and found[0][0] == "":
        raise ValueError("patch_model: this is a gated MLP, not a model with some: use SparseGatedMLP.from_mlp(mlp)")
    if any(isinstance(m, (SparseGatedMLP, DecodingLinear, CompressedLinear)) for m in model.modules()):
        raise ValueError("patch_model: the model is patched already: call unpatch_model(model) first")
    given = None if threshold is None else check_threshold("patch_model", threshold)
    if compress:
        _check_compressible(model, found, linears)
    own = [_own_or_dense(model, name, mlp, given, linears) for name, mlp in found]
    release_generation(model)
    layers, matrices = list[LayerPatch](), list[MatrixPatch]()
    try:
        for (name, mlp), was in zip(found, own, strict=True):
            if isinstance(was, str):
                layers.append(LayerPatch(name, False, 0.0, was))
                continue
            becomes = was if given is None else given
            reason = _why_dense(mlp) or _replace(model, name, mlp, was, becomes)
            layers.append(LayerPatch(name, not reason, becomes, reason))
        if compress:
            layers = _compress_all(model, layers)
        if linears:
            matrices = replace_matrices(model, compress)
    except BaseException:  # no GPU memory, a kernel that does not compile, Ctrl-C
        unpatch_model(model)
        raise
    return PatchReport(tuple(layers), tuple(matrices))


def _own_or_dense(model: nn.Module, name: str, mlp: Any, given: float | None, linears: bool) -> float | str:
    """T of an MLP as it is, or, where its matrices can be taken without it, why it is not sparse."""
    try:
        return own_threshold(model, name, mlp, given)
    except _NotSparse as error:
        if given is not None or not linears:
            raise
        return error.reason


class _NotSparse(ValueError):
    """An activation that leaves no zeros."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def _check_compressible(model: nn.Module, found: list[tuple[str, Any]], linears: bool) -> None:
    """ValueError if weights have a dtype that does not compress."""
    weights = [(name, getattr(mlp.gate_proj, "weight", None)) for name, mlp in found]
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
    done = [_compressed(model.get_submodule(layer.name), layer) if layer.sparse else layer for layer in bar]
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # the plain weights' memory goes back to the GPU
    return done


@torch.no_grad()
def _compressed(sparse: Any, layer: LayerPatch) -> LayerPatch:
    """A layer whose weights have been compressed, one after the other, where that pays."""
    before, plain = 0, 0.0
    left = list[str]()
    for name in PROJECTIONS:
        linear = getattr(sparse, name)
        weight, transposed = linear.weight, name == "down_proj"
        before += weight.numel()
        if transposed and is_too_narrow(sparse.d_model, sparse.d_ff):
            left.append(f"{name}: d_model {sparse.d_model} is too narrow")
            plain += weight.numel()
            continue
        packed = CompressedLinear(weight, transposed=transposed)
        ratio = packed.packed.ratio
        if ratio > LARGEST_RATIO:
            left.append(f"{name}: {ratio:.0%} of its size")
            plain += weight.numel()
            continue
        if not torch.equal(packed.weight.view(torch.int16), weight.view(torch.int16)):
            raise RuntimeError(f"patch_model: {layer.name}.{name} did not come back to the bit: a defect, please report it")
        plain += ratio * weight.numel()
        packed.train(linear.training)
        for holder in (sparse, sparse.replaced):
            setattr(holder, name, packed)
        del linear, weight
    return replace(layer, ratio=plain / before, plain=", ".join(left))


def unpatch_model(model: nn.Module) -> None:
    """Undo `patch_model`: the MLPs of before, on the weights of now in `nn.Linear`'s layout. Others are left alone.

    Compressed weights become plain ones again, bit for bit, a matrix at a time, and those that were moved side by side get
    memory of their own.

    Projections that were replaced since then, by LoRA adapters for instance, stay.
    """
    check_module("unpatch_model", model)
    release_generation(model)
    for name, mlp in list(gated_mlps(model)):
        if isinstance(mlp, SparseGatedMLP) and mlp.replaced is not None:
            _put_back(model, name, mlp)
    put_back_matrices(model)


def check_module(function: str, model: nn.Module) -> None:
    """TypeError for what is no module, such as the name of one."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{function}: model must be a torch.nn.Module, got {type(model).__name__}: load it first, for example with "
            "transformers.AutoModelForCausalLM.from_pretrained"
        )


def gated_mlps(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of every gated MLP."""
    for name, module in model.named_modules():
        if all(isinstance(getattr(module, p, None), nn.Module) for p in PROJECTIONS):
            yield name, module


def own_threshold(model: nn.Module, name: str, mlp: Any, given: float | None) -> float:
    """T of an MLP as it is; `given` if its config does not say; ValueError if its activation is not supported."""
    config: Any = getattr(mlp, "config", None) or getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    activation, parameter = said_by(config)
    own: Any = getattr(mlp, "act_fn", None)
    said = f"the config says hidden_act={activation!r}"
    if activation is None:
        activation = {nn.ReLU: RELU, FATReLU: FATRELU}.get(type(own), type(own).__name__)
        said = (
            f"the config has no hidden_act, and act_fn is a {activation}" if own is not None else "nothing names the activation"
        )
    if isinstance(own, FATReLU) and own.threshold is not None:
        parameter = own.threshold
    if parameter is None and activation == FATRELU and given is None:
        raise ValueError(
            f"patch_model: {name}: {said}, but the config has no hidden_act_param, its threshold: pass "
            "patch_model(model, threshold=T); nothing was changed"
        )
    try:
        return formula_of(activation, given if parameter is None else parameter).threshold
    except UnsupportedFormula as error:
        raise _NotSparse(f"patch_model: {name}: {said}: {error}; nothing was changed", f"{said}: {error}") from None


def _why_dense(mlp: Any) -> str:
    """Why an MLP cannot be patched, or nothing."""
    linears = [getattr(mlp, p) for p in PROJECTIONS]
    for name, linear in zip(PROJECTIONS, linears, strict=True):
        if type(linear) is not nn.Linear:
            return f"{name} is a {type(linear).__module__}.{type(linear).__qualname__}, not a torch.nn.Linear itself"
        if linear.bias is not None:
            return f"{name} has a bias"
        if type(linear.weight.data) is not torch.Tensor or linear.weight.dtype not in DTYPES:
            return (
                f"{name} is {linear.weight.dtype} in a {type(linear.weight.data).__name__}: bfloat16, float16 or float32 needed"
            )
    weights = [linear.weight for linear in linears]
    if any(hasattr(m, "_hf_hook") or does_more(m) for m in mlp.modules()):
        return "it has hooks, or a forward of its own (offloading, or a user's)"
    if any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p for m in mlp.modules()):
        return "it has dropout"
    if any(w.is_meta for w in weights):
        return "its weights are on the meta device: load them first"
    if len({(w.device, w.dtype) for w in weights}) > 1:
        return "its weights have different devices or dtypes"
    if weights[0].device.type not in ("cuda", "cpu"):
        return f"its weights are on {weights[0].device}"
    if weights[0].shape != weights[1].shape or weights[0].shape != weights[2].t().shape:
        return f"its weights do not fit each other: {', '.join(str(tuple(w.shape)) for w in weights)}"
    if weights[0].numel() == 0:
        return f"it has no neurons: gate_proj.weight has shape {tuple(weights[0].shape)}"
    vector = VECTOR_BYTES // weights[0].element_size()
    if weights[0].shape[1] % vector:
        return f"d_model is {weights[0].shape[1]}, not a multiple of {vector}"
    if any(w.data_ptr() % VECTOR_BYTES for w in weights) or not all(w.is_contiguous() for w in weights[:2]):
        return "its weights are views into other memory, strided or not aligned to 16 bytes"
    return ""


@torch.no_grad()
def _replace(model: nn.Module, name: str, mlp: Any, was: float, becomes: float) -> str:
    """Put a SparseGatedMLP in the place of `mlp`, or say why that is not what `mlp` computes and leave `mlp` there."""
    with torch.autocast(mlp.gate_proj.weight.device.type, enabled=False):
        if reason := why_another_formula(mlp, was):
            return reason
        sparse = SparseGatedMLP.from_mlp(mlp, becomes)
        model.set_submodule(name, sparse)
        reason = why_outside_the_contract(mlp, was, sparse)
    if reason:
        _put_back(model, name, sparse)
    return reason


def _put_back(model: nn.Module, name: str, sparse: SparseGatedMLP) -> None:
    unpack(sparse.down_proj)
    before: Any = sparse.replaced
    for projection in PROJECTIONS:
        linear = getattr(sparse, projection)
        if isinstance(linear, CompressedLinear):
            linear = linear.linear()
            setattr(sparse, projection, linear)
        setattr(before, projection, linear)
    model.set_submodule(name, before.train(sparse.training))
