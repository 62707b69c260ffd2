"""A trained model with real masks, decoded: `data/relu-lm`, see its README."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason='the extra "torch" brings it')
transformers = pytest.importorskip("transformers", reason='the extra "hf" brings it')
from torch_devices import DEVICES  # noqa: E402

from prosparse_cupy.torch import SparseMLP, measure_sparsity, patch_model, unpatch_model  # noqa: E402

FOLDER = Path(__file__).parent / "data" / "relu-lm"
PROMPTS = ("def parse_args(", "import ", "class Queue:\n    def ", "# Copyright", "try:\n    ")


def _model(device: str, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=dtype).eval().to(device)


def _tokens(prompt: str, device: str):
    return transformers.AutoTokenizer.from_pretrained(FOLDER)(prompt, return_tensors="pt").input_ids.to(device)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small operations on threads that other tests need wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


# Several tokens at once: batches, and the tokens that speculation verifies.

REPEATING = "def read(self):\n    return self.read()\n\ndef write(self):\n    return self.write()\n\ndef close(self):\n    "


@pytest.fixture
def taken(monkeypatch):
    """How many tokens each sparse FFN took at once."""
    noted, real = [], SparseMLP._sparse

    def noting(self, tokens):
        y = real(self, tokens)
        if y is not None:
            noted.append(1 if tokens.dim() == 1 else len(tokens))
        return y

    monkeypatch.setattr(SparseMLP, "_sparse", noting)
    return noted


def _batch(texts: int, device: str):
    """Prompts of different lengths, padded on the left."""
    prompts = [PROMPTS[i % len(PROMPTS)] + "x" * (i // len(PROMPTS)) for i in range(texts)]
    longest = max(map(len, prompts))
    ids, mask = torch.zeros(2, texts, longest, dtype=torch.int64)
    for row, seen, prompt in zip(ids, mask, prompts, strict=True):
        row[longest - len(prompt) :] = torch.tensor(list(prompt.encode()))
        seen[longest - len(prompt) :] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def _written(model, ids, tokens: int = 40, **options):
    length = ids["input_ids"].shape[1]
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, **options}
    with torch.inference_mode():
        return model.generate(**ids, **options)[:, length:]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("texts", [2, 3, 5, 8])
def test_left_padded_batches(texts, device, taken):
    model, batch = _model(device), _batch(texts, device)
    assert not bool(batch["attention_mask"].all())
    dense = _written(model, batch)
    patch_model(model)
    taken.clear()
    assert torch.equal(_written(model, batch), dense)
    assert taken == [texts] * 4 * 39, "all but the prompts"
    unpatch_model(model)
    alone = [_written(model, _single(prompt, device))[0] for prompt in PROMPTS[:texts]]
    assert all(torch.equal(row, one) for row, one in zip(dense, alone, strict=False))


def _single(prompt: str, device: str):
    return {"input_ids": _tokens(prompt, device)}


@pytest.mark.parametrize("device", DEVICES)
def test_batches_of_more_texts_than_the_operators_take(device, taken):
    model, batch = _model(device), _batch(9, device)
    dense = _written(model, batch, 20)
    patch_model(model)
    taken.clear()
    assert torch.equal(_written(model, batch, 20), dense) and not taken


def _speculations(model):
    """Keywords of transformers' generate, by name; the assistant is right about half of the time."""
    assistant = copy.deepcopy(model)
    unpatch_model(assistant)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in assistant.parameters():
            noise = torch.randn(p.shape, generator=generator).to(p)
            p.add_(noise * p.float().std().to(p) * 0.3 if p.dim() > 1 else 0)
    assistant.generation_config.num_assistant_tokens = 7
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0
    return {"lookup": {"prompt_lookup_num_tokens": 7}, "assistant": {"assistant_model": assistant}}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("how", ["lookup", "assistant"])
def test_speculation_writes_the_same_text(how, device, taken):
    model, ids = _model(device), _single(REPEATING, device)
    dense = _written(model, ids, 80)
    options = _speculations(model)[how]
    assert torch.equal(_written(model, ids, 80, **options), dense)
    patch_model(model)
    taken.clear()
    assert torch.equal(_written(model, ids, 80, **options), dense)
    assert set(taken) <= set(range(1, 9)) and max(taken) > 4, "verified together, by the sparse operators"
    steps = len(taken) // 4
    assert steps < 79, "some of what was guessed was right"
    taken.clear()
    assert torch.equal(_written(model, ids, 80), dense) and taken == [1] * 4 * 79


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("how", ["batch", "lookup", "assistant"])
def test_compressed_models_choose_the_likeliest_tokens(how, device, taken):
    """Within bfloat16's rounding of a float32 model's logits: texts may part at a near tie."""
    exact, model = _model(device), _model(device, torch.bfloat16)
    options = {} if how == "batch" else _speculations(model)[how]
    patch_model(model, compress=True)
    ids = _batch(6, device) if how == "batch" else _single(REPEATING, device)
    taken.clear()
    text = _written(model, ids, 60, **options)[:, :60]  # older releases of transformers end with the guesses of the last step
    assert (set(taken) == {6}) if how == "batch" else max(taken) > 4
    whole = torch.cat([ids["input_ids"], text], 1)
    mask = torch.ones_like(whole)
    if how == "batch":
        mask[:, : ids["input_ids"].shape[1]] = ids["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode():
        logits = exact(whole, attention_mask=mask, position_ids=positions).logits[:, -61:-1].float()
    chosen = logits.gather(2, text[..., None])[..., 0]
    # Four layers of a dozen roundings, each with a relative error of half an eps, at the logits' size.
    assert ((logits.amax(-1) - chosen) <= 24 * 2.0**-8 * logits.abs().max()).all()
