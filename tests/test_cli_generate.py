"""`prosparse-cupy generate`: the same text however it is decoded, a report on stderr, and no traceback for what users do."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch", reason='the extra "torch" brings it')
transformers = pytest.importorskip("transformers", reason='the extra "hf" brings it')
from torch_devices import DEVICES  # noqa: E402

from prosparse_cupy import cli  # noqa: E402
from prosparse_cupy.torch import commandline  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SMALL = ROOT / "tests" / "data" / "relu-lm"
PROMPT = "def parse_args("
TEMPLATE = "{% for m in messages %}# {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}def {% endif %}"


def _generate(*arguments: str, model: Path = SMALL, device: str = "cpu", prompt: str = PROMPT, tokens: int = 12):
    given = ("--model", str(model), "--prompt", prompt, "--max-new-tokens", str(tokens), "--device", device)
    return CliRunner().invoke(cli.main, ("generate", *given, *arguments))


def _text(*arguments: str, **options) -> str:
    done = _generate(*arguments, **options)
    assert done.exit_code == 0, done.output
    return done.stdout


def _fails(done, message: str, code: int = 1) -> None:
    assert done.exit_code == code and isinstance(done.exception, SystemExit), done.output
    assert message in done.stderr and "Traceback" not in done.output


def _process(*arguments: str, code: str = "from prosparse_cupy.cli import main; main()") -> subprocess.Popen:
    # A shell without job control has what it puts in the background ignore Ctrl-C, these tests and all that they start.
    code = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {code}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, "generate", "--model", str(SMALL), "--prompt", PROMPT, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _copy(folder: Path, **config) -> Path:
    """The small model's files, as links, with another config."""
    for file in SMALL.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({**json.loads((SMALL / "config.json").read_text()), **config}))
    return folder


@pytest.fixture
def with_template(tmp_path) -> Path:
    folder = _copy(tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="module")
def compressed(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("checkpoints") / "small"
    done = CliRunner().invoke(cli.main, ("compress", str(SMALL), str(out)))
    assert done.exit_code == 0, done.output
    return out


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_text_dense_and_sparse(device):
    sparse, dense = (_generate("--dtype", "float32", *how, device=device, tokens=60) for how in ((), ("--dense",)))
    assert sparse.exit_code == dense.exit_code == 0, sparse.output + dense.output
    assert sparse.stdout == dense.stdout and sparse.stdout.startswith(PROMPT) and sparse.stdout.endswith("\n")
    assert "4 of 4 MLPs decode sparsely, T = 0" in sparse.stderr and "MLPs" not in dense.stderr
    memory = r", peak \d+\.\d\d GiB" if device == "cuda" else ""
    for done, how in ((sparse, "sparse"), (dense, "dense")):
        *_, last = done.stderr.splitlines()
        pattern = (
            r"60 tokens, \d+\.\d tokens/s, first token after \d+\.\d\d s \(\d+\.\d\d s of them warm-up\), sparsity 9\d\.\d%"
        )
        assert re.fullmatch(rf"{pattern}{memory} \({how}, float32, {device}\)", last), last


@pytest.mark.parametrize("device", DEVICES)
def test_compressed_weights_write_the_same_whether_compressed_now_or_before(device, compressed):
    now, before = _generate("--compress", device=device), _generate(model=compressed, device=device)
    assert now.exit_code == before.exit_code == 0, now.output + before.output
    assert now.stdout == before.stdout and len(now.stdout) > len(PROMPT)
    assert "16 of them in 12 bits" in now.stderr and "a compressed checkpoint: 4 MLPs decode sparsely" in before.stderr
    assert all(done.stderr.rstrip().endswith(f"(compressed, bfloat16, {device})") for done in (now, before))
    assert _generate("--dense", model=compressed, device=device).stderr.rstrip().endswith(f"(dense, bfloat16, {device})")


def test_a_compressed_checkpoint_has_its_dtype_and_threshold(compressed):
    _fails(_generate("--dtype", "float32", model=compressed), "is compressed, so its dtype is bfloat16")
    _fails(_generate("--threshold", "0.1", model=compressed), "--threshold: a compressed checkpoint has its own")


@pytest.mark.parametrize("device", DEVICES)
def test_a_seed_gives_its_text(device):
    sampled = ("--dtype", "float32", "--do-sample", "--temperature", "2", "--top-p", "0.99")
    one, again, other = (_text(*sampled, "--seed", seed, device=device, tokens=30) for seed in ("1", "1", "2"))
    assert one == again != other
    first, second = (_generate(*sampled, device=device, tokens=30) for _ in range(2))
    assert first.stdout != second.stdout, "without a seed every text is another"
    (seed,) = re.findall(r", seed (\d+)", first.stderr)
    assert _text(*sampled, "--seed", seed, device=device, tokens=30) == first.stdout


def test_options_of_sampling_arrive(monkeypatch):
    arrived = {}

    def generate(model, ids, streamer, **options):
        streamer.put(ids)
        arrived.update(options)

    monkeypatch.setattr(commandline, "generate", generate)
    options = {"temperature": 0.5, "top_k": 3, "top_p": 0.5, "min_p": 0.25, "repetition_penalty": 1.5}
    given = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    _text("--do-sample", *given)
    assert {**options, "do_sample": True, "max_new_tokens": 12}.items() <= arrived.items()


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_text_with_guesses(device):
    prompt = "def read(path):\n    return path\n\ndef read("
    plain, guessed = (
        _generate("--dtype", "float32", *how, device=device, prompt=prompt, tokens=80) for how in ((), ("--prompt-lookup", "5"))
    )
    assert plain.exit_code == guessed.exit_code == 0, plain.output + guessed.output
    assert plain.stdout == guessed.stdout and "warning" not in guessed.stderr
    assert re.search(r"^80 tokens, \d+\.\d tokens/s, ", guessed.stderr, re.MULTILINE)


def test_guesses_go_with_the_likeliest_tokens():
    _fails(_generate("--prompt-lookup", "3", "--do-sample"), "--prompt-lookup guesses the likeliest tokens", code=2)
    for number in ("0", "8", "x"):
        _fails(_generate("--prompt-lookup", number), "--prompt-lookup", code=2)


@pytest.mark.parametrize("device", DEVICES)
def test_text_ends_before_a_stop_text(device):
    whole = _text("--dtype", "float32", device=device, tokens=60)
    stop, later = whole[30:36], whole[50:56]
    done = _generate("--dtype", "float32", "--stop", later, "--stop", stop, "--stop", "not in it", device=device, tokens=60)
    assert done.stdout == whole[: whole.index(stop, len(PROMPT))].rstrip("\n") + "\n"
    assert int(re.search(r"^(\d+) tokens, ", done.stderr, re.MULTILINE)[1]) < 40, "the model went on behind it"


def test_a_chat_prints_the_reply_alone(with_template):
    reply = _text("--dtype", "float32", "--chat", model=with_template, prompt="a parser", tokens=30)
    plain = _text("--dtype", "float32", prompt="# a parser\ndef ", tokens=30)
    assert plain == "# a parser\ndef " + reply and len(reply) > 20


def test_a_chat_needs_a_template():
    _fails(_generate("--chat"), "--chat: this checkpoint's tokenizer has no chat template: leave out --chat")


def test_a_template_that_raises(with_template):
    file = with_template / "tokenizer_config.json"
    file.write_text(file.read_text().replace("{% for m in", "{{ raise_exception('no users') }}{% for m in"))
    _fails(_generate("--chat", model=with_template), "reading the prompt: TemplateError: no users")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--max-new-tokens", "0"), "'--max-new-tokens': 0 is not in the range x>=1"),
        (("--top-p", "0.5"), "--top-p goes with --do-sample"),
        (("--do-sample", "--temperature", "0"), "'--temperature': 0.0 is not in the range"),
        (("--do-sample", "--temperature", "nan"), "nan is not a number in the range"),
        (("--stop", ""), "--stop needs at least one character"),
        (("--dense", "--compress"), "leave out --compress and --threshold"),
        (("--dense", "--threshold", "0.1"), "leave out --compress and --threshold"),
        (("--compress", "--dtype", "float16"), "--compress is of bfloat16 alone, not of float16"),
        (("--seed", "-1"), "'--seed': -1 is not in the range"),
        (("--model", "/no/such/folder"), "does not exist"),
    ],
)
def test_options_that_do_not_go(given, message):
    _fails(_generate(*given), message, code=2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--prompt", ""), "Error: the prompt has no tokens: give at least one character"),
        (("--device", "nonsense"), "Error: --device nonsense: "),
        (("--device", "meta"), "Error: --device meta: expected cpu, cuda or cuda:N"),
        (("--device", "cuda:99"), "Error: --device cuda:99: "),
        pytest.param(
            ("--device", "cuda"),
            "Error: --device cuda: ",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the device is not missing here"),
        ),
    ],
)
def test_no_traceback_for(given, message):
    _fails(_generate(*given), message)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("length", [None, 0, 100], ids=["missing", "empty", "cut short"])
def test_no_traceback_for_broken_files(name, length, tmp_path):
    folder = _copy(tmp_path)
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if length is not None:
        (folder / name).write_bytes(content[:length])
    _fails(_generate(model=folder), "Error: loading ")


def test_an_empty_folder_is_no_checkpoint(tmp_path):
    _fails(_generate(model=tmp_path), f"Error: loading the tokenizer of {tmp_path}: ")


def test_a_weight_that_is_missing_is_not_made_up(tmp_path):
    _fails(_generate(model=_copy(tmp_path, num_hidden_layers=5)), "has no model.layers.4.")


def test_a_compressed_file_cut_short(compressed, tmp_path):
    for file in compressed.iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content[:4000] if file.suffix == ".safetensors" else content)
    _fails(_generate(model=tmp_path), f"Error: loading {tmp_path}: ")


def test_silu_decodes_with_dense_ffns_and_says_so(tmp_path):
    folder = _copy(tmp_path, hidden_act="silu")
    done = _generate(model=folder)
    assert done.exit_code == 0 and "0 of 4 MLPs decode sparsely" in done.stderr, done.output
    assert "  4 dense: the config says hidden_act='silu'" in done.stderr and "(dense FFN, bfloat16, cpu)" in done.stderr
    _fails(_generate("--threshold", "0.1", model=folder), "the config says hidden_act='silu': it leaves no zeros")


@pytest.fixture
def gpt2(tmp_path) -> Path:
    config = transformers.GPT2Config(vocab_size=256, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(SMALL / name)
    return tmp_path


def test_a_model_unlike_llama_is_written_by_transformers_own_loop(gpt2):
    done = _generate(model=gpt2)
    assert done.exit_code == 0 and "the model has no MLPs of a family that is known, so no FFN is sparse" in done.stderr, (
        done.output
    )
    assert "warning: generate: transformers' own loop does this call" in done.stderr and ".py:" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("12 tokens, ") and "sparsity" not in last


def test_a_model_with_nothing_to_patch_stays_as_it_is():
    (line,) = commandline.patched(torch.nn.Linear(2, 2), None, compress=False, dense=False)
    assert line == "nothing to patch: a Linear has no projections that are known, so it decodes as it is"


def test_more_tokens_than_the_model_was_made_for(tmp_path):
    done = _generate(model=_copy(tmp_path, max_position_embeddings=20))
    assert "note: the model was made for 20 tokens, prompt included, not 27" in done.stderr and done.exit_code == 0


def test_a_tokenizer_of_another_model(gpt2):
    transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2)).save_pretrained(gpt2)
    _fails(_generate(model=gpt2), "the tokenizer has more tokens than the model")


@pytest.mark.parametrize("function", ["load_compressed", "patch_model", "prepare_generation", "generate"])
@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_out_of_memory(function, error, monkeypatch, compressed):
    def full(*_, **__):
        raise error("this needs 7.00 GiB")

    monkeypatch.setattr(commandline, function, full)
    done = _generate(model=compressed if function == "load_compressed" else SMALL)
    _fails(done, "out of memory: this needs 7.00 GiB")
    if function == "generate":
        assert done.stdout == f"{PROMPT}\n", "what was written stays"


def test_ctrl_c_keeps_what_was_written():
    with _process("--max-new-tokens", "900", "--device", "cpu") as process:
        begun = process.stdout.read(len(PROMPT) + 40)
        process.send_signal(signal.SIGINT)
        rest, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in stderr, stderr
    assert begun.startswith(PROMPT) and rest.endswith("\n")
    *_, last = stderr.splitlines()
    assert re.match(r"interrupted: \d+ tokens, \d+\.\d tokens/s, ", last) and "sparsity" not in last


def test_a_reader_that_goes_away():
    with _process("--max-new-tokens", "900", "--device", "cpu") as process:
        process.stdout.read(len(PROMPT))
        process.stdout.close()
        stderr = process.stderr.read()
        process.wait(timeout=60)
    assert process.returncode == 1 and "Traceback" not in stderr and "Error" not in stderr


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_without_torch_or_transformers(missing):
    with _process(code=f"import sys; sys.modules['{missing}'] = None; from prosparse_cupy.cli import main; main()") as process:
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 1 and not stdout
    assert 'Error: this needs torch and transformers: pip install "prosparse-cupy[hf]"' in stderr and "Traceback" not in stderr


class _Words:
    """A tokenizer whose tokens are bytes, as the stream sees it."""

    def decode(self, ids, **_) -> str:
        return bytes(ids).decode("utf-8", "replace")


def _streamed(prompt: str, new: str, *stops: str) -> list[str]:
    pieces: list[str] = []
    stream = commandline.TextStream(_Words(), pieces.append, stops)
    stream.put(torch.tensor([list(prompt.encode())]))
    for byte in new.encode():
        stream.put(torch.tensor([byte]))
        if bool(stream.stops(torch.zeros(1, 1), None)):
            break
    stream.end()
    stream.end()  # as after an error
    assert stream.ids[: len(prompt.encode())] == list(prompt.encode())
    return [piece for piece in pieces if piece]


def test_characters_come_whole():
    assert _streamed("né", "aé€b") == ["a", "é", "€", "b"]
    assert "".join(_streamed("", "é" * 20)) == "é" * 20
    assert _streamed("x", "") == []


def test_bytes_that_never_make_a_character_come_at_the_end():
    pieces: list[str] = []
    stream = commandline.TextStream(_Words(), pieces.append)
    for ids in ([[120]], [97], [0xE2]):
        stream.put(torch.tensor(ids))
    stream.end()
    assert pieces[0] == "a" and "".join(pieces) == "a\N{REPLACEMENT CHARACTER}"


def test_the_beginning_of_a_stop_text_waits():
    assert "".join(_streamed("", "abENabEND and more", "END")) == "abENab"
    assert _streamed("", "xEN", "END") == ["x", "EN"]
    assert "".join(_streamed("", "one\n\ntwo", "two", "\n\n")) == "one"
    assert "".join(_streamed("END", "x", "END")) == "x", "the prompt's own does not count"
