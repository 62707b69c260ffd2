"""The README: short, its examples run as they stand, and its sentences tell the stored numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pages import ROOT, python_blocks

from prosparse_cupy import reference

README = ROOT / "README.md"
pytestmark = pytest.mark.skipif(not README.is_file(), reason="needs the source tree")


def test_it_is_short_and_has_two_examples():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150
    whole_model, one_layer = python_blocks(README)
    assert "patch_model(model" in whole_model.code and "import cupy as xp" in one_layer.code


def test_whole_model(capsys, monkeypatch):
    pytest.importorskip("transformers", reason='the extra "hf" brings it')
    monkeypatch.chdir(ROOT)
    python_blocks(README)[0].run({})
    printed = capsys.readouterr().out
    assert "4 of 4 MLPs decode sparsely" in printed and "def main" in printed


@pytest.mark.parametrize("library", ["numpy", pytest.param("cupy", marks=pytest.mark.gpu)])
def test_one_layer(library):
    block, names = python_blocks(README)[1], {}
    block._replace(code=block.code.replace("import cupy as xp", f"import {library} as xp")).run(names)
    y, x, *weights = (getattr(names[n], "get", lambda n=n: names[n])() for n in ("y", "x", "w_gate", "w_up", "w_down"))
    expected = reference.sparse_ffn(x, *weights[:2], reference.pack_down(weights[2]), 0.01).astype(np.float64)
    assert y.shape == (1536,) and y.dtype == np.float16
    assert np.linalg.norm(y.astype(np.float64) - expected) <= 2**-9 * np.linalg.norm(expected)


def _row(file: str, **wanted):
    rows = json.loads((ROOT / "benchmarks" / "results" / file).read_text(encoding="utf-8"))["rows"]
    (row,) = (row for row in rows if all(row[name] == value for name, value in wanted.items()))
    return row


def _sentences() -> list[str]:
    """What the README's sentences say of the stored results."""
    ours = {
        (model, weights): _row("h100-decode.json", model=model, variant="generate()", weights=weights)
        for model in ("7B", "13B", "7B SiLU")
        for weights in ("plain", "bf12")
    }
    theirs = [
        _row("h100-decode.json", model="7B", variant=f"transformers' generate(){how}", weights="unpatched")["tokens_per_s"]
        for how in ("", ", static cache")
    ]
    peaks = [ours["7B", weights]["peak_MiB"] / 1024 for weights in ("plain", "bf12")]
    silu = ours["7B SiLU", "bf12"]
    one_ffn = [_row("h100-ffn.json", model=model, op="SparseFFN", weights="bf12") for model in ("7B", "13B")]
    ffn = _row("h100-sweep.json", op="SparseFFN", model="7B", dtype="bfloat16", mask="hot", sparsity=0.66)
    return [
        f"writes {ours['7B', 'bf12']['tokens_per_s']:.1f} tokens per second so, where transformers' `generate` gives "
        f"{theirs[0]:.1f}, and {theirs[1]:.1f} with a static cache",
        f"Peak memory falls from {peaks[0]:.1f} to {peaks[1]:.1f} GiB",
        f"with no zeros at all, gets {silu['tokens_per_s']:.1f}",
        f"all matrices read faster: {silu['speedup']:.2f}x in 12 bits",
        "With plain weights the whole models write {:.1f} and {:.1f} tokens/s".format(
            *(ours[model, "plain"]["tokens_per_s"] for model in ("7B", "13B"))
        ),
        "one FFN takes {:.1f} and {:.1f} µs".format(*(row["time_us"] for row in one_ffn)),
        f"at 66 % one 7B FFN takes {ffn['time_us']:.1f} µs, {ffn['speedup']:.1f}x",
    ]


def test_sentences_tell_the_stored_numbers():
    text = " ".join(README.read_text(encoding="utf-8").split())
    for sentence in _sentences():
        assert sentence in text
