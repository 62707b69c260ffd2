"""`generate`: a model writes at the GPU's own pace. transformers prepares a call, and this is the loop that it runs."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from torch import Tensor

from ..arguments import MOST_TOKENS
from .eligibility import why_another_mode, why_no_call, why_not_together
from .families import check_module
from .parallel import TensorParallel, as_one, parallel_of
from .runner import Runner, turns
from .speculation import MOST_GUESSES, Guesses, guesses_of, why_no_guesses
from .step import CannotStep, Step


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
    to eight sequences, padded on the left as ``attention_mask`` says, greedily or sampled: ``do_sample``, ``temperature``,
    ``top_k``, ``top_p``, ``min_p``, ``repetition_penalty`` and other processors of scores, ``min_new_tokens``, EOS lists,
    ``stop_strings``, ``max_time``, stopping criteria of your own, streamers, a `DynamicCache` of an earlier turn,
    ``num_return_sequences`` of samples, ``return_dict_in_generate``, and of one sequence guesses that are verified together:
    ``prompt_lookup_num_tokens`` and ``assistant_model``. Anything else (larger batches, beams, scores as outputs, processors of
    your own, hooks) transformers' own loop does, and a warning says why.

    The first call on a model compiles and captures its step, which takes seconds; it is made again when the model has changed,
    or when a longer sequence than ever or another number of sequences is asked for. Threads that generate with one model take
    turns. Of a model that is split over processes all make the same call, in one thread each.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A decoder such as `patch_model` takes, patched or not, in evaluation mode, on one device.
    input_ids : torch.Tensor, (sequences, tokens) int64
        The prompts, 1 to 8. Where they differ in length, ``attention_mask`` tells the padding on their left.
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
    torch.Tensor, (sequences, tokens) int64
        Prompts and new tokens, with padding behind those that ended early; a ``GenerateDecoderOnlyOutput`` with
        ``return_dict_in_generate=True``.

    Raises
    ------
    MemoryError
        There is no memory for the cache; the message says how much it needs.
    RuntimeError
        A streamer or criterion called `generate` on the model that it is called by, or another process of a model that is split
        has failed; the message is its.
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
    with as_one(model) as parallel:
        if parallel is not None and streamer is not None:
            streamer = _Checked(streamer, parallel)
        return _generated(model, input_ids, streamer, tokenizer, options)


def _generated(model: Any, input_ids: Tensor, streamer: Any, tokenizer: Any, options: dict[str, Any]) -> Any:
    asked = {**options, "streamer": streamer, "tokenizer": tokenizer}
    guesses, options = guesses_of(options)
    given = options.get("past_key_values", options.get("cache"))
    loop = _Loop(streamer, tokenizer, keeps_cache=given is not None, guesses=guesses)
    if reason := why_another_mode(model, options):
        return _as_ever(model, input_ids, reason, asked)
    stop_strings = options.pop("stop_strings", None) or getattr(options.get("generation_config"), "stop_strings", None)
    if stop_strings is not None:
        options = _with_stop_strings(options, stop_strings, tokenizer)
    try:
        return model.generate(input_ids, custom_generate=loop, streamer=None if guesses else streamer, **options)
    except _GuessesElsewhere as refusal:
        return _as_ever(model, input_ids, str(refusal), asked)


def decoding_loop(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    **keywords: Any,
) -> Any:
    """`generate` as transformers' own hook takes it: ``model.generate(input_ids, custom_generate=decoding_loop, ...)``.

    transformers hands neither a streamer nor a tokenizer to such a hook: a streamer gets the prompt and no more, so whoever
    reads from it would wait for ever. `generate` hands them on.
    """
    loop = _Loop(None, None, keeps_cache=True)
    with as_one(model):
        return loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **keywords)


def prepare_generation(
    model: Any, max_length: int, *, batch_size: int = 1, prompt_lookup_num_tokens: int | None = None
) -> Step:
    """Compile and capture the step of a model now, for sequences of up to `max_length` tokens, so that no call waits for it.

    A step is for one number of sequences, `batch_size`, 1 to 8. One step of one sequence and one of several are kept. With
    `prompt_lookup_num_tokens` the step that verifies so many guesses is made too.

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
    if isinstance(batch_size, bool) or not isinstance(batch_size, int):
        raise TypeError(f"prepare_generation: batch_size must be an int, got {batch_size!r:.60}")
    if not 1 <= batch_size <= MOST_TOKENS:
        raise ValueError(f"prepare_generation: batch_size must be 1 to {MOST_TOKENS}, got {batch_size}: transformers does more")
    if prompt_lookup_num_tokens is not None and (prompt_lookup_num_tokens < 1 or batch_size > 1):
        raise ValueError("prepare_generation: prompt_lookup_num_tokens must be at least 1, and is for one sequence")
    runner = Runner.of(model)
    try:
        with as_one(model), runner.turn("prepare_generation", model.device):
            most = min(prompt_lookup_num_tokens or 0, MOST_GUESSES)
            step = runner.step(model, max_length + most, batch_size)
            if most:
                runner.verifier(model, step, 1 + most)
            return step
    except CannotStep as error:
        raise ValueError(f"prepare_generation: {error}") from None


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
    unset = [name for name in ("streamer", "tokenizer") if options[name] is None]
    return model.generate(input_ids, **{name: value for name, value in options.items() if name not in unset})


def _warn(reason: str) -> None:
    warnings.warn(f"generate: transformers' own loop does this call, which is slower: {reason}", stacklevel=3)


class _Checked:
    """A streamer that gets nothing of a group that has been given up, whose numbers mean nothing."""

    def __init__(self, streamer: Any, parallel: TensorParallel) -> None:
        self._streamer, self._failures = streamer, parallel.failures

    def put(self, value: Tensor) -> None:
        self._failures.stop()
        self._streamer.put(value)

    def end(self) -> None:
        self._failures.stop()
        self._streamer.end()


class _GuessesElsewhere(Exception):
    """A call with guesses that transformers must do; the message says why. Nothing has been written or streamed."""


class _Loop:
    """What transformers calls in the place of its own loop. Of a call with guesses it gets one without them."""

    def __init__(self, streamer: Any, tokenizer: Any, keeps_cache: bool, guesses: Guesses | None = None) -> None:
        self._streamer, self._tokenizer, self._keeps_cache, self._guesses = streamer, tokenizer, keeps_cache, guesses

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
        mode = generation_config.get_generation_mode()
        if mode.value not in ("greedy_search", "sample"):
            raise ValueError(f"decoding_loop: writes greedily or samples, this call is {mode.value}: leave custom_generate out")
        reason = why_no_call(model, input_ids, logits_processor, generation_config, synced_gpus, model_kwargs)
        reason = reason or why_not_together(model, stopping_criteria)
        if (parallel := parallel_of(model)) is not None:
            reason = parallel.agreed(reason)
        own = model_kwargs.get("cache", model_kwargs.get("past_key_values"))
        runner, guesses, models = Runner.of(model), self._guesses, [model]
        if guesses is not None:
            reason = reason or why_no_guesses(model, guesses, input_ids, logits_processor, generation_config)
            models += [guesses.assistant] if guesses.assistant is not None else []
        if not reason:
            keeps = self._keeps_cache or generation_config.return_dict_in_generate
            cache: Any = own if keeps or own is None else type(own)()
            try:
                with turns("generate", models):
                    ids = runner.write(
                        model,
                        input_ids,
                        logits_processor,
                        stopping_criteria,
                        generation_config,
                        self._streamer,
                        cache,
                        keeps,
                        model_kwargs.get("attention_mask"),
                        guesses,
                    )
            except CannotStep as error:
                reason = str(error)
            else:
                return _output(generation_config, ids, cache)
        runner.drop_stale(model)
        if guesses is not None:
            raise _GuessesElsewhere(reason)
        _warn(reason)
        keywords = {"synced_gpus": synced_gpus, "streamer": self._streamer, **model_kwargs}
        return model._sample(input_ids, logits_processor, stopping_criteria, generation_config, **keywords)


def _output(generation_config: Any, ids: Tensor, cache: Any) -> Any:
    if not generation_config.return_dict_in_generate:
        return ids
    from transformers.generation.utils import GenerateDecoderOnlyOutput

    name = "cache" if "cache" in GenerateDecoderOnlyOutput.__dataclass_fields__ else "past_key_values"
    return GenerateDecoderOnlyOutput(**{"sequences": ids, name: cache})
