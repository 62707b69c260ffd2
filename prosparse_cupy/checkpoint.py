"""One layer's FFN weights from a Hugging Face checkpoint on disk: safetensors, in one file or sharded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .families import LLAMA_LIKE, MLPFamily
from .formula import Formula, UnsupportedFormula, formula_of

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_FLOATS = ("BF16", "F16", "F32", "F64")


class CheckpointError(ValueError):
    """The folder is not a checkpoint of a ReLU-activated gated FFN that can be read; the message says why."""


@dataclass(frozen=True)
class FFNWeights:
    """A layer's weights in `nn.Linear`'s layout, and its activation's threshold."""

    w_gate: np.ndarray
    """(d_ff, d_model)"""
    w_up: np.ndarray
    """(d_ff, d_model)"""
    w_down: np.ndarray
    """(d_model, d_ff)"""
    threshold: float


def load_ffn(folder: Path, layer: int) -> FFNWeights:
    """The gate, up and down projections of layer `layer` (from 0) of the checkpoint in `folder`.

    Raises
    ------
    CheckpointError
        A file is missing, may not be read or is no checkpoint's, the activation is neither ``relu`` nor ``fatrelu``, the layer
        does not exist, has biases or a norm, or its weights are empty, quantised, not finite or do not fit each other.
    """
    formula = formula_of_config(read_json(folder / "config.json"))
    if formula != Formula(formula.threshold):
        raise CheckpointError(f"{folder}: its FFN computes {formula}: only layers of gated ReLU or FATReLU are read")
    files = files_by_name(folder)
    for name in files:
        if re.search(rf"(?:^|\.)layers\.{layer}\.mlp\.(?!(?:{'|'.join(_PROJECTIONS)})\.weight$)", name):
            raise CheckpointError(f"{folder}: layer {layer} has {name}: only FFNs without biases and norms are read")
    w_gate, w_up, w_down = (_load(folder, files, layer, projection) for projection in _PROJECTIONS)
    if w_gate.ndim != 2 or w_up.shape != w_gate.shape or w_down.shape != w_gate.shape[::-1]:
        shapes = ", ".join(f"{n} {w.shape}" for n, w in zip(_PROJECTIONS, (w_gate, w_up, w_down), strict=True))
        raise CheckpointError(f"{folder}: layer {layer} is no gated FFN: {shapes}")
    if w_gate.size == 0:
        raise CheckpointError(f"{folder}: layer {layer} has no neurons: gate_proj has shape {w_gate.shape}")
    for name, weights in zip(_PROJECTIONS, (w_gate, w_up, w_down), strict=True):
        if wrong := weights.size - np.count_nonzero(np.isfinite(weights)):
            raise CheckpointError(f"{folder}: layer {layer}'s {name} has {wrong} weights that are NaN or infinite")
    return FFNWeights(w_gate, w_up, w_down, formula.threshold)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, got {type(content).__name__}")
    return content


def formula_of_config(config: dict[str, Any], family: MLPFamily = LLAMA_LIKE) -> Formula:
    """What a model's config says of its FFNs; CheckpointError if its activation is not supported."""
    key, activation, parameter = family.said(config)
    try:
        return formula_of(activation, parameter, gated=family.gated, normed=family.norm is not None)
    except UnsupportedFormula as error:
        raise CheckpointError(f"config.json says {key}={activation!r}: {error}") from None


def files_by_name(folder: Path) -> dict[str, str]:
    """Tensor name to file name, from the index of a sharded checkpoint or from the only file."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
            raise CheckpointError(f"{index}: weight_map must map names of tensors to names of files")
        return files
    if not (folder / "model.safetensors").is_file():
        raise CheckpointError(f"{folder}: has neither model.safetensors nor model.safetensors.index.json")
    with open_safetensors(folder / "model.safetensors") as file:
        return dict.fromkeys(file.keys(), "model.safetensors")


def _load(folder: Path, files: dict[str, str], layer: int, projection: str) -> np.ndarray:
    ending = f"layers.{layer}.mlp.{projection}.weight"
    names = [name for name in files if name == ending or name.endswith(f".{ending}")]
    if not names:
        raise CheckpointError(f"{folder}: there is no tensor named *.{ending}: {_layers(files, projection)}")
    if len(names) > 1:
        raise CheckpointError(f"{folder}: there are {len(names)} tensors named *.{ending}")
    with open_safetensors(folder / files[names[0]]) as file:
        kind = file.get_slice(names[0]).get_dtype()
        if kind not in _FLOATS:
            raise CheckpointError(f"{folder}: {names[0]} is {kind}: quantised weights are not supported")
        tensor: np.ndarray = file.get_tensor(names[0])
        return tensor


def _layers(files: dict[str, str], projection: str) -> str:
    """Which layers a checkpoint has."""
    pattern = re.compile(rf"(?:^|\.)layers\.(\d+)\.mlp\.{projection}\.weight$")
    layers = {int(found[1]) for name in files if (found := pattern.search(name))}
    return f"its gated FFNs are in layers {min(layers)} to {max(layers)}" if layers else "it has no gated FFN"


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """A safetensors file; what it cannot give, while it is open, is a CheckpointError."""
    import ml_dtypes  # noqa: F401  teaches NumPy, and so safetensors, bfloat16
    from safetensors import SafetensorError, safe_open

    try:
        path.open("rb").close()  # safetensors calls every failure "no such file"
        with safe_open(path, framework="np") as file:
            yield file
    except CheckpointError:
        raise
    except (OSError, ValueError, SafetensorError) as error:  # ValueError: a name that no file can have
        raise CheckpointError(f"{path}: cannot be read as safetensors: {error}") from None
