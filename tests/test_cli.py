"""The command line: the demo, warmup and usage errors."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import click
import ml_dtypes
import numpy as np
import pytest
from checks import DTYPES
from click.testing import CliRunner
from gpu_arrays import OnCupy

import prosparse_cupy as psc
from prosparse_cupy import cli, device, reference
from prosparse_cupy.cli import demo
from prosparse_cupy.formula import Formula
from prosparse_cupy.testing.measure import DENSE, OURS, all_right


def _run(*arguments: str):
    return CliRunner().invoke(cli.main, arguments)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(cli, "has_gpu", lambda: False)
    monkeypatch.setattr(demo, "_HOST_SHRINK", 32)


@pytest.fixture
def no_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "_PACKAGE", tmp_path / "prosparse_cupy")
    monkeypatch.chdir(tmp_path)


def test_module_and_script_are_the_same_command():
    done = subprocess.run([sys.executable, "-m", "prosparse_cupy", "--version"], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"prosparse-cupy, version \d+\.\d+\.\d+", done.stdout.strip())


@pytest.mark.parametrize("arguments", [[], ["--model", "13b", "--sparsity", "0.5"], ["--dtype", "float32", "--threshold", "0"]])
def test_demo_without_a_gpu(no_gpu, no_checkout, arguments):
    done = _run("demo", *arguments)
    assert done.exit_code == 0, done.output
    assert "No GPU that CuPy can use" in done.output and "NumPy reference" in done.output
    for operator in demo.STEPS:
        assert re.search(rf"{operator} .*\d\.\d\dx .*\de-\d\d", done.output), done.output
    sparsity = "50.00% sparse" if "0.5" in arguments else "89.24% sparse"  # 37 of 344 neurons active
    assert sparsity in done.output


def test_demo_decodes_a_text_dense_and_sparse(no_gpu):
    pytest.importorskip("transformers", reason='the extra "hf" brings it')
    done = _run("demo")
    assert done.exit_code == 0, done.output
    text = done.output[done.output.index("relu-lm, trained") :]
    assert re.search(r"4\.0 million parameters, float32, T = 0, 9\d\.\d\d% sparse", text)
    assert re.search(r"^dense +\d+\.\d  def read\(", text, re.MULTILINE)
    assert re.search(r"^sparse +\d+\.\d  the same text", text, re.MULTILINE)
    assert "these numbers show rightness, not speed" in text
    assert max(map(len, text.splitlines())) <= 80


def test_demo_fails_where_the_text_is_another(no_gpu, monkeypatch):
    pytest.importorskip("transformers", reason='the extra "hf" brings it')
    from prosparse_cupy.torch import commandline

    texts = iter("ab")
    timed = commandline._timed
    monkeypatch.setattr(commandline, "_timed", lambda *given: (next(texts), timed(*given)[1]))
    done = _run("demo")
    assert done.exit_code == 1 and "writes another text when it is sparse" in done.output and "the same text" not in done.output


def test_demo_says_what_the_text_needs(no_gpu, no_checkout, monkeypatch, tmp_path):
    done = _run("demo")
    assert done.exit_code == 0 and done.output.splitlines()[-1].startswith("From a checkout the demo also decodes a text: pip")
    folder = tmp_path / "tests" / "data" / "relu-lm"
    folder.mkdir(parents=True)
    (folder / "config.json").touch()
    monkeypatch.setattr(cli.generate, "torch_part", _no_torch)
    done = _run("demo")
    assert done.exit_code == 0 and done.output.splitlines()[-1] == "A text, dense and sparse: torch is missing"


def _no_torch():
    raise click.ClickException("torch is missing")


def test_demo_of_a_checkpoint_is_of_its_layer_alone(no_gpu):
    checkpoint = Path(__file__).resolve().parent / "data" / "relu-lm"  # the installed package has none
    done = _run("demo", "--checkpoint", str(checkpoint))
    assert done.exit_code == 0 and "relu-lm, layer 0" in done.output and "trained" not in done.output


def test_demo_fails_where_a_result_is_wrong(no_gpu, monkeypatch):
    monkeypatch.setattr(demo.ops, "ffn_4", lambda x1, w, *, out: out.fill(np.nan))
    done = _run("demo")
    assert done.exit_code == 1
    assert "wrong results: ffn_4" in done.output
    assert re.search(r"ffn_4 .* - .* - .* wrong", done.output)


def test_progress_is_told_before_each_weight_matrix():
    told: list[str] = []
    demo.random_layer(64, 96, DTYPES["float32"], 0.5, 0.0, told.append)
    assert [message[:14] for message in told] == ["w_gate, 1 of 3", "w_up, 2 of 3: ", "w_down, 3 of 3"]


def test_demo_rows_are_judged_by_twice_the_dense_error():
    epsilon = float(ml_dtypes.finfo(DTYPES["bfloat16"]).eps)
    assert all_right({OURS: [1e-3, 2e-3 + epsilon], DENSE: [1e-3, 1e-3]}, OURS, epsilon)
    for wrong in (2.1e-3 + epsilon, float("nan")):
        assert not all_right({OURS: [wrong, 1e-3], DENSE: [1e-3, 1.0]}, OURS, epsilon), "no call makes up for another"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--sparsity", "nan"], "nan is not a number in the range"),
        (["demo", "--sparsity", "1.5"], "not in the range"),
        (["demo", "--threshold", "-1"], "not in the range"),
        (["demo", "--model", "70b"], "not one of '7b', '13b', '1b'"),
        (["demo", "--dtype", "float64"], "not one of 'bfloat16'"),
        (["demo", "--layer", "0"], "--layer goes with --checkpoint"),
        (["demo", "--checkpoint", "/no/such/folder"], "does not exist"),
        (["demo", "--checkpoint", ".", "--model", "7b"], "leave out --model and --sparsity"),
        (["demo", "--checkpoint", ".", "--sparsity", "0.5"], "leave out --model and --sparsity"),
        (["warmup", "--dtype", "int8"], "not one of"),
        (["doctor", "--xml"], "No such option"),
        (["dance"], "No such command"),
    ],
)
def test_wrong_options_get_a_usage_error(arguments, message):
    done = _run(*arguments)
    assert done.exit_code == 2 and isinstance(done.exception, SystemExit) and message in done.output


def test_warmup_without_a_gpu_says_what_was_looked_for(monkeypatch):
    def no_gpu():
        raise device.NoGPUError("no CUDA GPU: looked for one")

    monkeypatch.setattr(cli.ffn, "current_device", no_gpu)
    done = _run("warmup")
    assert done.exit_code == 1 and "Error: no CUDA GPU: looked for one" in done.output


def test_warmup_of_compressed_float16_is_a_usage_error():
    done = _run("warmup", "--compressed", "--dtype", "float16")
    assert done.exit_code == 2 and "compressed weights are bfloat16, got float16" in done.output


@pytest.mark.gpu
def test_warmup_of_compressed_weights_compiles_what_their_calls_launch():
    from prosparse_cupy import compiler

    report = psc.warmup(512, 1000, compressed=True)
    assert {k.kernel: "W_UP=Bf12Rows" in k.defines for k in report if k.kernel in ("ffn_123", "ffn_23")} == {
        "ffn_123": True,
        "ffn_23": True,
    }
    before = compiler.load.cache_info().misses
    rng = np.random.default_rng()
    w = [OnCupy().put(rng.standard_normal((1000, 512), dtype=np.float32).astype(DTYPES["bfloat16"])) for _ in range(3)]
    packed = [psc.compress(a, layout="slices" if a is w[2] else "rows") for a in w]
    psc.sparse_ffn(OnCupy().put(np.ones(512, DTYPES["bfloat16"])), *packed)
    assert compiler.load.cache_info().misses == before


@pytest.mark.gpu
def test_warmup_lists_every_kernel():
    done = _run("warmup", "--model", "1b", "--dtype", "float16")
    assert done.exit_code == 0, done.output
    for kernel in ("ffn_1", "ffn_123", "ffn_23", "ffn_4", "pack_down"):
        assert kernel in done.output
    assert re.search(r"\d\.\d\d s in all", done.output)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_demo_on_the_gpu(no_checkout, dtype):
    done = _run("demo", "--model", "1b", "--dtype", dtype)
    assert done.exit_code == 0, done.output
    assert "cold L2" in done.output and "wrong" not in done.output
    for operator in demo.STEPS:
        assert re.search(rf"{operator} .*\d\.\d\dx .*\de-\d\d", done.output), done.output


@pytest.mark.gpu
def test_demo_decodes_a_text_on_the_gpu(torch):
    pytest.importorskip("transformers", reason='the extra "hf" brings it')
    done = _run("demo", "--model", "1b")
    assert done.exit_code == 0, done.output
    text = done.output[done.output.index("relu-lm, trained") :]
    assert torch.cuda.get_device_name() in text and re.search(r"^sparse +\d+\.\d  the same text", text, re.MULTILINE)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [(), (1,), (3,), (8,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dense_path_is_right(dtype, tokens, torch):
    import cupy
    from gpu_arrays import OnCupy

    from prosparse_cupy.testing.dense import CupyDense, through_cublas, through_ffn_1
    from prosparse_cupy.testing.torch_dense import TorchDense

    rng, on, t = np.random.default_rng(), OnCupy(), 0.1
    x, w = (rng.standard_normal(s).astype(DTYPES[dtype]) for s in ((*tokens, 64), (96, 64)))
    g = np.where(rng.random((*tokens, 96)) < 0.3, t, rng.standard_normal((*tokens, 96))).astype(DTYPES[dtype])
    expected = reference.ffn_23(g, x, w, t).astype(np.float32)
    for dense in (TorchDense(), through_ffn_1(), through_cublas()):
        out = on.put(np.full((*tokens, 96), np.nan).astype(DTYPES[dtype]))
        arrays = [dense.adopt(on.put(a)) for a in (g, x, w)]
        try:
            dense.ffn_23(*arrays, Formula(t), dense.adopt(out))
        except (TypeError, cupy.cuda.compiler.CompileException):
            assert (
                isinstance(dense, CupyDense) and "cuBLAS" in dense.name and dtype == "bfloat16"
            )  # what best_dense() finds out and avoids
            continue
        cupy.cuda.Device().synchronize()
        np.testing.assert_allclose(on.get(out).astype(np.float32), expected, rtol=2**-6, atol=2**-8)
