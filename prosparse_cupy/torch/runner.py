"""Who writes: the decoding step of a model, the choice of tokens on the GPU, and the host that looks at them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from .eligibility import LENGTHS, state_of, why_no_step
from .step import CannotStep, Step, captured, forward
from .steps import kept_for

_AHEAD = 2  # steps that the GPU has been given when the host looks at a token: one that it does, one that waits
_LATEST = 4  # tokens that the host can still look at
_SMALLEST, _LARGER = 256, 1024  # tokens of a cache: a power of two between these, or a multiple of the larger


class Runner:
    """The step of one model, and who has it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: int | None = None
        self._step: Step | None = None
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

    def step(self, model: Any, length: int) -> Step:
        """A step for sequences of `length` tokens, the last one if it serves."""
        state = state_of(model)
        if self._refused is not None and self._refused[0] == state:
            raise CannotStep(self._refused[1])
        is_new = self._state != state or torch.is_autocast_enabled(model.device.type)
        if is_new and (reason := why_no_step(model)):
            raise CannotStep(reason)
        if self._step is None or self._state != state or self._step.capacity < length:
            self._step = None  # its memory first
            console = Console(stderr=True)
            try:
                with console.status("compiling the decoding step") if console.is_terminal else nullcontext():
                    self._step = Step(model, _capacity_for(length))
            except CannotStep as error:
                self._refused = state_of(model), str(error)
                raise
            self._state = state_of(model)  # what the first run of a module leaves in it belongs to it
        return self._step

    def drop_stale(self, model: Any) -> None:
        """Free the step of a model that has changed."""
        if self._step is not None and self._state != state_of(model):
            self._step = None

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
    ) -> Tensor:
        """Prompt and new tokens."""
        step = self.step(model, config.max_length)
        prompt = input_ids.to(step.device)
        length = prompt.shape[1]
        with torch.no_grad():
            step.logits.copy_(forward(model, prompt[:, cache.get_seq_length() :], cache))
        step.take(cache, length)
        if not keeps_cache:
            cache.layers.clear()
        choice = Choice(step, prompt, processors, config)
        choice.ahead = 1 if any(getattr(m, "counts", None) is not None for m in model.modules()) else _AHEAD
        tokens = choice.tokens(config.max_length - length, criteria, streamer)
        if keeps_cache:
            step.give(cache, length, length + len(tokens) - 1)
        new = torch.tensor([tokens], dtype=input_ids.dtype, device="cpu").to(input_ids.device)
        return torch.cat([input_ids, new], dim=1)


def _capacity_for(length: int) -> int:
    """Of a cache for sequences of so many tokens."""
    if length > _LARGER:
        return -(-length // _LARGER) * _LARGER
    return max(_SMALLEST, 1 << (length - 1).bit_length())


class Choice:
    """Chooses tokens, as the processors and the config say, and hands them to the host while the GPU goes on."""

    def __init__(self, step: Step, prompt: Tensor, processors: Any, config: Any) -> None:
        self._step, self._prompt, self._config = step, prompt.cpu(), config
        length = prompt.shape[1]
        # Behind the tokens there is one of them again and again, which counts once for those who look which tokens there are.
        self._ids = prompt[:, :1].repeat(1, step.capacity + 1)
        self._ids[:, :length] = prompt
        self._processors = [self._bound(processor) for processor in processors]
        self._graph: Any = None
        self.ahead = _AHEAD
        on_gpu = step.device.type == "cuda"
        # The latest tokens, by position, on the GPU and as the host sees them.
        self._latest = torch.zeros(_LATEST, dtype=torch.int64, device=step.device)
        self._seen = torch.zeros(_LATEST, dtype=torch.int64, pin_memory=on_gpu, device="cpu")
        self._events = [torch.cuda.Event() for _ in range(_LATEST)] if on_gpu else []

    def _bound(self, processor: Any) -> Callable[[Tensor, Tensor], Tensor]:
        """A processor that can be captured: lengths are compared on the GPU."""
        name = type(processor).__name__
        if name not in LENGTHS:
            return processor  # type: ignore[no-any-return]
        is_total = name.startswith("MinLength")
        least = processor.min_length if is_total else processor.prompt_length_to_skip + processor.min_new_tokens
        position, is_end = self._step.position, torch.zeros_like(self._step.logits, dtype=torch.bool)
        is_end[:, processor.eos_token_id.to(is_end.device)] = True

        def at_least(_: Tensor, scores: Tensor) -> Tensor:
            return scores.masked_fill(is_end & (position < least), -torch.inf)

        return at_least

    def _once(self) -> None:
        """The next token of the step's logits, for the step and for the host."""
        step, sampled = self._step, self._config.do_sample
        scores = step.logits.to(torch.float32, copy=True) if self._processors or sampled else step.logits
        for processor in self._processors:
            scores = processor(self._ids[:, :-1], scores)
        token = torch.multinomial(scores.softmax(-1), 1) if sampled else scores.argmax(-1, keepdim=True)
        step.token.copy_(token)
        if self._processors:
            self._ids.index_copy_(1, step.position, token)
        self._latest.index_copy_(0, step.position % _LATEST, token[0])
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

    def _take(self, i: int) -> int:
        if self._events:
            self._events[i % _LATEST].synchronize()
        return int(self._seen[(self._prompt.shape[1] + i) % _LATEST])

    def tokens(self, limit: int, criteria: Any, streamer: Any) -> list[int]:
        """Up to `limit` tokens, until a criterion says stop; the streamer gets each as it comes."""
        written: list[int] = []
        ids = torch.empty(1, self._prompt.shape[1] + limit, dtype=torch.int64)
        ids[:, : self._prompt.shape[1]] = self._prompt
        issued = 0
        while len(written) < limit:
            while issued < min(limit, len(written) + self.ahead):
                self._issue(issued)
                issued += 1
            token = self._take(len(written))
            written.append(token)
            length = self._prompt.shape[1] + len(written)
            ids[0, length - 1] = token
            if streamer is not None:
                streamer.put(ids[0, length - 1 : length])
            if bool(criteria(ids[:, :length], None).all()):
                break
        if streamer is not None:
            streamer.end()
        return written
