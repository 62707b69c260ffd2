"""Load a compressed checkpoint, without ever holding the plain weights of more than one attention."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from ..checkpoint import CheckpointError, files_by_name, read_json
from ..families import MLPFamily
from ..formula import Formula
from ..packed import MANIFEST, Entry, read_manifest
from .acceptance import forget_tensors, why_another_formula
from .compressed import checked_packed_of
from .families import mlps
from .linears import CompressedLinear
from .matrices import rejoin_matrices
from .mlp import SparseMLP, pack, rounds_twice
from .patch import made_sparse, own_formula

_LAYER = re.compile(r"\.\d+\.")
_GENERATION_CONFIG = "generation_config.json"
_OF_CONFIGS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def load_compressed(folder: str | Path, device: Any = "cuda", *, verify: bool = True, **keywords: Any) -> nn.Module:
    """A causal language model from what ``prosparse-cupy compress`` wrote, patched and compressed.

    The model is that of ``from_pretrained`` on the checkpoint before, after ``patch_model(model, compress=True)``:
    `unpatch_model` makes it plain again, ``save_pretrained`` writes the ordinary checkpoint. Compressed weights go to the
    device as they are.

    Parameters
    ----------
    folder : path
        Holds ``prosparse.json``.
    device : optional
        Where the model goes; "cuda" by default.
    verify : bool, default True
        Compare the checksum of every file of weights first, a few seconds for a 7B model.
    keywords
        Go to ``transformers.AutoConfig.from_pretrained`` and ``AutoModelForCausalLM.from_config``, ``trust_remote_code=True``
        for instance.

    Returns
    -------
    torch.nn.Module
        In evaluation mode and bfloat16.

    Raises
    ------
    CheckpointError
        A file is missing or changed, or the model's code does not compute the formula of its config, or has other weights.
    ValueError
        As for `patch_model`.
    """
    import transformers

    auto: Any = transformers.AutoModelForCausalLM
    path = Path(folder)
    if not (path / MANIFEST).is_file():
        raise CheckpointError(f"{path}: has no {MANIFEST}: write one with `prosparse-cupy compress CHECKPOINT {path}`")
    for name in ("config.json", _GENERATION_CONFIG):
        if name == "config.json" or (path / name).is_file():
            read_json(path / name)
    entries = read_manifest(path, verify)
    try:
        config = transformers.AutoConfig.from_pretrained(path, **keywords)
        with torch.device("meta"):
            model = auto.from_config(config, dtype=torch.bfloat16, **keywords)
        with torch.random.fork_rng(devices=[]):
            twin = _twin(config, keywords)
    except _OF_CONFIGS as error:
        said = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path}: transformers makes no model of its config.json ({said})") from error
    try:
        formulas = _checked_formulas(twin, path)
    finally:
        forget_tensors()
    _give_buffers(model, twin, path, device)
    sparse = _made_sparse(model, formulas)
    _load(model, path, entries, device)
    for module in sparse:
        pack(module.down)
    model.tie_weights()
    rejoin_matrices(model)
    if left := [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]:
        raise CheckpointError(f"{path}: has no {left[0]}, and {len(left) - 1} more that the model needs")
    _take_generation_config(model, path)
    loaded: nn.Module = model.eval()
    return loaded


def _twin(config: Any, keywords: dict[str, Any]) -> nn.Module:
    """The model with one small layer, in host memory: it has the buffers that checkpoints lack, and the code of the FFN."""
    import transformers

    auto: Any = transformers.AutoModelForCausalLM
    small = copy.deepcopy(config)
    small.num_hidden_layers, small.intermediate_size, small.vocab_size, small.pad_token_id = 1, 256, 8, None
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[:1]
    model: nn.Module = auto.from_config(small, dtype=torch.bfloat16, **keywords)
    return model.eval()


def _checked_formulas(twin: nn.Module, path: Path) -> dict[MLPFamily, Formula]:
    """What the model's MLPs compute, by their family, which its code must bear out."""
    formulas: dict[MLPFamily, Formula] = {}
    for name, mlp, family in mlps(twin):
        if not family.is_inside:
            try:
                formulas[family], _ = own_formula(twin, name, mlp, family, None)
            except ValueError as error:  # of a config that was of another model, or has come to harm
                raise CheckpointError(f"{path}: the model of its config.json has no FFN for its weights ({error})") from error
            if reason := why_another_formula(mlp, family, formulas[family]):
                raise CheckpointError(f"{path}: {reason}: load the plain checkpoint with from_pretrained")
    return formulas


def _give_buffers(model: nn.Module, twin: nn.Module, path: Path, device: Any) -> None:
    """The twin's buffers for the model's, which are on the meta device."""
    own = dict(twin.named_buffers())
    for name, buffer in list(model.named_buffers()):
        like = own.get(_LAYER.sub(".0.", name))
        if like is None or like.shape != buffer.shape:
            raise CheckpointError(f"{path}: {name} of this model is neither in its checkpoint nor known")
        holder, _, leaf = name.rpartition(".")
        model.get_submodule(holder)._buffers[leaf] = like.to(device, copy=True)


def _made_sparse(model: nn.Module, formulas: dict[MLPFamily, Formula]) -> list[SparseMLP]:
    """Put a `SparseMLP` in the place of every MLP."""
    made = []
    for name, mlp, family in list(mlps(model)):
        if family in formulas:
            sparse = made_sparse(mlp, family, formulas[family])
            model.set_submodule(name, sparse)
            made.append(sparse)
    return made


def _load(model: nn.Module, path: Path, entries: dict[str, Entry], device: Any) -> None:
    from safetensors import SafetensorError, safe_open

    files = files_by_name(path)
    of_part = {f"{name}.part_{i}": name for name, entry in entries.items() for i in range(entry.parts)}
    if missing := [part for part in of_part if part not in files]:
        raise CheckpointError(f"{path}: {missing[0]} is missing")
    console = Console(stderr=True)
    for file in track(sorted({*files.values()}), "loading", console=console, transient=True, disable=not console.is_terminal):
        parts: dict[str, dict[int, Tensor]] = {}
        try:
            with safe_open(path / file, framework="pt", device=str(device)) as source:
                for key in list(source.keys()):
                    tensor = source.get_tensor(key)
                    if not tensor.is_cuda:
                        tensor = tensor.clone()  # out of the mapped file, where it may start anywhere
                    if key not in of_part:
                        _set(model, path, key, tensor)
                        continue
                    name = of_part[key]
                    held = parts.setdefault(name, {})
                    held[int(key.rpartition("_")[2])] = tensor
                    if len(held) == entries[name].parts:
                        _set_packed(model, path, name, entries[name], [held[i] for i in sorted(held)])
                        del parts[name]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path / file}: cannot be read as safetensors: {error}") from None


def _set(model: nn.Module, path: Path, key: str, tensor: Tensor) -> None:
    holder, _, leaf = key.rpartition(".")
    try:
        module = model.get_submodule(holder)
        old = module._parameters[leaf] if leaf in module._parameters else module._buffers[leaf]
    except (AttributeError, KeyError):
        raise CheckpointError(f"{path}: {key} is no weight of a {type(model).__name__}") from None
    if old is None or old.shape != tensor.shape:
        raise CheckpointError(
            f"{path}: {key} has shape {tuple(tensor.shape)}, the model's has {tuple(getattr(old, 'shape', ()))}"
        )
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor.to(old.dtype), requires_grad=old.requires_grad)
    else:
        module._buffers[leaf] = tensor.to(old.dtype)


def _set_packed(model: nn.Module, path: Path, name: str, entry: Entry, parts: list[Tensor]) -> None:
    holder, _, leaf = name.removesuffix(".weight").rpartition(".")
    facts = (("rows", "slices").index(entry.layout), *entry.shape)
    try:
        numbers = torch.tensor([entry.base, entry.escapes], dtype=torch.int64, device="cpu")
        packed = checked_packed_of([*parts, numbers], facts)
    except (ValueError, RuntimeError) as error:  # torch's, of numbers that are too large
        raise CheckpointError(f"{path}: {name}: {error}") from None
    if strays := packed.strays():
        raise CheckpointError(f"{path}: {name}: {strays} chunks of 8 weights are not among its {entry.escapes} escapes")
    linear = CompressedLinear.of_packed(packed, transposed=entry.transposed)
    try:
        module = model.get_submodule(holder)
        old = getattr(module, leaf)
    except AttributeError:
        raise CheckpointError(f"{path}: {name} is no weight of a {type(model).__name__}") from None
    dims = linear.out_features, linear.in_features
    biased = isinstance(old, nn.Linear) and old.bias is not None and not isinstance(module, SparseMLP)
    if not isinstance(old, nn.Linear) or biased or (old.out_features, old.in_features) != dims:
        raise CheckpointError(f"{path}: {name} has other dims than the model's config says, or is no plain projection there")
    if rounds_twice(old):
        old.weight = nn.Parameter(linear.weight.contiguous(), requires_grad=old.weight.requires_grad)
        return
    if isinstance(module, SparseMLP):
        linear.register_parameter("bias", old.bias)
        setattr(module.replaced, leaf, linear)
        setattr(module, leaf, linear)
    else:
        linear.take_place_of(old, leaf, module)


def _take_generation_config(model: Any, path: Path) -> None:
    import transformers

    if (path / _GENERATION_CONFIG).is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(path)
