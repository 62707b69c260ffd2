"""Whole models that write for several at once, or look guesses up: tokens a second of steps and of `generate`.

The model is `decode`'s, with one thing added so that a model that has learnt nothing writes a text that repeats itself: behind
each of the tokens 1 to `CYCLE` its head prefers the next of them, and the first behind the last (`go_round`). All other tokens
go on at random. Nothing else of a step depends on it: every matrix is as large, and every layer as sparse.

Of a batch's prompts every second one goes round, the others are random. What goes round is known in advance, and the model is
sure of it, so those texts must be right to the last token, which shows sequences that are mixed up. Random texts have near
ties, which rounding may decide otherwise in a batch. The share of tokens that are those of the sequence alone is reported.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from prosparse_cupy.testing.timing import Times
from prosparse_cupy.torch import (
    generate,
    measure_sparsity,
    patch_model,
    prepare_generation,
    release_generation,
    unpatch_model,
)
from prosparse_cupy.torch.step import Step

from .decode import COMPILED, CONTEXT, STEP, compiled_step, free_memory, times_on_the_host
from .results import BatchesRow

GENERATE, LOOKUP = "generate", "lookup {}"
WEIGHTS = ("unpatched", "plain", "bf12")
BATCHES = (1, 2, 4, 8)
GUESSES = (7, 3)
"""Of a verification; the larger one first, whose step is prepared."""
CYCLE = 24
_PROMPT, _NEW_TOKENS = 64, 192
_ALONE = 64  # tokens of each sequence alone, to compare with
_LAST = 16  # positions of the context that steps are timed on
_SURE = 1.0  # least distance of logits where the text goes round: bfloat16's rounding is a fifteenth of it
_MOST_TRIALS = 8

Tell = Callable[[str], None]


@torch.no_grad()
def go_round(model: Any) -> None:
    """Let the text go round: behind token t of 1 to `CYCLE` comes t + 1, and 1 behind the last.

    The head's row of the next token becomes this token's embedding, which is what is left of it behind all layers. With the
    scale of the other rows it is no likelier than they are behind any other token; where that is not enough for the model to
    be sure, it is made larger.
    """
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    tokens = torch.arange(1, CYCLE + 1, device=head.device)
    follows = tokens % CYCLE + 1
    rows = embedding[tokens].float()
    rows *= head.float().std() / rows.std()
    text = cycle(0, _PROMPT + _NEW_TOKENS + 1).to(head.device)
    for _ in range(_MOST_TRIALS):
        head[follows] = rows.to(head.dtype)
        logits = model(text[None, :-1]).logits[0].float()
        best, found = logits.topk(2)
        if (found[:, 0] == text[1:]).all() and (best[:, 0] - best[:, 1]).min() >= _SURE:
            return
        rows *= 1.5
    raise RuntimeError("go_round: this model does not go round: its layers leave too little of the embedding")


def cycle(start: int, length: int) -> Tensor:
    """Tokens that go round."""
    return (start + torch.arange(length)) % CYCLE + 1


def prompts_of(model: Any, sequences: int) -> Tensor:
    """Random prompts, and in every second place one that goes round, each from another token."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(CYCLE + 1, model.config.vocab_size, (sequences, _PROMPT), generator=generator)
    for i in range(1, sequences, 2):
        ids[i] = cycle(3 * i, _PROMPT)
    return ids.to(model.device)


@torch.inference_mode()
def measure_batches(
    model: Any,
    label: str,
    repeats: int,
    tell: Tell,
    batches: tuple[int, ...] = BATCHES,
    compiled: tuple[int, ...] = BATCHES,
    context: int = CONTEXT,
) -> Iterator[list[BatchesRow]]:
    """Rows of a model that goes round: of the steps that torch compiles, then unpatched, patched, and in 12 bits.

    torch compiles the whole step for the batches `compiled`, half a minute each for 7B.
    """
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    measured = _Measured(model, label, repeats, tell, context)
    for batch in compiled:
        measured.add_compiled(batch)
    yield measured.new_rows()
    for weights in WEIGHTS:
        if weights != "unpatched":
            tell(f"{weights}: patching")
            unpatch_model(model)
            patch_model(model, compress=weights == "bf12")
        with _no_other_loop():
            measured.add_ours(weights, batches)
        yield measured.new_rows()


class _Measured:
    """The rows of one model, as it is patched in turn."""

    def __init__(self, model: Any, label: str, repeats: int, tell: Tell, context: int) -> None:
        self._model, self._label, self._tell, self._context = model, label, tell, context
        self._repeats, self._rounds = repeats, max(2, repeats // 8)
        self._prompts = prompts_of(model, max(2, *BATCHES))
        self._alone: list[Tensor] = []
        """What each prompt is followed by when it is alone, with the weights of now."""
        self._dense_us: dict[int, float] = {}
        """The fastest step of the unpatched model, by batch."""
        self._found: list[BatchesRow] = []
        self._sparsity = measure_sparsity(model, self._prompts[:1]).sparsity

    def new_rows(self) -> list[BatchesRow]:
        """Those that have not been asked for."""
        found, self._found = self._found, []
        return found

    def add_compiled(self, batch: int) -> None:
        """The unpatched model's step, compiled as a whole by torch."""
        self._tell(f"unpatched: {COMPILED}, batch {batch}")
        replay = compiled_step(self._model, self._prompts[:batch], self._context)
        timed = self._times(partial(_again, replay), _LAST, self._repeats)
        self._add_step(COMPILED, "unpatched", batch, timed, self._context)
        del replay
        self._free()

    def add_ours(self, weights: str, batches: tuple[int, ...]) -> None:
        """Our step and `generate`, by batch, and `generate` with guesses."""
        self._tell(f"{weights}: one sequence")
        prepare_generation(self._model, self._context, prompt_lookup_num_tokens=GUESSES[0])
        self._alone = [self._written(self._prompts[i : i + 1], _ALONE)[0] for i in range(max(2, *batches))]
        for batch in batches:
            self._tell(f"{weights}: batch {batch}")
            self._add_batch(weights, batch)
        for guesses in GUESSES:
            self._tell(f"{weights}: {LOOKUP.format(guesses)}")
            self._add_lookup(weights, guesses)
        release_generation(self._model)
        self._free()

    def _add_batch(self, weights: str, batch: int) -> None:
        prompts = self._prompts[:batch]
        step = prepare_generation(self._model, self._context, batch_size=batch)
        step.token.copy_(prompts[:, -1:])
        timed = self._times(partial(last_positions, step, self._context), _LAST, self._repeats)
        texts = self._written(prompts, _NEW_TOKENS)
        known = {
            "equal": _share([text[:_ALONE] for text in texts], self._alone[:batch]),
            "checked": all(_goes_round(texts[i], prompts[i]) for i in range(1, batch, 2)),
        }
        if batch == 1:  # the same call again
            known["checked"] = known["equal"] == 1
        self._add_step(STEP, weights, batch, timed, self._context, prepare_s=step.seconds, **known)
        timed = self._times(partial(self._written, prompts, _NEW_TOKENS), _NEW_TOKENS, self._rounds)
        self._add(GENERATE, weights, batch, timed, _PROMPT + _NEW_TOKENS, **known)

    def _add_lookup(self, weights: str, guesses: int) -> None:
        prompt = self._prompts[1:2]
        prepare_generation(self._model, self._context, prompt_lookup_num_tokens=guesses)  # whose trial is not to be counted
        call = partial(self._written, prompt, _NEW_TOKENS, prompt_lookup_num_tokens=guesses)
        with _counted() as runs:
            [text] = call()
        single, verified = runs[1], runs[guesses + 1]
        steps = 1 + single + verified  # the prompt's, too
        equal = _share([text[:_ALONE]], self._alone[1:2])
        known = {
            "equal": equal,
            "checked": equal == 1 and _goes_round(text, prompt[0]) and verified > 0,
            "tokens_per_step": _NEW_TOKENS / steps,
            "accepted": (_NEW_TOKENS - steps) / verified if verified else 0.0,
        }
        timed = self._times(call, steps, self._rounds)
        self._add(LOOKUP.format(guesses), weights, 1, timed, _PROMPT + _NEW_TOKENS, **known)

    def _written(self, prompts: Tensor, new: int, **options: Any) -> Tensor:
        """What follows the prompts, (sequences, new)."""
        mask = torch.ones_like(prompts)
        ids = generate(self._model, prompts, attention_mask=mask, max_new_tokens=new, do_sample=False, **options)
        return ids[:, prompts.shape[1] :]

    def _times(self, call: Callable[[], Any], steps: int, repeats: int) -> Times:
        return times_on_the_host(call, steps, repeats, self._model.device)

    def _free(self) -> None:
        if self._model.device.type == "cuda":
            free_memory()

    def _add_step(self, variant: str, weights: str, batch: int, times: Times, context: int, **more: Any) -> None:
        if weights == "unpatched":
            self._dense_us[batch] = min(times.median, self._dense_us.get(batch, times.median))
        self._add(variant, weights, batch, times, context, **more)

    def _add(self, variant: str, weights: str, batch: int, times: Times, context: int, **more: Any) -> None:
        config = self._model.config
        row = BatchesRow(
            op="batches",
            variant=variant,
            model=self._label,
            d_model=config.hidden_size,
            d_ff=config.intermediate_size,
            n_layers=config.num_hidden_layers,
            dtype="bfloat16",
            weights=weights,
            batch=batch,
            context=context,
            sparsity=self._sparsity,
            time_us=times.median,
            p10_us=times.p10,
            p90_us=times.p90,
            noisy=times.is_noisy,
            dense_us=self._dense_us[batch],
            **more,
        )
        self._found.append(row)


def _again(replay: Callable[[], None]) -> None:
    for _ in range(_LAST):
        replay()


def last_positions(step: Step, context: int) -> None:
    """A step on the last positions of the context, where it takes longest."""
    step.position.fill_(context - _LAST)
    for _ in range(_LAST):
        step.run()


def _share(texts: list[Tensor], others: list[Tensor]) -> float:
    """Of tokens that are the same."""
    return torch.stack(texts).eq(torch.stack(others)).double().mean().item()


def _goes_round(text: Tensor, prompt: Tensor) -> bool:
    return torch.equal(text.cpu(), cycle(int(prompt[-1]), len(text)))


@contextmanager
def _counted() -> Iterator[Counter[int]]:
    """How often steps are run, by the number of tokens that they feed."""
    runs: Counter[int] = Counter()
    run = Step.run

    def counting(step: Step) -> None:
        runs[step.tokens] += 1
        run(step)

    with mock.patch.object(Step, "run", counting):
        yield runs


@contextmanager
def _no_other_loop() -> Iterator[None]:
    """An error where `generate` would leave a call to transformers: that is not what is measured."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="generate: transformers' own loop")
        yield
