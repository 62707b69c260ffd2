"""`generate`: a model writes at the GPU's own pace. transformers prepares a call, and this is the loop that it runs."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from .patch import check_module
from .step import CannotStep, Step, forward, state_of, why_no_step
from .steps import kept_for

_AHEAD = 2  # steps that the GPU has been given when the host looks at a token: one that it does, one that waits
_LATEST = 4  # tokens that the host can still look at
_SMALLEST, _LARGER = (
    256,
    1024,
)  # tokens of a cache: powers of two up to the one, then multiples of the other, so that few are made
_PURE = {
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
    "MinPLogitsWarper",
    "SuppressTokensLogitsProcessor",
    "TemperatureLogitsWarper",
    "TopHLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "TypicalLogitsWarper",
}
"""Processors of transformers that look at the scores alone, and wait for nothing."""
_LENGTHS = {"MinLengthLogitsProcessor": "min_length", "MinNewTokensLengthLogitsProcessor": "min_new_tokens"}
_KNOWN_INPUTS = {"attention_mask", "position_ids", "use_cache", "logits_to_keep", "cache", "past_key_values", "cache_position"}
_OUTPUTS = ("output_attentions", "output_hidden_states", "output_scores", "output_logits")


def generate(
    model: Any,
    input_ids: Tensor,
    *,
    max_new_tokens: int | None = None,
    streamer: Any = None,
    tokenizer: Any = None,
    **options: Any,
) -> Any:
    """``model.generate(input_ids, ...)`` at the pace of the GPU: each step is one CUDA graph, and nothing waits for the host.

    transformers prepares the call, so options mean what they mean there, and greedy tokens are the same. What runs here is one
    sequence, greedily or sampled: ``do_sample``, ``temperature``, ``top_k``, ``top_p``, ``min_p``, ``repetition_penalty`` and
    other processors of scores, ``min_new_tokens``, EOS lists, ``stop_strings``, ``max_time``, stopping criteria of your own,
    streamers, a `DynamicCache` of an earlier turn, and ``return_dict_in_generate``. Anything else (batches, beams, assistants,
    scores as outputs, processors of your own, hooks) transformers' own loop does, and a warning says why.

    The first call on a model compiles and captures its step, which takes seconds; it is made again when the model has changed,
    or when a longer sequence than ever is asked for. Threads that generate with one model take turns.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A decoder such as `patch_model` takes, patched or not, in evaluation mode, on one device.
    input_ids : torch.Tensor, (1, tokens) int64
        The prompt.
    max_new_tokens : int, optional
        As in transformers, where the model's generation config says it otherwise.
    streamer : transformers.generation.BaseStreamer, optional
        Gets the prompt, then each token.
    tokenizer : optional
        For ``stop_strings``.
    options
        As for transformers' ``generate``.

    Returns
    -------
    torch.Tensor, (1, tokens) int64
        Prompt and new tokens; a ``GenerateDecoderOnlyOutput`` with ``return_dict_in_generate=True``.

    Raises
    ------
    MemoryError
        There is no memory for the cache; the message says how much it needs.
    RuntimeError
        A streamer or criterion called `generate` on the model that it is called by.
    TypeError, ValueError
        As transformers does.
    """
    check_module("generate", model)
    if not hasattr(model, "generate"):
        raise TypeError(f"generate: a {type(model).__name__} cannot generate: load it with AutoModelForCausalLM")
    if options.get("custom_generate") is not None:
        raise ValueError("generate: custom_generate is this function itself: call model.generate for another")
    if max_new_tokens is not None:
        options["max_new_tokens"] = max_new_tokens
    given = options.get("past_key_values", options.get("cache"))
    loop = _Loop(streamer, tokenizer, keeps_cache=given is not None)
    if reason := _why_not_prepared(model, options):
        return _as_ever(model, input_ids, reason, {**options, "streamer": streamer, "tokenizer": tokenizer})
    stop_strings = options.pop("stop_strings", None) or getattr(options.get("generation_config"), "stop_strings", None)
    if stop_strings is not None:
        options = _with_stop_strings(options, stop_strings, tokenizer)
    return model.generate(input_ids, custom_generate=loop, streamer=streamer, **options)


def decoding_loop(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    **keywords: Any,
) -> Any:
    """`generate` as transformers' own hook takes it: ``model.generate(input_ids, custom_generate=decoding_loop, ...)``.

    transformers hands neither a streamer nor a tokenizer to such a hook; `generate` does.
    """
    loop = _Loop(None, None, keeps_cache=True)
    return loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **keywords)


def prepare_generation(model: Any, max_length: int) -> Step:
    """Compile and capture the step of a model now, for sequences of up to `max_length` tokens, so that no call waits for it.

    Returns
    -------
    Step
        ``.seconds`` says what that took, ``.is_compiled`` whether torch.compile served, ``.nbytes`` what its cache takes.

    Raises
    ------
    ValueError
        The model cannot be decoded so; the message says why.
    MemoryError
        As for `generate`.
    """
    check_module("prepare_generation", model)
    runner = _Runner.of(model)
    try:
        with runner.turn("prepare_generation"), _on(model.device):
            return runner.step(model, max_length)
    except CannotStep as error:
        raise ValueError(f"prepare_generation: {error}") from None


def _why_not_prepared(model: Any, options: dict[str, Any]) -> str:
    """What transformers would not hand to a loop, so that it must run all of it."""
    config = options.get("generation_config") or model.generation_config
    for name, off in (("num_beams", (None, 1)), ("prompt_lookup_num_tokens", (None,)), ("penalty_alpha", (None,))):
        if (value := options.get(name, getattr(config, name, None))) not in off:
            return f"{name}={value}"
    if options.get("assistant_model") is not None:
        return "an assistant model"
    return ""


def _with_stop_strings(options: dict[str, Any], stop_strings: Any, tokenizer: Any) -> dict[str, Any]:
    """The options with a criterion for these strings: transformers does not hand the tokenizer on that it would need."""
    from transformers import StoppingCriteriaList, StopStringCriteria

    if tokenizer is None:
        raise ValueError("generate: stop_strings need a tokenizer: pass generate(..., tokenizer=tokenizer)")
    if (config := options.get("generation_config")) is not None:
        options["generation_config"] = config = copy.deepcopy(config)
        config.stop_strings = None
    strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
    own = StopStringCriteria(tokenizer=tokenizer, stop_strings=strings)
    return {**options, "stopping_criteria": StoppingCriteriaList([*(options.get("stopping_criteria") or []), own])}


def _as_ever(model: Any, input_ids: Tensor, reason: str, options: dict[str, Any]) -> Any:
    _warn(reason)
    return model.generate(input_ids, **{name: value for name, value in options.items() if value is not None})


def _warn(reason: str) -> None:
    warnings.warn(f"generate: transformers' own loop does this call, which is slower: {reason}", stacklevel=3)


class _Loop:
    """What transformers calls in the place of its own loop."""

    def __init__(self, streamer: Any, tokenizer: Any, keeps_cache: bool) -> None:
        self._streamer, self._tokenizer, self._keeps_cache = streamer, tokenizer, keeps_cache

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        reason = _why_not(model, input_ids, logits_processor, generation_config, synced_gpus, model_kwargs)
        own = model_kwargs.get("cache", model_kwargs.get("past_key_values"))
        if not reason:
            runner = _Runner.of(model)
            keeps = self._keeps_cache or generation_config.return_dict_in_generate
            cache: Any = own if keeps or own is None else type(own)()
            try:
                with runner.turn("generate"), _on(model.device):
                    ids = runner.write(
                        model, input_ids, logits_processor, stopping_criteria, generation_config, self._streamer, cache, keeps
                    )
            except CannotStep as error:
                reason = str(error)
                runner.refused = state_of(model), reason
            else:
                return _output(generation_config, ids, cache)
        _warn(reason)
        keywords = {"synced_gpus": synced_gpus, "streamer": self._streamer, **model_kwargs}
        return model._sample(input_ids, logits_processor, stopping_criteria, generation_config, **keywords)


def _output(generation_config: Any, ids: Tensor, cache: Any) -> Any:
    if not generation_config.return_dict_in_generate:
        return ids
    from transformers.generation.utils import GenerateDecoderOnlyOutput

    name = "cache" if "cache" in GenerateDecoderOnlyOutput.__dataclass_fields__ else "past_key_values"
    return GenerateDecoderOnlyOutput(**{"sequences": ids, name: cache})


def _why_not(model: Any, input_ids: Tensor, processors: Any, config: Any, synced_gpus: bool, inputs: dict[str, Any]) -> str:
    """Why transformers' own loop must do a call, or nothing."""
    from transformers import DynamicCache

    if input_ids.shape[0] != 1:
        return f"{input_ids.shape[0]} sequences at once"
    if input_ids.shape[1] == 0:
        return "an empty prompt"
    for name in _OUTPUTS:
        if config.return_dict_in_generate and getattr(config, name, None):
            return name
    if torch.is_autocast_enabled(model.device.type):
        return "autocast"
    if synced_gpus or not config.use_cache:
        return "synced_gpus" if synced_gpus else "use_cache=False"
    if other := sorted(name for name, value in inputs.items() if value is not None and name not in _KNOWN_INPUTS):
        return f"inputs beside the tokens: {', '.join(other)}"
    mask = inputs.get("attention_mask")
    if mask is not None and (mask.dim() != 2 or mask.shape[1] != input_ids.shape[1] or not bool((mask == 1).all())):
        return "an attention mask that hides tokens"
    if getattr(config, "_mask_length", input_ids.shape[1]) not in (-1, input_ids.shape[1]):
        return "a prompt without the tokens of its cache"
    cache = inputs.get("cache", inputs.get("past_key_values"))
    if type(cache) is not DynamicCache or cache.get_seq_length() >= input_ids.shape[1]:
        return f"a {type(cache).__name__} as the cache, not a DynamicCache shorter than the prompt"
    for processor in processors:
        name = type(processor).__name__
        own = type(processor).__module__.startswith("transformers.")
        if own and name == "RepetitionPenaltyLogitsProcessor" and getattr(processor, "prompt_ignore_length", None) is None:
            continue
        if not own or (name not in _PURE and name not in _LENGTHS):
            return f"a {name}"
    return ""


class _Runner:
    """The step of one model, and who has it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: int | None = None
        self._step: Step | None = None
        self._state: Any = None
        self.refused: tuple[Any, str] | None = None
        self._ended: Any = None
        """Of the last call: the next one may come on another stream."""

    @staticmethod
    def of(model: Any) -> _Runner:
        return kept_for(model, _Runner)

    @contextmanager
    def turn(self, function: str) -> Iterator[None]:
        """Have the step to oneself."""
        if self._holder == threading.get_ident():
            raise RuntimeError(f"{function}: called by a streamer or criterion of a call that is generating with this model")
        with self._lock:
            self._holder = threading.get_ident()
            try:
                yield
            finally:
                self._holder = None

    def step(self, model: Any, length: int) -> Step:
        """A step for sequences of `length` tokens, the last one if it serves."""
        state = state_of(model)
        if self.refused is not None and self.refused[0] == state:
            raise CannotStep(self.refused[1])
        if self._state != state and (reason := why_no_step(model)):
            raise CannotStep(reason)
        if self._step is None or self._state != state or self._step.capacity < length:
            self._step = None  # its memory first
            console = Console(stderr=True)
            with console.status("compiling the decoding step") if console.is_terminal else _quiet():
                self._step = Step(model, _capacity_for(length))
            self._state = state
        return self._step

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
        if self._ended is not None:
            self._ended.wait()
        prompt = input_ids.to(step.device)
        length = prompt.shape[1]
        with torch.inference_mode():
            logits = forward(model, prompt[:, cache.get_seq_length() :], cache)
        step.take(cache, length)
        if not keeps_cache:
            cache.layers.clear()
        step.logits.copy_(logits)
        choice = _Choice(step, prompt, processors, config)
        try:
            tokens = choice.tokens(config.max_length - length, criteria, streamer)
        finally:
            self._ended = torch.cuda.current_stream().record_event() if step.device.type == "cuda" else None
        if keeps_cache:
            step.give(cache, length, length + len(tokens) - 1)
        new = torch.tensor([tokens], dtype=input_ids.dtype, device="cpu").to(input_ids.device)
        return torch.cat([input_ids, new], dim=1)


def _capacity_for(length: int) -> int:
    """Of a cache for sequences of so many tokens."""
    if length > _LARGER:
        return -(-length // _LARGER) * _LARGER
    return max(_SMALLEST, 1 << (length - 1).bit_length())


class _Choice:
    """Chooses tokens, as the processors and the config say, and hands them to the host while the GPU goes on."""

    def __init__(self, step: Step, prompt: Tensor, processors: Any, config: Any) -> None:
        self._step, self._prompt, self._config = step, prompt.cpu(), config
        length = prompt.shape[1]
        # Behind the tokens there is one of them again and again, which counts once for those who look which tokens there are.
        self._ids = prompt[:, :1].repeat(1, step.capacity + 1)
        self._ids[:, :length] = prompt
        self._processors = [self._bound(processor, length) for processor in processors]
        self._graph: Any = None
        on_gpu = step.device.type == "cuda"
        # The latest tokens, by position, on the GPU and as the host sees them.
        self._latest = torch.zeros(_LATEST, dtype=torch.int64, device=step.device)
        self._seen = torch.zeros(_LATEST, dtype=torch.int64, pin_memory=on_gpu, device="cpu")
        self._events = [torch.cuda.Event() for _ in range(_LATEST)] if on_gpu else []

    def _bound(self, processor: Any, length: int) -> Callable[[Tensor, Tensor], Tensor]:
        """A processor that can be captured: lengths are compared on the GPU."""
        name = type(processor).__name__
        if name not in _LENGTHS:
            return processor  # type: ignore[no-any-return]
        least = processor.min_length if name.startswith("MinLength") else length + processor.min_new_tokens
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
        if self._graph is None:
            self._once()
        else:
            self._graph.replay()
        if self._events:
            self._events[i % _LATEST].record()

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
            while issued < min(limit, len(written) + _AHEAD):
                self._issue(issued)
                issued += 1
                if issued == 1 and self._events:
                    self._capture()
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

    @torch.inference_mode()
    def _capture(self) -> None:
        """The choice as a graph, once it has run."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._step.device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._once()
        self._graph = graph


def _on(device: torch.device) -> Any:
    """The GPU's own streams and graphs, where it is not the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else _quiet()


@contextmanager
def _quiet() -> Iterator[None]:
    yield
