"""Speculative decoding of one sequence: guesses are verified by one step of the model, and the host keeps those that are right.

The text is the one that is written without guesses, since every token is chosen from the model's logits. Guesses decide how
many tokens a step gives. The host looks at each step before the next begins: only then is it known how many guesses were right.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import MOST_TOKENS
from .choice import bound, captured_choice
from .step import Step

MOST_GUESSES = MOST_TOKENS - 1
"""Of a step, which feeds one token that is known before them."""
_USUAL_GUESSES = 5  # of an assistant that does not say how many


class Guesses(NamedTuple):
    """What a call asks for."""

    most: int
    """Of a step, up to `MOST_GUESSES`."""
    assistant: Any = None
    """The model that guesses; without one they are looked up in the text."""


def guesses_of(options: dict[str, Any]) -> tuple[Guesses | None, dict[str, Any]]:
    """What a call's options ask for, and the options without it, which are those of the same call without guesses.

    No guesses for what transformers itself must do: that stays among the options.
    """
    config, assistant = options.get("generation_config"), options.get("assistant_model")
    name = "prompt_lookup_num_tokens"
    of_config = getattr(config, name, None)
    number = options.get(name) if options.get(name) is not None else of_config
    if assistant is not None:
        if number is not None or options.get("assistant_tokenizer") is not None or not hasattr(assistant, "generation_config"):
            return None, options
        number = getattr(assistant.generation_config, "num_assistant_tokens", None) or _USUAL_GUESSES
    if type(number) is not int or number < 1:
        return None, options
    rest = {key: value for key, value in options.items() if key not in (name, "assistant_model")}
    if of_config is not None:
        own = rest["generation_config"] = copy.deepcopy(config)
        own.prompt_lookup_num_tokens = None  # type: ignore[union-attr]
    return Guesses(min(number, MOST_GUESSES), assistant), rest


def why_no_guesses(model: Any, guesses: Guesses, input_ids: Tensor, processors: Any, config: Any) -> str:
    """Why transformers' own loop must do a call with guesses that it has prepared, or nothing."""
    assistant = guesses.assistant
    if input_ids.shape[0] != 1:
        return f"guesses for {input_ids.shape[0]} sequences"
    if config.do_sample:
        return "sampling with guesses"
    for name in ("assistant_ensemble_weight", "speculation_type"):
        if getattr(config, name, None) is not None:
            return name
    if any(getattr(processor, "prompt_ignore_length", None) is not None for processor in processors):
        return "a penalty that does not count padding, with guesses"
    if assistant is None:
        return ""
    if assistant is model:
        return "a model that is its own assistant"
    if assistant.device != model.device:
        return f"an assistant on {assistant.device}, a model on {model.device}"
    sizes = [m.config.get_text_config(decoder=True).vocab_size for m in (model, assistant)]
    return "" if sizes[0] == sizes[1] else f"an assistant of {sizes[1]} tokens, a model of {sizes[0]}"


class PromptLookup:
    """Guesses what followed the last tokens where they stood in the text before, as transformers looks it up."""

    def __init__(self, most: int, config: Any, length: int) -> None:
        from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

        ends = getattr(config, "_eos_token_tensor", None)
        self._generator = PromptLookupCandidateGenerator(
            eos_token_id=None if ends is None else ends.cpu(),
            num_output_tokens=most,
            max_matching_ngram_size=getattr(config, "max_matching_ngram_size", None) or 2,
            max_length=config.max_length,
        )

    def propose(self, ids: Tensor, most: int, token: Tensor) -> int:
        """Guess up to `most` tokens behind `ids`, (1, length) on the host, into all but the first of `token`; returns how many.

        Places that are left over get the last guess again, which is likely to need few neurons beside those of the others.
        """
        found, _ = self._generator.get_candidates(ids)  # type: ignore[arg-type]
        guesses = found[0, ids.shape[1] :][:most]
        if len(guesses):
            padded = torch.cat([guesses, guesses[-1:].expand(token.shape[1] - 1 - len(guesses))])
            token[0, 1:].copy_(padded)
        return len(guesses)


class Assistant:
    """Guesses the tokens that another model would write, by its own step. The guesses stay on the GPU.

    `padding` is how many tokens on the left of the text it has not read.
    """

    def __init__(self, step: Step, length: int, padding: int) -> None:
        self._step, self._padding = step, padding
        self._fed = length
        """Tokens of the text that its cache holds."""

    def propose(self, ids: Tensor, most: int, token: Tensor) -> int:
        """As `PromptLookup.propose`."""
        text = ids[0, self._padding :].tolist()
        step, last = self._step, len(text) - 1
        step.position.fill_(min(self._fed, last))
        for known in text[min(self._fed, last) : -1]:  # the last guess of a step that was right has not been fed
            step.token.fill_(known)
            step.run()
        step.token.fill_(text[-1])
        for i in range(token.shape[1] - 1):
            if i < most:
                step.run()
                step.token.copy_(step.logits.argmax(-1, keepdim=True))
            token[:, 1 + i : 2 + i].copy_(step.token)
        self._fed = last + most
        return most

    def keep(self, length: int) -> None:
        """So many tokens of the text are right; what the cache holds behind them is not."""
        self._fed = min(self._fed, length - self._padding)


class _Chooser:
    """Chooses the likeliest token behind each of those that a step has fed, and hands them to the host with what was fed."""

    def __init__(self, step: Step, ids: Tensor, last: int, processors: Any, padding: int) -> None:
        self._step, self._ids, self._filler = step, ids, last
        # The step of one token has moved on when its logits are there, the one of several has not.
        moved = torch.arange(step.tokens, device=step.device)[:, None] + int(step.tokens > 1)
        self._offsets = moved + padding
        self._places = torch.arange(ids.shape[1], device=step.device)
        self._processors = [bound(processor, step.logits, self._columns) for processor in processors]
        on_gpu = step.device.type == "cuda"
        self._found = torch.zeros(2, step.tokens, dtype=torch.int64, device=step.device)
        self._seen = torch.zeros(2, step.tokens, dtype=torch.int64, pin_memory=on_gpu, device="cpu")
        self._event = torch.cuda.Event() if on_gpu else None
        self._graph: Any = captured_choice(self._once, step.device) if on_gpu else None

    def _columns(self) -> Tensor:
        """How many tokens there are before each that is chosen, padding included, (tokens, 1)."""
        return self._step.position + self._offsets

    def _once(self) -> None:
        step, scores = self._step, self._step.logits
        if self._processors:
            columns, scores = self._columns(), scores.to(torch.float32, copy=True)
            self._ids.index_copy_(1, columns[:, 0] - 1, step.token)
            # Behind the tokens of each row there is one of them again and again, as in `Choice`.
            ids = torch.where(self._places < columns, self._ids, self._filler)
            for processor in self._processors:
                scores = processor(ids, scores)
        self._found[0].copy_(step.token[0])
        self._found[1].copy_(scores.argmax(-1))
        self._seen.copy_(self._found, non_blocking=True)

    @torch.inference_mode()
    def chosen(self) -> tuple[list[int], list[int]]:
        """The tokens that were fed, and the one behind each."""
        if self._graph is None:
            self._once()
        else:
            self._graph.replay()
        if self._event is not None:
            self._event.record()
            self._event.synchronize()
            if self._step.parallel is not None:
                self._step.parallel.failures.stop()
        fed, found = self._seen.tolist()
        return fed, found


class Speculation:
    """Writes one sequence, greedily, with guesses of a proposer."""

    def __init__(
        self, step: Step, verifier: Step, proposer: PromptLookup | Assistant, prompt: Tensor, processors: Any, padding: int
    ) -> None:
        self._step, self._verifier, self._proposer, self._padding = step, verifier, proposer, padding
        self._prompt = prompt.cpu()
        ids = prompt[:, -1:].repeat(1, step.capacity + padding + 1 + MOST_TOKENS)
        ids[:, : prompt.shape[1]] = prompt
        last = int(self._prompt[0, -1])
        step.token.fill_(last)
        # A capture may write to the text behind the prompt, which is written before it is read.
        with torch.inference_mode():
            self._choosers = {s.tokens: _Chooser(s, ids, last, processors, padding) for s in (step, verifier)}

    def tokens(self, limit: int, criteria: Any, streamer: Any) -> Tensor:
        """Up to `limit` tokens until a criterion says stop; the streamer gets each."""
        length = self._prompt.shape[1]
        ids = torch.empty(1, length + limit, dtype=torch.int64, device="cpu")
        ids[:, :length] = self._prompt
        _, new = self._choosers[1].chosen()  # of the prompt's logits
        written, is_over = 0, False
        while not is_over:
            for token in new:
                ids[0, length + written] = token
                written += 1
                if streamer is not None:
                    streamer.put(ids[0, length + written - 1 : length + written])
                is_over = bool(criteria(ids[:, : length + written], None).all()) or written == limit
                if is_over:
                    break
            else:
                new = self._next(ids[:, : length + written], limit - written - 1)
        if streamer is not None:
            streamer.end()
        return ids[:, length : length + written]

    @torch.inference_mode()
    def _next(self, ids: Tensor, most: int) -> list[int]:
        """At least one token, and as many more as were guessed."""
        position = ids.shape[1] - 1 - self._padding
        most = min(most, self._verifier.tokens - 1)
        # All places of the verifier are fed, and there may be no positions behind the model's last one.
        if self._verifier.positions is not None and position + self._verifier.tokens > self._verifier.positions:
            most = 0
        guessed = self._proposer.propose(ids, most, self._verifier.token) if most else 0
        step = self._verifier if guessed else self._step
        step.position.fill_(position)
        step.token[:, :1].fill_(int(ids[0, -1]))
        step.run()
        fed, found = self._choosers[step.tokens].chosen()
        right = 0
        while right < guessed and fed[1 + right] == found[right]:
            right += 1
        if isinstance(self._proposer, Assistant):
            self._proposer.keep(ids.shape[1] + right)
        return found[: right + 1]
