"""Who writes: the decoding steps of a model, who has them, and the way from a prompt to its text."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from .choice import Choice
from .eligibility import padding_of, positions_of, state_of, why_no_step
from .parallel import parallel_of
from .speculation import Assistant, Guesses, PromptLookup, Speculation
from .step import CannotStep, Step, forward
from .steps import kept_for

_SMALLEST, _LARGER = 256, 1024  # tokens of a cache: a power of two between these, or a multiple of the larger


class Runner:
    """The step of one model, and who has it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: int | None = None
        self._steps: dict[bool, Step] = {}
        """The last one of one sequence, and the last one of several."""
        self._verifiers: dict[int, Step] = {}
        """Of the step of one sequence, by the number of tokens that they feed."""
        self._state: Any = None
        self._refused: tuple[Any, str] | None = None
        self._ended: Any = None
        """Of the last call: the next one may come on another stream."""

    @staticmethod
    def of(model: Any) -> Runner:
        return kept_for(model, Runner)

    @contextmanager
    def alone(self, function: str) -> Iterator[None]:
        """Have the model to oneself: whoever generates with it, patches or unpatches it meanwhile waits."""
        # The holder counts only while the lock is held: after an interrupt a name may have been left behind.
        if self._lock.locked() and self._holder == threading.get_ident():
            raise RuntimeError(f"{function}: called by a streamer or criterion of a call that is generating with this model")
        with self._lock:
            self._holder = threading.get_ident()
            try:
                yield
            finally:
                self._holder = None

    @contextmanager
    def turn(self, function: str, device: torch.device) -> Iterator[None]:
        """Have the step to oneself, on the GPU's current stream, behind all that the last one did with it on another."""
        on_gpu = device.type == "cuda"
        with self.alone(function), torch.cuda.device(device) if on_gpu else nullcontext():
            if self._ended is not None:
                self._ended.wait()
            try:
                yield
            finally:
                self._ended = torch.cuda.current_stream().record_event() if on_gpu else None

    def step(self, model: Any, length: int, sequences: int = 1) -> Step:
        """A step for so many sequences of `length` tokens, the last one if it serves."""
        state = self._agreed_state(model, length, sequences)
        if self._state != state:
            self._drop()
        step = self._steps.get(sequences > 1)
        if step is None or step.capacity < length or step.sequences != sequences:
            self._steps.pop(sequences > 1, None)  # its memory first
            if sequences == 1:
                self._verifiers.clear()
            step = None
            try:
                step = self._made(model, (sequences, 1), lambda: Step(model, _capacity_for(length), sequences))
            except (MemoryError, torch.OutOfMemoryError) as error:
                alike = isinstance(error, MemoryError) or parallel_of(model) is None  # in all processes that have parts
                if not self._steps or not alike:
                    raise
            if step is None:  # no longer while the error holds what has been allocated
                self._drop()  # the step of another number of sequences may have what is missing
                gc.collect()  # and what is in circles
                step = self._made(model, (sequences, 1), lambda: Step(model, _capacity_for(length), sequences))
            self._steps[sequences > 1] = step
        return step

    def verifier(self, model: Any, step: Step, tokens: int) -> Step:
        """A step that feeds so many tokens in a row, on the cache of the step of one sequence."""
        self._checked_state(model, (1, tokens))
        if tokens not in self._verifiers:
            self._verifiers[tokens] = self._made(
                model, (1, tokens), lambda: Step(model, step.capacity, tokens=tokens, cache_of=step)
            )
        return self._verifiers[tokens]

    def _agreed_state(self, model: Any, length: int, sequences: int) -> Any:
        """As `_checked_state`, agreed by the processes that hold parts of a model: all make a step, have it, or do without."""
        parallel = parallel_of(model)
        if parallel is None:
            return self._checked_state(model, (sequences, 1))
        state, reason = None, ""
        try:
            state = self._checked_state(model, (sequences, 1))
        except CannotStep as error:
            reason = str(error)
        step = self._steps.get(sequences > 1)
        serves = step is not None and self._state == state and step.capacity >= length and step.sequences == sequences
        said = parallel.told((reason, serves))
        for rank, (other, _) in enumerate(said):
            if other:
                raise CannotStep(reason or f"{other} (rank {rank} of {parallel.size})")
        if len({has_step for _, has_step in said}) > 1:
            self._drop()
        return state

    def _checked_state(self, model: Any, kind: tuple[int, int]) -> Any:
        """The state of a model that a step of this kind, sequences and tokens of each, can be made of."""
        state = state_of(model)
        if self._refused is not None and self._refused[0] == (state, kind):
            raise CannotStep(self._refused[1])
        is_new = self._state != state or torch.is_autocast_enabled(model.device.type)
        if is_new and (reason := why_no_step(model)):
            raise CannotStep(reason)
        return state

    def _made(self, model: Any, kind: tuple[int, int], make: Callable[[], Step]) -> Step:
        console = Console(stderr=True)
        try:
            with console.status("compiling the decoding step") if console.is_terminal else nullcontext():
                step = make()
        except CannotStep as error:
            self._refused = (state_of(model), kind), str(error)
            raise
        self._state = state_of(model)  # what the first run of a module leaves in it belongs to it
        return step

    def _drop(self) -> None:
        self._steps.clear()
        self._verifiers.clear()

    def release(self) -> None:
        """Free the steps; the next call makes them again, and tries again what was refused."""
        self._drop()
        self._state = self._refused = None

    def drop_stale(self, model: Any) -> None:
        """Free the steps of a model that has changed."""
        if self._steps and self._state != state_of(model):
            self._drop()

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
        guesses: Guesses | None = None,
    ) -> Tensor:
        """Prompts and new tokens; `mask` hides padding on the left of prompts."""
        most = 0 if guesses is None else guesses.most
        step = self.step(model, config.max_length + most, len(input_ids))
        verifier = None if guesses is None else self.verifier(model, step, 1 + most)
        prompt, padding = input_ids.to(step.device), padding_of(mask, input_ids) or [0] * len(input_ids)
        length, past = prompt.shape[1], cache.get_seq_length()
        proposer = None if guesses is None else _proposer(guesses, model, prompt, padding[0], config)
        if guesses is not None and streamer is not None:
            streamer.put(input_ids.cpu())  # which transformers does where there are no guesses
        inputs: dict[str, Any] = {}
        if mask is not None and any(padding):
            inputs = {"attention_mask": mask.to(step.device), "position_ids": positions_of(mask)[:, past:].to(step.device)}
        # Before the prompt is read, while nothing is under way: what is told waits for the GPU.
        choice = self._choice(model, step, prompt, processors, criteria, config, padding) if proposer is None else None
        with torch.no_grad():
            step.logits.copy_(forward(model, prompt[:, past:], cache, **inputs))
        step.take(cache, length, padding)
        if not keeps_cache:
            cache.layers.clear()
        limit = config.max_length - length
        if choice is not None:
            tokens = choice.tokens(limit, streamer)
        else:
            assert verifier is not None and proposer is not None
            tokens = Speculation(step, verifier, proposer, prompt, processors, padding[0]).tokens(limit, criteria, streamer)
        if keeps_cache:
            step.give(cache, length, length + tokens.shape[1] - 1, padding)
        return torch.cat([input_ids, tokens.to(input_ids.device, input_ids.dtype)], dim=1)

    @staticmethod
    def _choice(
        model: Any, step: Step, prompt: Tensor, processors: Any, criteria: Any, config: Any, padding: list[int]
    ) -> Choice:
        """Who chooses the tokens; all processes that hold parts of a model give their GPUs as many steps ahead."""
        choice = Choice(step, prompt, processors, criteria, config, padding)
        if any(m.__dict__.get("counts") is not None for m in model.modules()):
            choice.ahead = 1
        if step.parallel is not None:
            choice.ahead = min(step.parallel.told(choice.ahead))
        return choice


def _proposer(guesses: Guesses, model: Any, prompt: Tensor, padding: int, config: Any) -> PromptLookup | Assistant:
    """Who guesses; an assistant has read the prompt."""
    if guesses.assistant is None:
        return PromptLookup(guesses.most, config, prompt.shape[1])
    from transformers import DynamicCache

    try:
        step = Runner.of(guesses.assistant).step(guesses.assistant, config.max_length + guesses.most)
    except CannotStep as error:
        raise CannotStep(f"the assistant has no step: {error}") from None
    cache, shown = DynamicCache(), prompt[:, padding:]
    with torch.no_grad():
        forward(guesses.assistant, shown, cache)
    step.take(cache, shown.shape[1])
    return Assistant(step, shown.shape[1], padding)


@contextmanager
def turns(function: str, models: list[Any]) -> Iterator[None]:
    """The turn of each model, in an order of theirs, so that two calls never wait for each other."""
    with ExitStack() as stack:
        for model in sorted(models, key=id):
            stack.enter_context(Runner.of(model).turn(function, model.device))
        yield


def _capacity_for(length: int) -> int:
    """Of a cache for sequences of so many tokens."""
    if length > _LARGER:
        return -(-length // _LARGER) * _LARGER
    return max(_SMALLEST, 1 << (length - 1).bit_length())
