"""One decoding step of a model at fixed addresses: tokens in, logits out, its small operations fused, all in a CUDA graph.

The step is made of a twin of the model: modules of their own that share the model's parameters, so that the model itself, which
other threads may be using, is not touched. In the twin, projections of one input are one matrix, attention is `attend` over a
static cache, and a decoder layer is compiled once and serves all layers.
"""

from __future__ import annotations

import copy
import inspect
import math
import time
import types
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import Attention
from ..crossover import most_tokens
from .attention import NAME, LayerCache, register_attention
from .capture import captured
from .dispatch import TorchWeight, dispatched, few_tokens, is_taken
from .eligibility import attention_of
from .linears import CompressedLinear, DecodingLinear, LinearShard, known_sharding, whole_of
from .matrices import groups_of
from .mlp import SparseMLP
from .parallel import Sharding, TensorParallel, forward_is_parallel, hold_parts, local_of, parallel_of, stay_split
from .peers import PeerParallel

_PROMPT, _CHECKED = 48, 3  # tokens behind which a step is compared with the model, and on which
_REFUSALS = (RuntimeError, NotImplementedError, AssertionError, TypeError, ValueError, AttributeError, LookupError, OSError)
_AROUND = ("norm", "rotary_emb")  # what a decoder does beside its layers, as transformers names it
_RECOMPILATIONS = 64  # of a layer: layers may differ in kind
_NOISES = 8  # times the model's own noise that a step's logits may lie away from it, or this share of their norm
_FARTHEST = {torch.bfloat16: 0.03, torch.float16: 0.005, torch.float32: 1e-4}


class CannotStep(Exception):
    """A model, or its state, that a step cannot be made of; the message says why."""


class Step:
    """A model's decoding step for sequences of up to `capacity` tokens.

    It feeds one token of each of `sequences`, or, on the cache of another step, several `tokens` of its sequence in a row.

    Attributes
    ----------
    token : torch.Tensor, (sequences, tokens) int64
        The tokens to be fed.
    position : torch.Tensor, (sequences,) int64
        Where each sequence's first one is. Each `run` of one token moves it on by one; whoever feeds several does so himself.
    logits : torch.Tensor, (sequences * tokens, vocabulary)
        What `run` leaves, in the model's dtype.
    seconds : float
        What making it took.
    is_compiled : bool
        Whether torch.compile has fused the small operations.
    """

    def __init__(self, model: Any, capacity: int, sequences: int = 1, *, tokens: int = 1, cache_of: Step | None = None) -> None:
        start = time.perf_counter()
        config = model.config.get_text_config(decoder=True)
        weight = model.get_input_embeddings().weight
        self.capacity, self.device, self.dtype = capacity, weight.device, weight.dtype
        self.positions: int | None = getattr(config, "max_position_embeddings", None)  # a table of them may have no more
        self.sequences, self.tokens = sequences, tokens
        self.parallel = parallel_of(model)
        attention = attention_of(model, config, self.dtype)._replace(sequences=sequences, tokens=tokens)
        register_attention()
        together = nullcontext() if self.parallel is None else self.parallel.together()
        with torch.inference_mode(False), torch.no_grad(), together:  # tensors that can be written to in any mode
            if cache_of is None:
                self._allocate(attention, config.num_hidden_layers)
            else:
                self._share(cache_of)
            self._attach(attention)
            self._twin = _twin(model, self._summing(max(config.hidden_size, config.vocab_size)))
        self.is_compiled = False
        self._cache = _StepCache()
        self._names = cache_name(model), "logits_to_keep" in inspect.signature(model.forward).parameters
        self._graph: Any = None
        if self.parallel is not None:
            self.parallel.failures.frees(self)
        try:
            with nullcontext() if self.parallel is None else self.parallel.together(adds=True), _counts_kept(model):
                self._made(model)
        except RuntimeError as error:
            if str(getattr(error, "told", "")).startswith(f"{CannotStep.__name__}: "):  # so no process has a step
                raise CannotStep(str(error)) from None
            raise
        self.seconds = time.perf_counter() - start

    def _made(self, model: Any) -> None:
        """Compiled, captured and tried."""
        try:
            self._prepare()
            self._check(model)
        except torch.OutOfMemoryError:
            raise
        except _REFUSALS as error:
            raise CannotStep(f"its step cannot be made ({type(error).__name__}: {_first_line(error)})") from error

    def _allocate(self, attention: Attention, layers: int) -> None:
        shape: tuple[int, ...] = attention.kv_heads, self.capacity, attention.head_dim
        if self.sequences > 1:
            shape = self.sequences, *shape
        nbytes = 2 * layers * math.prod(shape) * self.dtype.itemsize
        try:
            self.keys = [torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(layers)]
            self.values = [torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(layers)]
        except RuntimeError as error:
            self.__dict__.pop("keys", None)
            if self.device.type == "cuda" and not isinstance(error, torch.OutOfMemoryError):
                raise
            raise MemoryError(  # torch has no error of its own for host memory
                f"generate: a cache of {self._size} tokens needs {nbytes / 2**30:.2f} GiB, which {self.device} has not "
                f"free: ask for fewer tokens ({error})"
            ) from error
        self.nbytes = nbytes
        self.position = torch.zeros(self.sequences, dtype=torch.int64, device=self.device)

    def _share(self, other: Step) -> None:
        self.keys, self.values, self.nbytes, self.position = other.keys, other.values, other.nbytes, other.position

    def _summing(self, most: int) -> TensorParallel | None:
        """Who adds the parts, of `most` numbers a token: the GPUs by themselves, where they see each other's memory."""
        if self.parallel is None or self.device.type != "cuda":
            return self.parallel
        try:
            return PeerParallel(self.parallel, self.device, self.sequences * self.tokens * most)
        except OSError:
            return self.parallel

    @property
    def _size(self) -> str:
        return f"{self.sequences} times {self.capacity}" if self.sequences > 1 else str(self.capacity)

    def _attach(self, attention: Attention) -> None:
        """What feeds the tokens and lets layers find the cache."""
        self.position.zero_()
        self.token = torch.zeros(self.sequences, self.tokens, dtype=torch.int64, device=self.device)
        self.logits = torch.zeros(0, device=self.device)
        self._offsets = torch.arange(self.tokens, device=self.device)
        scratch = torch.zeros(attention.scratch_words, dtype=torch.int32, device=self.device)
        caches = zip(self.keys, self.values, strict=True)
        if self.tokens > 1 and self.sequences == 1:
            caches = zip([k[None] for k in self.keys], [v[None] for v in self.values], strict=True)
        self._layers = [LayerCache(k, v, self.position, scratch, self.tokens) for k, v in caches]

    def _prepare(self) -> None:
        """Compile and capture; where torch.compile fails, capture what there is."""
        decoder = self._twin.get_decoder()
        _let_layers_run(decoder.layers, self._layers, self._cache, _forward_of)
        with torch.inference_mode():
            logits = self._outputs()  # shows what cannot be done, whoever runs it
        with torch.inference_mode(False):
            self.logits = torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device)
        if self.device.type != "cuda":
            return
        others = [m for name in _AROUND if isinstance(m := getattr(decoder, name, None), nn.Module)]
        try:
            _let_layers_run(decoder.layers, self._layers, self._cache, _compiled(_forward_of))
            for module in others:
                module.__dict__["forward"] = partial(_with_keywords, _compiled(_forward_of), weakref.ref(module))
            with _recompiling():
                self._capture()
            self.is_compiled = True
        except torch.OutOfMemoryError:
            raise
        except _REFUSALS as error:
            warnings.warn(
                f"generate: torch.compile failed ({type(error).__name__}: {_first_line(error)}), so small operations stay "
                "apart and a token takes longer",
                stacklevel=2,
            )
            self._capture_as_it_is(others)
        if self.parallel is not None and self.parallel.any(not self.is_compiled):  # compiled code may add in another order
            self.is_compiled = False
            self._capture_as_it_is(others)

    def _capture_as_it_is(self, others: Sequence[nn.Module]) -> None:
        _let_layers_run(self._twin.get_decoder().layers, self._layers, self._cache, _forward_of)
        for module in others:
            module.__dict__.pop("forward", None)
        self._capture()

    @torch.inference_mode()
    def _capture(self) -> None:
        def twice() -> None:  # compiles, and lets libraries allocate what they keep
            self._once()
            self._once()

        self._graph = captured(self._once, self.device, twice)

    def _once(self) -> None:
        self.logits.copy_(self._outputs())
        if self.tokens == 1:
            self.position.add_(1)

    def _outputs(self) -> Tensor:
        """The logits of `token` at `position`."""
        cache, keeps = self._names
        keywords = {cache: self._cache, "logits_to_keep": self.tokens} if keeps else {cache: self._cache}
        position_ids = self.position[:, None]
        if self.tokens > 1:
            position_ids = position_ids + self._offsets
        outputs = self._twin(input_ids=self.token, position_ids=position_ids, use_cache=True, return_dict=True, **keywords)
        return _last(outputs.logits, self.tokens)

    @torch.inference_mode()
    def run(self) -> None:
        """Feed `token` at `position`: stores keys and values, and leaves `logits`."""
        if self._graph is None:
            self._once()
        else:
            self._graph.replay()

    def let_go(self) -> None:
        """Free the graph, once the processes that it adds the parts of have given each other up."""
        self._graph = None

    @torch.inference_mode()
    def take(self, cache: Any, length: int, padding: Sequence[int] = ()) -> None:
        """Start from a `DynamicCache` of `length` tokens, of which so many are padding on the left of each sequence.

        Padding is left out: here every sequence begins at position 0.
        """
        padding = padding or [0] * self.sequences
        for layer, keys, values in zip(cache.layers, self.keys, self.values, strict=True):
            kept = layer.keys.shape[-2]  # fewer than `length` in a layer with a window
            for s, (own_keys, own_values) in enumerate(zip(self._of_each(keys), self._of_each(values), strict=True)):
                stop = length - padding[s]
                start = max(0, stop - kept)
                own_keys[:, start:stop] = layer.keys[s, :, kept - (stop - start) :]
                own_values[:, start:stop] = layer.values[s, :, kept - (stop - start) :]
        for s, pad in enumerate(padding):
            self.position[s : s + 1].fill_(length - pad)

    def _of_each(self, cache: Tensor) -> Sequence[Tensor]:
        """A layer's keys or values of each sequence."""
        return (cache,) if cache.dim() == 3 else cache.unbind()

    @torch.inference_mode()
    def give(self, cache: Any, start: int, stop: int, padding: Sequence[int] = ()) -> None:
        """Append the tokens at positions `start` to `stop` to a `DynamicCache`; positions count padding on the left."""
        padding = padding or [0] * self.sequences
        if start < stop:
            for i, both in enumerate(zip(self.keys, self.values, strict=True)):
                keys, values = (
                    torch.stack([own[:, start - p : stop - p] for own, p in zip(self._of_each(t), padding, strict=True)])
                    for t in both
                )
                cache.update(keys, values, i)

    @torch.inference_mode()
    def _check(self, model: Any) -> None:
        """CannotStep if the logits of some tokens are not the model's own.

        Attention that goes its own way, or a layer that does something at its first call only, would show here. How far logits
        may differ says the model itself, which rounds otherwise when it takes a text at once.
        """
        from transformers import DynamicCache

        times = _CHECKED if self.tokens == 1 else 1
        checked = times * self.tokens
        # A table of positions may have no more: beyond its end a GPU's context is lost.
        room = self.capacity if self.positions is None else min(self.capacity, self.positions)
        length = min(_PROMPT, room - checked)
        if length < 1:
            raise CannotStep(f"it has {room} positions, too few to try a step on")
        generator = torch.Generator().manual_seed(0)
        vocabulary = self.logits.shape[-1]
        size = self.sequences, length + checked
        text = torch.randint(vocabulary, size, generator=generator, device="cpu").to(self.device)
        cache = DynamicCache()
        forward(model, text[:, :length], cache)
        self.take(cache, length)
        farthest, noise, norm = 0.0, 0.0, 0.0
        for i in range(length, length + checked, self.tokens):
            new, stop = text[:, i : i + self.tokens], i + self.tokens
            self.token.copy_(new)
            self.run()
            own, at_once = forward(model, new, cache, self.tokens), forward(model, text[:, :stop], DynamicCache(), self.tokens)
            own, at_once, found = (_centred(logits) for logits in (own, at_once, self.logits))
            farthest = max(farthest, (found - own).norm().item())
            noise, norm = max(noise, (at_once - own).norm().item()), max(norm, own.norm().item())
        if not farthest <= max(_NOISES * noise, _FARTHEST[self.dtype] * norm):
            share = farthest / norm if norm else float("inf")
            raise CannotStep(f"its step computes something else than the model: logits differ by {share:.2g} of their norm")


def _centred(logits: Tensor) -> Tensor:
    """As a softmax sees them."""
    wide = logits.double()
    return wide - wide.mean(-1, keepdim=True)


@contextmanager
def _counts_kept(model: nn.Module) -> Iterator[None]:
    """Have a `SparsityMeter` not count what is run meanwhile."""
    counts = [c for m in model.modules() if isinstance(c := getattr(m, "counts", None), Tensor)]
    before = [c.clone() for c in counts]
    try:
        yield
    finally:
        for count, was in zip(counts, before, strict=True):
            count.copy_(was)


class _StepCache:
    """What the model takes for its cache; its layers get a `LayerCache` each."""

    is_compileable = True
    is_sliding = (False,)

    def get_seq_length(self, *_: Any) -> int:
        return 0


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")


def cache_name(model: Any) -> str:
    """How this version of transformers calls the cache."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def forward(model: Any, input_ids: Tensor, cache: Any, tokens: int = 1, **inputs: Any) -> Tensor:
    """The logits behind each of the last `tokens` of these, (sequences * tokens, vocabulary); `cache` takes them all in."""
    keywords = {cache_name(model): cache, "use_cache": True, "return_dict": True, **inputs}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        keywords["logits_to_keep"] = tokens
    return _last(model(input_ids=input_ids, **keywords).logits, tokens)


def _last(logits: Tensor, tokens: int) -> Tensor:
    """Of each sequence's last tokens, one row each."""
    return logits[:, -1] if tokens == 1 else logits[:, -tokens:].flatten(0, 1)


def _twin(model: Any, parallel: TensorParallel | None = None) -> Any:
    """Modules of their own on the same parameters, whose attention is `attend` and whose projections are together.

    Where a model is split over processes, those that the operators serve have this one's part of their parameters, and leave
    the sums of all parts to `parallel`.
    """
    configs: dict[int, Any] = {}
    modules: dict[int, nn.Module] = {}
    twin: Any = _copied(model, modules, configs)
    for module in list(twin.modules()):
        if not isinstance(module, SparseMLP):
            for name, child in module._modules.items():
                if type(child) is nn.Linear and (sharding := known_sharding(child)) is not None:
                    module._modules[name] = LinearShard(child, sharding)
                    child.__dict__.pop("forward", None)  # which keeps the copy, and so the model's weights, until a collection
    for module in twin.modules():
        if parallel is not None:
            if isinstance(module, SparseMLP) and module.parallel is not None and module.parallel.is_of(parallel.group):
                module.parallel = parallel
            elif isinstance(sharding := module.__dict__.get("_sharding"), Sharding) and sharding.parallel.is_of(parallel.group):
                module.__dict__["_sharding"] = sharding._replace(parallel=parallel)
        if isinstance(module, DecodingLinear):
            hold_parts(module)
        elif isinstance(module, SparseMLP) and module.parallel is not None:
            module._is_own_shard = True
            for name in module.family.projections:
                hold_parts(getattr(module, name))
    for holder, group in groups_of(twin):
        if len(group) > 1:
            module = twin.get_submodule(holder)
            linears = [getattr(module, leaf) for leaf in group]
            whole = whole_of(linears)
            if whole is not None:
                for leaf, part in zip(group, _parts(whole, linears), strict=True):
                    setattr(module, leaf, part)
    for module in twin.modules():
        if isinstance(module, SparseMLP):
            module.show_one_escape()
        shared = module.shared.whole if isinstance(module, _Part) else module
        if isinstance(shared, CompressedLinear):
            shared.show_one_escape()
    return twin


def _copied(module: nn.Module, modules: dict[int, nn.Module], configs: dict[int, Any]) -> nn.Module:
    if id(module) in modules:
        return modules[id(module)]
    new = modules[id(module)] = copy.copy(module)
    if forward_is_parallel(module):
        stay_split(module, new)
    else:
        for own in ("forward", "_old_forward", "_hf_hook"):  # accelerate's, bound to `module`, which would then never go
            new.__dict__.pop(own, None)
        new._forward_hooks = OrderedDict()  # there are none but transformers', which would only keep torch.compile away
    new._parameters, new._buffers = dict(module._parameters), dict(module._buffers)
    new._modules = {name: None if m is None else _copied(m, modules, configs) for name, m in module._modules.items()}
    if "_layer" in new.__dict__:  # of a half of an FFN, whose layer was copied before
        new.__dict__["_layer"] = tuple(modules[id(m)] for m in module.__dict__["_layer"])
    config: Any = module.__dict__.get("config")
    if hasattr(config, "_attn_implementation"):
        if id(config) not in configs:
            configs[id(config)] = copy.deepcopy(config)
            configs[id(config)]._attn_implementation = NAME
        new.config = configs[id(config)]
    return new


class _Shared:
    """What the projections of one input have computed together, for the one that asks first and the others."""

    def __init__(self, whole: TorchWeight, batch_invariant: bool) -> None:
        self.whole, self.batch_invariant = whole, batch_invariant
        self.x: Tensor | None = None
        self.result: Tensor | None = None
        self.asked = 0


class _Part(nn.Module):
    """One of them."""

    def __init__(self, shared: _Shared, start: int, stop: int, of: int) -> None:
        super().__init__()
        self.shared, self.start, self.stop, self.of = shared, start, stop, of

    def forward(self, x: Tensor) -> Tensor:
        shared = self.shared
        if shared.x is not x:
            shared.x, shared.asked, shared.result = x, 0, _times(x, shared.whole, shared.batch_invariant)
        result = shared.result
        assert result is not None
        shared.asked += 1
        if shared.asked == self.of:
            shared.x = shared.result = None
        return result[..., self.start : self.stop].view(*x.shape[:-1], -1)


def _times(x: Tensor, whole: TorchWeight, batch_invariant: bool) -> Tensor:
    """``x @ whole.T`` of each token, a row each if they are several: by `ffn_1`, or by the dense path where that is faster."""
    plain = isinstance(whole, Tensor)
    tokens = few_tokens(x, most_tokens("ffn_1", "plain" if plain else "bf12")) if x.numel() > x.shape[-1] else x.flatten()
    if tokens is None:
        return nn.functional.linear(x.flatten(0, -2), whole if isinstance(whole, Tensor) else whole.weight)
    if not is_taken(tokens, whole):
        raise NotImplementedError(f"ffn_1 does not take tokens of {tuple(x.shape)} in {x.dtype}")
    more = {} if batch_invariant else {"batch_invariant": False}
    return dispatched("ffn_1", tokens, (whole,), **more)


def _parts(whole: Tensor | CompressedLinear, linears: Sequence[Any]) -> Iterator[_Part]:
    invariant = any(getattr(linear, "batch_invariant", True) for linear in linears)
    shared, start = _Shared(whole, invariant), 0
    for linear in linears:
        rows = len(local_of(linear.weight)) if isinstance(linear, nn.Linear) else linear.out_features
        yield _Part(shared, start, start + rows, len(linears))
        start += rows


def _let_layers_run(layers: Any, caches: Sequence[LayerCache], step_cache: _StepCache, run: Callable[..., Any]) -> None:
    """Have each decoder layer of a twin called through `run`, with its own cache.

    By weak references: a step's memory is free when nobody has the step any more, not when garbage is next collected.
    """
    for layer, own in zip(layers, caches, strict=True):
        layer.__dict__["forward"] = partial(_with_own_cache, run, weakref.ref(layer), step_cache, own)


def _with_own_cache(
    run: Callable[..., Any], layer: Any, step_cache: _StepCache, own: LayerCache, /, *arguments: Any, **keywords: Any
) -> Any:
    given = {name: own if value is step_cache else value for name, value in keywords.items()}
    return run(layer(), arguments, {**given, "prosparse_cache": own})


def _with_keywords(run: Callable[..., Any], module: Any, /, *arguments: Any, **keywords: Any) -> Any:
    return run(module(), arguments, keywords)


def _forward_of(module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    return type(module).forward(module, *arguments, **keywords)


def _compiled(function: Any) -> Callable[..., Any]:
    """By inductor, its kernels launched programmatically as ours are, where this torch can.

    A copy of the function is compiled, since torch keeps and counts what it compiled by the code.
    """
    import torch._inductor.config

    own = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    options: Any = {"triton.enable_pdl": True} if hasattr(torch._inductor.config.triton, "enable_pdl") else None
    compiled: Callable[..., Any] = torch.compile(own, fullgraph=True, dynamic=False, options=options)
    return compiled


@contextmanager
def _recompiling() -> Iterator[None]:
    """Let one function be compiled for every kind of layer."""
    import torch._dynamo.config

    known = hasattr(torch._dynamo.config, "recompile_limit")
    with torch._dynamo.config.patch(recompile_limit=_RECOMPILATIONS) if known else nullcontext():
        yield
