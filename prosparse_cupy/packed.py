"""Compressed checkpoints: a Hugging Face checkpoint whose matrices are in 12 bits on disk too.

A folder as before, with the same files, in which the weight ``X.weight`` of an FFN's or attention's projection, or of the head,
is the tensors ``X.weight.part_0``, ``part_1``, ... of its `CompressedWeight`. ``prosparse.json`` says what they are, and the
checksum of every file of weights.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .checkpoint import CheckpointError, files_by_name, formula_of_config, open_safetensors, read_json
from .compressed import LARGEST_RATIO, CompressedWeight, Layout, compress, is_too_narrow
from .device import cupy, has_gpu
from .families import FAMILIES
from .formats import VECTOR_BYTES

MANIFEST = "prosparse.json"
VERSION = 1
_INDEX = "model.safetensors.index.json"
_FAMILIES = [family for family in FAMILIES if not family.is_inside and not family.classes]
"""Those that the names of weights tell apart."""
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_HEAD = "lm_head.weight"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5")

Tell = Callable[[str, int, int], None]
"""Is told what is being done, how many weights are done, and how many there are."""


class Entry(NamedTuple):
    """What the manifest says of a compressed weight."""

    layout: Layout
    shape: tuple[int, int]
    """(d_ff, d_model)"""
    base: int
    escapes: int
    parts: int

    @property
    def transposed(self) -> bool:
        """Whether it is the transpose of `nn.Linear`'s."""
        return self.layout == "slices"


class Summary(NamedTuple):
    """What `compress_checkpoint` did."""

    compressed: int
    """Weights."""
    plain: dict[str, str]
    """Those that were left as they are, and why."""
    bytes_before: int
    bytes_after: int


def compress_checkpoint(folder: Path, out: Path, tell: Tell = lambda doing, done, total: None) -> Summary:
    """Write the checkpoint in `folder` to `out`, its matrices in 12 bits; on the GPU where there is one.

    These are the projections of FFNs and of attention, and the head where it is not the embedding too.

    `out` appears when all of it is written. A file of weights is in memory at a time.

    Raises
    ------
    CheckpointError
        `folder` is no checkpoint of a model whose FFNs leave neurons at zero, cannot be read, or is compressed already; `out`
        exists or cannot be written.
    """
    if (folder / MANIFEST).exists():
        raise CheckpointError(f"{folder}: is a compressed checkpoint already")
    config = read_json(folder / "config.json")
    files = files_by_name(folder)
    projections = _projections(folder, config, files)
    others = _side_by_side(files, _ATTENTION)
    if _HEAD in files and not config.get("tie_word_embeddings", False):
        others.add(_HEAD)
    projections |= {name for name in others if f"{name.removesuffix('weight')}bias" not in files}
    if out.exists():
        raise CheckpointError(f"{out}: exists already: choose another folder, or remove it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.") as unfinished:
            written = Path(unfinished, out.name)
            written.mkdir()
            summary = _write(folder, written, files, projections, tell)
            written.rename(out)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written: {error}") from None
    return summary


def read_manifest(folder: Path, verify: bool = True) -> dict[str, Entry]:
    """The compressed weights of a folder; CheckpointError if a file is missing or, with `verify`, is not what was written."""
    content = read_json(folder / MANIFEST)
    if content.get("version") != VERSION:
        raise CheckpointError(f"{folder / MANIFEST}: is of version {content.get('version')!r}, this release reads {VERSION}")
    if content != sealed(content):
        raise CheckpointError(f"{folder / MANIFEST}: is not the file that was written: it was cut short or changed")
    try:
        entries = {
            str(name): Entry(
                entry["layout"],
                (int(entry["shape"][0]), int(entry["shape"][1])),
                entry["base"],
                entry["escapes"],
                entry["parts"],
            )
            for name, entry in content["weights"].items()
        }
        checksums = {str(file): str(digest) for file, digest in content["sha256"].items()}
        if any(
            e.layout not in ("rows", "slices") or any(type(n) is not int for n in (e.base, e.escapes, e.parts))
            for e in entries.values()
        ):
            raise TypeError("a weight has no layout, or its base, escapes or parts are no numbers")
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise CheckpointError(f"{folder / MANIFEST}: cannot be read ({type(error).__name__}: {error})") from None
    for file, digest in checksums.items():
        if Path(file).name != file or not (folder / file).is_file():
            raise CheckpointError(f"{folder}: {file} is missing")
        if verify and _sha256(folder / file) != digest:
            raise CheckpointError(f"{folder / file}: is not the file that was written: it was cut short or changed")
    if other := sorted({*files_by_name(folder).values()} - checksums.keys()):
        raise CheckpointError(f"{folder / _INDEX}: names {other[0]}, which was not written with {MANIFEST}")
    return entries


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest with the checksum of what it says."""
    said = {key: value for key, value in manifest.items() if key != "checksum"}
    return {**said, "checksum": hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()}


def _projections(folder: Path, config: dict[str, Any], files: dict[str, str]) -> set[str]:
    """Names of the weights of FFNs; CheckpointError if there are none, or their activation leaves no zeros."""
    found: set[str] = set()
    for family in _FAMILIES:
        norm = () if family.norm is None else (family.norm,)
        names = _side_by_side(files, (*family.projections, *norm))
        names = {n for n in names if not n.endswith(tuple(f".{leaf}.weight" for leaf in norm)) and ".experts." not in n}
        if names - found:
            formula_of_config(config, family)
            found |= names
    if not found:
        known = "; ".join(", ".join(family.projections) for family in _FAMILIES if family.norm is None)
        raise CheckpointError(f"{folder}: has no FFN that is known: no weights side by side of the names {known}")
    return found


def _side_by_side(files: dict[str, str], leaves: tuple[str, ...]) -> set[str]:
    """Names of weights of modules that have all of these projections."""
    ending = f".{leaves[0]}.weight"
    stems = [name.removesuffix(ending) for name in files if name.endswith(ending)]
    names = {stem: [f"{stem}.{leaf}.weight" for leaf in leaves] for stem in stems}
    return {name for several in names.values() if all(n in files for n in several) for name in several}


def _write(folder: Path, out: Path, files: dict[str, str], projections: set[str], tell: Tell) -> Summary:
    on_gpu = has_gpu()
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix not in _WEIGHTS and file.name not in (_INDEX, MANIFEST):
            shutil.copyfile(file, out / file.name)
    entries: dict[str, dict[str, Any]] = {}
    plain: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    checksums: dict[str, str] = {}
    done = before = after = 0
    for file_name in sorted({*files.values()}):
        tensors: dict[str, np.ndarray] = {}
        with open_safetensors(folder / file_name) as source:
            for name in sorted(source.keys()):
                tensor = source.get_tensor(name)
                if name not in projections:
                    tensors[name] = tensor
                    continue
                tell(name, done, len(projections))
                done += 1
                before += tensor.nbytes
                packed = _compressed(name, tensor, on_gpu)
                if isinstance(packed, str):
                    plain[name], tensors[name] = packed, tensor
                    after += tensor.nbytes
                    continue
                after += packed.nbytes
                for i, array in enumerate(packed.arrays):
                    tensors[f"{name}.part_{i}"] = array.view(np.int16) if array.dtype.itemsize == 2 else array
                entries[name] = {
                    "layout": packed.layout,
                    "shape": packed.shape,
                    "base": packed.base,
                    "escapes": packed.escapes,
                    "parts": len(packed.arrays),
                }
        tell(f"writing {file_name}", done, len(projections))
        _save(tensors, out / file_name)
        checksums[file_name] = _sha256(out / file_name)
        weight_map |= dict.fromkeys(tensors, file_name)
    if (folder / _INDEX).is_file():
        (out / _INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1), encoding="utf-8")
    manifest = sealed({"version": VERSION, "weights": entries, "sha256": checksums})
    (out / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return Summary(len(entries), plain, before, after)


def _compressed(name: str, weight: np.ndarray, on_gpu: bool) -> CompressedWeight[np.ndarray] | str:
    """A projection's weight in 12 bits, in host memory, or why it stays as it is."""
    leaf = name.removesuffix(".weight").rpartition(".")[2]
    down = leaf in {family.down for family in _FAMILIES}
    rows = np.ascontiguousarray(weight.T) if down else weight
    if str(weight.dtype) != "bfloat16" or weight.ndim != 2:
        return f"it is {weight.dtype} {weight.shape}, not a bfloat16 matrix"
    if 0 in rows.shape or rows.shape[1] % 8:
        return f"its rows of {rows.shape[1]} are no multiple of 8"
    if down and is_too_narrow(rows.shape[1], rows.shape[0]):
        return f"d_model {rows.shape[1]} is too narrow"
    if leaf in {family.fused for family in _FAMILIES} and rows.shape[0] // 2 * (rows.shape[1] // 8) * 4 % VECTOR_BYTES:
        return "its second half does not start at a multiple of 16 bytes"
    layout: Layout = "slices" if down else "rows"
    given: Any = cupy().asarray(rows) if on_gpu else rows
    packed: Any = compress(given, layout=layout)
    if packed.ratio > LARGEST_RATIO:
        return f"it would take {packed.ratio:.0%} of its size"
    if not bool((packed.decompress().view(np.int16) == given.view(np.int16)).all()):
        raise CheckpointError(f"{name}: did not come back to the bit: a defect, please report it")
    host: CompressedWeight[np.ndarray] = packed.on_host() if on_gpu else packed
    return host


def _save(tensors: dict[str, np.ndarray], path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()
