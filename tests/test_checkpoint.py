"""Reading one layer of a Hugging Face checkpoint, and the demo on it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from checks import DTYPES
from click.testing import CliRunner
from safetensors.numpy import save_file

from prosparse_cupy import cli, reference
from prosparse_cupy.checkpoint import CheckpointError, load_ffn

_ALL = {f"model.layers.0.mlp.{p}_proj.weight": "model.safetensors" for p in ("gate", "up", "down")}
_UP = "model.layers.0.mlp.up_proj.weight"


def _index(folder, content) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def _checkpoint(
    folder,
    *,
    shards: int = 1,
    dtype="bfloat16",
    d_model: int = 64,
    d_ff: int = 96,
    up: tuple | None = None,
    wrong: float | None = None,
    forget: str = "",
    **config,
):
    rng = np.random.default_rng(0)
    tensors = {}
    for layer in range(2):
        for name, shape in (("gate_proj", (d_ff, d_model)), ("up_proj", up or (d_ff, d_model)), ("down_proj", (d_model, d_ff))):
            tensors[f"model.layers.{layer}.mlp.{name}.weight"] = rng.standard_normal(shape).astype(DTYPES.get(dtype, dtype))
        if wrong is not None:
            tensors[f"model.layers.{layer}.mlp.up_proj.weight"][3:5, 7] = wrong
    (folder / "config.json").write_text(json.dumps({"hidden_act": "fatrelu", "hidden_act_param": 0.03, **config}))
    tensors.pop(forget, None)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return tensors
    index = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
    for file in set(index.values()):
        save_file({name: tensors[name] for name in tensors if index[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return tensors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", [1, 3])
def test_checkpoints_are_read(tmp_path, shards, dtype):
    tensors = _checkpoint(tmp_path, shards=shards, dtype=dtype)
    for layer in (0, 1):
        weights = load_ffn(tmp_path, layer)
        for array, name in ((weights.w_gate, "gate"), (weights.w_up, "up"), (weights.w_down, "down")):
            np.testing.assert_array_equal(array, tensors[f"model.layers.{layer}.mlp.{name}_proj.weight"])
            assert array.dtype == DTYPES[dtype]
        assert weights.threshold == 0.03


def test_relu_has_no_threshold(tmp_path):
    _checkpoint(tmp_path, hidden_act="relu")
    assert load_ffn(tmp_path, 0).threshold == 0.0


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json: cannot be read"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: cannot be read as JSON"),
        (
            lambda f: (f / "config.json").write_text('{"hidden_act": "silu"}'),
            "config.json says hidden_act='silu': it leaves no zeros: relu, fatrelu, relu2 and dReLU",
        ),
        (lambda f: (f / "config.json").write_text('{"hidden_act": "fatrelu"}'), "no hidden_act_param"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json: must hold a JSON object, got list"),
        (
            lambda f: _checkpoint(f, hidden_act_param="x"),
            "hidden_act_param, FATReLU's threshold, must be >= 0 and finite as float32, got 'x'",
        ),
        (lambda f: _checkpoint(f, hidden_act_param=-1), "must be >= 0 and finite as float32, got -1"),
        (lambda f: _checkpoint(f, dtype=np.int8), "gate_proj.weight is I8: quantised weights are not supported"),
        (
            lambda f: _checkpoint(f, up=(90, 64)),
            "layer 0 is no gated FFN: gate_proj (96, 64), up_proj (90, 64), down_proj (64, 96)",
        ),
        (lambda f: _checkpoint(f, hidden_act_param=10**400), "must be >= 0 and finite as float32, got 1000"),
        (lambda f: _checkpoint(f, hidden_act_param=1e39), "must be >= 0 and finite as float32, got 1e+39"),
        (lambda f: _checkpoint(f, hidden_act_param=True), "must be >= 0 and finite as float32, got True"),
        (lambda f: _checkpoint(f, d_ff=0), "layer 0 has no neurons: gate_proj has shape (0, 64)"),
        (lambda f: _checkpoint(f, wrong=np.nan), "layer 0's up_proj has 2 weights that are NaN or infinite"),
        (lambda f: _checkpoint(f, wrong=-np.inf), "layer 0's up_proj has 2 weights that are NaN or infinite"),
        (lambda f: _index(f, {"weight_map": 3}), "weight_map must map names of tensors to names of files"),
        (lambda f: _index(f, {"weight_map": None}), "weight_map must map names"),
        (lambda f: _index(f, {}), "weight_map must map names"),
        (lambda f: _index(f, {"weight_map": {"model.layers.0.mlp.gate_proj.weight": 7}}), "weight_map must map names"),
        (lambda f: _index(f, {"weight_map": {}}), "*.layers.0.mlp.gate_proj.weight: it has no gated FFN"),
        (
            lambda f: _index(f, {"weight_map": _ALL | {_UP: "model\0.safetensors"}}),
            "cannot be read as safetensors: embedded null",
        ),
        (lambda f: _checkpoint(f, forget=_UP), "there is no tensor named *.layers.0.mlp.up_proj.weight"),
        (lambda f: (_checkpoint(f, forget=_UP), _index(f, {"weight_map": _ALL})), "cannot be read as safetensors"),
        (lambda f: (f / "config.json").write_text("[" * 10**5), "config.json: cannot be read as JSON"),
        (lambda f: _index(f, {"weight_map": {"layers.0.mlp.gate_proj.weight": "no.safetensors"}}), "No such file"),
        (lambda f: (f / "model.safetensors").unlink(), "has neither model.safetensors nor"),
        (lambda f: (f / "model.safetensors").write_bytes(b"not a checkpoint"), "cannot be read as safetensors"),
    ],
)
def test_broken_checkpoints_say_what_is_wrong(tmp_path, breakage, message):
    _checkpoint(tmp_path)
    breakage(tmp_path)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_ffn(tmp_path, 0)
    done = CliRunner().invoke(cli.main, ["demo", "--checkpoint", str(tmp_path)])
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit) and "Error: " in done.output


def test_a_layer_that_is_not_there(tmp_path):
    _checkpoint(tmp_path)
    with pytest.raises(
        CheckpointError,
        match=r"there is no tensor named \*\.layers\.7\.mlp\.gate_proj\.weight: its gated FFNs are in layers 0 to 1",
    ):
        load_ffn(tmp_path, 7)


def test_a_file_that_may_not_be_read_is_not_called_missing(monkeypatch, tmp_path):
    _checkpoint(tmp_path)
    real = Path.open

    def refuse(self, *arguments, **keywords):  # as the file's mode does for users other than root
        if self.suffix == ".safetensors":
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *arguments, **keywords)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read as safetensors: .*Permission denied"):
        load_ffn(tmp_path, 0)


def test_dims_that_no_kernel_supports_are_no_traceback(monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "has_gpu", lambda: False)
    _checkpoint(tmp_path, d_model=60)
    done = CliRunner().invoke(cli.main, ["demo", "--checkpoint", str(tmp_path)])
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit)
    assert "d_model must be a multiple of 8 for bfloat16" in done.output


def test_demo_on_a_checkpoint(monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "has_gpu", lambda: False)
    tensors = _checkpoint(tmp_path, shards=2)
    done = CliRunner().invoke(cli.main, ["demo", "--checkpoint", str(tmp_path), "--layer", "1"])
    assert done.exit_code == 0, done.output
    assert "layer 1: d_model 64, d_ff 96, bfloat16, T = 0.03" in done.output
    x = np.random.default_rng(0).standard_normal(64, dtype=np.float32).astype(DTYPES["bfloat16"])
    gate = reference.ffn_1(x, tensors["model.layers.1.mlp.gate_proj.weight"])
    assert f"{1 - reference.active(gate, 0.03).mean():.2%} sparse" in done.output
