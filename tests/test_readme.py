"""The README's Python examples run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from checks import DTYPES, assert_no_worse_than_vendor, weights
from gpu_arrays import OnTorch

from prosparse_cupy import reference

README = Path(__file__).resolve().parent.parent / "README.md"
pytestmark = pytest.mark.skipif(not README.is_file(), reason="needs the source tree")


def _examples() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_there_are_three_examples():
    with_cupy, with_torch, with_transformers = _examples()
    assert "import cupy" in with_cupy and "import torch" in with_torch and "patch_model(model)" in with_transformers
    for code in (with_cupy, with_torch, with_transformers):
        compile(code, "README.md", "exec")


@pytest.mark.gpu
def test_first_call_with_cupy():
    names: dict = {}
    exec(_examples()[0], names)
    y, x = names["y"].get(), names["x"].get()
    w_gate, w_up, w_down = (names[name].get() for name in ("w_gate", "w_up", "w_down"))
    assert y.shape == (4096,) and y.dtype == DTYPES["bfloat16"]
    expected = reference.sparse_ffn(x, w_gate, w_up, np.ascontiguousarray(w_down.T), 0.01).astype(np.float64)
    assert np.linalg.norm(y.astype(np.float64) - expected) <= 2**-7 * np.linalg.norm(expected)


@pytest.mark.gpu
def test_first_call_with_torch(torch):
    to = OnTorch()
    w_gate, w_up = (to.put(weights(1024, 4096, "bfloat16", seed)) for seed in range(2))
    w_down = to.put(weights(4096, 1024, "bfloat16"))
    proj = {
        name: SimpleNamespace(weight=torch.nn.Parameter(w)) for name, w in (("gate", w_gate), ("up", w_up), ("down", w_down))
    }
    mlp = SimpleNamespace(**{f"{name}_proj": value for name, value in proj.items()})
    names: dict = {"model": SimpleNamespace(model=SimpleNamespace(layers=[SimpleNamespace(mlp=mlp)]))}
    exec(_examples()[1], names)
    x = names["x"]
    gate = torch.mv(w_gate, x)
    dense = torch.mv(w_down, torch.where(gate >= 0.01, gate, 0) * torch.mv(w_up, x))
    s = torch.where(gate >= 0.01, gate, 0).double()
    exact = w_down.double() @ (s * (w_up.double() @ x.double())).to(x.dtype).double()
    assert_no_worse_than_vendor(to.get(names["y"]), to.get(dense), exact.cpu().numpy())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_one_line_patch(device, capsys, request):
    pytest.importorskip("transformers", reason='the extra "hf" brings it')
    if device == "cuda":
        request.getfixturevalue("torch")
    names: dict = {"folder": Path(__file__).parent / "data" / "relu-lm"}
    exec(_examples()[2].replace('"cuda"', repr(device)), names)
    assert "4 of 4 gated MLPs decode sparsely" in capsys.readouterr().out
    ids = names["torch"].tensor([[*b"import "]], device=device)
    assert names["model"].generate(ids, max_new_tokens=5, do_sample=False).shape == (1, 12)
