"""What `generate` can do: of a call, and of a model; and the state of a model that its decoding step depends on."""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import MOST_TOKENS
from ..attention import Attention
from .dispatch import DTYPES, forward_is_torchs, has_own_forward
from .parallel import Split, forward_is_parallel, local_of, parallel_of

_PURE = {
    "EpsilonLogitsWarper",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
    "MinPLogitsWarper",
    "SuppressTokensLogitsProcessor",
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "TypicalLogitsWarper",
}
"""Processors of transformers that look at the scores alone, and wait for nothing."""
LENGTHS = {"MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor"}
"""Those that look at the number of tokens too."""
_SAME_EVERYWHERE = {"EosTokenCriteria", "MaxLengthCriteria", "StopStringCriteria"}
"""Criteria of transformers that look at the tokens alone."""
_KNOWN_INPUTS = {"attention_mask", "position_ids", "use_cache", "logits_to_keep", "cache", "past_key_values", "cache_position"}
_OUTPUTS = ("output_attentions", "output_hidden_states", "output_scores", "output_logits")
_MODES = {  # what makes transformers run another loop, or more than a loop, and its value where it does not
    "num_beams": 1,
    "num_beam_groups": 1,
    "penalty_alpha": None,
    "dola_layers": None,
    "constraints": None,
    "force_words_ids": None,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "use_mtp": None,
    "token_healing": False,
    "assistant_model": None,
    "custom_generate": None,
}
_LAYER_TYPES = {"full_attention", "sliding_attention"}
_ROPES = ("dynamic", "longrope")  # whose frequencies follow the length, on the host
_OF_TORCH = set(nn.Module().__dict__) - {"training"}
_CAPTURING = "transformers.utils.output_capturing"
_NOT_ASKED = _OF_TORCH | {  # what modules keep of calls; configs are looked at once
    *("_packed", "_bound", "_halves", "config", "_output_capturing_hooks_installed"),
}
_ATOMS = frozenset({bool, int, float, str, type(None), torch.dtype, torch.device})


def why_another_mode(model: Any, options: dict[str, Any]) -> str:
    """Why transformers must run a whole call with these options itself, or nothing.

    An option may come by itself, in a config of the call, or in the model's; whichever counts is transformers' to say.
    """
    for name, off in _MODES.items():
        for source in (options, options.get("generation_config"), model.generation_config):
            value = source.get(name) if isinstance(source, dict) else getattr(source, name, None)
            if value is not None and value != off and value is not False:
                return f"{name}={value!r:.60}"
    if getattr(model.generation_config, "stop_strings", None):
        return "stop_strings in the model's generation config"
    return ""


def why_no_call(model: Any, input_ids: Tensor, processors: Any, config: Any, synced_gpus: bool, inputs: dict[str, Any]) -> str:
    """Why transformers' own loop must do a call that it has prepared, or nothing."""
    if not 1 <= input_ids.shape[0] <= MOST_TOKENS:
        return f"{input_ids.shape[0]} sequences at once, of at most {MOST_TOKENS}"
    if input_ids.shape[1] == 0:
        return "an empty prompt"
    for name in _OUTPUTS:
        if config.return_dict_in_generate and getattr(config, name, None):
            return name
    if synced_gpus or not config.use_cache:
        return "synced_gpus" if synced_gpus else "use_cache=False"
    return _why_not_these_inputs(input_ids, config, inputs) or _why_not_these_processors(processors, input_ids.shape[1])


def why_not_together(model: Any, criteria: Any) -> str:
    """Why processes that hold parts of a model might not end a call at the same token, or nothing."""
    if parallel_of(model) is None:
        return ""
    other = next((type(c).__name__ for c in criteria if type(c).__name__ not in _SAME_EVERYWHERE), None)
    return "" if other is None else f"a {other}, which each process of the model's group may answer otherwise"


def _why_not_these_inputs(input_ids: Tensor, config: Any, inputs: dict[str, Any]) -> str:
    from transformers import DynamicCache

    length = input_ids.shape[1]
    if other := sorted(name for name, value in inputs.items() if value is not None and name not in _KNOWN_INPUTS):
        return f"inputs beside the tokens: {', '.join(other)}"
    mask = inputs.get("attention_mask")
    if mask is not None and padding_of(mask, input_ids) is None:
        return "an attention mask that hides tokens, other than padding on the left"
    for name in ("position_ids", "cache_position"):
        given = inputs.get(name)
        if given is not None and not _are_positions(given, mask, length):
            return f"{name} other than those of the tokens"
    if getattr(config, "_mask_length", length) not in (-1, length):
        return "a prompt without the tokens of its cache"
    cache = inputs.get("cache", inputs.get("past_key_values"))
    if type(cache) is not DynamicCache or cache.get_seq_length() >= length:
        return f"a {type(cache).__name__} as the cache, not a DynamicCache shorter than the prompt"
    return ""


def padding_of(mask: Tensor | None, input_ids: Tensor) -> list[int] | None:
    """How many tokens on the left of each sequence a mask hides, or None if it hides others, or is of other tokens."""
    if mask is None:
        return [0] * len(input_ids)
    if mask.shape != input_ids.shape:
        return None
    shown = mask == 1
    hidden = input_ids.shape[1] - shown.sum(1)
    places = torch.arange(input_ids.shape[1], device=mask.device)
    if not bool((shown == (places >= hidden[:, None])).all()) or not bool(((mask == 0) | shown).all()):
        return None
    found: list[int] = hidden.tolist()
    return found if max(found) < input_ids.shape[1] else None


def positions_of(mask: Tensor) -> Tensor:
    """Each token's position among those that a mask shows, as transformers counts them: that of padding is 0."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def _are_positions(given: Tensor, mask: Tensor | None, length: int) -> bool:
    """Whether positions are those of the last tokens of sequences."""
    if mask is None or bool((mask == 1).all()):
        rows: Any = given.flatten(0, -2) if given.dim() > 1 else given[None]
        return all(row == list(range(length - given.shape[-1], length)) for row in rows.tolist())
    return given.dim() == 2 and bool((given == positions_of(mask)[:, length - given.shape[-1] :]).all())


def _why_not_these_processors(processors: Any, length: int) -> str:
    for processor in processors:
        name = type(processor).__name__
        own = type(processor).__module__.startswith("transformers.")
        if own and name == "RepetitionPenaltyLogitsProcessor" and _counts_the_last(processor, length):
            continue
        if not own or (name not in _PURE and name not in LENGTHS):
            return f"a {name}"
    return ""


def _counts_the_last(processor: Any, length: int) -> bool:
    """Whether a penalty for repetitions counts the prompts' last token, and ignores nothing but padding before it."""
    ignored = getattr(processor, "prompt_ignore_length", None)
    return ignored is None or (isinstance(ignored, Tensor) and bool((ignored < length).all()))


def why_no_step(model: Any) -> str:
    """Why a step cannot be made of a model as it is, or nothing. What it computes is looked at when it is made."""
    try:
        config = model.config.get_text_config(decoder=True)
        decoder, weight = model.get_decoder(), model.get_input_embeddings().weight
        layers = decoder.layers
    except (AttributeError, NotImplementedError) as error:
        return f"a {type(model).__name__} is no decoder with layers that transformers knows ({error})"
    if model.config.is_encoder_decoder or not isinstance(layers, nn.ModuleList):
        return f"a {type(model).__name__} is no decoder with a list of layers"
    if model.training:
        return "the model is in training mode: call model.eval()"
    if torch.is_autocast_enabled(weight.device.type):
        return "autocast"
    if not forward_is_torchs():
        return "torch.nn.Linear has another forward, or all modules have hooks"
    if not _prepares_as_ever(model):
        return f"a {type(model).__name__} prepares its inputs in a way of its own"
    if any(rope in repr(getattr(config, name, "")) for rope in _ROPES for name in ("rope_parameters", "rope_scaling")):
        return "its rotary embedding changes with the length of the text"
    devices = {str(p.device) for p in model.parameters()}
    if len(devices) > 1:
        return f"its parameters are on several devices: {', '.join(sorted(devices))}"
    if weight.dtype not in DTYPES:
        return f"its dtype is {weight.dtype}"
    if misfit := attention_of(model, config, weight.dtype).misfit:
        return misfit
    if len(layers) != config.num_hidden_layers:
        return f"it has {len(layers)} layers, its config says {config.num_hidden_layers}"
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - _LAYER_TYPES or getattr(config, "attention_chunk_size", None):
        return f"its layers are of kinds {', '.join(sorted(kinds)) or 'with chunks'}"
    if _has_windows(config) and not all(_knows_windows(layer) for layer in layers):
        return "its attention has a window that it does not say"
    for name, module in model.named_modules():
        if _is_hooked(module):
            return f"{name or 'the model'} has hooks, or a forward of its own, which a graph would not call"
    return ""


def attention_of(model: Any, config: Any, dtype: torch.dtype) -> Attention:
    """The attention of a model's layers: of one that is split over processes, this one's heads."""
    found = attention_of_config(config, dtype)
    parallel = parallel_of(model)
    if parallel is None:
        return found
    keys = [module for name, module in model.named_modules() if name.endswith(".k_proj")]
    rows = {len(local_of(m.weight)) if isinstance(m, nn.Linear) else m.out_features for m in keys}
    if rows != {found.kv_heads // parallel.size * found.head_dim}:
        return found  # every process has all heads, or they are split in another way, which the step's check would see
    return found._replace(heads=found.heads // parallel.size, kv_heads=found.kv_heads // parallel.size)


def attention_of_config(config: Any, dtype: torch.dtype) -> Attention:
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Attention(str(dtype).removeprefix("torch."), heads, kv_heads, head_dim)


def _has_windows(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return "sliding_attention" in kinds
    return bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True)


def _knows_windows(layer: Any) -> bool:
    """Whether a layer's attention hands its window to the function that computes it."""
    attention = getattr(layer, "self_attn", None)
    try:
        return attention is not None and "sliding_window=" in inspect.getsource(type(attention).forward)
    except (OSError, TypeError):
        return False


def _prepares_as_ever(model: Any) -> bool:
    """Whether a model's inputs are those that transformers prepares for any model."""
    from transformers import GenerationMixin

    names = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
    mixin: Any = GenerationMixin
    return all(getattr(type(model), n) is getattr(mixin, n) and n not in model.__dict__ for n in names)


def _is_hooked(module: nn.Module) -> bool:
    """Whether a step would leave out what calling a module does beside its class's `forward`.

    Where hidden states or attentions have once been asked for, transformers leaves hooks on a model that do nothing until they
    are asked for again, which its own loop does.
    """
    if module._backward_hooks:
        return True
    if forward_is_parallel(module):
        return False
    others = any(getattr(hook, "__module__", None) != _CAPTURING for hook in module._forward_hooks.values())
    return others or bool(module._forward_pre_hooks) or has_own_forward(module)


def state_of(model: nn.Module) -> tuple[Any, ...]:
    """What a step depends on: where tensors lie, and what modules are and are set to. Another state needs another step.

    Every call asks for it, of hundreds of modules. So it is flat: numbers and names cost Python's garbage collector nothing.
    """
    settings = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32, forward_is_torchs()
    found: list[Any] = [*settings, torch.are_deterministic_algorithms_enabled(), repr(vars(getattr(model, "config", model)))]
    for module in model.modules():
        own, kind = module.__dict__, type(module)
        found += kind, kind.forward, _is_hooked(module)
        found += own["_modules"]
        for tensors in (own["_parameters"], own["_buffers"]):
            found.append(len(tensors))
            for name, tensor in tensors.items():
                found.append(name)
                _add(found, tensor)
        for name, value in own.items():
            if name not in _NOT_ASKED:
                if type(value) in _ATOMS:
                    found += name, value
                elif type(value) is not Split:  # which `unpatch_model` needs, and no step
                    found.append(name)
                    _add(found, value)
    return tuple(found)


def _add(found: list[Any], value: Any, depth: int = 3) -> None:
    """Add what is equal to that of another time if nothing about a value has changed."""
    if type(value) in _ATOMS:
        found.append(value)
    elif isinstance(value, Tensor):
        value = local_of(value)
        found += value.data_ptr(), value.dtype, value.dim(), *value.shape, *value.stride()
    elif isinstance(value, nn.Module):
        found += "module", id(value)
    elif depth and isinstance(value, dict):
        found += "dict", len(value)
        for key, of_key in value.items():
            found.append(str(key))
            _add(found, of_key, depth - 1)
    elif depth and isinstance(value, (list, tuple, set, frozenset)):
        found += type(value).__name__, len(value)
        for one in value:
            _add(found, one, depth - 1)
    else:
        try:
            found.append(_Same(weakref.ref(value)))
        except TypeError:
            found.append(repr(value))


class _Same:
    """An object that is equal to itself alone, and to nothing once it is gone."""

    __slots__ = ("_reference",)

    def __init__(self, reference: weakref.ref[Any]) -> None:
        self._reference = reference

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._reference() is not None and self._reference() is other._reference()

    __hash__ = object.__hash__
