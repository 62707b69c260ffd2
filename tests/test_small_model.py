"""A trained model with real masks, decoded: `data/relu-lm`, see its README."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason='the extra "torch" brings it')
transformers = pytest.importorskip("transformers", reason='the extra "hf" brings it')
from torch_devices import DEVICES  # noqa: E402

from prosparse_cupy.torch import measure_sparsity, patch_model, unpatch_model  # noqa: E402

FOLDER = Path(__file__).parent / "data" / "relu-lm"
PROMPTS = ("def parse_args(", "import ", "class Queue:\n    def ", "# Copyright", "try:\n    ")


def _model(device: str, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=dtype).eval().to(device)


def _tokens(prompt: str, device: str):
    return transformers.AutoTokenizer.from_pretrained(FOLDER)(prompt, return_tensors="pt").input_ids.to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_same_greedy_text(prompt, device):
    model, ids = _model(device), _tokens(prompt, device)

    def text():
        with torch.inference_mode():
            return model.generate(ids, max_new_tokens=200, min_new_tokens=200, do_sample=False)[0]

    dense = text()
    assert len(patch_model(model).sparse) == 4
    assert torch.equal(text(), dense)
    unpatch_model(model)
    assert torch.equal(text(), dense)
    assert bytes(dense.tolist()).decode("utf-8", "replace").startswith(prompt)


@pytest.mark.parametrize("device", DEVICES)
def test_logits_within_the_contract_in_bfloat16(device):
    """Against a float32 model: at most twice the dense bfloat16 model's error, over a text decoded token by token."""
    ids = _tokens("def main():\n    parser = argparse.ArgumentParser(description=__doc__)\n", device)

    def logits(model):
        cache, found = transformers.DynamicCache(config=model.config), []
        with torch.inference_mode():
            for i in range(ids.shape[1]):
                found.append(model(ids[:, i : i + 1], past_key_values=cache).logits.double().cpu().numpy().ravel())
        return np.stack(found)

    exact = logits(_model(device))
    model = _model(device, torch.bfloat16)
    dense = logits(model)
    patch_model(model)
    sparse = logits(model)
    ours, theirs = (np.linalg.norm(found - exact) for found in (sparse, dense))
    assert 0 < ours <= 2 * theirs + 2.0**-7 * np.linalg.norm(exact)
    assert (sparse.argmax(-1) == exact.argmax(-1)).mean() > 0.9


@pytest.mark.parametrize("device", DEVICES)
def test_is_sparse_and_writes_python(device):
    model = _model(device)
    text = "import os\n\n\nclass Reader:\n    def __init__(self, path):\n        self.path = path\n\n    def read(self):\n"
    ids = _tokens(text, device)
    report = measure_sparsity(model, ids)
    assert report.sparsity > 0.8 and min(layer.sparsity for layer in report.layers) > 0.8
    with torch.inference_mode():
        bits = model(ids, labels=ids).loss.item() / np.log(2)
    assert bits < 1.5, "8 would be chance"
    facts = json.loads((FOLDER / "training.json").read_text())
    assert facts["sparsity"] > 0.8 and facts["held_out_bits_per_byte"] < 2


def test_tokens_are_bytes():
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    text = "x = 'é\t€'\n  # ok"
    ids = tokenizer(text).input_ids
    assert bytes(ids) == text.encode() and tokenizer.decode(ids) == text
