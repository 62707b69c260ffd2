"""Mutants of the package: what lies behind a launch, and what is checked before it."""

from __future__ import annotations

from . import Mutant

_TIME = "costs time and changes no result"

MUTANTS = [
    # ops.py
    Mutant(
        "prosparse_cupy/ops.py",
        "*call.inputs, call.output, *threshold, checked.d_ff, checked.d_model",
        "*call.inputs, call.output, *threshold, checked.d_model, checked.d_ff",
    ),
    Mutant("prosparse_cupy/ops.py", "*call.inputs, call.output, *threshold", "*reversed(call.inputs), call.output, *threshold"),
    Mutant(
        "prosparse_cupy/ops.py",
        '_launch("ffn_23", call, specialize, threshold, activation=activation)',
        '_launch("ffn_23", call, specialize, 0.0, activation=activation)',
    ),
    Mutant(
        "prosparse_cupy/ops.py",
        '_launch("ffn_12", call, specialize, threshold, activation=activation)',
        '_launch("ffn_12", call, specialize, threshold)',
    ),
    Mutant(
        "prosparse_cupy/ops.py",
        '_launch("ffn_123", call, specialize, threshold, activation=activation)',
        '_launch("ffn_123", call, specialize, threshold)',
    ),
    Mutant(
        "prosparse_cupy/ops.py",
        '_launch("ffn_4", call, specialize, norm_eps=norm_eps, ',
        '_launch("ffn_4", call, specialize, ',
    ),
    Mutant("prosparse_cupy/ops.py", "call.family.stream(checked.device), kernel_of", "0, kernel_of"),
    Mutant("prosparse_cupy/ops.py", "launched.plan.programmatic and overlaps(stream)", "True"),
    Mutant(
        "prosparse_cupy/ops.py",
        "kernel_of(kernel, checked, specialize, activation, batch_invariant)\n",
        "kernel_of(kernel, checked, True, activation, batch_invariant)\n",
        "the bits are the same; whoever asks for it wants fewer kernels",
    ),
    Mutant("prosparse_cupy/ops.py", "[extras.get(p, 0) for p in KERNELS[kernel].optional]", "[*extras.values()]"),
    Mutant("prosparse_cupy/ops.py", "return (*addresses, norm_eps) if", "return (*addresses, 0.0) if"),
    Mutant(
        "prosparse_cupy/ops.py",
        'extra("gate_bias", "d_ff", "gate_bias"), extra("up_bias", "d_ff", "up_bias")',
        'extra("gate_bias", "d_ff", "up_bias"), extra("up_bias", "d_ff", "gate_bias")',
    ),
    # ffn.py
    Mutant("prosparse_cupy/ffn.py", "x1, threshold, d_ff, d_model, *of_first", "x1, 0.0, d_ff, d_model, *of_first"),
    Mutant("prosparse_cupy/ffn.py", "x1, threshold, d_ff, d_model, *of_first", "x1, threshold, d_model, d_ff, *of_first"),
    Mutant(
        "prosparse_cupy/ffn.py",
        "*inputs[first_of_down:], call.output, d_ff, d_model, *of_second",
        "*inputs[first_of_down:], call.output, d_model, d_ff, *of_second",
    ),
    Mutant("prosparse_cupy/ffn.py", "second.launch(stream, overlaps, x1,", "second.launch(0, overlaps, x1,"),
    Mutant("prosparse_cupy/ffn.py", "first.launch(stream, overlaps, *inputs", "first.launch(0, overlaps, *inputs"),
    Mutant(
        "prosparse_cupy/ffn.py",
        "take(stream, device, checked.scratch_bytes, captured)",
        "take(0, device, checked.scratch_bytes, captured)",
    ),
    Mutant(
        "prosparse_cupy/ffn.py",
        "take(stream, device, checked.scratch_bytes, captured)",
        "take(stream, 0, checked.scratch_bytes, captured)",
    ),
    Mutant(
        "prosparse_cupy/ffn.py", "take(stream, device, checked.scratch_bytes, captured)", "take(stream, device, 4096, captured)"
    ),
    Mutant(
        "prosparse_cupy/ffn.py",
        "take(stream, device, checked.scratch_bytes, captured)",
        "take(stream, device, checked.scratch_bytes, False)",
    ),
    Mutant("prosparse_cupy/ffn.py", "    finally:\n        home.append(x1)", "    finally:\n        pass"),
    Mutant(
        "prosparse_cupy/ffn.py",
        'trailing_arguments(half, given, norm_eps), trailing_arguments("ffn_4", given, norm_eps)',
        'trailing_arguments(half, given, norm_eps), trailing_arguments("ffn_4", {}, norm_eps)',
    ),
    Mutant(
        "prosparse_cupy/ffn.py",
        'trailing_arguments(half, given, norm_eps), trailing_arguments("ffn_4", given, norm_eps)',
        'trailing_arguments(half, {}, norm_eps), trailing_arguments("ffn_4", given, norm_eps)',
    ),
    Mutant("prosparse_cupy/ffn.py", 'half = "ffn_12" if arrays[1] is None else "ffn_123"', 'half = "ffn_123"'),
    Mutant(
        "prosparse_cupy/ffn.py",
        "first = kernel_of(half, checked, specialize, activation, in_ffn=True)",
        "first = kernel_of(half, checked, specialize, in_ffn=True)",
    ),
    Mutant(
        "prosparse_cupy/ffn.py",
        "first = kernel_of(half, checked, specialize, activation, in_ffn=True)",
        "first = kernel_of(half, checked, specialize, activation)",
    ),
    Mutant("prosparse_cupy/ffn.py", "activation, in_ffn=gate is None)", "activation)"),
    Mutant("prosparse_cupy/ffn.py", "if loaded is not before:", "if True:"),
    Mutant(
        "prosparse_cupy/ffn.py",
        "return _run(call, self._arrays(x), (token, *weights), self._how, self._extras)",
        "return _run(call, self._arrays(x), (*weights, token), self._how, self._extras)",
    ),
    Mutant("prosparse_cupy/ffn.py", "driver.overlaps(stream, captured)", "True"),
    # arguments.py
    Mutant(
        "prosparse_cupy/arguments.py",
        'size_class(number * dims["d_ff"] * ITEMSIZE[dtype])',
        'size_class(dims["d_ff"] * ITEMSIZE[dtype])',
    ),
    Mutant(
        "prosparse_cupy/arguments.py",
        'size_class(number * dims["d_ff"] * ITEMSIZE[dtype])',
        'size_class(number * dims["d_model"] * ITEMSIZE[dtype])',
    ),
    Mutant(
        "prosparse_cupy/arguments.py",
        'size_class(number * dims["d_ff"] * ITEMSIZE[dtype])',
        'size_class(number * dims["d_ff"] * 2)',
    ),
    Mutant(
        "prosparse_cupy/arguments.py",
        'facts = dims["d_model"], dims["d_ff"], dtype, metas[0].device',
        'facts = dims["d_model"], dims["d_ff"], dtype, 0',
    ),
    Mutant("prosparse_cupy/arguments.py", "if address < end and start < address + nbytes:", "if address == start:"),
    Mutant("prosparse_cupy/arguments.py", "if aligned and address % VECTOR_BYTES and checked.device != HOST:", "if False:"),
    Mutant("prosparse_cupy/arguments.py", "if meta.dtype != dtype:", "if False:"),
    Mutant("prosparse_cupy/arguments.py", "if meta.device != device:", "if False:"),
    Mutant("prosparse_cupy/arguments.py", "if tuple(shape[:-1]) != tokens:", "if False:"),
    Mutant(
        "prosparse_cupy/arguments.py",
        "if tokens and not 1 <= tokens[0] <= MOST_TOKENS:",
        "if tokens and not 0 <= tokens[0] <= MOST_TOKENS:",
    ),
    Mutant("prosparse_cupy/arguments.py", "if size > LARGEST_DIMS[dim]:", "if False:"),
    Mutant("prosparse_cupy/arguments.py", "if not meta.contiguous:", "if False:"),
    Mutant("prosparse_cupy/arguments.py", "if d_model % multiple:", "if d_model % 4:"),
    Mutant(
        "prosparse_cupy/arguments.py",
        "if 0 in addresses:\n        _refuse_without_memory(signature, family, views)\n    _check_addresses",
        "_check_addresses",
    ),
    Mutant("prosparse_cupy/arguments.py", "    _check_addresses(signature, checked, tuple(addresses))\n", ""),
    Mutant(
        "prosparse_cupy/arguments.py",
        "self.inputs = [address for i, address in enumerate(inputs) if i not in places]",
        "self.inputs = inputs",
    ),
    Mutant("prosparse_cupy/arguments.py", "if _facts(now) != self.facts:", "if False:"),
    Mutant(
        "prosparse_cupy/arguments.py",
        "return checked.d_model, checked.d_ff, checked.dtype, checked.device",
        "return checked.d_model, checked.d_ff, checked.dtype, 0",
    ),
    Mutant(
        "prosparse_cupy/arguments.py",
        "checked = self._known.get(described)",
        "checked = next(iter(self._known.values()), None)",
    ),
    Mutant("prosparse_cupy/arguments.py", "if partial else dtype)\n    names", "if False else dtype)\n    names"),
    Mutant("prosparse_cupy/arguments.py", "(o.name, n, o.aligned and n > 0)", "(o.name, n, False)"),
    # compiler.py
    Mutant(
        "prosparse_cupy/compiler.py",
        "shape = dims.d_model, dims.d_ff, dims.dtype, specialize, dims.tokens",
        "shape = dims.d_ff, dims.d_model, dims.dtype, specialize, dims.tokens",
    ),
    Mutant(
        "prosparse_cupy/compiler.py",
        "shape = dims.d_model, dims.d_ff, dims.dtype, specialize, dims.tokens",
        "shape = dims.d_model, dims.d_ff, dims.dtype, specialize, 1",
    ),
    Mutant("prosparse_cupy/compiler.py", "extras = tuple(p for p in interface.optional if p in dims.extras)", "extras = ()"),
    Mutant("prosparse_cupy/compiler.py", "partial = dims.partial and interface.may_be_partial", "partial = False"),
    Mutant(
        "prosparse_cupy/compiler.py",
        "partial = dims.partial and interface.may_be_partial",
        "partial = dims.partial",
        "kernels that cannot leave float32 ignore the define; one more is compiled",
    ),
    Mutant(
        "prosparse_cupy/compiler.py",
        "return load(problem_of(name, dims, specialize, activation, batch_invariant, in_ffn), dims.device)",
        "return load(problem_of(name, dims, specialize, activation, batch_invariant, in_ffn), 0)",
    ),
    Mutant("prosparse_cupy/compiler.py", "if problem.in_ffn and plan == _plan(", "if problem.in_ffn and None is _plan("),
    Mutant("prosparse_cupy/compiler.py", "if problem.in_ffn and plan == _plan(", "if problem.in_ffn and plan is not _plan("),
    Mutant("prosparse_cupy/compiler.py", "activation = activation if interface.has_activation else RELU", "activation = RELU"),
    Mutant(
        "prosparse_cupy/compiler.py",
        "    if plan.shared_bytes:\n        function.max_dynamic_shared_size_bytes = plan.shared_bytes\n",
        "",
    ),
    Mutant(
        "prosparse_cupy/compiler.py",
        "    cp = cupy()\n    with cp.cuda.Device(device):\n        try:\n            try:",
        "    cp = cupy()\n    with cp.cuda.Device(0):\n        try:\n            try:",
    ),
    Mutant(
        "prosparse_cupy/compiler.py",
        "_pretended.get(device) or Target(gpu(device)",
        "_pretended.get(device) or Target(gpu(0)",
        "GPUs of two kinds in one machine are not simulated",
    ),
    Mutant(
        "prosparse_cupy/compiler.py",
        "    with loading():\n        return _load_once(problem, device)",
        "    return _load_once(problem, device)",
    ),
    Mutant("prosparse_cupy/compiler.py", "        if _is_forked:\n            _refuse_after_fork()\n", ""),
    Mutant(
        "prosparse_cupy/compiler.py", "    if _is_forked:\n        _refuse_after_fork()\n    return load", "    return load"
    ),
    Mutant("prosparse_cupy/compiler.py", "        kernel.launch = _refuse_after_fork\n", "        pass\n"),
    Mutant("prosparse_cupy/compiler.py", "    kernel_of.cache_clear()\n    gate_of", "    gate_of"),
    Mutant("prosparse_cupy/compiler.py", "_is_forked, _loading = True, threading.RLock()", "_is_forked = True"),
    # driver.py
    Mutant(
        "prosparse_cupy/driver.py",
        "pack(buffer.bytes, start, stream, 0, 0, *arguments)",
        "pack(buffer.bytes, start, 0, 0, 0, *arguments)",
        "CuPy's launch takes the stream by itself",
    ),
    Mutant("prosparse_cupy/driver.py", "shape, stream, buffer.arguments, 0)", "shape, 0, buffer.arguments, 0)"),
    Mutant(
        "prosparse_cupy/driver.py",
        "pack(buffer.bytes, start, stream, attribute, overlaps, *arguments)",
        "pack(buffer.bytes, start, stream, attribute, True, *arguments)",
    ),
    Mutant(
        "prosparse_cupy/driver.py",
        "pack(buffer.bytes, start, stream, attribute, overlaps, *arguments)",
        "pack(buffer.bytes, start, 0, attribute, overlaps, *arguments)",
    ),
    Mutant(
        "prosparse_cupy/driver.py", "        if status:\n            raise cupy().cuda.driver.CUDADriverError(status)\n", ""
    ),
    Mutant("prosparse_cupy/driver.py", "class _Buffer(threading.local):", "class _Buffer:"),
    Mutant("prosparse_cupy/driver.py", 'return character + "x" * (_SLOT - struct.calcsize(character))', "return character"),
    Mutant(
        "prosparse_cupy/driver.py",
        "return stream in lasting_streams or (is_capturing()(stream) if captured is None else captured)",
        "return True",
    ),
    Mutant("prosparse_cupy/driver.py", "return stream > LEGACY and is_capturing()(stream)", "return False"),
    Mutant("prosparse_cupy/driver.py", "            gc.disable()\n", ""),
    Mutant(
        "prosparse_cupy/driver.py",
        "            if gc.isenabled():\n                self.was_on = True\n",
        "            self.was_on = gc.isenabled()\n",
    ),
    Mutant(
        "prosparse_cupy/driver.py",
        "which changes nothing that is done\n            _collector.let_go(capture)\n",
        "which changes nothing that is done\n",
    ),
    Mutant("prosparse_cupy/testing/timing.py", "with without_collections():", "if True:"),
    Mutant(
        "prosparse_cupy/driver.py",
        "            if not self.holders:\n                self.restore()",
        "            self.restore()",
    ),
    Mutant("prosparse_cupy/driver.py", "        self.was_on = False\n\n\n_collector", "\n\n_collector"),
    Mutant("prosparse_cupy/driver.py", "    _collector.restore()\n", ""),
    Mutant(
        "prosparse_cupy/driver.py",
        "            with on_device(device):\n                return programmatic(stream, overlaps, *arguments)\n",
        "            pass\n",
    ),
    Mutant("prosparse_cupy/driver.py", "return _written.word.value", "return stream"),
    Mutant(
        "prosparse_cupy/driver.py",
        "ends = [*accumulate((_SLOT * len(a) for a in arguments), initial=_CONFIG_BYTES)]",
        "ends = [*accumulate((_SLOT for a in arguments), initial=_CONFIG_BYTES)]",
    ),
    Mutant("prosparse_cupy/driver.py", "    _check(exchange(ctypes.addressof(mode)))\n    try:", "    try:"),
    # libraries.py
    Mutant(
        "prosparse_cupy/libraries.py",
        "        with _lock:  # so that threads that make the first call agree on it\n            return _torch_family(torch)",
        "        return _torch_family(torch)",
    ),
    Mutant("prosparse_cupy/libraries.py", "return _dlpack_families.setdefault(kind, _Dlpack(kind))", "return _Dlpack(kind)"),
    # workspace.py
    Mutant(
        "prosparse_cupy/workspace.py",
        "        with suppress(RuntimeError):\n            torch_cuda.empty_cache()",
        "        torch_cuda.empty_cache()",
    ),
    Mutant(
        "prosparse_cupy/workspace.py",
        "        home = _homes[device, ident, size]\n",
        "        home = _homes[device, 0, nbytes]\n",
    ),
    Mutant("prosparse_cupy/workspace.py", "key = device, ident, size", "key = device, _LEGACY_ID, nbytes"),
    Mutant(
        "prosparse_cupy/workspace.py",
        "ident = driver.stream_id(stream) if stream > driver.LEGACY else _LEGACY_ID",
        "ident = stream",
    ),
    Mutant(
        "prosparse_cupy/workspace.py",
        "ident = driver.stream_id(stream) if stream > driver.LEGACY else _LEGACY_ID",
        "ident = _LEGACY_ID",
    ),
    Mutant("prosparse_cupy/workspace.py", "        return home.pop(), home\n", "        return home[-1], home\n"),
    Mutant("prosparse_cupy/workspace.py", "addresses = _passing[device, size]", "addresses = _passing[0, nbytes]"),
    Mutant("prosparse_cupy/workspace.py", "if event.done:", "if True:"),
    Mutant(
        "prosparse_cupy/workspace.py",
        "cupy().cuda.runtime.eventRecord(self._event.ptr, self._stream)",
        "cupy().cuda.runtime.eventRecord(self._event.ptr, 0)",
    ),
    Mutant(
        "prosparse_cupy/workspace.py", "for owned in [g for g in _graphs if g.destroyed.is_set()]:", "for owned in [*_graphs]:"
    ),
    Mutant("prosparse_cupy/workspace.py", "for owned in [g for g in _graphs if g.destroyed.is_set()]:", "for owned in []:"),
    Mutant("prosparse_cupy/workspace.py", "        if _idle[device, size]:\n", "        if False:\n"),
    Mutant(
        "prosparse_cupy/workspace.py",
        "return max(4096, 1 << (nbytes - 1).bit_length())",
        "return max(4096, 1 << (nbytes.bit_length() - 1))",
    ),
    Mutant(
        "prosparse_cupy/workspace.py",
        "with cupy().cuda.Device(device), driver.allowed_during_captures():\n        if _idle",
        "with driver.allowed_during_captures():\n        if _idle",
    ),
    Mutant(
        "prosparse_cupy/workspace.py",
        "with cupy().cuda.Device(device), driver.allowed_during_captures():\n        if _idle",
        "with cupy().cuda.Device(device):\n        if _idle",
    ),
    Mutant(
        "prosparse_cupy/workspace.py",
        "            if error.status != _OUT_OF_MEMORY:\n                raise\n",
        "            raise\n",
    ),
    # libraries.py
    Mutant("prosparse_cupy/libraries.py", "return int(cupy().cuda.get_current_stream(device).ptr)", "return 0"),
    Mutant(
        "prosparse_cupy/libraries.py",
        "return int(cupy().cuda.get_current_stream(device).ptr)",
        "return int(cupy().cuda.get_current_stream().ptr)",
    ),
    Mutant(
        "prosparse_cupy/libraries.py",
        "        with cupy().cuda.Device(device):\n            return cupy().empty(shape, NUMPY_DTYPES[dtype])",
        "        return cupy().empty(shape, NUMPY_DTYPES[dtype])",
    ),
    Mutant("prosparse_cupy/libraries.py", "array.data.device_id, array.flags.c_contiguous", "0, array.flags.c_contiguous"),
    Mutant("prosparse_cupy/libraries.py", "a.data.device_id, a.flags.c_contiguous", "0, a.flags.c_contiguous"),
    # launch.py, knobs.py, measured.py
    Mutant(
        "prosparse_cupy/launch.py",
        '(("ROW_OPT", problem.d_ff), ("COL_OPT", problem.d_model))',
        '(("ROW_OPT", problem.d_model), ("COL_OPT", problem.d_ff))',
    ),
    Mutant("prosparse_cupy/launch.py", "int(name in problem.extras)", "0"),
    Mutant("prosparse_cupy/launch.py", 'partial = (("PARTIAL", None),) if problem.partial else ()', "partial = ()"),
    Mutant("prosparse_cupy/launch.py", "chosen.shared_bytes(problem), chosen.partial", "0, chosen.partial"),
    Mutant("prosparse_cupy/launch.py", "if wrong := chosen.legal(problem, target):", "if wrong := '':"),
    Mutant(
        "prosparse_cupy/launch.py", "programmatic = target.is_programmatic and interface.is_programmatic", "programmatic = True"
    ),
    Mutant("prosparse_cupy/knobs.py", "slices * ceil_div(problem.tokens, self.here)", "slices"),
    Mutant("prosparse_cupy/knobs.py", "self if problem.in_ffn else replace(self, early_successor=False)", "self"),
    Mutant(
        "prosparse_cupy/knobs.py",
        "of_block = self.rows or max(1, self.warps // _sharing(problem))",
        "of_block = self.rows or self.warps",
    ),
    Mutant("prosparse_cupy/knobs.py", "return needed if needed > _STATIC_BYTES else 0", "return 0"),
    Mutant(
        "prosparse_cupy/knobs.py",
        "if self.warps < 1 or self.warps % order.warps or self.warps > order.warps * self.here:",
        "if False:",
    ),
    Mutant(
        "prosparse_cupy/measured.py",
        "if measured is not None and not measured.knobs.legal(problem, target):",
        "if measured is not None:",
    ),
    Mutant("prosparse_cupy/measured.py", 'if content.get("gpu") != target.name:', "if False:"),
    Mutant("prosparse_cupy/measured.py", 'if content.get("version") != VERSION:', "if False:"),
    # compressed.py, bf12.py
    Mutant(
        "prosparse_cupy/compressed.py",
        "self._packed.base | 1 << 32",
        "self._packed.base | 1 << 33",
    ),
    Mutant("prosparse_cupy/compressed.py", "kernel.launch(family.stream(device), False,", "kernel.launch(0, False,"),
    Mutant("prosparse_cupy/compressed.py", "address, *self._shape)", "address, *self._shape[::-1])"),
    Mutant(
        "prosparse_cupy/compressed.py",
        'if address % VECTOR_BYTES:\n            raise ValueError(f"decompress',
        'if False:\n            raise ValueError(f"decompress',
    ),
    Mutant("prosparse_cupy/compressed.py", "tuple(array[start:stop] for array in words)", "tuple(words)"),
    Mutant(
        "prosparse_cupy/bf12.py",
        "| (words[..., 2] == np.uint32(ESCAPE))] =",
        "] =",
        "such a chunk is found by its word all the same; of what is left of it only zeros are lost",
    ),
    Mutant("prosparse_cupy/bf12.py", "(codes >= 0) & (codes < WINDOW)", "(codes >= 0) & (codes <= WINDOW)"),
    Mutant("prosparse_cupy/bf12.py", "return int(held.argmax())", "return 0"),
    # peers.py
    Mutant("prosparse_cupy/peers.py", "return -(-(self.ranks + 1) // _LINE) * _LINE", "return self.ranks"),
    Mutant("prosparse_cupy/peers.py", "        return self.ranks\n", "        return self.ranks - 1\n"),
    Mutant("prosparse_cupy/peers.py", "self._page_locked.ptr - self.address", "self._page_locked.ptr"),
    Mutant("prosparse_cupy/peers.py", "        self._waits_no_more[0] = 0\n", ""),
    Mutant("prosparse_cupy/peers.py", "-(-self.blocks // (2 * _LINE)) * _LINE", "self.blocks // (2 * _LINE) * _LINE"),
    Mutant("prosparse_cupy/peers.py", "-(-self.capacity // _THREADS)", "self.capacity // _THREADS"),
    Mutant("prosparse_cupy/peers.py", "_BLOCKS * _THREADS * multiprocessors, ", ""),
    Mutant("prosparse_cupy/peers.py", "if any(host != said[0][0] for host, *_ in said):", "if False:"),
    Mutant("prosparse_cupy/peers.py", "elif not any(failure for _, failure, _ in said):", "else:"),
    Mutant("prosparse_cupy/peers.py", "                self._close(tell)\n", ""),
    Mutant("prosparse_cupy/peers.py", "found[r] != _mark(self.number, r)", "False"),
    Mutant("prosparse_cupy/peers.py", "next(others) - self.address", "next(others)"),
    Mutant("prosparse_cupy/peers.py", "        self._zero()\n        tell(None)", "        tell(None)"),
    # tensor_cores.py, and what launches on tensor cores
    Mutant("prosparse_cupy/tensor_cores.py", "problem.tokens < FEWEST_TOKENS or ", ""),
    Mutant("prosparse_cupy/tensor_cores.py", " or not problem.is_plain", ""),
    Mutant("prosparse_cupy/tensor_cores.py", " or not problem.specialize", ""),
    Mutant("prosparse_cupy/tensor_cores.py", 'if "norm_weight" in problem.extras:', "if False:"),
    Mutant("prosparse_cupy/tensor_cores.py", "problem.d_ff > _MOST_ROWS", "False"),
    Mutant("prosparse_cupy/tensor_cores.py", "problem.d_ff % vector_length(problem.dtype) or ", ""),
    Mutant("prosparse_cupy/tensor_cores.py", "problem.d_model % self._columns or ", ""),
    Mutant("prosparse_cupy/tensor_cores.py", "> _MOST_STEPS", "> 100"),
    Mutant("prosparse_cupy/tensor_cores.py", "// slices))", "// slices)) + 1"),
    Mutant("prosparse_cupy/tensor_cores.py", "batch_invariant or tokens < FEWEST_TOKENS", "batch_invariant"),
    Mutant("prosparse_cupy/workspace.py", "if isinstance(size, WithTickets):", "if False:"),
    Mutant("prosparse_cupy/workspace.py", "else TICKET_BYTES + size.behind", "else size.behind"),
    Mutant("prosparse_cupy/workspace.py", "WithTickets(size_class(nbytes))", "WithTickets(size_class(nbytes) // 2)"),
    Mutant("prosparse_cupy/compiler.py", "if dims.tokens < FEWEST_OF_GATE:", "if False:"),
    Mutant("prosparse_cupy/compiler.py", "batch_invariant=False), partial=False)", "batch_invariant=False))"),
    Mutant("prosparse_cupy/ops.py", "yield tickets + TICKET_BYTES, tickets", "yield tickets, tickets"),
    Mutant(
        "prosparse_cupy/ffn.py",
        "(x, w_gate, *w_up), ungated = inputs[:down], taken()",
        "(x, w_gate, *w_up), ungated = inputs[:down], x1",
    ),
    # formula.py, reference.py
    Mutant(
        "prosparse_cupy/formula.py",
        "np.logical_and(~(wide < np.float32(self.threshold)), wide != 0)",
        "np.logical_and(~(wide < self.threshold), wide != 0)",
        "NumPy 2 compares a float32 array with a Python number in float32",
    ),
    Mutant(
        "prosparse_cupy/formula.py",
        "np.logical_and(~(wide < np.float32(self.threshold)), wide != 0)",
        "np.logical_and(wide >= np.float32(self.threshold), wide != 0)",
    ),
    Mutant(
        "prosparse_cupy/formula.py",
        "np.logical_and(~(wide < np.float32(self.threshold)), wide != 0)",
        "~(wide < np.float32(self.threshold))",
    ),
    Mutant("prosparse_cupy/formula.py", "active &= ~(up <= 0)", "active &= up > 0"),
    Mutant(
        "prosparse_cupy/formula.py",
        'if not 0.0 <= value <= _LARGEST_THRESHOLD:\n        raise ValueError(f"{operator}: threshold',
        'if False:\n        raise ValueError(f"{operator}: threshold',
    ),
    Mutant(
        "prosparse_cupy/reference.py", "used = np.flatnonzero(values.astype(np.float32) != 0)", "used = np.arange(len(values))"
    ),
    Mutant("prosparse_cupy/reference.py", "None if bias is None else bias[used]", "None"),
    Mutant("prosparse_cupy/reference.py", "np.mean(np.square(values)) + norm_eps", "np.mean(np.square(values))"),
]
