"""generate with guesses: prompt lookup and assistants write the text that is written without them, in fewer steps."""

from __future__ import annotations

import copy
import gc
import re
import threading
import warnings
import weakref
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason='the extra "torch" brings it')
transformers = pytest.importorskip("transformers", reason='the extra "hf" brings it')
from test_generate import (  # noqa: E402
    FOLDER,
    MODELS,
    Calling,
    Noting,
    StopAt,
    _agree,
    _assert_caches_agree,
    _cache_of,
    _ids,
    _own,
    _theirs,
    _tiny,
    one_thread,
)
from torch_devices import DEVICES  # noqa: E402

from prosparse_cupy.torch import generate, patch_model, prepare_generation, release_generation  # noqa: E402
from prosparse_cupy.torch.runner import Runner  # noqa: E402
from prosparse_cupy.torch.speculation import Speculation, guesses_of  # noqa: E402

__all__ = ["one_thread"]


@pytest.fixture
def rounds(monkeypatch):
    """How many tokens each step after the prompt gave."""
    found, real = [], Speculation._next

    def noting(self, ids, most):
        new = real(self, ids, most)
        found.append(len(new))
        return new

    monkeypatch.setattr(Speculation, "_next", noting)
    return found


def _repeating(device: Any = "cpu"):
    """A prompt that says the same thing three times."""
    return torch.cat([_ids(device, 9)] * 3, 1)


def _near(model, noise: float):
    """A model that often writes what the other does: its weights are changed a little."""
    near = copy.deepcopy(model)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in near.parameters():
            parameter.add_(noise * parameter.std() * torch.randn(parameter.shape).to(parameter.device, parameter.dtype))
    return near


def _agree_with_guesses(model, ids, **options):
    """The text with guesses, which must be that of both loops without."""
    guessing = {name: options.pop(name) for name in ("prompt_lookup_num_tokens", "assistant_model") if name in options}
    given = {"max_new_tokens": 60, "do_sample": False, **options}
    own = _own(model, ids, **given, **guessing)
    assert torch.equal(own, _theirs(model, ids, **given)) and torch.equal(own, _own(model, ids, **given))
    assert own.device == ids.device and own.dtype == ids.dtype
    return own


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("which", MODELS)
def test_prompt_lookup_writes_the_same_text(which, device, rounds):
    kind, changes = MODELS[which]
    model = _tiny(kind, device, **changes)
    _agree_with_guesses(model, _repeating(device), prompt_lookup_num_tokens=4)
    patch_model(model)
    rounds.clear()
    _agree_with_guesses(model, _repeating(device), prompt_lookup_num_tokens=4)
    assert max(rounds) > 1 and sum(rounds) >= 59, "no guess was right"


@pytest.mark.parametrize("number", [1, 2, 3, 7, 10, 50])
def test_any_number_of_guesses(number, rounds):
    """Of more than seven, seven are verified."""
    model = _tiny()
    _agree_with_guesses(model, _repeating(), prompt_lookup_num_tokens=number)
    assert 1 < max(rounds) <= min(number, 7) + 1


def test_the_trained_model_looks_up_its_prompt(rounds):
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    patch_model(model)
    ids = tokenizer("def read(path):\n    return path\n\ndef read(", return_tensors="pt").input_ids
    _agree_with_guesses(model, ids, prompt_lookup_num_tokens=5, max_new_tokens=120)
    assert len(rounds) < 100
    rounds.clear()
    _agree_with_guesses(model, ids, prompt_lookup_num_tokens=5, max_matching_ngram_size=4)
    assert max(rounds) > 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("noise", [0.0, 0.05, 3.0], ids=["itself", "near", "far"])
def test_assistants_write_the_same_text(noise, device, rounds):
    """Whether they guess always, sometimes or never right. Where all were right, the assistant has one token to catch up on."""
    model = _tiny(device=device)
    assistant = _near(model, noise)
    patch_model(model)
    _agree_with_guesses(model, _ids(device), assistant_model=assistant)
    found = set(rounds[:-1])
    assert found == {6} if noise == 0 else len(found) > 2 if noise < 1 else found == {1}
    patch_model(assistant)
    assistant.generation_config.num_assistant_tokens = 3
    rounds.clear()
    _agree_with_guesses(model, _repeating(device), assistant_model=assistant)
    assert max(rounds) <= 4
    assistant.generation_config.num_assistant_tokens = 20
    rounds.clear()
    _agree_with_guesses(model, _ids(device), assistant_model=assistant)
    assert max(rounds) <= 8 and (noise or max(rounds) == 8)


def test_an_assistant_of_another_kind():
    model, assistant = _tiny(), _tiny("Qwen3", num_hidden_layers=1, hidden_size=32, head_dim=16)
    _agree_with_guesses(model, _ids(), assistant_model=assistant)
    state = copy.deepcopy(assistant.generation_config.to_dict())
    _agree_with_guesses(assistant, _ids(), assistant_model=model)
    assert assistant.generation_config.to_dict() == state


ASKED = {
    "prompt lookup": lambda model: {"prompt_lookup_num_tokens": 6},
    "an assistant": lambda model: {"assistant_model": model},
}


@pytest.fixture(scope="module")
def assisted():
    """A random model, patched, one that is near it, and the text of the first behind `_repeating`."""
    model = _tiny()
    assistant = _near(model, 0.05)
    patch_model(model)
    return model, assistant, _theirs(model, _repeating(), max_new_tokens=60, do_sample=False)[0, 27:].tolist()


@pytest.fixture(params=ASKED)
def asked(request, assisted):
    """A model and the options of a call with guesses."""
    return assisted[0], ASKED[request.param](assisted[1])


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3},
        {"min_new_tokens": 25, "eos_token_id": list(range(20, 200))},
        {"min_length": 40, "eos_token_id": list(range(20, 200)), "repetition_penalty": 1.1},
        {"suppress_tokens": list(range(100, 150))},
        {"remove_invalid_values": True},
    ],
    ids=lambda options: ", ".join(options),
)
def test_processors_see_the_text_before_each_guess(options, asked):
    model, guessing = asked
    plain = _theirs(model, _repeating(), max_new_tokens=60, do_sample=False)
    text = _agree_with_guesses(model, _repeating(), pad_token_id=0, **options, **guessing)
    assert "remove_invalid_values" in options or not torch.equal(text, plain)


def test_a_text_ends_where_it_ends_without_guesses(asked, assisted):
    model, guessing = asked
    written = assisted[2]
    for at in (0, 7, 23, 41):
        ends = [written[at], 199]
        text = _agree_with_guesses(model, _repeating(), eos_token_id=ends, pad_token_id=0, **guessing)
        assert text.shape[1] == 28 + min(n for n, token in enumerate(written) if token in ends)
    for length in (28, 29, 30, 35, 36):
        assert _agree_with_guesses(model, _repeating(), max_new_tokens=None, max_length=length, **guessing).shape[1] == length
    # Guesses of the last step lie behind the longest text that the cache is made for.
    assert _agree_with_guesses(model, _repeating(), max_new_tokens=229, **guessing).shape[1] == 256


def test_criteria_and_streamers_get_each_token(asked):
    model, guessing = asked
    found = []
    for more in ({}, guessing):
        criterion, note = StopAt(50), Noting()
        criteria = transformers.StoppingCriteriaList([criterion])
        options = {"max_new_tokens": 60, "do_sample": False, "stopping_criteria": criteria, "streamer": note}
        found.append((_own(model, _repeating(), **options, **more), criterion.shown, note.given))
    assert torch.equal(found[0][0], found[1][0]) and found[0][0].shape[1] == 50
    assert found[0][1] == found[1][1] and found[0][2] == found[1][2]


def test_stop_strings_with_guesses():
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    ids = tokenizer("def read(path):\n    return path\n\ndef read(", return_tensors="pt").input_ids
    whole = tokenizer.decode(_theirs(model, ids, max_new_tokens=60, do_sample=False)[0, ids.shape[1] :])
    text = _agree(model, ids, max_new_tokens=60, stop_strings=whole[30:34], tokenizer=tokenizer, prompt_lookup_num_tokens=5)
    assert tokenizer.decode(text[0]).endswith(whole[30:34])


@pytest.mark.parametrize("which", ["Llama", "a window", "layers with a window and without"])
def test_turns_with_guesses_go_on_with_a_cache(which):
    kind, changes = MODELS[which]
    model, found = _tiny(kind, **changes), []
    for guessing in ({"prompt_lookup_num_tokens": 5}, {"assistant_model": _near(model, 0.05)}, {}):
        cache, text = transformers.DynamicCache(config=model.config), _repeating()
        for turn in range(3):
            given = torch.cat([text, _ids("cpu", 3, seed=turn + 1)], 1) if turn else text
            text = _own(model, given, max_new_tokens=20, do_sample=False, past_key_values=cache, **guessing)
            assert cache.get_seq_length() == text.shape[1] - 1
        found.append((text, cache))
    for text, cache in found[:2]:
        assert torch.equal(text, found[2][0])
        _assert_caches_agree(cache, found[2][1], torch.ones(1, 27))


def test_a_dict_as_the_result(asked):
    model, guessing = asked
    options = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True}
    own, plain = _own(model, _repeating(), **options, **guessing), _own(model, _repeating(), **options)
    assert type(own) is type(plain) and torch.equal(own.sequences, plain.sequences)
    _assert_caches_agree(_cache_of(own), _cache_of(plain), torch.ones(1, 27))


def test_a_padded_prompt(asked):
    model, guessing = asked
    ids = torch.cat([torch.zeros(1, 5, dtype=torch.int64), _repeating()], 1)
    mask = (torch.arange(32) >= 5).long()[None]
    text = _agree_with_guesses(model, ids, attention_mask=mask, min_new_tokens=9, eos_token_id=199, pad_token_id=0, **guessing)
    assert torch.equal(text[:, 5:], _agree(model, _repeating(), max_new_tokens=60, eos_token_id=199, min_new_tokens=9))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compress", [False, True])
def test_guesses_in_bfloat16_leave_the_likeliest_tokens_within_rounding(compress, device):
    model = _tiny(device=device, dtype=torch.bfloat16)
    patch_model(model, compress=compress)
    text = _own(model, _repeating(device), max_new_tokens=40, do_sample=False, prompt_lookup_num_tokens=7)
    with torch.inference_mode():
        logits = model(text).logits[0, 26:-1].float()
    chosen = logits.gather(1, text[0, 27:, None])[:, 0]
    assert ((logits.max(-1).values - chosen) <= 12 * torch.finfo(torch.bfloat16).eps * logits.abs().max()).all()


# What transformers does instead.

ELSEWHERE = {
    "sampling": (lambda model: {"prompt_lookup_num_tokens": 3, "do_sample": True}, "sampling with guesses"),
    "an assistant that samples": (lambda model: {"assistant_model": model, "do_sample": True}, "sampling with guesses"),
    "itself": (lambda model: {"assistant_model": "itself"}, "a model that is its own assistant"),
    "hooks": (lambda model: {"assistant_model": _hooked(model)}, "the assistant has no step: .* has hooks"),
    "a cache": (lambda model: {"prompt_lookup_num_tokens": 3, "cache_implementation": "static"}, "a StaticCache"),
    "a processor": (lambda model: {"prompt_lookup_num_tokens": 3, "no_repeat_ngram_size": 9}, "a NoRepeatNGram"),
    "scores": (
        lambda model: {"prompt_lookup_num_tokens": 3, "return_dict_in_generate": True, "output_scores": True},
        "output_scores",
    ),
    "beside beams": (lambda model: {"prompt_lookup_num_tokens": 3, "num_beams": 2}, "num_beams=2"),
}


def _hooked(model):
    hooked = copy.deepcopy(model)
    hooked.model.layers[0].register_forward_hook(lambda module, given, out: None)
    return hooked


@pytest.mark.parametrize("what", ELSEWHERE)
def test_what_transformers_does_itself_is_said(what, assisted):
    """And done as the call asked for it; a streamer gets the prompt once."""
    make, reason = ELSEWHERE[what]
    model, results, notes = assisted[0], [], [Noting(), Noting()]
    more = make(assisted[1])
    if more.get("assistant_model") == "itself":
        more["assistant_model"] = model
    for write, note in zip((generate, _theirs), notes, strict=True):
        given = {"max_new_tokens": 12, "do_sample": False, **more}
        if "num_beams" not in given:
            given["streamer"] = note
        torch.manual_seed(0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                results.append(write(model, _repeating(), **given))
            except Exception as error:  # transformers' own, of what it does not do either
                results.append(type(error))
        said = [str(w.message) for w in caught if str(w.message).startswith("generate: ")]
        assert len(said) == (write is generate), said
        if said:
            assert re.search(reason, said[0]), said
    one, other = (r.sequences if hasattr(r, "sequences") else r for r in results)
    assert one is other if isinstance(one, type) else torch.equal(one, other)
    assert notes[0].given == notes[1].given


def test_errors_of_calls_with_guesses_are_transformers(assisted):
    model, assistant, _ = assisted
    for options in (
        {"prompt_lookup_num_tokens": 0},
        {"prompt_lookup_num_tokens": 3, "inputs": _repeating().repeat(2, 1)},
        {"prompt_lookup_num_tokens": 3, "num_return_sequences": 2},
        {"assistant_model": assistant, "max_length": 3},
        {"assistant_model": _tiny(vocab_size=150)},
    ):
        errors = []
        for write in (generate, _theirs):
            given = {"inputs": _repeating(), "do_sample": False, "max_new_tokens": 5, **options}
            if "max_length" in given:
                del given["max_new_tokens"]
            ids = given.pop("inputs")
            with warnings.catch_warnings(), pytest.raises(Exception) as caught:
                warnings.simplefilter("ignore")
                write(model, ids, **given)
            errors.append((type(caught.value), str(caught.value)))
        assert errors[0] == errors[1]


def test_guesses_in_configs():
    """Of the call they count; of the model they are left to transformers."""
    model = _tiny()
    config = transformers.GenerationConfig(max_new_tokens=20, do_sample=False, prompt_lookup_num_tokens=3, pad_token_id=0)
    wanted = _theirs(model, _repeating(), max_new_tokens=20, do_sample=False)
    assert torch.equal(_own(model, _repeating(), generation_config=config), wanted)
    assert config.prompt_lookup_num_tokens == 3
    model.generation_config.prompt_lookup_num_tokens = 2
    with pytest.warns(UserWarning, match="prompt_lookup_num_tokens=2"):
        assert torch.equal(generate(model, _repeating(), max_new_tokens=20, do_sample=False), wanted)
    assert guesses_of({"prompt_lookup_num_tokens": 9})[0].most == 7
    assert guesses_of({"prompt_lookup_num_tokens": 2.5}) == (None, {"prompt_lookup_num_tokens": 2.5})
    assert guesses_of({}) == (None, {})


# Threads, interruptions, memory.


def test_two_models_that_assist_each_other_in_two_threads():
    models = [_tiny(), _tiny(seed=1)]
    wanted, found = [_theirs(m, _ids(), max_new_tokens=20, do_sample=False) for m in models], {}

    def write(i: int) -> None:
        for _ in range(3):
            found[i] = generate(models[i], _ids(), max_new_tokens=20, do_sample=False, assistant_model=models[1 - i])

    threads = [threading.Thread(target=write, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert all(torch.equal(found[i], wanted[i]) for i in (0, 1))


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_call_leaves_both_models_usable(error, asked, assisted):
    model, guessing = asked

    def interrupt() -> None:
        raise error

    with pytest.raises(error):
        _own(model, _repeating(), max_new_tokens=30, do_sample=False, streamer=Calling(interrupt), **guessing)
    _agree_with_guesses(model, _repeating(), **guessing)
    _agree(assisted[1])


def test_a_streamer_that_generates_with_either_model_is_refused(assisted):
    model, assistant, _ = assisted
    for other in (model, assistant):
        streamer = Calling(lambda other=other: generate(other, _ids(), max_new_tokens=3))
        with pytest.raises(RuntimeError, match="called by a streamer or criterion of a call"):
            _own(model, _ids(), max_new_tokens=30, do_sample=False, streamer=streamer, assistant_model=assistant)


def test_the_step_that_verifies_lives_on_the_cache_of_the_other():
    model = _tiny()
    step = prepare_generation(model, 100, prompt_lookup_num_tokens=3)
    runner = Runner.of(model)
    verifier = runner.verifier(model, step, 4)
    assert verifier.keys is step.keys and verifier.position is step.position and prepare_generation(model, 100) is step
    assert runner.verifier(model, step, 4) is verifier, "made twice"
    _agree_with_guesses(model, _repeating(), prompt_lookup_num_tokens=3)
    longer = prepare_generation(model, 1000)
    assert longer is not step and not runner._verifiers
    kept = weakref.ref(runner.verifier(model, longer, 4))
    del step, verifier, runner, longer
    patch_model(model)
    gc.collect()
    assert kept() is None
    _agree_with_guesses(model, _repeating(), prompt_lookup_num_tokens=3)
    release_generation(model)
    for options in ({"prompt_lookup_num_tokens": 0}, {"prompt_lookup_num_tokens": 3, "batch_size": 2}):
        with pytest.raises(ValueError, match="prompt_lookup_num_tokens must be at least 1, and is for one sequence"):
            prepare_generation(model, 64, **options)


@pytest.mark.parametrize("total", [126, 127, 128])
def test_guesses_end_where_the_models_positions_do(total):
    """All places of a verification are fed, and a table of positions has no more of them than the config says."""
    config = transformers.OPTConfig(
        hidden_size=64,
        ffn_dim=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=128,
        max_position_embeddings=128,
        word_embed_proj_dim=64,
    )
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    ids = torch.arange(1, 7).repeat(3)[None]
    given = {"max_new_tokens": total - 18, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **given)
    assert torch.equal(generate(model, ids, **given, prompt_lookup_num_tokens=7), expected)
    assistant = copy.deepcopy(model)
    assistant.generation_config.num_assistant_tokens = 7
    assert torch.equal(generate(model, ids, **given, assistant_model=assistant), expected)


@pytest.mark.gpu
def test_steps_of_several_tokens_are_compiled_and_captured(torch_gpu):
    model = _tiny(device="cuda")
    patch_model(model)
    step = prepare_generation(model, 300, prompt_lookup_num_tokens=7)
    verifier = Runner.of(model).verifier(model, step, 8)
    assert step.is_compiled and verifier.is_compiled and verifier._graph is not None
    assert prepare_generation(model, 300, batch_size=8).is_compiled
