"""generate, decoding_loop and prepare_generation against transformers' own loop."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason='the extra "torch" brings it')
transformers = pytest.importorskip("transformers", reason='the extra "hf" brings it')
from torch import nn  # noqa: E402
from torch_devices import DEVICES  # noqa: E402
from transformers import generation as hf  # noqa: E402

from prosparse_cupy.torch import (  # noqa: E402
    SparseGatedMLP,
    decoding_loop,
    generate,
    patch_model,
    prepare_generation,
    release_generation,
    unpatch_model,
)

FOLDER = Path(__file__).parent / "data" / "relu-lm"
PROMPT = "def parse_args("
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 200,
    "max_position_embeddings": 128,
    "eos_token_id": None,
    "pad_token_id": None,
    "hidden_act": "relu",
}


def _tiny(kind: str = "Llama", device: str = "cpu", dtype=torch.float32, seed: int = 0, **changes):
    """A random model, with weights so large that its text does not repeat itself at once."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_()
            elif parameter.dim() > 1:
                parameter.mul_(3)
    return model.to(device)


def _ids(device: Any = "cpu", length: int = 7, seed: int = 0):
    return torch.randint(1, 200, (1, length), generator=torch.Generator().manual_seed(seed)).to(device)


def _own(model, ids, **options):
    """By our loop: a fallback is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="generate: ")
        return generate(model, ids, **options)


def _theirs(model, ids, **options):
    return model.generate(ids, **options)


def _agree(model, ids=None, **options):
    """Both loops' tokens, which must be the same."""
    given = {"max_new_tokens": 30, "do_sample": False, **options}
    ids = _ids(model.device) if ids is None else ids
    own = _own(model, ids, **given)
    assert torch.equal(own, _theirs(model, ids, **given))
    assert own.device == ids.device and own.dtype == ids.dtype
    return own


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module", params=DEVICES)
def trained(request):
    """The trained model, patched; tests leave it as it is."""
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval().to(request.param)
    patch_model(model)
    return model


@pytest.fixture(scope="module")
def prompt(tokenizer):
    return tokenizer(PROMPT, return_tensors="pt").input_ids


@pytest.fixture(scope="module")
def small():
    """A random model, patched; tests leave it as it is."""
    model = _tiny()
    patch_model(model)
    return model


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small operations on threads that other tests need wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Greedy text.


def test_the_trained_models_text(trained, prompt):
    model, ids = copy.deepcopy(trained), prompt.to(trained.device)
    texts = [_agree(model, ids, max_new_tokens=200, min_new_tokens=200)]
    unpatch_model(model)
    texts.append(_agree(model, ids, max_new_tokens=200, min_new_tokens=200))
    assert torch.equal(*texts) and bytes(texts[0][0].tolist()).decode().startswith(PROMPT)


MODELS = {
    "Llama": ("Llama", {}),
    "one head of keys": ("Llama", {"num_key_value_heads": 1}),
    "as many heads of keys": ("Llama", {"num_key_value_heads": 4}),
    "SiLU": ("Llama", {"hidden_act": "silu"}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "heads of 80": ("Llama", {"head_dim": 80}),
    "biases everywhere": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "a window": ("Mistral", {"sliding_window": 8}),
    "a window as long as the text": ("Mistral", {"sliding_window": 37}),
    "biases": ("Qwen2", {}),
    "layers with a window and without": ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "norms of heads": ("Qwen3", {"head_dim": 16}),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("which", MODELS)
def test_random_models_texts(which, device):
    kind, changes = MODELS[which]
    model = _tiny(kind, device, **changes)
    first = _agree(model)
    assert len(set(first[0].tolist())) > 6, "such a text says little"
    patch_model(model)
    assert torch.equal(_own(model, _ids(device), max_new_tokens=30, do_sample=False), first)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", DEVICES)
def test_shorter_dtypes_choose_the_likeliest_token_within_rounding(device, dtype, compress):
    """Texts may part at a near tie; each token must still be as likely as the likeliest, within the dtype's rounding."""
    if compress and dtype != torch.bfloat16:
        pytest.skip("only bfloat16 is compressed")
    model = _tiny(device=device, dtype=dtype)
    patch_model(model, compress=compress)
    text = _own(model, _ids(device), max_new_tokens=40, do_sample=False)
    with torch.inference_mode():
        logits = model(text).logits[0, 6:-1].float()
    chosen = logits.gather(1, text[0, 7:, None])[:, 0]
    assert text.shape[1] == 47 and len(set(text[0].tolist())) > 8
    # A dozen operations in a row, each with a relative error of half an eps, at the logits' size.
    assert ((logits.max(-1).values - chosen) <= 12 * torch.finfo(dtype).eps * logits.abs().max()).all()


@pytest.mark.parametrize("length", [1, 2, 300, 1021])
def test_prompts_of_any_length(trained, prompt, length):
    ids = prompt.repeat(1, 100)[:, :length].to(trained.device)
    _agree(trained, ids, max_new_tokens=3 if length == 1021 else 12)


# Sampling.

WARPERS = {
    "nothing": ({}, []),
    "temperature": ({"temperature": 0.6}, [lambda: hf.TemperatureLogitsWarper(0.6)]),
    "top_k": ({"top_k": 5}, [lambda: hf.TopKLogitsWarper(5)]),
    "top_p": ({"top_p": 0.7}, [lambda: hf.TopPLogitsWarper(0.7)]),
    "min_p": ({"min_p": 0.1}, [lambda: hf.MinPLogitsWarper(0.1)]),
    "repetition_penalty": ({"repetition_penalty": 1.7}, [lambda: hf.RepetitionPenaltyLogitsProcessor(1.7)]),
    "all": (
        {"temperature": 1.4, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3},
        [
            lambda: hf.RepetitionPenaltyLogitsProcessor(1.3),
            lambda: hf.TemperatureLogitsWarper(1.4),
            lambda: hf.TopKLogitsWarper(40),
            lambda: hf.TopPLogitsWarper(0.9),
            lambda: hf.MinPLogitsWarper(0.01),
        ],
    ),
}


def _expected_probabilities(model, text, length: int, warpers):
    """Of each new token of a text, from the model's own logits."""
    with torch.inference_mode():
        logits = model(text).logits[0].float()
    found = []
    for n in range(length, text.shape[1]):
        scores = logits[n - 1 : n]
        for warper in warpers:
            scores = warper()(text[:, :n], scores)
        found.append(scores.softmax(-1)[0])
    return torch.stack(found)


@pytest.mark.quick
@pytest.mark.parametrize("what", WARPERS)
def test_probabilities_are_those_of_the_processors(what, small, monkeypatch):
    options, warpers = WARPERS[what]
    seen, real = [], torch.multinomial

    def noting(probabilities, *arguments, **keywords):
        seen.append(probabilities.clone())
        return real(probabilities, *arguments, **keywords)

    monkeypatch.setattr(torch, "multinomial", noting)
    torch.manual_seed(1)
    text = _own(small, _ids(), max_new_tokens=30, do_sample=True, **{"top_k": 0, **options})
    monkeypatch.undo()
    expected = _expected_probabilities(small, text, 7, warpers)
    found = torch.cat(seen)
    assert len(expected) == 30 and len(found) == 30
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)
    if what not in ("nothing", "temperature", "repetition_penalty"):
        assert torch.equal(found > 0, expected > 0) and (found == 0).any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("what", ["top_k", "all"])
def test_drawn_tokens_are_possible_and_come_with_the_seed(what, device):
    options, warpers = WARPERS[what]
    model, texts = _tiny(device=device), []
    patch_model(model)
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(_own(model, _ids(device), max_new_tokens=60, do_sample=True, **{"top_k": 0, **options}))
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])
    for text in texts:
        probabilities = _expected_probabilities(model, text, 7, warpers)
        assert (probabilities.gather(1, text[0, 7:, None]) > 0).all()
        assert not torch.equal(probabilities.argmax(-1), text[0, 7:]), "nothing was drawn"


def test_the_defaults_of_sampling_are_transformers(small):
    """The model's generation config counts: 50 tokens as transformers has it, or what the model says."""
    model = copy.deepcopy(small)
    model.generation_config.top_k = 2
    torch.manual_seed(0)
    text = _own(model, _ids(), max_new_tokens=40, do_sample=True)
    ranks = _expected_probabilities(model, text, 7, []).argsort(-1, descending=True).argsort(-1)
    assert ranks.gather(1, text[0, 7:, None]).max() == 1


# When a text ends.


@pytest.fixture(scope="module")
def written(small):
    """30 greedy tokens of `small`."""
    return _theirs(small, _ids(), max_new_tokens=30, do_sample=False)[0, 7:].tolist()


@pytest.mark.quick
def test_end_of_sequence(small, written):
    first = written.index(written[11])
    for ends in (written[11], [written[11]], [199 if 199 not in written else 198, written[11]]):
        text = _agree(small, eos_token_id=ends)
        assert text.shape[1] == 7 + first + 1
    assert _agree(small, eos_token_id=written[0]).shape[1] == 8
    assert _agree(small, eos_token_id=written[0], max_new_tokens=1).shape[1] == 8


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["min_new_tokens", "min_length"])
def test_no_end_before_a_length(name, device):
    """Nine tokens in ten end the text, so that it ends as soon as it may."""
    model = _tiny(device=device)
    ends = list(range(20, 200))
    assert _agree(model, eos_token_id=ends).shape[1] < 16
    text = _agree(model, eos_token_id=ends, **{name: 9 if name == "min_new_tokens" else 16})
    assert text.shape[1] == 17 and max(text[0, 7:-1]) < 20 <= text[0, -1]


@pytest.mark.quick
def test_lengths(small):
    assert _agree(small, max_new_tokens=None, max_length=19).shape[1] == 19
    config = transformers.GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0)
    own = _own(small, _ids(), generation_config=config)
    assert own.shape[1] == 12 and torch.equal(own, _theirs(small, _ids(), generation_config=config))
    for options in ({"max_length": 7}, {"max_length": 3}, {"max_new_tokens": 0}):
        errors = []
        for write in (generate, _theirs):
            with pytest.raises(ValueError) as caught:
                write(small, _ids(), do_sample=False, **options)
            errors.append(str(caught.value))
        assert errors[0] == errors[1]


def test_stop_strings(trained, prompt, tokenizer):
    ids = prompt.to(trained.device)
    whole = tokenizer.decode(_theirs(trained, ids, max_new_tokens=60, do_sample=False)[0])
    string = whole[len(PROMPT) + 20 : len(PROMPT) + 23]
    for strings in (string, [string, "\0"]):
        text = _agree(trained, ids, max_new_tokens=60, stop_strings=strings, tokenizer=tokenizer)
        assert tokenizer.decode(text[0]).endswith(string) and text.shape[1] < ids.shape[1] + 60
    config = transformers.GenerationConfig(max_new_tokens=60, do_sample=False, stop_strings=string, pad_token_id=0)
    own = _own(trained, ids, generation_config=config, tokenizer=tokenizer)
    assert torch.equal(own, text) and config.stop_strings == string
    with pytest.raises(ValueError, match=r"stop_strings need a tokenizer: pass generate\(\.\.\., tokenizer=tokenizer\)"):
        generate(trained, ids, stop_strings=string)


def test_max_time(small):
    assert _agree(small, max_time=0.0).shape[1] == 8
    assert _agree(small, max_time=600.0).shape[1] == 37


class StopAt(transformers.StoppingCriteria):
    """After so many tokens; it notes what it is shown."""

    def __init__(self, length: int) -> None:
        self.length, self.shown = length, []

    def __call__(self, input_ids, scores, **keywords):
        self.shown.append(input_ids.tolist())
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length, dtype=torch.bool, device=input_ids.device)


@pytest.mark.quick
def test_a_criterion_of_ones_own(small):
    criteria = [StopAt(19), StopAt(19)]
    texts = [
        write(small, _ids(), max_new_tokens=30, do_sample=False, stopping_criteria=transformers.StoppingCriteriaList([own]))
        for write, own in zip((_own, _theirs), criteria, strict=True)
    ]
    assert texts[0].shape[1] == 19 and torch.equal(*texts)
    assert criteria[0].shown == criteria[1].shown and len(criteria[0].shown) == 12


# Streamers.


class Noting:
    """A streamer."""

    def __init__(self) -> None:
        self.given: list[Any] = []

    def put(self, value) -> None:
        assert value.device.type == "cpu"
        self.given.append(value.tolist())

    def end(self) -> None:
        self.given.append("end")


@pytest.mark.quick
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sampled", [False, True])
def test_streamers_get_what_transformers_gives_them(sampled, device):
    model, notes = _tiny(device=device), [Noting(), Noting()]
    for write, note in zip((_own, _theirs), notes, strict=True):
        torch.manual_seed(0)
        text = write(model, _ids(device), max_new_tokens=9, do_sample=sampled, streamer=note)
        assert note.given == [_ids().tolist(), *([t] for t in text[0, 7:].tolist()), "end"]
    if not sampled:
        assert notes[0].given == notes[1].given


def test_text_streamers(trained, prompt, tokenizer, capsys):
    ids, printed = prompt.to(trained.device), []
    for write in (_own, _theirs):
        streamer = transformers.TextStreamer(tokenizer, skip_prompt=True)
        text = write(trained, ids, max_new_tokens=40, do_sample=False, streamer=streamer)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and tokenizer.decode(text[0, ids.shape[1] :]).strip() == printed[0].strip() != ""
    streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=lambda: generate(trained, ids, max_new_tokens=40, do_sample=False, streamer=streamer))
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert len(pieces) > 5 and "".join(pieces).strip() == printed[0].strip()


# Turns and caches.


def _cache_of(out):
    return out.cache if getattr(out, "cache", None) is not None else out.past_key_values


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("which", ["Llama", "a window", "layers with a window and without"])
@pytest.mark.parametrize("configured", [True, False])
def test_turns_go_on_with_a_cache(which, configured, device):
    kind, changes = MODELS[which]
    model, found = _tiny(kind, device, **changes), []
    for write in (_own, _theirs):
        cache = transformers.DynamicCache(config=model.config) if configured else transformers.DynamicCache()
        text = _ids(device)
        for turn in range(3):
            given = torch.cat([text, _ids(device, 3, seed=turn + 1)], 1) if turn else text
            text = write(model, given, max_new_tokens=12, do_sample=False, past_key_values=cache)
            assert cache.get_seq_length() == text.shape[1] - 1
        found.append((text, cache))
    (own, ours), (wanted, theirs) = found
    assert own.shape[1] == 7 + 3 * 12 + 2 * 3 and torch.equal(own, wanted)
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(one.values, other.values, atol=1e-4, rtol=1e-3)


def test_a_cache_can_change_hands(small):
    """Turns of the one loop and the other, on one cache."""
    found = []
    for first, second in ((_own, _theirs), (_theirs, _own), (_theirs, _theirs)):
        cache = transformers.DynamicCache(config=small.config)
        text = first(small, _ids(), max_new_tokens=10, do_sample=False, past_key_values=cache)
        given = torch.cat([text, _ids(length=4, seed=1)], 1)
        found.append(second(small, given, max_new_tokens=10, do_sample=False, past_key_values=cache))
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[2])


def test_a_dict_as_the_result(small):
    options = {"max_new_tokens": 10, "do_sample": False, "return_dict_in_generate": True}
    own, wanted = _own(small, _ids(), **options), _theirs(small, _ids(), **options)
    assert type(own) is type(wanted) and torch.equal(own.sequences, wanted.sequences)
    assert _cache_of(own).get_seq_length() == _cache_of(wanted).get_seq_length() == 16
    for one, other in zip(_cache_of(own).layers, _cache_of(wanted).layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys, atol=1e-4, rtol=1e-3)


# Several sequences.


def _batch(device: Any = "cpu", sequences: int = 4, length: int = 9) -> dict[str, Any]:
    """Prompts of unequal lengths, the i-th one two tokens shorter than the one before, down to one; 0 pads them."""
    ids = torch.cat([_ids("cpu", length, seed=i) for i in range(sequences)])
    mask = torch.ones_like(ids)
    for i in range(sequences):
        mask[i, : min(2 * i, length - 1)] = 0
    return {"input_ids": (ids * mask).to(device), "attention_mask": mask.to(device), "pad_token_id": 0}


def _agree_on(model, batch, **options):
    """Both loops' tokens of a batch, which must be the same."""
    given = {"max_new_tokens": 30, "do_sample": False, **batch, **options}
    ids = given.pop("input_ids")
    own = _own(model, ids, **given)
    assert torch.equal(own, _theirs(model, ids, **given))
    assert own.device == ids.device and own.dtype == ids.dtype
    return own


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("which", MODELS)
def test_random_models_texts_of_batches(which, device):
    kind, changes = MODELS[which]
    model = _tiny(kind, device, **changes)
    first = _agree_on(model, _batch(device))
    assert len({tuple(row) for row in first[:, 9:].tolist()}) > 1, "such texts say little"
    patch_model(model)
    assert torch.equal(_agree_on(model, _batch(device)), first)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sequences", range(1, 9))
def test_every_sequence_of_a_batch_writes_what_it_writes_alone(sequences, device):
    """Padding or not, whatever stands beside it."""
    model, batch = _tiny(device=device), _batch(device, sequences, length=12)
    patch_model(model)
    texts = _agree_on(model, batch, max_new_tokens=20)
    for ids, mask, text in zip(batch["input_ids"], batch["attention_mask"], texts, strict=True):
        alone = _own(model, ids[mask == 1][None], max_new_tokens=20, do_sample=False)
        assert torch.equal(alone[0, -20:], text[-20:])
    assert torch.equal(
        _agree_on(model, {"input_ids": batch["input_ids"][:1].repeat(sequences, 1)}),
        _agree(model, batch["input_ids"][:1]).repeat(sequences, 1),
    )


@pytest.mark.parametrize("device", DEVICES)
def test_batches_in_layers_that_are_too_dense_for_them(device):
    """Random models leave half of their neurons at zero, too few for six tokens to pay: the dense path is in the step."""
    model, batch = _tiny(device=device), _batch(device, 6)
    report = patch_model(model, example=_ids(device, 40), batch_invariant=False)
    assert all(layer.sparse and layer.most_tokens < 6 for layer in report.layers)
    text = _agree_on(model, batch)
    step = prepare_generation(model, 64, batch_size=6)
    assert step.is_compiled == (device == "cuda")
    for layer in model.model.layers:
        layer.mlp.sparsity = 0.95
    assert torch.equal(_agree_on(model, batch), text)
    assert prepare_generation(model, 64, batch_size=6) is not step, "whose layers take the other path"


def test_the_trained_models_batch(trained, tokenizer):
    """As a tokenizer makes it."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side, tokenizer.pad_token_id = "left", 0
    batch = dict(tokenizer(["def main", "class A:", "import sys\nimport os\n"], return_tensors="pt", padding=True))
    batch = {name: tensor.to(trained.device) for name, tensor in batch.items() if name != "token_type_ids"}
    assert not batch["attention_mask"].bool().all()
    texts = _agree_on(trained, {**batch, "pad_token_id": 0}, max_new_tokens=60)
    for ids, mask, text in zip(batch["input_ids"], batch["attention_mask"], texts, strict=True):
        alone = _own(trained, ids[mask == 1][None], max_new_tokens=60, do_sample=False)[0]
        assert torch.equal(alone, text[mask.shape[0] - int(mask.sum()) :])


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_batches_in_bfloat16_choose_the_likeliest_token_within_rounding(device, compress):
    model, batch = _tiny(device=device, dtype=torch.bfloat16), _batch(device)
    patch_model(model, compress=compress)
    given = {**batch, "max_new_tokens": 20, "do_sample": False}
    texts = _own(model, given.pop("input_ids"), **given)
    for mask, text in zip(batch["attention_mask"], texts, strict=True):
        own = text[9 - int(mask.sum()) :][None]
        with torch.inference_mode():
            logits = model(own).logits[0, -21:-1].float()
        chosen = logits.gather(1, own[0, -20:, None])[:, 0]
        assert ((logits.max(-1).values - chosen) <= 12 * torch.finfo(torch.bfloat16).eps * logits.abs().max()).all()


@pytest.mark.quick
@pytest.mark.parametrize("device", DEVICES)
def test_a_padded_sequence_alone(device):
    model = _tiny(device=device)
    ids, mask = _ids(device), torch.tensor([[0, 0, 0, 1, 1, 1, 1]], device=device)
    padded = _agree_on(model, {"input_ids": ids, "attention_mask": mask})
    assert torch.equal(padded[:, 3:], _agree(model, ids[:, 3:])) and not torch.equal(padded, _agree(model, ids))
    options = {"repetition_penalty": 1.3, "min_new_tokens": 9, "eos_token_id": list(range(20, 200)), "pad_token_id": 0}
    assert _agree_on(model, {"input_ids": ids, "attention_mask": mask}, **options).shape[1] >= 17


@pytest.mark.parametrize("device", DEVICES)
def test_a_penalty_for_repetitions_does_not_count_padding(device):
    model, batch = _tiny(device=device), _batch(device)
    whole = _agree_on(model, batch)
    options = {"repetition_penalty": 1.7}
    text = _agree_on(model, batch, **options)
    assert not torch.equal(text, whole)
    for ids, mask, row in zip(batch["input_ids"], batch["attention_mask"], text, strict=True):
        given = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0, **options}
        alone = _own(model, ids[mask == 1][None], **given)
        assert torch.equal(alone, _theirs(model, ids[mask == 1][None], **given))
        if device == "cpu":  # on a GPU small operations round otherwise for another number of sequences
            assert torch.equal(alone[0, -30:], row[-30:])


@pytest.mark.quick
@pytest.mark.parametrize("device", DEVICES)
def test_sequences_end_apart(device):
    """Padding stands behind the end of each, and the call ends with the last one."""
    model, batch = _tiny(device=device), _batch(device)
    whole = _agree_on(model, batch)
    ends = [int(whole[0, 12]), int(whole[2, 21])]
    for eos in (ends, ends[:1], [*ends, *range(20, 40)]):
        text = _agree_on(model, batch, eos_token_id=eos if len(eos) > 1 else eos[0])
        ended = [next((n for n, token in enumerate(row) if token in eos), 99) for row in text[:, 9:].tolist()]
        assert len(set(ended)) > 1 and text.shape[1] == min(39, 10 + max(ended))
        for row, end in zip(text[:, 9:], ended, strict=True):
            assert not row[end + 1 :].any(), "padding"
    assert _agree_on(model, batch, eos_token_id=list(range(200))).shape[1] == 10
    assert _agree_on(model, batch, eos_token_id=list(range(1, 200)), min_new_tokens=5, pad_token_id=3).shape[1] >= 15
    assert _agree_on(model, batch, eos_token_id=ends, max_new_tokens=None, max_length=14).shape[1] <= 14


class StopSequence(transformers.StoppingCriteria):
    """Ends the second sequence at one length, all at another; it notes what it is shown."""

    def __init__(self) -> None:
        self.shown: list[Any] = []

    def __call__(self, input_ids, scores, **keywords):
        self.shown.append(input_ids.tolist())
        ended = torch.full((len(input_ids),), input_ids.shape[1] >= 25, dtype=torch.bool, device=input_ids.device)
        ended[1] |= input_ids.shape[1] >= 14
        return ended


@pytest.mark.quick
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ends", [None, [199]])
def test_criteria_end_sequences_apart(ends, device):
    """Without an end-of-sequence token an ended sequence goes on until the others have ended, as transformers has it."""
    model, criteria, found = _tiny(device=device), [StopSequence(), StopSequence()], []
    for write, criterion in zip((_own, _theirs), criteria, strict=True):
        given = {**_batch(device), "max_new_tokens": 30, "do_sample": False, "eos_token_id": ends}
        given |= {"stopping_criteria": transformers.StoppingCriteriaList([criterion]), "return_dict_in_generate": True}
        found.append(write(model, given.pop("input_ids"), **given))
    own, theirs = found
    assert torch.equal(own.sequences, theirs.sequences) and own.sequences.shape[1] == 25
    assert criteria[0].shown == criteria[1].shown
    assert bool(own.sequences[1, 14:].any()) == (ends is None)
    _assert_caches_agree(_cache_of(own), _cache_of(theirs), _batch()["attention_mask"])


def _assert_caches_agree(own, theirs, mask) -> None:
    """But for padding, of which nothing is ever read."""
    length = theirs.get_seq_length()
    assert own.get_seq_length() == length
    for one, other in zip(own.layers, theirs.layers, strict=True):
        for ours, wanted in ((one.keys, other.keys), (one.values, other.values)):
            kept = wanted.shape[-2]
            shown = torch.cat([mask, torch.ones(len(mask), length - mask.shape[1])], 1).bool()[:, length - kept :]
            assert ours.shape == wanted.shape
            for s in range(len(mask)):
                torch.testing.assert_close(ours[s][:, shown[s]], wanted[s][:, shown[s]], atol=1e-4, rtol=1e-3)


def test_stop_strings_of_batches(trained, tokenizer):
    ids = tokenizer(["def main", "def read", "import s"], return_tensors="pt").input_ids.to(trained.device)
    whole = _theirs(trained, ids, max_new_tokens=40, do_sample=False, pad_token_id=0)
    strings = [tokenizer.decode(whole[0, 14:17]), tokenizer.decode(whole[2, 24:27])]
    for ends in (None, [1]):
        options = {"stop_strings": strings, "tokenizer": tokenizer, "eos_token_id": ends, "pad_token_id": 0}
        text = _agree_on(trained, {"input_ids": ids}, **options)
        assert text.shape[0] == 3


@pytest.mark.quick
@pytest.mark.parametrize("device", DEVICES)
def test_streamers_of_batches(device, tokenizer):
    """They get what transformers gives them, and those of one text alone refuse several as they do there."""
    model, notes = _tiny(device=device), [Noting(), Noting()]
    for write, note in zip((_own, _theirs), notes, strict=True):
        given = {**_batch(device), "max_new_tokens": 9, "do_sample": False, "streamer": note}
        text = write(model, given.pop("input_ids"), **given)
        assert note.given == [text[:, :9].tolist(), *text[:, 9:].t().tolist(), "end"]
    assert notes[0].given == notes[1].given
    for write in (generate, _theirs):
        given = {**_batch(device), "max_new_tokens": 9, "streamer": transformers.TextStreamer(tokenizer)}
        with pytest.raises(ValueError, match="TextStreamer only supports batch size 1"):
            write(model, given.pop("input_ids"), **given)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("which", ["Llama", "a window", "layers with a window and without"])
@pytest.mark.parametrize("configured", [True, False])
def test_turns_of_batches_go_on_with_a_cache(which, configured, device):
    kind, changes = MODELS[which]
    model, found = _tiny(kind, device, **changes), []
    for write in (_own, _theirs):
        cache = transformers.DynamicCache(config=model.config) if configured else transformers.DynamicCache()
        batch = _batch(device, 3)
        text, mask = batch["input_ids"], batch["attention_mask"]
        for turn in range(3):
            if turn:
                text = torch.cat([text, *(torch.cat([_ids(device, 3, seed=9 * turn + s) for s in range(3)]),)], 1)
            mask = torch.cat([mask, mask.new_ones(3, text.shape[1] - mask.shape[1])], 1)
            text = write(model, text, attention_mask=mask, max_new_tokens=12, do_sample=False, past_key_values=cache)
            assert cache.get_seq_length() == text.shape[1] - 1
        found.append((text, cache))
    assert found[0][0].shape[1] == 9 + 3 * 12 + 2 * 3 and torch.equal(found[0][0], found[1][0])
    _assert_caches_agree(found[0][1], found[1][1], _batch(sequences=3)["attention_mask"])


@pytest.mark.quick
@pytest.mark.parametrize("what", WARPERS)
def test_probabilities_of_batches_are_those_of_the_processors(what, small, monkeypatch):
    options, warpers = WARPERS[what]
    seen, real = [], torch.multinomial

    def noting(probabilities, *arguments, **keywords):
        seen.append(probabilities.clone())
        return real(probabilities, *arguments, **keywords)

    monkeypatch.setattr(torch, "multinomial", noting)
    torch.manual_seed(1)
    ids = torch.cat([_ids(seed=i) for i in range(3)])
    texts = _own(small, ids, max_new_tokens=20, do_sample=True, **{"top_k": 0, **options})
    monkeypatch.undo()
    for s, text in enumerate(texts):
        expected = _expected_probabilities(small, text[None], 7, warpers)
        torch.testing.assert_close(torch.stack([p[s] for p in seen]), expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_several_samples_of_one_prompt(device):
    model, texts = _tiny(device=device), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(_own(model, _ids(device), max_new_tokens=40, do_sample=True, num_return_sequences=4, top_k=20))
        assert len({tuple(row) for row in texts[-1].tolist()}) == 4
        for text in texts[-1]:
            probabilities = _expected_probabilities(model, text[None], 7, [lambda: hf.TopKLogitsWarper(20)])
            assert (probabilities.gather(1, text[7:, None]) > 0).all()
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


def test_one_step_of_one_sequence_and_one_of_several_are_kept():
    model = _tiny()
    one, four = prepare_generation(model, 300), prepare_generation(model, 300, batch_size=4)
    assert four.sequences == 4 and four.nbytes == 4 * one.nbytes
    _agree(model)
    _agree_on(model, _batch())
    assert prepare_generation(model, 300) is one and prepare_generation(model, 300, batch_size=4) is four
    assert prepare_generation(model, 64, batch_size=3).sequences == 3
    kept = weakref.ref(four)
    del four
    gc.collect()
    assert kept() is None and prepare_generation(model, 300) is one
    for size in (0, 9):
        with pytest.raises(ValueError, match=f"prepare_generation: batch_size must be 1 to 8, got {size}"):
            prepare_generation(model, 64, batch_size=size)
    for size in (2.0, "2", True):
        with pytest.raises(TypeError, match="prepare_generation: batch_size must be an int, got"):
            prepare_generation(model, 64, batch_size=size)


# What transformers does instead.


class Halving(transformers.LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores / 2


def _hooked(model):
    model.model.layers[0].register_forward_hook(lambda module, given, out: None)


FALLBACKS = {
    "nine sequences": (lambda: {"inputs": _ids().repeat(9, 1)}, "9 sequences at once, of at most 8"),
    "beams": (lambda: {"num_beams": 2}, "num_beams=2"),
    "scores": (lambda: {"return_dict_in_generate": True, "output_scores": True}, "output_scores"),
    "logits": (lambda: {"return_dict_in_generate": True, "output_logits": True}, "output_logits"),
    "attentions": (lambda: {"return_dict_in_generate": True, "output_hidden_states": True}, "output_hidden_states"),
    "a hole": (lambda: {"attention_mask": torch.tensor([[0, 1, 1, 0, 1, 1, 1]])}, "an attention mask that hides tokens"),
    "padding on the right": (
        lambda: {"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0]])},
        "other than padding on the left",
    ),
    "other positions": (lambda: {"position_ids": 2 * torch.arange(7)[None]}, "position_ids other than those of the tokens"),
    "a static cache": (lambda: {"cache_implementation": "static"}, "a StaticCache as the cache"),
    "no cache": (lambda: {"use_cache": False}, "use_cache=False"),
    "n-grams": (lambda: {"no_repeat_ngram_size": 2}, "a NoRepeatNGramLogitsProcessor"),
    "a processor": (lambda: {"logits_processor": transformers.LogitsProcessorList([Halving()])}, "a Halving"),
    "more texts": (lambda: {"num_return_sequences": 9, "do_sample": True}, "9 sequences at once"),
}


@pytest.mark.quick
@pytest.mark.parametrize("what", FALLBACKS)
def test_what_transformers_does_itself_is_said(what, small):
    make, reason = FALLBACKS[what]
    results = []
    for write in (generate, _theirs):
        given = {"inputs": _ids(), "max_new_tokens": 12, "do_sample": False, **make()}
        ids = given.pop("inputs")
        torch.manual_seed(0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results.append(write(small, ids, **given))
        said = [str(w.message) for w in caught if str(w.message).startswith("generate: ")]
        assert len(said) == (write is generate)
        assert not said or ("transformers' own loop does this call, which is slower: " in said[0] and reason in said[0])
    one, other = (r if isinstance(r, torch.Tensor) else r.sequences for r in results)
    assert torch.equal(one, other) and one.shape[1] == 19
    if not isinstance(results[0], torch.Tensor):
        assert set(results[0].keys()) == set(results[1].keys())
        assert all(torch.equal(a, b) for a, b in zip(results[0].scores or (), results[1].scores or (), strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_a_model_that_has_shown_its_hidden_states_still_has_its_step(device):
    """transformers leaves hooks on its layers, which do nothing until they are asked again."""
    model = _tiny(device=device)
    patch_model(model)
    options = {"max_new_tokens": 12, "do_sample": False}
    text, before = generate(model, _ids(device), **options), prepare_generation(model, 64)
    shown = {"output_hidden_states": True, "output_attentions": True, "return_dict_in_generate": True}
    first = _theirs(model, _ids(device), **options, **shown)
    assert any(layer._forward_hooks for layer in model.model.layers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert prepare_generation(model, 64) is before
        release_generation(model)
        assert torch.equal(generate(model, _ids(device), **options), text)
        assert prepare_generation(model, 64).is_compiled == before.is_compiled
    again = _theirs(model, _ids(device), **options, **shown)
    assert len(again.hidden_states) == 12 and torch.equal(first.hidden_states[3][1], again.hidden_states[3][1])
    _hooked(model)
    with pytest.warns(UserWarning, match="has hooks"):
        assert torch.equal(generate(model, _ids(device), **options), text)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("how", ["hooks", "training", "float64", "a forward of its own"])
def test_models_that_have_no_step_are_left_to_transformers(how, device):
    model = _tiny(device=device)
    release = {
        "hooks": "has hooks",
        "training": "training mode",
        "float64": "float64",
        "a forward of its own": "forward of its own",
    }
    if how == "hooks":
        _hooked(model)
    elif how == "training":
        model.train()
    elif how == "float64":
        model.double()
    else:
        layer = model.model.layers[1]
        layer.mlp.forward = lambda x: 2 * type(layer.mlp).forward(layer.mlp, x)
    note = Noting()
    with pytest.warns(UserWarning, match=release[how]):
        text = generate(model, _ids(device), max_new_tokens=12, do_sample=False, streamer=note)
    assert torch.equal(text, _theirs(model, _ids(device), max_new_tokens=12, do_sample=False))
    assert len(note.given) == 14 and note.given[-1] == "end"
    with pytest.raises(ValueError, match=f"prepare_generation: .*{release[how]}"):
        prepare_generation(model, 64)


def test_another_attention_is_left_to_transformers():
    """A softcap that transformers hands on, and one that it knows nothing of."""
    known = _tiny("Gemma2", head_dim=16, attn_logit_softcapping=1.0)
    with pytest.warns(UserWarning, match="softcap"):
        text = generate(known, _ids(), max_new_tokens=12, do_sample=False)
    assert torch.equal(text, _theirs(known, _ids(), max_new_tokens=12, do_sample=False))

    def capped(module, query, key, value, attention_mask, scaling=None, **keywords):
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        scores = (9 * (query @ key.mT) * scaling).tanh()
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(scores.shape[-1] - scores.shape[-2])
        return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register("capped_by_a_test", capped)
    model = _tiny()
    plain = _theirs(model, _ids(), max_new_tokens=12, do_sample=False)
    model.set_attn_implementation("capped_by_a_test")
    with pytest.warns(UserWarning, match="generate: transformers' own loop does this call"):
        text = generate(model, _ids(), max_new_tokens=12, do_sample=False)
    assert torch.equal(text, _theirs(model, _ids(), max_new_tokens=12, do_sample=False)) and not torch.equal(text, plain)


def test_an_attention_class_of_its_own_is_left_to_transformers():
    model = _tiny()
    kind = type(model.model.layers[0].self_attn)

    class Remembering(kind):
        """Which adds the mean of all values it has seen."""

        def forward(self, hidden_states, *arguments, **keywords):
            out, weights = super().forward(hidden_states, *arguments, **keywords)
            cache = keywords.get("past_key_values", keywords.get("cache"))
            seen = cache.layers[self.layer_idx].values.mean(dim=(0, 1, 2)).repeat(4)
            return out + seen, weights

    for layer in model.model.layers:
        layer.self_attn.__class__ = Remembering
    with pytest.warns(UserWarning, match="generate: transformers' own loop does this call"):
        text = generate(model, _ids(), max_new_tokens=12, do_sample=False)
    assert torch.equal(text, _theirs(model, _ids(), max_new_tokens=12, do_sample=False))


@pytest.mark.quick
def test_what_is_refused(small):
    with pytest.raises(TypeError, match=r"generate: model must be a torch\.nn\.Module, got str"):
        generate("a folder", _ids())
    with pytest.raises(TypeError, match="a Linear cannot generate: load it with AutoModelForCausalLM"):
        generate(nn.Linear(1, 1), _ids())
    with pytest.raises(TypeError, match=r"prepare_generation: model must be a torch\.nn\.Module"):
        prepare_generation("a folder", 1)
    with pytest.raises(ValueError, match="custom_generate is this function itself"):
        generate(small, _ids(), custom_generate=decoding_loop)
    with pytest.raises((TypeError, ValueError), match="no_such_option"):
        generate(small, _ids(), max_new_tokens=3, no_such_option=1)


# The hook of transformers.


@pytest.mark.quick
@pytest.mark.parametrize("device", DEVICES)
def test_as_transformers_hook(device):
    model = _tiny(device=device)
    options = {"max_new_tokens": 20, "do_sample": False}
    wanted = _theirs(model, _ids(device), **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="generate: ")
        own = model.generate(_ids(device), custom_generate=decoding_loop, **options)
        out = model.generate(_ids(device), custom_generate=decoding_loop, return_dict_in_generate=True, **options)
    assert torch.equal(own, wanted) and torch.equal(out.sequences, wanted)
    assert _cache_of(out).get_seq_length() == 26


def test_batches_as_transformers_hook():
    model, given = _tiny(), {**_batch(), "max_new_tokens": 20, "do_sample": False}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="generate: ")
        own = model.generate(custom_generate=decoding_loop, **given)
    assert torch.equal(own, model.generate(**given))
    with pytest.raises(ValueError, match=r"decoding_loop: .* this call is assisted_generation: leave custom_generate out"):
        model.generate(_ids(), custom_generate=decoding_loop, prompt_lookup_num_tokens=3, max_new_tokens=5)


# A model that changes.


@pytest.mark.parametrize("device", DEVICES)
def test_changes_between_calls_are_seen(device):
    model, other = _tiny(device=device), _tiny(device=device, seed=1)
    first = _agree(model)
    patch_model(model)
    assert torch.equal(_agree(model), first)
    model.load_state_dict(other.state_dict())
    second = _agree(model)
    assert torch.equal(second, _theirs(other, _ids(device), max_new_tokens=30, do_sample=False))
    for layer in model.model.layers:
        layer.mlp.act_fn.threshold = 0.7
    third = _agree(model)
    unpatch_model(model)
    assert torch.equal(_agree(model), second)
    patch_model(model, 0.7)
    assert torch.equal(_agree(model), third)
    unpatch_model(model)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.roll(1, 0))  # in place: every token is the next one
    fourth = _agree(model)
    model.lm_head = copy.deepcopy(other.lm_head)
    assert torch.equal(_agree(model), second)
    assert len({tuple(t[0].tolist()) for t in (first, second, third, fourth)}) == 4, (
        "a change that changes nothing says nothing"
    )


@pytest.mark.parametrize("device", DEVICES)
def test_another_dtype_is_seen(device):
    model = _tiny(device=device)
    first = _agree(model)
    model.double()
    with pytest.warns(UserWarning, match="float64"):
        generate(model, _ids(device), max_new_tokens=5)
    model.float()
    assert torch.equal(_agree(model), first)
    model.bfloat16()
    text = _own(model, _ids(device), max_new_tokens=30, do_sample=False)
    with torch.inference_mode():
        logits = model(text).logits[0, 6:-1].float()
    assert (logits.max(-1).values - logits.gather(1, text[0, 7:, None])[:, 0] <= 0.1 * logits.abs().max()).all()


@pytest.mark.parametrize("device", DEVICES)
def test_adapters_are_seen(device):
    peft = pytest.importorskip("peft", reason="peft brings LoRA adapters")
    model = _tiny(device=device)
    patch_model(model)
    plain = _agree(model)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj", "up_proj"], r=4, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()

    def text():
        options = {"max_new_tokens": 30, "do_sample": False}
        wanted = adapted.generate(input_ids=_ids(device), **options)
        assert torch.equal(generate(model, _ids(device), **options), wanted)
        return wanted

    with_adapter = text()
    with adapted.disable_adapter():
        without = text()
    assert torch.equal(text(), with_adapter) and not torch.equal(with_adapter, plain)
    for module in model.modules():
        if hasattr(module, "scaling") and isinstance(module.scaling, dict):
            module.scaling["default"] *= 3
    assert not torch.equal(text(), with_adapter)
    assert torch.equal(without, plain)
    merged = adapted.merge_and_unload()
    _agree(merged)


# Threads, interruptions.


@pytest.mark.parametrize("device", DEVICES)
def test_two_threads_on_one_model(device):
    model = _tiny(device=device)
    wanted = [_theirs(model, _ids(device, seed=i), max_new_tokens=25, do_sample=False) for i in range(4)]
    found, errors = {}, []

    def write(i: int) -> None:
        try:
            for _ in range(2):
                found[i] = _own_in_a_thread(model, _ids(device, seed=i))
                assert torch.equal(found[i], wanted[i])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(found) == 4


def _own_in_a_thread(model, ids):
    """Without `catch_warnings`, which is not for threads."""
    return generate(model, ids, max_new_tokens=25, do_sample=False)


class Calling(Noting):
    """A streamer that does something at the third token."""

    def __init__(self, what) -> None:
        super().__init__()
        self.what = what

    def put(self, value) -> None:
        super().put(value)
        if len(self.given) == 4:
            self.what()


@pytest.mark.parametrize("device", DEVICES)
def test_a_streamer_that_generates_with_the_same_model_is_refused(device):
    model, other = _tiny(device=device), _tiny(device=device, seed=1)
    first = _agree(model)
    for again in (lambda: generate(model, _ids(device), max_new_tokens=3), lambda: prepare_generation(model, 64)):
        with pytest.raises(
            RuntimeError, match="called by a streamer or criterion of a call that is generating with this model"
        ):
            _own(model, _ids(device), max_new_tokens=30, do_sample=False, streamer=Calling(again))
        assert torch.equal(_agree(model), first)
    streamer = Calling(lambda: generate(other, _ids(device), max_new_tokens=3, do_sample=False))
    assert torch.equal(_own(model, _ids(device), max_new_tokens=30, do_sample=False, streamer=streamer), first)


@pytest.mark.quick
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_call_leaves_the_model_usable(error, device):
    model = _tiny(device=device)
    first = _agree(model)

    def interrupt() -> None:
        raise error

    with pytest.raises(error):
        _own(model, _ids(device), max_new_tokens=30, do_sample=False, streamer=Calling(interrupt))
    assert torch.equal(_agree(model), first)


# The model itself, and memory.


def _inside(model) -> dict:
    """What a model's modules hold, by identity."""
    found = {}
    for name, module in model.named_modules():
        own = module.__dict__
        for key, value in own.items():
            if key in ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks"):
                found |= {(name, key, k): id(v) for k, v in value.items()}
            found[name, key] = id(value)
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("patched", [False, True])
def test_the_model_is_not_changed(patched, device):
    model = _tiny(device=device)
    if patched:
        patch_model(model)
    _theirs(model, _ids(device), max_new_tokens=3, do_sample=False)
    before, config, state = _inside(model), model.config.to_dict(), copy.deepcopy(model.state_dict())
    attention = model.config._attn_implementation
    _own(model, _ids(device), max_new_tokens=10, do_sample=False)
    torch.manual_seed(0)
    _own(model, _ids(device), max_new_tokens=10, do_sample=True, top_k=5, min_new_tokens=3)
    assert _inside(model) == before and model.config.to_dict() == config and model.config._attn_implementation == attention
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    for parameter in model.parameters():
        assert parameter.requires_grad and parameter.grad is None and not parameter.is_inference()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_copies_of_a_model_that_has_generated(how, device):
    model = _tiny(device=device)
    patch_model(model)
    first = _agree(model)
    other = how(model)
    assert torch.equal(_agree(other), first) and isinstance(other.model.layers[0].mlp, SparseGatedMLP)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    assert not torch.equal(_agree(other), first) and torch.equal(_agree(model), first)


def test_what_is_kept_goes_when_it_is_released_or_the_model_goes():
    model = _tiny()
    step = prepare_generation(model, 300)
    assert step.capacity >= 300 and step.seconds > 0 and step.nbytes >= 2 * 2 * 2 * 300 * 16 * 4
    assert prepare_generation(model, 200) is step, "it serves shorter texts"
    kept = weakref.ref(step)
    del step
    gc.collect()
    assert kept() is not None
    release_generation(model)
    gc.collect()
    assert kept() is None
    release_generation(model)
    kept, first = weakref.ref(prepare_generation(model, 64)), _agree(model)
    for change in (patch_model, unpatch_model):
        change(model)
        gc.collect()
        assert kept() is None, "a step of the modules of before"
        kept = weakref.ref(prepare_generation(model, 64))
        assert torch.equal(_agree(model), first)
    model.train()
    with pytest.warns(UserWarning, match="training mode"):
        generate(model, _ids(), max_new_tokens=3)
    gc.collect()
    assert kept() is None, "a step that does not serve any more"
    model.eval()
    kept = weakref.ref(prepare_generation(model, 64))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and kept() is None


@pytest.mark.gpu
def test_gpu_memory_is_freed(torch_gpu):
    model = _tiny(device="cuda")
    _own(model, _ids("cuda"), max_new_tokens=10, do_sample=False)
    release_generation(model)
    gc.collect()
    before = torch.cuda.memory_allocated()
    step = prepare_generation(model, 4096)
    assert torch.cuda.memory_allocated() - before >= step.nbytes
    assert step.is_compiled
    del step
    for _ in range(3):
        _own(model, _ids("cuda"), max_new_tokens=10, do_sample=False)
    held = torch.cuda.memory_allocated()
    for _ in range(3):
        _own(model, _ids("cuda"), max_new_tokens=10, do_sample=False)
    assert torch.cuda.memory_allocated() == held, "every call keeps something"
    release_generation(model)
    gc.collect()
    assert torch.cuda.memory_allocated() <= before


def test_a_cache_without_memory_is_said(monkeypatch):
    model = _tiny()
    first, real = _agree(model), torch.zeros
    calls = []

    def full(*size, **keywords):
        if isinstance(size[0], tuple) and len(size[0]) == 3:
            calls.append(size)
            if len(calls) == 3:
                raise torch.OutOfMemoryError("made up")
        return real(*size, **keywords)

    monkeypatch.setattr(torch, "zeros", full)
    release_generation(model)
    wanted = r"generate: a cache of \d+ tokens needs \d+\.\d+ GiB, which cpu has not free: ask for fewer tokens \(made up\)"
    with pytest.raises(MemoryError, match=wanted):
        generate(model, _ids(), max_new_tokens=1000, do_sample=False)
    monkeypatch.undo()
    assert torch.equal(_agree(model), first)
