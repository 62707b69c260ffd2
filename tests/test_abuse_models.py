"""Whole models under abuse: threads, interrupts, missing memory, loops, limits, broken files, changes between calls, forks."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import copy
import gc
import hashlib
import json
import linecache
import random
import re
import shutil
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason='the extra "torch" brings it')
transformers = pytest.importorskip("transformers", reason='the extra "hf" brings it')
from safetensors.torch import load_file, save_file  # noqa: E402
from test_generate import Calling, Noting, _agree, _ids, _inside, _own, _theirs, _tiny, one_thread  # noqa: E402
from torch import nn  # noqa: E402
from torch_devices import DEVICES  # noqa: E402

import prosparse_cupy.torch as package  # noqa: E402
from prosparse_cupy.checkpoint import CheckpointError  # noqa: E402
from prosparse_cupy.packed import compress_checkpoint, sealed  # noqa: E402
from prosparse_cupy.torch import (  # noqa: E402
    CompressedLinear,
    DecodingLinear,
    SparseMLP,
    generate,
    load_compressed,
    patch_model,
    prepare_generation,
    release_generation,
    unpatch_model,
)
from prosparse_cupy.torch.choice import Choice  # noqa: E402
from prosparse_cupy.torch.runner import Runner  # noqa: E402
from prosparse_cupy.torch.step import Step  # noqa: E402

__all__ = ["one_thread"]

OURS = (SparseMLP, DecodingLinear, CompressedLinear)
GREEDY = {"max_new_tokens": 16, "do_sample": False}
NO_MEMORY = [torch.OutOfMemoryError, MemoryError]
LONG = 300  # seconds, which a test that hangs takes


def _small(device: str = "cpu", dtype=torch.bfloat16, **changes):
    """One layer, whose weights have codes."""
    model = _tiny(device=device, dtype=dtype, **{"num_hidden_layers": 1, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) / 8)
    return model


def _bits(model) -> dict[str, bytes]:
    """The state of a model, to the bit."""
    state = model.state_dict()
    return {
        name: value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() for name, value in state.items()
    }


def _places(model) -> dict[str, int]:
    return {name: id(module) for name, module in model.named_modules()}


def _patched_parts(model) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules() if isinstance(module, OURS)}


def _is_patched(model) -> bool:
    return bool(_patched_parts(model))


def _surroundings(device: str = "cpu") -> tuple[Any, ...]:
    """What a call must leave as it found it, beside the model."""
    hooks = nn.modules.module
    found = (
        gc.isenabled(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.is_autocast_enabled(device),
        torch.random.get_rng_state().numpy().tobytes(),
        torch.get_num_threads(),
        len(hooks._global_forward_hooks) + len(hooks._global_forward_pre_hooks),
    )
    if device == "cpu":
        return found
    generator = torch.cuda.get_rng_state().numpy().tobytes()
    return *found, torch.cuda.current_stream(), torch.cuda.current_device(), generator, torch.cuda.is_current_stream_capturing()


def _logits(model):
    with torch.inference_mode():
        return model(_ids(model.device), use_cache=False).logits


def _hooks(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def _one_kind_is_enough(kind: type, which: type, device: str) -> None:
    if device == "cuda" and kind is not which:
        pytest.skip(f"a step takes seconds to make here: {which.__name__} is enough")


def _in_threads(*tasks) -> list[Any]:
    """The results of functions that begin together, a thread each."""
    start = threading.Barrier(len(tasks))

    def run(task):
        start.wait(LONG)
        return task()

    with concurrent.futures.ThreadPoolExecutor(len(tasks)) as pool:
        return [future.result(LONG) for future in [pool.submit(run, task) for task in tasks]]


@pytest.fixture
def switching():
    """Threads that take turns often."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


# Threads.


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("models", [1, 2])
def test_threads_write_what_they_write_alone(models, device, monkeypatch):
    """One or two prompts, short and long, so that steps are made anew; each streamer gets its own call's tokens."""
    monkeypatch.setattr(package.runner, "_SMALLEST", 32)
    written = [_tiny(device=device, num_hidden_layers=1, seed=seed) for seed in range(models)]
    for model in written:
        patch_model(model)
    tasks, wanted = [], []
    for i in range(6):
        ids = _ids(device, 5 + i, seed=i)
        ids = torch.cat([ids, ids.flip(1)]) if i == 5 else ids
        options = {"max_new_tokens": 40 if i == 4 else 8 + i, "do_sample": False}
        wanted.append(_theirs(written[i % models], ids, **options))
        note = Noting()

        def write(model=written[i % models], ids=ids, options=options, note=note):
            out = [generate(model, ids, streamer=note, **options)]
            return [*out, generate(model, ids, **options)], note.given

        tasks.append(write)
    for (texts, given), expected in zip(_in_threads(*tasks), wanted, strict=True):
        assert all(torch.equal(text, expected) for text in texts)
        new = expected[:, expected.shape[1] - len(given) + 2 :]
        assert given == [expected[:, : -new.shape[1]].tolist(), *new.T.tolist(), "end"]


@pytest.mark.usefixtures("switching")
def test_threads_that_patch_one_model_patch_it_once():
    model = _small()
    before, places = _bits(model), _places(model)

    def patch():
        try:
            return len(patch_model(model).sparse)
        except ValueError as error:
            return str(error)

    said = _in_threads(*[patch] * 4)
    assert sorted(said, key=str)[0] == 1 and said.count(1) == 1
    assert all("patched already: call unpatch_model(model) first" in text for text in said if text != 1)
    _in_threads(*[lambda: unpatch_model(model)] * 4)
    assert not _is_patched(model) and _places(model) == places and _bits(model) == before


@pytest.mark.parametrize("device", DEVICES)
def test_whoever_patches_waits_for_a_text_and_a_streamer_is_refused(device):
    """A step's graph holds the addresses of weights, which patching moves."""
    model = _tiny(device=device)
    first = _agree(model)
    for change in (patch_model, unpatch_model):
        with pytest.raises(RuntimeError, match=f"{change.__name__}: called by a streamer or criterion of a call"):
            _own(model, _ids(device), streamer=Calling(lambda change=change: change(model)), **GREEDY)
        order, threads = [], []

        def meanwhile(change=change, order=order, threads=threads):
            release_generation(model)  # which anyone may call at any time
            threads.append(threading.Thread(target=lambda: (change(model), order.append("changed"))))
            threads[0].start()
            threads[0].join(0.3)
            order.append("writing")

        text = _own(model, _ids(device), max_new_tokens=30, do_sample=False, streamer=Calling(meanwhile))
        threads[0].join(LONG)
        assert torch.equal(text, first) and order == ["writing", "changed"]
        assert _is_patched(model) == (change is patch_model) and torch.equal(_agree(model), first)


def test_asyncio_calls_in_an_executor():
    """As servers do: many calls at once, one of which nobody waits for any more."""
    model = _small(dtype=torch.float32)
    patch_model(model)
    prompts = [_ids(seed=i) for i in range(6)]
    wanted = [_theirs(model, ids, **GREEDY) for ids in prompts]

    async def serve():
        loop = asyncio.get_running_loop()
        calls = [loop.run_in_executor(None, lambda ids=ids: generate(model, ids, **GREEDY)) for ids in prompts]
        lost = loop.run_in_executor(None, lambda: generate(model, prompts[0], max_new_tokens=200, do_sample=False))
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(lost, 0.01)
        return await asyncio.gather(*calls)

    assert all(torch.equal(text, expected) for text, expected in zip(asyncio.run(serve()), wanted, strict=True))
    assert torch.equal(generate(model, prompts[1], **GREEDY), wanted[1])


class _Forking(torch.utils.data.Dataset):
    """What a forked worker does with the model that its parent has patched."""

    def __init__(self, model) -> None:
        self.model = model

    def __len__(self) -> int:
        return 2

    def __getitem__(self, i: int):
        return torch.cat([_theirs(self.model, _ids(), **GREEDY), generate(self.model, _ids(), **GREEDY)])


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_a_forked_worker_writes_though_a_thread_of_its_parent_was_writing():
    model = _small(dtype=torch.float32)
    patch_model(model)
    expected = generate(model, _ids(), **GREEDY)
    found = []

    def fork():
        context = {"num_workers": 1, "multiprocessing_context": "fork", "timeout": LONG}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of processes with threads
            found.extend(torch.utils.data.DataLoader(_Forking(model), batch_size=None, **context))

    fork()
    waiting, done = threading.Event(), threading.Event()
    streamer = Calling(lambda: (waiting.set(), done.wait(LONG)))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        text = pool.submit(generate, model, _ids(), streamer=streamer, **GREEDY)
        waiting.wait(LONG)
        try:
            fork()
        finally:
            done.set()
        assert torch.equal(text.result(LONG), expected)
    assert len(found) == 4 and all(torch.equal(texts, torch.cat([expected] * 2)) for texts in found)


# Interrupts and errors.


class _Raising:
    """In the place of a function: raises at its n-th call."""

    def __init__(self, real, error: BaseException, n: int = 1) -> None:
        self.real, self.error, self.left = real, error, n

    def __get__(self, instance, owner=None):
        return self if instance is None else lambda *given, **named: self(instance, *given, **named)

    def __call__(self, *given, **named):
        self.left -= 1
        if self.left == 0:
            raise self.error
        return self.real(*given, **named)


def _raise_in(monkeypatch, holder, name: str, error: BaseException, n: int = 1) -> _Raising:
    raising = _Raising(getattr(holder, name), error, n)
    monkeypatch.setattr(holder, name, raising)
    return raising


class _RaisingCriterion(transformers.StoppingCriteria):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __call__(self, input_ids, scores, **keywords):
        if input_ids.shape[1] == 10:
            raise self.error
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class _RaisingProcessor(transformers.LogitsProcessor, _RaisingCriterion):
    def __call__(self, input_ids, scores):
        _RaisingCriterion.__call__(self, input_ids, scores)
        return scores


def _raiser(error: BaseException):
    def throw():
        raise error

    return throw


WHERE: dict[str, Any] = {
    "a streamer": lambda patch, error: {"streamer": Calling(_raiser(error))},
    "a criterion": lambda patch, error: {"stopping_criteria": transformers.StoppingCriteriaList([_RaisingCriterion(error)])},
    "a processor": lambda patch, error: {"logits_processor": transformers.LogitsProcessorList([_RaisingProcessor(error)])},
    "a warper": lambda patch, error: (
        _raise_in(patch, transformers.generation.TopKLogitsWarper, "__call__", error) and {"do_sample": True, "top_k": 5}
    ),
    "prefill": lambda patch, error: _raise_in(patch, package.runner, "forward", error) and {},
    "the cache": lambda patch, error: _raise_in(patch, Step, "take", error) and {},
    "a turn": lambda patch, error: _raise_in(patch, Step, "run", error, 4) and {"past_key_values": transformers.DynamicCache()},
    "building the twin": lambda patch, error: _raise_in(patch, package.step, "_twin", error) and {},
    "building the first run": lambda patch, error: _raise_in(patch, Step, "_outputs", error) and {},
    "building the check": lambda patch, error: _raise_in(patch, package.step, "forward", error, 3) and {},
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [KeyboardInterrupt, ConnectionError])
@pytest.mark.parametrize("where", WHERE)
def test_an_error_in_the_middle_changes_nothing(where, kind, device, monkeypatch):
    _one_kind_is_enough(kind, KeyboardInterrupt, device)
    model = _small(device, torch.float32)
    patch_model(model)
    expected = _theirs(model, _ids(device), **GREEDY)
    if "building" not in where:
        prepare_generation(model, 64)
    inside, around, state = _inside(model), _surroundings(device), _bits(model)
    error = kind("made up")
    options = {**GREEDY, **WHERE[where](monkeypatch, error)}
    refused = "building" in where and where != "building the twin" and kind is ConnectionError
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if refused:  # a step that cannot be made is done without
            assert torch.equal(generate(model, _ids(device), **options), expected)
            release_generation(model)
        else:
            with pytest.raises(kind) as caught:
                generate(model, _ids(device), **options)
            assert caught.value is error
    monkeypatch.undo()
    assert _inside(model) == inside and _surroundings(device) == around and _bits(model) == state
    (other,) = _in_threads(lambda: generate(model, _ids(device), **GREEDY))  # whom a lock that was kept would stop
    assert torch.equal(other, expected) and torch.equal(_own(model, _ids(device), **GREEDY), expected)


class _At:
    """Ctrl-C at the n-th line of this package that a call runs, or at none."""

    FOLDER = str(Path(package.__file__).parent)

    def __init__(self, n: int = 0) -> None:
        self.n, self.seen, self.where = n, 0, ""
        self.begun: dict[int, set[int]] = {}

    def _line(self, frame, event, argument):
        if event == "line":
            self.seen += 1
            is_shut = self._is_shut(frame)
            if self.seen >= self.n > 0 and not self.where and not is_shut:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise KeyboardInterrupt("made up")
        return self._line

    def _is_shut(self, frame) -> bool:
        """Whether Python itself lets no signal in here: at the end of a ``with``, and where nothing runs."""
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        if not line.startswith("with "):
            return line == "try:"
        begun, number = self.begun[id(frame)], frame.f_lineno
        closes = number in begun
        begun.add(number)
        return closes

    def __call__(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(self.FOLDER):
            return None
        if frame.f_lineno == frame.f_code.co_firstlineno or id(frame) not in self.begun:  # else a generator goes on
            self.begun[id(frame)] = set()
        return self._line

    def run(self, function) -> str:
        """Where it was interrupted, or nothing."""
        before = sys.gettrace()
        sys.settrace(self)
        try:
            function()
        except KeyboardInterrupt as error:
            if str(error) != "made up":
                raise
        finally:
            sys.settrace(before)
        return self.where


def _moments(function, number: int, seed: int) -> list[int]:
    """So many of the lines that a function runs, one in each of as many equal parts."""
    at = _At()
    at.run(function)
    drawn = random.Random(seed)
    return [int(at.seen * (i + drawn.random()) / number) + 1 for i in range(number)]


def test_an_interrupt_at_any_moment_of_patching_leaves_the_model_as_it_was():
    """Or patched whole, where it comes after the last layer. Unpatching that is interrupted goes on at the next call."""
    model, seed = _small(), random.randrange(10**6)
    state, places = _bits(model), _places(model)

    def as_it_was() -> bool:
        return not _is_patched(model) and _places(model) == places and _bits(model) == state and not _hooks(model)

    moments = _moments(lambda: patch_model(model, compress=True), 8, seed)
    whole = _patched_parts(model)
    for moment in moments:
        unpatch_model(model)
        assert as_it_was()
        where = _At(moment).run(lambda: patch_model(model, compress=True))
        assert _patched_parts(model) == whole or as_it_was(), f"seed {seed}: interrupted at {where}"
        if not _is_patched(model):
            patch_model(model, compress=True)
        assert _patched_parts(model) == whole and _bits(model) == state, f"seed {seed}: interrupted at {where}"
    for moment in _moments(lambda: unpatch_model(model), 4, seed):
        patch_model(model, compress=True) if not _is_patched(model) else None
        where = _At(moment).run(lambda: unpatch_model(model))
        unpatch_model(model)
        assert as_it_was(), f"seed {seed}: unpatching interrupted at {where}"


def _interrupted(code, function) -> Iterator[int]:
    """Call a function again and again, each time interrupted at another line of this code."""
    lines = {line for *_, line in code.co_lines() if line is not None and line != code.co_firstlineno}
    for line in sorted(lines):
        if linecache.getline(code.co_filename, line).strip() == "try:":
            continue  # where nothing runs

        def stop(frame, event, argument, line=line):
            if event == "line" and frame.f_lineno == line:
                raise KeyboardInterrupt
            return stop

        before = sys.gettrace()
        sys.settrace(lambda frame, event, argument, stop=stop: stop if frame.f_code is code else None)
        try:
            function()
        except KeyboardInterrupt:
            sys.settrace(before)
            yield line
        finally:
            sys.settrace(before)


def test_weights_are_held_by_one_place_at_every_moment_of_compressing():
    """Every line of the hand-over, of which a draw may miss the few that matter."""
    model = _small()
    state, places, lines = _bits(model), _places(model), 0
    for line in _interrupted(CompressedLinear.take_place_of.__code__, lambda: patch_model(model, compress=True)):
        assert not _is_patched(model) and _places(model) == places and _bits(model) == state, f"line {line}"
        lines += 1
    assert lines > 6


def test_a_model_is_nobodys_after_an_interrupt_at_any_line_of_the_lock():
    model = _small(dtype=torch.float32)
    expected, lines = _theirs(model, _ids(), **GREEDY), 0
    for line in _interrupted(Runner.alone.__wrapped__.__code__, lambda: generate(model, _ids(), **GREEDY)):
        assert torch.equal(generate(model, _ids(), **GREEDY), expected), f"line {line}"
        lines += 1
    assert lines > 4


@pytest.mark.parametrize("made", [False, True], ids=["building", "built"])
def test_an_interrupt_at_any_moment_of_a_call_leaves_the_next_one_right(made):
    model, seed = _small(dtype=torch.float32), random.randrange(10**6)
    patch_model(model)
    options = {"max_new_tokens": 4, "do_sample": False}

    def write():
        if not made:
            release_generation(model)
        return generate(model, _ids(), **options)

    expected, inside = write(), _inside(model)
    for moment in _moments(write, 4, seed):
        around = _surroundings()
        where = _At(moment).run(write)
        assert where and _surroundings() == around and _inside(model) == inside, f"seed {seed}: interrupted at {where}"
        (text,) = _in_threads(lambda: generate(model, _ids(), **options))
        assert torch.equal(text, expected) and torch.equal(generate(model, _ids(), **options), expected), f"{seed}: {where}"


class _Event:
    """What stands for an event of the GPU."""

    issued = 0

    def __init__(self) -> None:
        self.number, self.waited = 0, 0

    def record(self) -> None:
        _Event.issued += 1
        self.number = _Event.issued

    def synchronize(self) -> None:
        self.waited = self.number


@pytest.mark.parametrize("how", ["an end", "an interrupt"])
def test_no_call_ends_before_what_the_gpu_still_writes(how, monkeypatch):
    """Steps ahead of the host write to page-locked memory, which whoever allocates next would get."""
    model, events = _small(dtype=torch.float32), [_Event() for _ in range(4)]
    real = Choice.__init__

    def eventful(self, *given, **named):
        real(self, *given, **named)
        self._events = events

    _Event.issued = 0
    monkeypatch.setattr(Choice, "__init__", eventful)
    monkeypatch.setattr(package.choice, "captured_choice", lambda *_: None)
    text = _theirs(model, _ids(), **GREEDY)[0, 7:].tolist()
    if how == "an end":
        _own(model, _ids(), **{**GREEDY, "eos_token_id": text[5], "pad_token_id": 0})
        written = text.index(text[5]) + 1
    else:
        with pytest.raises(KeyboardInterrupt):
            _own(model, _ids(), streamer=Calling(_raiser(KeyboardInterrupt())), **GREEDY)
        written = 3
    assert _Event.issued == written + 1 == max(event.waited for event in events)


# Missing memory.

PATCHING = {
    "a kernel's first run": (SparseMLP, "_sparse", 1),
    "packing down": (package.mlp, "pack", 1),
    "the third matrix": (CompressedLinear, "_hold", 3),
    "the last matrix": (CompressedLinear, "_hold", 6),
    "checking a matrix": (package.matrices, "decoded", 2),
    "moving q, k and v": (package.matrices, "place_together", 1),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", NO_MEMORY)
@pytest.mark.parametrize("stage", PATCHING)
def test_patching_without_memory_changes_nothing(stage, kind, device, monkeypatch):
    model = _small(device)
    state, places, around = _bits(model), _places(model), _surroundings(device)
    compress = "matrix" in stage
    holder, name, n = PATCHING[stage]
    raising = _raise_in(monkeypatch, holder, name, kind("made up"), n)
    with pytest.raises(kind, match="made up"):
        patch_model(model, compress=compress)
    monkeypatch.undo()
    assert raising.left == 0 and not _is_patched(model) and _places(model) == places and _bits(model) == state
    assert not _hooks(model) and _surroundings(device) == around
    assert len(patch_model(model, compress=compress).sparse) == 1
    assert _bits(model) == state


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("while_patching", [False, True])
def test_what_cannot_be_decompressed_now_can_be_later(while_patching, device, monkeypatch):
    """Neither what was patched nor what was put back is lost where there is no memory to put the rest back."""
    model = _small(device)
    state, places = _bits(model), _places(model)
    logits = model(_ids(device)[:, :1]).logits
    if not while_patching:
        patch_model(model, compress=True)
    real = CompressedLinear.linear
    monkeypatch.setattr(CompressedLinear, "linear", _Raising(real, torch.OutOfMemoryError("none to put back"), 2))
    if while_patching:
        monkeypatch.setattr(package.matrices, "decoded", _Raising(package.matrices.decoded, torch.OutOfMemoryError("none"), 1))
    with pytest.raises(torch.OutOfMemoryError, match="none to put back"):
        patch_model(model, compress=True) if while_patching else unpatch_model(model)
    monkeypatch.undo()
    assert _is_patched(model) and _bits(model) == state
    torch.testing.assert_close(model(_ids(device)[:, :1]).logits, logits, atol=0.05, rtol=0.05)
    with pytest.raises(ValueError, match="patched already: call unpatch_model"):
        patch_model(model)
    unpatch_model(model)
    assert not _is_patched(model) and _places(model) == places and _bits(model) == state


CALLING = {
    "the twin": (package.step, "_twin", 1),
    "the step's first run": (Step, "_outputs", 1),
    "the step's check": (package.step, "forward", 2),
    "prefill": (package.runner, "forward", 1),
    "the dense path's buffer": (package.compressed.CompressedWeight, "decompress", 3),
    "the choice": (Choice, "__init__", 1),
    "a token": (Step, "run", 6),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", NO_MEMORY)
@pytest.mark.parametrize("stage", CALLING)
def test_a_call_without_memory_leaves_the_next_one_right(stage, kind, device, monkeypatch):
    _one_kind_is_enough(kind, torch.OutOfMemoryError, device)
    model = _small(device)
    patch_model(model, compress=True)
    ids = _ids(device, 12)
    expected = _own(model, ids, **GREEDY)
    release_generation(model)
    inside, around = _inside(model), _surroundings(device)
    raising = _raise_in(monkeypatch, *CALLING[stage][:2], kind("made up"), CALLING[stage][2])
    with pytest.raises(kind, match="made up"):
        _own(model, ids, **GREEDY)
    monkeypatch.undo()
    assert raising.left == 0 and _surroundings(device) == around
    kept = {"_packed", "_bound"}  # by modules, of their last call
    now, before = ({k: v for k, v in found.items() if not kept & {*k}} for found in (_inside(model), inside))
    assert now == before
    assert torch.equal(_own(model, ids, **GREEDY), expected)


@pytest.mark.parametrize("kind", NO_MEMORY)
def test_a_step_takes_the_memory_of_the_other(kind, monkeypatch):
    """What the one that failed has allocated is free by then, too."""
    model = _small(dtype=torch.float32)
    expected = _theirs(model, _ids(), **GREEDY)
    kept = weakref.ref(prepare_generation(model, 64, batch_size=3))
    real, failed = Step._prepare, []

    def once(self):
        if not failed:
            failed.append(weakref.ref(self))
            raise kind("made up")
        assert failed[0]() is None and kept() is None
        real(self)

    monkeypatch.setattr(Step, "_prepare", once)
    was_kept = kept() is not None
    text = _own(model, _ids(), **GREEDY)
    assert was_kept and len(failed) == 1 and torch.equal(text, expected)


def test_a_step_is_free_when_nobody_has_it():
    """Its cache is many times what other objects take, and a graph's memory is not known to Python's collector at all."""
    model = _small(dtype=torch.float32)
    patch_model(model)
    gc.disable()
    try:
        kept = [weakref.ref(prepare_generation(model, 64, prompt_lookup_num_tokens=3).keys[0])]
        _own(model, _ids(), **GREEDY)
        kept.append(weakref.ref(prepare_generation(model, 300).keys[0]))
        assert kept[0]() is None
        release_generation(model)
        assert kept[1]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("device", DEVICES)
def test_a_cache_that_no_machine_has_is_said(device):
    model = _small(device, torch.float32)
    wanted = rf"a cache of \d+ tokens needs \d+\.\d+ GiB, which {device}(:0)? has not free: ask for fewer tokens"
    with pytest.raises(MemoryError, match=wanted):
        generate(model, _ids(device), max_new_tokens=10**12, do_sample=False)
    _agree(model)


# Again and again.


def _tensors(device: str) -> tuple[int, int]:
    """How many tensors live, and the bytes that they take."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects warn when they are looked at
        # torch.compile keeps fake ones, perhaps of other tests, which have no memory
        living = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter) and x.device.type == "cpu"]
    on_host = sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in living}.values())
    return (len(living), on_host) if device == "cpu" else (0, torch.cuda.memory_allocated())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compress", [False, True])
def test_patched_and_unpatched_again_and_again(compress, device):
    """Memory is flat, the weights are those of before to the bit, and so are the modules."""
    model = _small(device)
    state, places, around, held = _bits(model), _places(model), _surroundings(device), {}
    layout = [(p.shape, p.stride(), p.is_contiguous()) for p in model.parameters()]
    first, last = (9, 49) if device == "cuda" else (4, 14)
    for i in range(last + 1):
        patch_model(model, compress=compress)
        if i in (0, 1, last - 4):
            text = generate(model, _ids(device), **GREEDY)
        if i == 0:
            expected = text
        unpatch_model(model)
        if i in (first, last):
            held[i] = _tensors(device)
    assert held[first] == held[last] and torch.equal(text, expected)
    assert _bits(model) == state and _places(model) == places and _surroundings(device) == around and not _hooks(model)
    assert [(p.shape, p.stride(), p.is_contiguous()) for p in model.parameters()] == layout


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compress", [False, True])
def test_a_notebook_that_runs_its_cells_again(compress, device):
    model = _small(device)
    state = _bits(model)
    for _ in range(2):
        patch_model(model, compress=compress)
        text = _own(model, _ids(device), **GREEDY)
        for again in (False, True):
            with pytest.raises(ValueError, match=r"patched already: call unpatch_model\(model\) first"):
                patch_model(model, compress=again)
        assert torch.equal(_own(model, _ids(device), **GREEDY), text) and _bits(model) == state
        unpatch_model(model)
        unpatch_model(model)
        assert not _is_patched(model) and _bits(model) == state


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compress", [False, True])
def test_saved_and_loaded_again_and_again(compress, device, tmp_path):
    model = _small(device)
    state = _bits(model)
    for i in range(3):
        patch_model(model, compress=compress)
        text = _own(model, _ids(device), **GREEDY)
        model.save_pretrained(tmp_path / str(i))
        assert torch.equal(_own(model, _ids(device), **GREEDY), text)
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / str(i), dtype=torch.bfloat16).eval().to(device)
        assert not _is_patched(model) and _bits(model) == state


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("how", ["plain", "compressed", "guesses", "hooks of accelerate"])
def test_a_model_goes_though_its_step_lives(how, device):
    model = _small(device)
    options = {"prompt_lookup_num_tokens": 3} if how == "guesses" else {}
    if how == "hooks of accelerate":
        accelerate = pytest.importorskip("accelerate", reason="accelerate brings hooks")
        accelerate.hooks.attach_execution_device_hook(model, model.device)
    patch_model(model, compress=how == "compressed")
    _own(model, _ids(device), **GREEDY, **options)
    step = prepare_generation(model, 32)
    gone = [weakref.ref(model), weakref.ref(step)]
    del model
    gc.collect()
    assert gone[0]() is None and gone[1]() is step, "the step holds the model"
    del step
    gc.collect()
    assert gone[1]() is None


# Lengths.


def _of_table(device: str, positions: int = 40):
    """A model with a table of positions."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "ffn_dim": 160, "num_hidden_layers": 1, "num_attention_heads": 4, "word_embed_proj_dim": 64}
    config = transformers.OPTConfig(**sizes, vocab_size=200, max_position_embeddings=positions)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    return model.to(device)


LENGTHS = {
    "full attention": lambda device: _small(device, torch.float32),
    "a window": lambda device: _tiny("Mistral", device, num_hidden_layers=1, sliding_window=8),
    "windows in some layers": lambda device: _tiny(
        "Qwen2", device, use_sliding_window=True, sliding_window=8, max_window_layers=1
    ),
    "a table of positions": _of_table,
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("which", LENGTHS)
def test_prompts_of_every_length_around_the_sizes(which, device, monkeypatch):
    """Windows of 8; caches of 16, 32 and more; 40 positions in the table. Few tokens, one, and up to the last position."""
    monkeypatch.setattr(package.runner, "_SMALLEST", 16)
    model = LENGTHS[which](device)
    patch_model(model)
    capacities = set()
    for length in (*range(1, 4), *range(7, 11), *range(12, 19), *range(28, 36)):
        _agree(model, _ids(device, length), max_new_tokens=3 if length % 3 else 1)
        capacities.add(Runner.of(model)._steps[False].capacity)
    assert capacities == {16, 32, 64}
    if device == "cpu":  # a step takes seconds to make on a GPU
        release_generation(model)
    for length, total in (
        (1, 16),
        (1, 17),
        (7, 8),
        (8, 9),
        (15, 16),
        (15, 17),
        (31, 32),
        (30, 33),
        (33, 40),
        (39, 40),
        (2, 40),
    ):
        _agree(model, _ids(device, length), max_new_tokens=total - length)


def test_errors_at_the_limits_are_those_of_transformers():
    model = _of_table("cpu")
    patch_model(model)
    for length, new in ((7, 0), (36, 6), (41, 1), (45, 3), (3, -1)):
        errors = []
        for write in (generate, _theirs):
            with warnings.catch_warnings(), pytest.raises((ValueError, IndexError)) as caught:
                warnings.simplefilter("ignore")
                write(model, _ids(length=length), max_new_tokens=new, do_sample=False)
            errors.append((caught.type, str(caught.value)))
        assert errors[0] == errors[1]
    _agree(model, max_new_tokens=33)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("positions", [8, 20, 49, 51])
def test_small_tables_of_positions(positions, device):
    """A step is tried on positions that there are: beyond them a GPU would be lost to the process."""
    model = _of_table(device, positions)
    patch_model(model)
    _agree(model, _ids(device, 3), max_new_tokens=positions - 3)


# Checkpoints.


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A model's compressed checkpoint in several files, in `small`; another model's in `other`; and the state of the first."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, seed in (("small", 1), ("other", 2)):
        model = _small(tie_word_embeddings=False)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) / 8)
            model.model.layers[0].mlp.up_proj.weight[3, 3] = 2.0**-100  # has no code
        model.generation_config.max_new_tokens = 5
        model.save_pretrained(folder / f"plain-{name}", max_shard_size="20KB")
        compress_checkpoint(folder / f"plain-{name}", folder / name)
        if name == "small":
            state = _bits(model)
    assert len(list((folder / "small").glob("*.safetensors"))) > 3
    return folder, state


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _refused(folder: Path, **keywords) -> str:
    """What is said of a folder, which is not touched."""
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(CheckpointError) as caught:
        load_compressed(folder, "cpu", **keywords)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert str(folder) in str(caught.value)
    return str(caught.value)


@pytest.fixture
def spoiled(checkpoints, tmp_path):
    """A copy of `small` to be spoiled."""
    return Path(shutil.copytree(checkpoints[0] / "small", tmp_path / "spoiled"))


def test_files_that_are_cut_flipped_or_swapped_are_refused_by_name(checkpoints, spoiled):
    """At drawn offsets of every file; a bit that changes no weight may be taken, a weight that differs never."""
    seed = random.randrange(10**6)
    drawn, state, taken = random.Random(seed), checkpoints[1], 0
    names = sorted(file.name for file in spoiled.iterdir())
    for i in range(45):
        name, how = names[i % len(names)], drawn.choice(["cut", "flip", "flip in the header", "swap", "gone"])
        whole, other = {}, drawn.choice([n for n in names if n != name and (n.endswith("s") == name.endswith("s"))])
        for n in (name, other):
            whole[n] = (spoiled / n).read_bytes()
        content, where = bytearray(whole[name]), drawn.randrange(len(whole[name]))
        if how == "cut":
            content = content[:where]
        elif how.startswith("flip"):
            content[where if how == "flip" else where % 200] ^= 1 << drawn.randrange(8)
        elif how == "swap":
            content = bytearray(whole[other])
            (spoiled / other).write_bytes(whole[name])
        (spoiled / name).write_bytes(content) if how != "gone" else (spoiled / name).unlink()
        said = f"seed {seed}: {how} {name} at {where}"
        try:
            loaded = load_compressed(spoiled, "cpu")
        except CheckpointError as error:
            assert str(spoiled) in str(error), said
        except Exception as error:
            raise AssertionError(said) from error
        else:
            assert "safetensors" not in name or name.endswith("json"), said
            assert _bits(loaded) == state, said
            taken += 1
        for n, own in whole.items():
            (spoiled / n).write_bytes(own)
    assert taken < 16 and _bits(load_compressed(spoiled, "cpu")) == state


def _resealed(folder: Path, shard: Path, change=lambda manifest: None) -> None:
    """The manifest as one who knows how it is made would have it."""
    manifest = json.loads((folder / "prosparse.json").read_text())
    manifest["sha256"][shard.name] = hashlib.sha256(shard.read_bytes()).hexdigest()
    change(manifest)
    (folder / "prosparse.json").write_text(json.dumps(sealed(manifest)))


def test_files_that_no_checksum_vouches_for_are_refused(checkpoints, spoiled):
    shard, index = _shards(spoiled)[0], spoiled / "model.safetensors.index.json"
    shutil.copy(checkpoints[0] / "other" / shard.name, spoiled / "more.safetensors")
    given = json.loads(index.read_text())
    index.write_text(json.dumps({**given, "weight_map": {**given["weight_map"], "more": "more.safetensors"}}))
    assert "prosparse.json: has no checksum of more.safetensors" in _refused(spoiled)
    moved = {key: "more.safetensors" if file == shard.name else file for key, file in given["weight_map"].items()}
    index.write_text(json.dumps({**given, "weight_map": moved}))
    assert "more.safetensors" in _refused(spoiled, verify=False)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"hidden_act"', '"hidden_act_"', "no FFN for its weights"),
        ('"hidden_act": "relu"', '"hidden_act": "silu"', "no FFN for its weights"),
        ('"hidden_act": "relu"', '"hidden_act": "fatrelu"', "makes no model of its config.json|no FFN for its weights"),
    ],
)
def test_a_config_of_another_activation_is_refused_by_name(spoiled, old, new, message):
    """Nothing vouches for a config's text, which people edit; what it says is held against the weights."""
    config = spoiled / "config.json"
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new))
    assert re.search(message, _refused(spoiled))


def test_files_of_another_model_are_refused(checkpoints, spoiled):
    other = checkpoints[0] / "other"
    shard = _shards(spoiled)[-1]
    own = shard.read_bytes()
    shutil.copy(other / shard.name, shard)
    assert f"{shard.name}: is not the file that was written" in _refused(spoiled)
    shard.write_bytes(own)
    shutil.copy(other / "prosparse.json", spoiled)
    assert "is not the file that was written" in _refused(spoiled)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["", "{", "[1]", "\0"])
def test_configs_that_are_no_json_are_refused_before_weights_are_read(name, content, spoiled, monkeypatch):
    (spoiled / name).write_text(content)
    monkeypatch.setattr(package.loading, "read_manifest", _raiser(AssertionError()))
    assert name in _refused(spoiled)


@pytest.mark.parametrize("number", [-1, "the first that is not there", 1 << 28, -(1 << 31)])
@pytest.mark.parametrize("verify", [True, False])
def test_numbers_of_escapes_that_are_not_there_are_refused(number, verify, spoiled):
    """A kernel would read weights there, wherever that is."""
    name = "model.layers.0.mlp.up_proj.weight"
    shard = next(s for s in _shards(spoiled) if f"{name}.part_0" in load_file(s))
    tensors = load_file(shard)
    places = (tensors[f"{name}.part_1"] == 0x88888888 - (1 << 32)).nonzero().tolist()
    number = number if isinstance(number, int) else len(places)
    assert [tensors[f"{name}.part_0"][(*place, 0)].item() for place in places] == list(range(len(places)))
    tensors[f"{name}.part_0"][(*places[-1], 0)] = number
    save_file(tensors, shard, metadata={"format": "pt"})
    _resealed(spoiled, shard)
    said = f"{name}: 1 chunks of 8 weights are not among its {len(places)} escapes"
    assert said in _refused(spoiled, verify=verify)


@pytest.mark.parametrize("change", [{"escapes": "1"}, {"escapes": None}, {"escapes": 1 << 70}, {"base": 1.5}, {"parts": 0}])
def test_manifests_of_other_types_are_refused(change, spoiled):
    def other(manifest):
        next(iter(manifest["weights"].values())).update(change)

    _resealed(spoiled, _shards(spoiled)[0], other)
    _refused(spoiled)


@pytest.mark.parametrize("kind", [*NO_MEMORY, KeyboardInterrupt])
def test_loading_and_compressing_that_stop_halfway_leave_nothing(kind, checkpoints, tmp_path, monkeypatch):
    folder, state = checkpoints
    _raise_in(monkeypatch, package.loading, "_set_packed", kind("made up"), 3)
    before, around = _tensors("cpu"), _surroundings()
    with pytest.raises(kind, match="made up"):
        load_compressed(folder / "small", "cpu")
    monkeypatch.undo()
    assert _tensors("cpu") == before and _surroundings() == around
    assert _bits(load_compressed(folder / "small", "cpu")) == state

    def tell(doing, done, total):
        if done == 3:
            raise kind("made up")

    with pytest.raises(kind, match="made up"):
        compress_checkpoint(folder / "plain-small", tmp_path / "out", tell)
    assert not list(tmp_path.iterdir())
    compress_checkpoint(folder / "plain-small", tmp_path / "out")
    assert _bits(load_compressed(tmp_path / "out", "cpu")) == state


# Changes between calls.


@pytest.mark.parametrize("device", DEVICES)
def test_adapters_before_patching(device):
    """What an adapter holds stays as it is, and is said; the rest decodes as ever."""
    peft = pytest.importorskip("peft", reason="peft brings LoRA adapters")
    config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], r=4, init_lora_weights=False)
    adapted = peft.get_peft_model(_small(device, torch.float32), config).eval()
    expected = adapted.generate(input_ids=_ids(device), **GREEDY)
    places = _places(adapted)
    report = patch_model(adapted)
    assert [layer.reason for layer in report.layers] == [
        "up_proj is a peft.tuners.lora.layer.Linear, not a torch.nn.Linear itself"
    ]
    assert {m.name.split(".")[-1] for m in report.decoding} == {
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "down_proj",
        "lm_head",
    }
    assert torch.equal(adapted.generate(input_ids=_ids(device), **GREEDY), expected)
    assert torch.equal(generate(adapted, _ids(device), **GREEDY), expected)
    unpatch_model(adapted)
    assert _places(adapted) == places and torch.equal(adapted.generate(input_ids=_ids(device), **GREEDY), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_adapters_after_compressing_are_refused_and_change_nothing(device):
    peft = pytest.importorskip("peft", reason="peft brings LoRA adapters")
    model = _small(device)
    patch_model(model, compress=True)
    text, state = _own(model, _ids(device), **GREEDY), _bits(model)
    with pytest.raises(ValueError, match=r"CompressedLinear.* is not supported"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=4))
    assert _bits(model) == state and torch.equal(_own(model, _ids(device), **GREEDY), text)


@pytest.mark.parametrize("device", DEVICES)
def test_a_patched_model_trains_between_texts(device):
    """As the model that was never patched: the same gradients, and the texts of the weights of now."""
    model, plain = (_small(device, torch.float32) for _ in range(2))
    patch_model(model)
    for _ in range(3):
        text = _own(model, _ids(device), **GREEDY)
        assert torch.equal(text, _theirs(plain, _ids(device), **GREEDY))
        for one in (model, plain):
            one.train()
            optimizer = torch.optim.SGD(one.parameters(), lr=0.05)
            one(_ids(device), labels=_ids(device)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            one.eval()
    for (name, one), other in zip(plain.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(other, one, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compress", [False, True])
def test_moved_and_cast_between_calls(compress, device):
    """To the host and back, and, where weights are plain, to another dtype and back; all the while patched."""
    model = _small(device)
    state, expected = _bits(model), _theirs(model, _ids(device), **GREEDY)
    patch_model(model, compress=compress)
    first, logits = _own(model, _ids(device), **GREEDY), _logits(model)

    def is_as_before() -> bool:
        """In bfloat16 a GPU may round otherwise where q, k and v, which lay side by side, lie apart."""
        text = _own(model, _ids(device), **GREEDY)
        torch.testing.assert_close(_logits(model), logits, atol=0.05, rtol=0.05)
        return text.shape == first.shape and (device == "cuda" or torch.equal(text, first)) and _bits(model) == state

    if device == "cuda":
        model.to("cpu")
        assert _own(model, _ids(), **GREEDY).shape == first.shape and _bits(model) == state
        model.to(device)
    assert is_as_before()
    if compress:
        with pytest.raises(TypeError, match=r"compressed weights are bfloat16 and cannot become torch\.float32"):
            model.float()
        model.bfloat16()  # what torch has cast before it came to a compressed weight
    else:
        model.float()
        wide = _own(model, _ids(device), **GREEDY)
        plain = _small(device).float()
        assert torch.equal(wide, _theirs(plain, _ids(device), **GREEDY))
        model.bfloat16()
    assert is_as_before()
    unpatch_model(model)
    assert _bits(model) == state and torch.equal(_theirs(model, _ids(device), **GREEDY), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_a_patched_model_that_is_compiled_whole(device):
    """The wrapper of `torch.compile` is the same model: it writes the same text, and can be unpatched."""
    model = _small(device, torch.float32)
    expected = _theirs(model, _ids(device), **GREEDY)
    patch_model(model)
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(compiled.generate(_ids(device), **GREEDY), expected)
    assert torch.equal(_own(compiled, _ids(device), **GREEDY), expected)
    with pytest.raises(ValueError, match="patched already"):
        patch_model(compiled)
    unpatch_model(compiled)
    assert not _is_patched(model)
    assert torch.equal(compiled.generate(_ids(device), **GREEDY), expected)
    assert torch.equal(_own(model, _ids(device), **GREEDY), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compress", [False, True])
def test_copies_write_beside_the_model_that_they_are_of(compress, device):
    """In two threads, after one was unpatched, and when the first is gone."""
    model = _small(device)
    patch_model(model, compress=compress)
    text = _own(model, _ids(device), **GREEDY)
    other = copy.deepcopy(model)
    alone = _own(other, _ids(device), **GREEDY)  # on a GPU within rounding: q, k and v of a copy lie apart
    assert device == "cuda" or torch.equal(alone, text)
    release_generation(model)
    release_generation(other)
    both = _in_threads(*(lambda m=m: generate(m, _ids(device), **GREEDY) for m in (model, other)))
    assert torch.equal(both[0], text) and torch.equal(both[1], alone)
    state = _bits(other)
    unpatch_model(model)
    assert _is_patched(other) and torch.equal(_own(other, _ids(device), **GREEDY), alone)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and torch.equal(_own(other, _ids(device), **GREEDY), alone)
    unpatch_model(other)
    assert not _is_patched(other) and _bits(other) == state
