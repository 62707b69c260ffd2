"""The choice of tokens on the GPU, and the host that looks at them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .capture import captured
from .eligibility import LENGTHS
from .step import Step

AHEAD = 2  # steps that the GPU has been given when the host looks at a token: one that it does, one that waits
_LATEST = 4  # tokens that the host can still look at
_ENDS, _LENGTH = "EosTokenCriteria", "MaxLengthCriteria"  # of transformers, which the GPU does without the host


def bound(processor: Any, logits: Tensor, columns: Callable[[], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """A processor that can be captured: lengths, which `columns` tells, are compared on the GPU."""
    name = type(processor).__name__
    if name not in LENGTHS:
        return processor  # type: ignore[no-any-return]
    is_total = name.startswith("MinLength")
    least = processor.min_length if is_total else processor.prompt_length_to_skip + processor.min_new_tokens
    is_end = torch.zeros_like(logits, dtype=torch.bool)
    is_end[:, processor.eos_token_id.to(is_end.device)] = True

    def at_least(_: Tensor, scores: Tensor) -> Tensor:
        return scores.masked_fill(is_end & (columns() < least), -torch.inf)

    return at_least


def captured_choice(choose: Callable[[], None], device: torch.device) -> Any:
    """A choice as a graph, or None if not all of it can be captured; generators are put back as they were."""
    state = torch.cuda.get_rng_state(device)
    try:
        return captured(choose, device, choose)
    except RuntimeError:  # what waits for the host, as some processors of some versions do
        return None
    finally:
        torch.cuda.set_rng_state(state, device)


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
        self._processors = [bound(processor, step.logits, self._column) for processor in processors]
        self._graph: Any = None
        if step.parallel is not None:
            step.parallel.failures.frees(self)  # what shares sampled tokens is in its graph
        self.ahead = AHEAD
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

    def let_go(self) -> None:
        """Free the graph, as `Step.let_go` does."""
        self._graph = None

    def _column(self) -> Tensor:
        """How many tokens each sequence has, padding on the left included, (1,)."""
        position = self._step.position[:1]
        return position if self._first_padding is None else position + self._first_padding

    def _once(self) -> None:
        """The next token of the step's logits, for the step and for the host."""
        step, sampled = self._step, self._config.do_sample
        scores = step.logits.to(torch.float32, copy=True) if self._processors or sampled else step.logits
        for processor in self._processors:
            scores = processor(self._ids[:, :-1], scores)
        token: Tensor = torch.multinomial(scores.softmax(-1), 1) if sampled else scores.argmax(-1, keepdim=True)
        if sampled and step.parallel is not None:
            step.parallel.share(token)  # whose generators may be in other states
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
            self._graph = captured_choice(self._once, self._step.device)
            # What was chosen while the choice was captured has not been written.
            self._ids[:, self._prompt.shape[1] :] = self._ids[:, self._prompt.shape[1] - 1 : self._prompt.shape[1]]
            self._ended.zero_()
        if self._graph is None:
            self._once()
        else:
            self._graph.replay()
        if self._events:
            self._events[i % _LATEST].record()

    def _take(self, i: int) -> Tensor:
        if self._events:
            self._events[i % _LATEST].synchronize()
            if self._step.parallel is not None:
                self._step.parallel.failures.stop()
        return self._seen[:, (self._prompt.shape[1] + i) % _LATEST]

    def tokens(self, limit: int, streamer: Any) -> Tensor:
        """Up to `limit` tokens of each sequence, until criteria have ended all; the streamer gets each as it comes."""
        sequences, length = self._prompt.shape
        ids = torch.empty(sequences, length + limit, dtype=torch.int64, device="cpu")
        ids[:, :length] = self._prompt
        ended = torch.zeros(sequences, dtype=torch.bool, device="cpu")
        issued = written = 0
        try:
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
        finally:
            if issued > written:
                self._take(issued - 1)  # what a graph still writes to, page-locked memory among it, is not to be freed
        return ids[:, length : length + written]
