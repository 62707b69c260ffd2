"""Who writes: the decoding step of a model, the choice of tokens on the GPU, and the host that looks at them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from .eligibility import LENGTHS, padding_of, positions_of, state_of, why_no_step
from .step import CannotStep, Step, captured, forward
from .steps import kept_for

_AHEAD = 2  # steps that the GPU has been given when the host looks at a token: one that it does, one that waits
_LATEST = 4  # tokens that the host can still look at
_ENDS, _LENGTH = "EosTokenCriteria", "MaxLengthCriteria"  # of transformers, which the GPU does without the host
_SMALLEST, _LARGER = 256, 1024  # tokens of a cache: a power of two between these, or a multiple of the larger


class Runner:
    """The step of one model, and who has it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: int | None = None
        self._steps: dict[bool, Step] = {}
        """The last one of one sequence, and the last one of several."""
        self._state: Any = None
        self._refused: tuple[Any, str] | None = None
        self._ended: Any = None
        """Of the last call: the next one may come on another stream."""

    @staticmethod
    def of(model: Any) -> Runner:
        return kept_for(model, Runner)

    @contextmanager
    def turn(self, function: str, device: torch.device) -> Iterator[None]:
        """Have the step to oneself, on the GPU's current stream, behind all that the last one did with it on another."""
        if self._holder == threading.get_ident():
            raise RuntimeError(f"{function}: called by a streamer or criterion of a call that is generating with this model")
        on_gpu = device.type == "cuda"
        with self._lock, torch.cuda.device(device) if on_gpu else nullcontext():
            self._holder = threading.get_ident()
            if self._ended is not None:
                self._ended.wait()
            try:
                yield
            finally:
                self._ended = torch.cuda.current_stream().record_event() if on_gpu else None
                self._holder = None

    def step(self, model: Any, length: int, sequences: int = 1) -> Step:
        """A step for so many sequences of `length` tokens, the last one if it serves."""
        state = state_of(model)
        if self._refused is not None and self._refused[0] == (state, sequences):
            raise CannotStep(self._refused[1])
        is_new = self._state != state or torch.is_autocast_enabled(model.device.type)
        if is_new and (reason := why_no_step(model)):
            raise CannotStep(reason)
        if self._state != state:
            self._steps.clear()
        step = self._steps.get(sequences > 1)
        if step is None or step.capacity < length or step.sequences != sequences:
            step = self._steps[sequences > 1] = self._made(model, length, sequences)
        return step

    def _made(self, model: Any, length: int, sequences: int) -> Step:
        self._steps.pop(sequences > 1, None)  # its memory first
        console = Console(stderr=True)
        try:
            with console.status("compiling the decoding step") if console.is_terminal else nullcontext():
                try:
                    step = Step(model, _capacity_for(length), sequences)
                except MemoryError:
                    if not self._steps:
                        raise
                    self._steps.clear()  # the step of another number of sequences may have what is missing
                    step = Step(model, _capacity_for(length), sequences)
        except CannotStep as error:
            self._refused = (state_of(model), sequences), str(error)
            raise
        self._state = state_of(model)  # what the first run of a module leaves in it belongs to it
        return step

    def drop_stale(self, model: Any) -> None:
        """Free the steps of a model that has changed."""
        if self._steps and self._state != state_of(model):
            self._steps.clear()

    def write(
        self,
        model: Any,
        input_ids: Tensor,
        processors: Any,
        criteria: Any,
        config: Any,
        streamer: Any,
        cache: Any,
        keeps_cache: bool,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Prompts and new tokens; `mask` hides padding on the left of prompts."""
        step = self.step(model, config.max_length, len(input_ids))
        prompt, padding = input_ids.to(step.device), padding_of(mask, input_ids)
        length, past = prompt.shape[1], cache.get_seq_length()
        inputs: dict[str, Any] = {}
        if mask is not None and padding is not None and any(padding):
            inputs = {"attention_mask": mask.to(step.device), "position_ids": positions_of(mask)[:, past:].to(step.device)}
        with torch.no_grad():
            step.logits.copy_(forward(model, prompt[:, past:], cache, **inputs))
        step.take(cache, length, padding or ())
        if not keeps_cache:
            cache.layers.clear()
        choice = Choice(step, prompt, processors, criteria, config, padding or ())
        if any(getattr(m, "counts", None) is not None for m in model.modules()):
            choice.ahead = 1
        tokens = choice.tokens(config.max_length - length, streamer)
        if keeps_cache:
            step.give(cache, length, length + tokens.shape[1] - 1, padding or ())
        return torch.cat([input_ids, tokens.to(input_ids.device, input_ids.dtype)], dim=1)


def _capacity_for(length: int) -> int:
    """Of a cache for sequences of so many tokens."""
    if length > _LARGER:
        return -(-length // _LARGER) * _LARGER
    return max(_SMALLEST, 1 << (length - 1).bit_length())


class Choice:
    """Chooses tokens, as the processors and the config say, and hands them to the host while the GPU goes on.

    Of several sequences, those that have ended get the padding token, as transformers has it. The end-of-sequence tokens are
    looked for on the GPU; where other criteria may end a sequence, the GPU waits for what the host says of each token.
    """

    def __init__(
        self, step: Step, prompt: Tensor, processors: Any, criteria: Any, config: Any, padding: Sequence[int] = ()
    ) -> None:
        self._step, self._prompt, self._criteria, self._config = step, prompt.cpu(), criteria, config
        sequences, length = prompt.shape
        # Behind the tokens there is one of them again and again, which counts once for those who look which tokens there are:
        # the prompt's last one, since the first may be padding, which does not count.
        self._ids = prompt[:, -1:].repeat(1, step.capacity + 1)
        self._ids[:, :length] = prompt
        self._first_padding = torch.tensor(padding[:1], device=step.device) if padding and padding[0] else None
        self._processors = [self._bound(processor) for processor in processors]
        self._graph: Any = None
        self.ahead = _AHEAD
        self._padded = sequences > 1 and any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self._ended = torch.zeros(sequences, 1, dtype=torch.bool, device=step.device)
        self._ends: list[Tensor] = []
        if self._padded:
            self._pad = config._pad_token_tensor.to(step.device)
            names = [type(criterion).__name__ for criterion in criteria]
            self._ends = [c.eos_token_id.to(step.device) for c in criteria if type(c).__name__ == _ENDS]
            if set(names) - {_ENDS, _LENGTH}:
                self.ahead = 1
        on_gpu = step.device.type == "cuda"
        # The latest tokens, by position, on the GPU and as the host sees them.
        self._latest = torch.zeros(sequences, _LATEST, dtype=torch.int64, device=step.device)
        self._seen = torch.zeros(sequences, _LATEST, dtype=torch.int64, pin_memory=on_gpu, device="cpu")
        self._events = [torch.cuda.Event() for _ in range(_LATEST)] if on_gpu else []

    def _column(self) -> Tensor:
        """How many tokens each sequence has, padding on the left included, (1,)."""
        position = self._step.position[:1]
        return position if self._first_padding is None else position + self._first_padding

    def _bound(self, processor: Any) -> Callable[[Tensor, Tensor], Tensor]:
        """A processor that can be captured: lengths are compared on the GPU."""
        name = type(processor).__name__
        if name not in LENGTHS:
            return processor  # type: ignore[no-any-return]
        is_total = name.startswith("MinLength")
        least = processor.min_length if is_total else processor.prompt_length_to_skip + processor.min_new_tokens
        is_end = torch.zeros_like(self._step.logits, dtype=torch.bool)
        is_end[:, processor.eos_token_id.to(is_end.device)] = True

        def at_least(_: Tensor, scores: Tensor) -> Tensor:
            return scores.masked_fill(is_end & (self._column() < least), -torch.inf)

        return at_least

    def _once(self) -> None:
        """The next token of the step's logits, for the step and for the host."""
        step, sampled = self._step, self._config.do_sample
        scores = step.logits.to(torch.float32, copy=True) if self._processors or sampled else step.logits
        for processor in self._processors:
            scores = processor(self._ids[:, :-1], scores)
        token: Tensor = torch.multinomial(scores.softmax(-1), 1) if sampled else scores.argmax(-1, keepdim=True)
        if self._padded:
            token = torch.where(self._ended, self._pad, token)
            for ends in self._ends:
                self._ended.logical_or_((token == ends).any(-1, keepdim=True))  # isin may sort, which waits for the host
        step.token.copy_(token)
        column = self._column()
        if self._processors:
            self._ids.index_copy_(1, column, token)
        self._latest.index_copy_(1, column % _LATEST, token)
        self._seen.copy_(self._latest, non_blocking=True)

    @torch.inference_mode()
    def _issue(self, i: int) -> None:
        """Have the i-th token chosen, of logits that a step makes first, except for those of the prompt."""
        if i:
            self._step.run()
        elif self._events:
            self._capture()
        if self._graph is None:
            self._once()
        else:
            self._graph.replay()
        if self._events:
            self._events[i % _LATEST].record()

    def _capture(self) -> None:
        """The choice as a graph, if all of it can be captured; generators are put back as they were."""
        state = torch.cuda.get_rng_state(self._step.device)
        try:
            self._graph = captured(self._once, self._step.device, self._once)
        except RuntimeError:  # what waits for the host, as some processors of some versions do
            self._graph = None
        torch.cuda.set_rng_state(state, self._step.device)
        self._ended.zero_()

    def _take(self, i: int) -> Tensor:
        if self._events:
            self._events[i % _LATEST].synchronize()
        return self._seen[:, (self._prompt.shape[1] + i) % _LATEST]

    def tokens(self, limit: int, streamer: Any) -> Tensor:
        """Up to `limit` tokens of each sequence, until criteria have ended all; the streamer gets each as it comes."""
        sequences, length = self._prompt.shape
        ids = torch.empty(sequences, length + limit, dtype=torch.int64, device="cpu")
        ids[:, :length] = self._prompt
        ended = torch.zeros(sequences, dtype=torch.bool, device="cpu")
        issued = written = 0
        while written < limit:
            while issued < min(limit, written + self.ahead):
                self._issue(issued)
                issued += 1
            ids[:, length + written] = self._take(written)
            written += 1
            if streamer is not None:
                streamer.put(ids[:, length + written - 1])
            ended |= self._criteria(ids[:, : length + written], None)
            if bool(ended.all()):
                break
            if self._padded and self.ahead == 1:
                self._ended.copy_(ended[:, None])
        if streamer is not None:
            streamer.end()
        return ids[:, length : length + written]
