"""Compressed models: patch_model(compress=True), CompressedLinear, compressed checkpoints, and the torch ops for them."""

from __future__ import annotations

import copy
import gc
import hashlib
import io
import json
import multiprocessing
import pickle
import shutil
import struct

import numpy as np
import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch", reason='the extra "torch" brings it')
transformers = pytest.importorskip("transformers", reason='the extra "hf" brings it')
from torch import nn  # noqa: E402
from torch_devices import DEVICES  # noqa: E402

import prosparse_cupy as psc  # noqa: E402
from prosparse_cupy import cli  # noqa: E402
from prosparse_cupy.checkpoint import CheckpointError  # noqa: E402
from prosparse_cupy.packed import sealed  # noqa: E402
from prosparse_cupy.torch import (  # noqa: E402
    CompressedLinear,
    SparsityMeter,
    load_compressed,
    measure_sparsity,
    patch_model,
    unpatch_model,
)
from prosparse_cupy.torch import ops as torch_ops  # noqa: E402
from prosparse_cupy.torch.compressed import facts_of, parts_of  # noqa: E402

WIDE, NARROW = 2656, 64  # whose slices in ffn_4 are units, and are not
MATRICES = 2 * (3 + 4) + 1  # of `_model`: two layers' FFNs and attentions, and the head
LEFT_PLAIN = {"embed_tokens", "input_layernorm", "post_attention_layernorm", "norm"}


def _model(hidden: int = WIDE, device: str = "cpu", dtype=torch.bfloat16, **changes):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=64,
        max_position_embeddings=64,
        eos_token_id=None,
        pad_token_id=0,
        hidden_act="relu",
        **changes,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval().to(device)
    with torch.no_grad():  # weights of which some have no code; older releases of torch draw many zeros in bfloat16
        for name, weight in model.named_parameters():
            if name.endswith("_proj.weight") or name == "lm_head.weight":
                weight.copy_(torch.randn(weight.shape) / 50)
            if ".mlp." in name:
                weight[torch.rand(weight.shape) < 1e-4] = 2.0**-100
    return model


def _ids(model):
    return torch.randint(1, 64, (1, 7), generator=torch.Generator().manual_seed(0)).to(model.device)


def _text(model):
    with torch.inference_mode():
        return model.generate(_ids(model), max_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_logits=True)


def _bits(tensor):
    return tensor.detach().cpu().contiguous().view(torch.int16)


def _same_state(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert value.shape == other[key].shape and torch.equal(_bits(value), _bits(other[key])), key


def _weights(device: str, d_ff: int = 40):
    generator = torch.Generator().manual_seed(1)
    w = [(torch.randn(d_ff, WIDE, generator=generator) / WIDE**0.5).to(torch.bfloat16) for _ in range(3)]
    for weight in w:
        weight[torch.rand(weight.shape, generator=generator) < 1e-3] = 2.0**-100
    return torch.randn(WIDE, generator=generator).to(torch.bfloat16).to(device), *(weight.to(device) for weight in w)


@pytest.mark.parametrize("device", DEVICES)
def test_a_compressed_model_gives_the_bits_of_a_patched_one_and_unpatching_those_of_before(device):
    model = _model(device=device)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    patch_model(model)
    expected = _text(model)
    unpatch_model(model)
    report = patch_model(model, compress=True)
    assert len(report.sparse) == 2 and all(0.75 < layer.ratio < 0.8 and not layer.plain for layer in report.layers)
    assert "their weights in 7" in str(report)
    linears = [m for m in model.modules() if isinstance(m, CompressedLinear)]
    assert len(linears) == MATRICES and {n.split(".")[-2] for n, _ in model.named_parameters()} == LEFT_PLAIN
    assert len(report.decoding) == len(report.matrices) == MATRICES - 6
    assert all(0.75 <= matrix.ratio < 0.8 and not matrix.reason for matrix in report.matrices)
    found = _text(model)
    assert torch.equal(found.sequences, expected.sequences)
    for one, other in zip(found.logits, expected.logits, strict=True):  # prefill and decoding
        assert torch.equal(one.view(torch.int32), other.view(torch.int32))
    _same_state(model.state_dict(), state)
    assert all(v.device.type == "cpu" for k, v in model.state_dict().items() if k.split(".")[-2] not in LEFT_PLAIN)
    unpatch_model(model)
    projections = [m for name, m in model.named_modules() if name.endswith(("_proj", "lm_head"))]
    assert len(projections) == MATRICES and all(type(m) is nn.Linear for m in projections)
    _same_state(model.state_dict(), state)
    assert all(p.requires_grad for p in model.parameters())


def test_save_pretrained_writes_the_ordinary_checkpoint(tmp_path):
    model = _model()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    patch_model(model, compress=True)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    _same_state(loaded.state_dict(), state)
    assert type(loaded.model.layers[0].mlp).__name__ == "LlamaMLP"


def test_a_compressed_model_loads_a_state_dict():
    model, other = _model(), _model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    patch_model(model, compress=True)
    assert not model.load_state_dict(other.state_dict()).missing_keys
    _same_state(model.state_dict(), other.state_dict())
    patch_model(other)
    assert torch.equal(_text(model).sequences, _text(other).sequences)
    broken = other.state_dict()
    broken["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 3)
    with pytest.raises(RuntimeError, match=r"size mismatch for model.layers.0.mlp.up_proj.weight: \(3, 3\)"):
        model.load_state_dict(broken)
    del broken["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*up_proj"):
        model.load_state_dict(broken)


@pytest.mark.parametrize("device", DEVICES)
def test_what_does_not_pay_stays_plain_and_is_said(device):
    model = _model(NARROW, device)
    with torch.no_grad():
        weight = model.model.layers[0].mlp.up_proj.weight
        weight.copy_(torch.randn(weight.shape) * 2.0 ** torch.randint(-60, 60, weight.shape))
    plain = copy.deepcopy(model)
    report = patch_model(model, compress=True)
    patch_model(plain)
    assert [layer.plain.split(":")[0] for layer in report.layers] == ["up_proj", "down_proj"]
    assert "down_proj: d_model 64 is too narrow" in str(report) and "% of its size" in report.layers[0].plain
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert type(model.model.layers[1].mlp.up_proj) is CompressedLinear
    assert torch.equal(_text(model).sequences, _text(plain).sequences)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_are_refused_before_anything_changes(dtype):
    model = _model(NARROW, dtype=dtype)
    with pytest.raises(ValueError, match=r"compress=True needs bfloat16 weights, got torch.float.*nothing was changed"):
        patch_model(model, compress=True)
    assert type(model.model.layers[0].mlp).__name__ == "LlamaMLP"


def test_a_failure_on_the_way_puts_everything_back(monkeypatch):
    model = _model()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    calls, real = iter(range(9)), CompressedLinear.__init__

    def broken(self, *arguments, **keywords):
        if next(calls) == 4:
            raise torch.OutOfMemoryError("no memory")
        real(self, *arguments, **keywords)

    monkeypatch.setattr(CompressedLinear, "__init__", broken)
    with pytest.raises(torch.OutOfMemoryError):
        patch_model(model, compress=True)
    assert type(model.model.layers[0].mlp).__name__ == type(model.model.layers[1].mlp).__name__ == "LlamaMLP"
    _same_state(model.state_dict(), state)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), "torch.save"])
def test_copies_and_pickles(how):
    model = _model()
    patch_model(model, compress=True)
    expected = _text(model).sequences
    if how == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = how(model)
    assert torch.equal(_text(other).sequences, expected)
    _same_state(other.state_dict(), model.state_dict())


def test_casts_are_refused_and_moves_are_not():
    linear = CompressedLinear(_weights("cpu")[1])
    for cast in (lambda: linear.half(), lambda: linear.float(), lambda: linear.to(torch.float64)):
        with pytest.raises(TypeError, match=r"compressed weights are bfloat16 and cannot become .*unpatch_model"):
            cast()
    before = _bits(linear.weight)
    assert torch.equal(_bits(linear.to("cpu").bfloat16().weight), before)
    assert "ratio=0.7" in repr(linear)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("transposed", [False, True])
def test_linear_is_linear(transposed, device):
    _, w, *_ = _weights(device)
    w = w.t() if transposed else w
    linear, plain = CompressedLinear(w, transposed=transposed), nn.Linear(1, 1, bias=False, device="meta")
    plain.weight = nn.Parameter(w)
    x = torch.randn(5, 3, w.shape[1], device=device).to(torch.bfloat16)
    assert torch.equal(linear(x), plain(x)) and torch.equal(_bits(linear.linear().weight), _bits(w))
    x.requires_grad_(True)
    linear(x).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("device", DEVICES)
def test_sparsity_is_counted(device):
    model = _model(device=device)
    patch_model(model)
    expected = measure_sparsity(model, _ids(model)).sparsity
    unpatch_model(model)
    patch_model(model, compress=True)
    assert measure_sparsity(model, _ids(model)).sparsity == expected
    with SparsityMeter(model) as meter:
        _text(model)
    assert 0 < meter.report().sparsity < 1 and meter.report().layers[0].tokens == 18


@pytest.mark.parametrize("device", DEVICES)
def test_the_ops_take_compressed_weights_in_parts(device):
    x, w_gate, w_up, w_down_t = _weights(device)
    packed = [psc.compress(w_gate), w_up, psc.compress(w_down_t, layout="slices")]
    ops = torch.ops.prosparse
    facts = lambda *weights: [fact for w in weights for fact in facts_of(w)]  # noqa: E731
    with torch.inference_mode():
        gate = ops.ffn_1(x, w_gate)
        x1 = ops.ffn_123(x, w_gate, w_up, 0.1)
        pairs = [
            (gate, ops.ffn_1.parts(x, parts_of(packed[0]), facts(packed[0]))),
            (x1, ops.ffn_123.parts(x, *map(parts_of, packed[:2]), facts(*packed[:2]), 0.1)),
            (ops.ffn_23(gate, x, w_up, 0.1), ops.ffn_23.parts(gate, x, [w_up], facts(w_up), 0.1)),
            (ops.ffn_4(x1, w_down_t), ops.ffn_4.parts(x1, parts_of(packed[2]), facts(packed[2]))),
            (
                ops.sparse_ffn(x, w_gate, w_up, w_down_t, 0.1),
                ops.sparse_ffn.parts(x, *map(parts_of, packed), facts(*packed), 0.1),
            ),
            (w_down_t, ops.decompress(parts_of(packed[2]), facts(packed[2]))),
        ]
    for expected, found in pairs:
        assert found.shape == expected.shape and torch.equal(_bits(found), _bits(expected)) and _bits(found).any()
    assert np.array_equal(torch_ops.as_numpy(w_gate.cpu()).view(np.int16), _bits(packed[0].decompress()).numpy())


@pytest.mark.parametrize("device", DEVICES)
def test_parts_that_do_not_fit_are_refused_before_anything_is_read(device):
    x, w, *_ = _weights(device)
    packed = psc.compress(w)
    parts, facts = parts_of(packed), list(facts_of(packed))
    ops, d_ff = torch.ops.prosparse, len(w)
    for given, said, message in (
        (parts, [0, d_ff + 1, *facts[2:]], r"part 0 must be"),
        (parts, [1, *facts[1:]], r"part 0 must be"),
        (parts, [0, d_ff, 3], "there is no weight of shape"),
        ([*parts[:3], torch.tensor([121, parts[3][1]])], facts, "its base is 121"),
        ([*parts[:3], parts[3] + torch.tensor([0, 1])], facts, r"part 2 must be"),
        ([*parts[:3], torch.tensor([parts[3][0], 1 << 40])], facts, "escapes in"),
        (parts[:3], facts, "part is|parts are of int32"),
        ([*parts[:3], parts[3].int()], facts, "last part is torch.int32"),
        (parts, [7, *facts[1:]], "with the facts"),
        ([*parts[:2], parts[2].float(), parts[3]], facts, "its parts are of int32 and 16 bits"),
        ([parts[0][:-1], *parts[1:]], facts, r"part 0 must be"),
        ([parts[0].transpose(1, 2).contiguous().transpose(1, 2), *parts[1:]], facts, r"part 0 must be"),
        ([parts[0], parts[1], parts[1], *parts[2:]], facts, r"part 2 must be|parts, not 3"),
    ):
        with torch.inference_mode():
            with pytest.raises(ValueError, match=message):
                ops.ffn_1.parts(x, given, said)
            with pytest.raises(ValueError, match=message):
                ops.decompress(given, said)


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_whole(device):
    model = _model(device=device)
    patch_model(model, compress=True)
    mlp = model.model.layers[0].mlp
    step = torch.compile(mlp, fullgraph=True)
    with torch.inference_mode():
        for tokens in (1, 5):
            x = torch.randn(1, tokens, WIDE, device=device).to(torch.bfloat16)
            torch.testing.assert_close(step(x), mlp(x), rtol=2**-7, atol=2**-9)


def test_moved_weights(torch_gpu):
    packed = psc.compress(_weights("cpu")[1])
    there = packed.to("cuda")
    assert all(a.is_cuda for a in there.arrays)
    assert torch.equal(_bits(there.decompress()), _bits(packed.decompress()))
    assert torch.equal(_bits(there.to("cpu").decompress()), _bits(packed.decompress()))


def test_arrays_that_do_not_move():
    with pytest.raises(TypeError, match="only weights in torch tensors move, this one is in NumPy arrays"):
        psc.compress(np.ones((2, 8), psc.compress.__globals__["np"].float32).astype("bfloat16")).to("cuda")


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """A checkpoint of `_model`, its compressed one, what the command said, and the model."""
    folder = tmp_path_factory.mktemp("checkpoints")
    model = _model(tie_word_embeddings=False)
    model.generation_config.max_new_tokens = 5
    model.save_pretrained(folder / "plain", max_shard_size="1MB")
    (folder / "plain" / "tokenizer.json").write_text("{}")
    done = CliRunner().invoke(cli.main, ["compress", str(folder / "plain"), str(folder / "small")])
    assert done.exit_code == 0, done.output
    return folder, done.output, model


def test_a_compressed_checkpoint_is_smaller_and_has_all_files(compressed):
    folder, said, _ = compressed
    assert f"{MATRICES} matrices compressed" in said and "(75." in said
    plain, small = ({f.name for f in (folder / name).iterdir()} for name in ("plain", "small"))
    assert small == plain | {"prosparse.json"} and len([n for n in plain if n.endswith(".safetensors")]) > 1
    assert {f.name for f in folder.iterdir()} == {"plain", "small"}, "something unfinished was left"


@pytest.mark.parametrize("device", DEVICES)
def test_a_compressed_checkpoint_loads(compressed, device, tmp_path):
    folder, _, model = compressed
    loaded = load_compressed(folder / "small", device)
    assert sum(isinstance(m, CompressedLinear) for m in loaded.modules()) == MATRICES
    assert loaded.generation_config.max_new_tokens == 5 and not loaded.training
    assert {p.device.type for p in (*loaded.parameters(), *loaded.buffers())} == {device}
    _same_state(loaded.state_dict(), model.state_dict())
    other = copy.deepcopy(model).to(device)
    patch_model(other, compress=True)
    expected, found = _text(other), _text(loaded)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.logits, expected.logits, strict=True))
    loaded.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    _same_state(again.state_dict(), model.state_dict())
    unpatch_model(loaded)
    assert type(loaded.model.layers[0].mlp).__name__ == "LlamaMLP"
    _same_state(loaded.state_dict(), model.state_dict())


def _spoiled(compressed, tmp_path, spoil):
    folder = tmp_path / "spoiled"
    shutil.copytree(compressed[0] / "small", folder)
    spoil(folder)
    return folder


def _cut(folder):
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])


def _flip(folder):
    shard = sorted(folder.glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)


def _manifest(change, seal=sealed):
    def spoil(folder):
        content = json.loads((folder / "prosparse.json").read_text())
        change(content)
        (folder / "prosparse.json").write_text(json.dumps(seal(content)))

    return spoil


def _of_first(**changes):
    return lambda content: next(iter(content["weights"].values())).update(changes)


def _other_config(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 104}))


def _other_dims(content):
    name = next(iter(content["weights"]))
    content["weights"][name]["shape"] = [8, WIDE]


def _index(change):
    """The index names other files; it has no checksum, since a folder with one file has none."""

    def spoil(folder):
        index = folder / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        change(content["weight_map"])
        index.write_text(json.dumps(content))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_cut, "is not the file that was written"),
        (_flip, "is not the file that was written"),
        (lambda folder: sorted(folder.glob("*.safetensors"))[0].unlink(), "is missing"),
        (lambda folder: (folder / "prosparse.json").unlink(), "has no prosparse.json: write one with `prosparse-cupy compress"),
        (lambda folder: (folder / "prosparse.json").write_text("{"), "cannot be read as JSON"),
        (_manifest(lambda c: c.update(version=9)), "is of version 9, this release reads 1"),
        (_manifest(lambda c: c.update(weights=[1])), "cannot be read"),
        (_manifest(_of_first(layout="columns")), "cannot be read"),
        (_manifest(_of_first(base=50), seal=dict), "prosparse.json: is not the file that was written"),
        (_manifest(_of_first(base=900)), "its base is 900, not 0 to 120"),
        (_manifest(_of_first(escapes=3)), r"part \d must be .*got"),
        (_manifest(_of_first(layout="slices")), r"part 0 must be .*got"),
        (_manifest(_of_first(parts=2)), "cannot|parts|part"),
        (_manifest(_other_dims), "part 0 must be"),
        (_other_config, "other dims than the model's config says"),
        (_manifest(_of_first(base=float("nan"))), "must be whole numbers"),
        (_manifest(_of_first(base=True)), "must be whole numbers"),
        (_manifest(_of_first(base=-1)), "must be whole numbers"),
        (_manifest(_of_first(escapes=float("nan"))), "must be whole numbers"),
        (_manifest(_of_first(escapes="3")), "must be whole numbers"),
        (_manifest(_of_first(escapes=10**30)), "must be whole numbers"),
        (_manifest(_of_first(escapes=1 << 62)), "escapes in rows of"),
        (_manifest(_of_first(parts=10**12)), "a weight in 1000000000000 parts"),
        (_manifest(_of_first(shape=[float("inf"), WIDE])), "must be whole numbers"),
        (_manifest(_of_first(shape=[96, WIDE, 1])), "must be whole numbers"),
        (_manifest(_of_first(shape=[1 << 40, 1 << 40])), "there is no weight of shape"),
        (_manifest(_of_first(shape=96)), "cannot be read"),
        (_manifest(_of_first(layout=["rows"])), "a weight of layout"),
        (_manifest(lambda c: c["sha256"].popitem()), "has no checksum of"),
        (_manifest(lambda c: c["sha256"].update({"../config.json": "0"})), r"\.\./config.json is missing"),
        (_index(lambda files: files.update(x="../elsewhere.safetensors")), r"has no checksum of \.\./elsewhere"),
        (_index(lambda files: files.update(x="/elsewhere.safetensors")), "has no checksum of /elsewhere"),
    ],
)
def test_broken_compressed_checkpoints_are_refused_by_name(compressed, tmp_path, spoil, message):
    with pytest.raises(CheckpointError, match=message):
        load_compressed(_spoiled(compressed, tmp_path, spoil), "cpu")


def _forged(folder, change):
    """Change the bytes of the file that holds the first compressed weight, and give the manifest their checksum.

    `change` gets the weight's name, what the manifest says of it, and the file's header and data.
    """
    manifest = json.loads((folder / "prosparse.json").read_text())
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]

    def of(name):
        file = folder / index[f"{name}.part_0"]
        content = file.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header, data = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
        new = change(name, manifest["weights"][name], header, data)
        if new is None:
            said = json.dumps(header).encode()
            new = struct.pack("<Q", len(said)) + said + bytes(data)
        file.write_bytes(new)
        manifest["sha256"][file.name] = hashlib.sha256(new).hexdigest()
        (folder / "prosparse.json").write_text(json.dumps(sealed(manifest)))

    return manifest["weights"], of


ESCAPE = 0x88888888


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("beyond", [0, 1, 1 << 31, 0xFFFFFFFF])
@pytest.mark.parametrize("layout", ["rows", "slices"])
def test_escapes_outside_their_array_are_refused_before_a_kernel_reads_them(compressed, tmp_path, layout, beyond, device):
    """The first chunk of a weight says that it is kept where nothing is."""
    folder = tmp_path / "forged"
    shutil.copytree(compressed[0] / "small", folder)

    def change(name, entry, header, data):
        place = entry["escapes"] + beyond if beyond < 2 else beyond
        of_part = [header[f"{name}.part_{i}"]["data_offsets"] for i in range(entry["parts"] - 1)]
        if layout == "rows":
            struct.pack_into("<I", data, of_part[0][0], place)
            struct.pack_into("<I", data, of_part[1][0], ESCAPE)
        else:  # vector 0 of a unit: low0, low1 and high of its first chunk
            struct.pack_into("<III", data, of_part[0][0], place, 0, ESCAPE)

    entries, forge = _forged(folder, change)
    name = next(name for name, entry in entries.items() if entry["layout"] == layout and entry["escapes"] > 0)
    forge(name)
    with pytest.raises(CheckpointError, match=f"{name}: 1 chunks of 8 weights are not among its .* escapes"):
        load_compressed(folder, device)


def _offsets(name, header, first, last):
    header[f"{name}.part_0"]["data_offsets"] = [first, last]


@pytest.mark.parametrize(
    "change",
    [
        lambda name, entry, header, data: struct.pack("<Q", (1 << 64) - 1) + bytes(data),
        lambda name, entry, header, data: struct.pack("<Q", 1 << 40) + bytes(data),
        lambda name, entry, header, data: struct.pack("<Q", 8) + b"[" * 8 + bytes(data),
        lambda name, entry, header, data: b"",
        lambda name, entry, header, data: _offsets(name, header, 0, 1 << 60),
        lambda name, entry, header, data: _offsets(name, header, -8, 0),
        lambda name, entry, header, data: _offsets(name, header, *header[f"{name}.part_1"]["data_offsets"]),
        lambda name, entry, header, data: header[f"{name}.part_0"].update(shape=[1 << 62, 1 << 62]),
        lambda name, entry, header, data: header[f"{name}.part_0"].update(dtype="X9"),
        lambda name, entry, header, data: header[f"{name}.part_0"].update(dtype="F32"),
        lambda name, entry, header, data: header.pop(f"{name}.part_0") and None,
    ],
    ids=["2**64", "2**40", "no JSON", "empty", "behind", "before", "overlap", "huge", "no dtype", "floats", "hole"],
)
def test_forged_headers_are_refused(compressed, tmp_path, change):
    folder = tmp_path / "forged"
    shutil.copytree(compressed[0] / "small", folder)
    entries, forge = _forged(folder, change)
    forge(next(iter(entries)))
    with pytest.raises(CheckpointError, match=r"cannot be read as safetensors|its parts are of int32"):
        load_compressed(folder, "cpu")


def test_what_cannot_be_compressed_leaves_nothing(compressed, tmp_path, monkeypatch):
    plain, small = (str(compressed[0] / name) for name in ("plain", "small"))
    run = lambda *arguments: CliRunner().invoke(cli.main, ["compress", *arguments])  # noqa: E731
    silu = tmp_path / "silu"
    shutil.copytree(plain, silu)
    config = json.loads((silu / "config.json").read_text())
    (silu / "config.json").write_text(json.dumps({**config, "hidden_act": "silu"}))
    for arguments, message in (
        ((plain, small), "exists already"),
        ((small, str(tmp_path / "x")), "is a compressed checkpoint already"),
        ((str(tmp_path / "nothing"), str(tmp_path / "x")), "cannot be read as JSON"),
        ((str(silu), str(tmp_path / "x")), "silu"),
        ((plain, str(silu / "config.json" / "x")), "cannot be written"),
    ):
        done = run(*arguments)
        assert done.exit_code == 1 and message in done.output and "Traceback" not in done.output, done.output
    monkeypatch.setattr("prosparse_cupy.packed._save", _full_disk)
    assert "No space left" in run(plain, str(tmp_path / "x")).output
    assert {f.name for f in tmp_path.iterdir()} == {"silu"}


def _full_disk(*arguments):
    raise OSError(28, "No space left on device")


@pytest.mark.gpu
def test_memory_on_the_gpu(torch_gpu):
    """Three quarters of it, and never more than the plain model and one layer.

    In a process of its own: what other tests have left, half free, would take what this one frees.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        plain, saved, in_tensors, peak, ratios, same = pool.apply(_memory)
    assert abs(in_tensors / plain - 0.25) < 0.003, (in_tensors, plain)
    assert abs(saved / plain - 0.25) < 0.02, (saved, plain)  # torch takes memory by 2 MiB
    assert peak < 3 * 4096 * 11008 * 2, "more than one layer at once"
    assert len(ratios) == 4 and all(0.75 < ratio < 0.755 for ratio in ratios)
    assert same


def _memory():
    """Bytes of a model's matrices, what compressing them saves of the GPU's and of the tensors', and the peak meanwhile."""

    def used():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=4, num_attention_heads=32, vocab_size=64, hidden_act="relu"
    )
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    plain = used()
    patch_model(copy.deepcopy(model), compress=True)  # what is loaded once is loaded
    gc.collect()
    once = used() - plain
    torch.cuda.reset_peak_memory_stats()
    allocated = torch.cuda.memory_allocated()
    report = patch_model(model, compress=True)
    peak = torch.cuda.max_memory_allocated() - allocated
    saved, in_tensors = plain + once - used(), allocated - torch.cuda.memory_allocated()
    state = model.model.layers[0].mlp.gate_proj.weight.clone()
    unpatch_model(model)
    same = torch.equal(_bits(model.model.layers[0].mlp.gate_proj.weight), _bits(state))
    matrices = 4 * (3 * 4096 * 11008 + 4 * 4096 * 4096) * 2
    return matrices, saved, in_tensors, peak, [layer.ratio for layer in report.layers], same
