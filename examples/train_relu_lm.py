"""Train a small byte-level LLaMA with a ReLU gate to be sparse, as ProSparse does in miniature.

The text is the Python standard library's source, which every Python has on hand. The loss is cross entropy plus an L1 penalty
on the activated gate (arXiv 2402.13516, progressive sparsity regularisation): none while the model learns to write, then
growing until the wanted share of neurons is at zero. The result is a Hugging Face folder in bfloat16: what
`tests/data/relu-lm` holds.

    python examples/train_relu_lm.py relu-lm          # two minutes on an H100

Needs torch and transformers.
"""

from __future__ import annotations

import json
import math
import sysconfig
from pathlib import Path

import click
import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prosparse_cupy.torch import measure_sparsity

END = 0  # the byte between files; Python source has none
HELD_OUT = 50  # one file of so many


def corpus() -> tuple[np.ndarray, np.ndarray]:
    """The standard library's modules as bytes, for training and held out."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    kept = (f for f in sorted(folder.rglob("*.py")) if not {"site-packages", "dist-packages", "test", "tests"} & {*f.parts})
    for i, file in enumerate(kept):
        parts[i % HELD_OUT == 0].append(file.read_bytes())
    train, held_out = (np.frombuffer(bytes([END]).join(part), np.uint8) for part in parts)
    return train, held_out


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, its id the byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's table: these stand for themselves
    others = (chr(256 + i) for i in range(256))
    vocabulary = {chr(b) if b in printable else next(others): b for b in range(256)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    end = next(character for character, byte in vocabulary.items() if byte == END)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=end, pad_token=end, clean_up_tokenization_spaces=False)


def new_model() -> LlamaForCausalLM:
    """4.1 million parameters, 3.1 of them in the FFN."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        hidden_act="relu",
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=END,
    )
    return LlamaForCausalLM(config)


class Gates:
    """The activated gates of the last forward pass: what they cost and how sparse they are."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self._last: dict[int, torch.Tensor] = {}
        for i, layer in enumerate(model.model.layers):
            layer.mlp.act_fn.register_forward_hook(lambda module, _, s, i=i: self._last.update({i: s}))

    def l1(self) -> torch.Tensor:
        """Sum over neurons, mean over tokens and layers."""
        return torch.stack([s.float().sum(-1).mean() for s in self._last.values()]).mean()

    def sparsity(self) -> torch.Tensor:
        return torch.stack([(s == 0).float().mean() for s in self._last.values()]).mean()


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--steps", default=5000, show_default=True)
@click.option("--batch", default=64, show_default=True, help="Sequences a step.")
@click.option("--length", default=512, show_default=True, help="Bytes of a sequence.")
@click.option(
    "--sparsity", "wanted", default=0.92, show_default=True, help="The penalty grows until so many neurons are at zero."
)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
def main(folder: Path, steps: int, batch: int, length: int, wanted: float, device: str) -> None:
    """Train, and write the model and its tokenizer to FOLDER."""
    torch.manual_seed(0)
    train, held_out = (torch.from_numpy(part.copy()).to(device) for part in corpus())
    model = new_model().to(device)
    gates = Gates(model)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=2e-3)
    warmup, quiet = max(1, steps // 25), steps // 4
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, (i + 1) / warmup) * (0.05 + 0.95 * (1 + math.cos(math.pi * i / steps)) / 2)
    )
    penalty, sparsity = 0.0, 0.0
    offsets = torch.arange(length + 1, device=device)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("", total=steps)
        for step in range(steps):
            starts = torch.randint(len(train) - length, (batch, 1), device=device)
            ids = train[starts + offsets].long()
            with torch.autocast(device, torch.bfloat16):
                logits = model(ids[:, :-1], use_cache=False).logits
                loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
                (loss + penalty * gates.l1()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            if step % 20 == 0:
                sparsity = gates.sparsity().item()
                if step >= quiet:  # doubles in 1/40 of the steps while too few neurons are at zero
                    penalty = max(penalty, 1e-5) * (2 ** (20 * 40 / steps) if sparsity < wanted else 1.0)
                text = f"{loss.item() / math.log(2):.3f} bits a byte, sparsity {sparsity:.1%}, penalty {penalty:.1e}"
                bar.update(task, description=text)
                if step % 500 == 0:
                    bar.console.print(f"step {step}: {text}")
            bar.advance(task)
    _save(model.eval().to(torch.bfloat16), held_out, length, folder)


def _save(model: LlamaForCausalLM, held_out: torch.Tensor, length: int, folder: Path) -> None:
    count = min(64, (len(held_out) - 1) // length)
    ids = held_out[: count * length].long().view(count, length)
    with torch.inference_mode():
        loss = model(ids, labels=ids).loss.item() / math.log(2)
    report = measure_sparsity(model, ids)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    facts = {
        "held_out_bits_per_byte": round(loss, 4),
        "held_out_bytes": ids.numel(),
        "sparsity": round(report.sparsity, 4),
        "sparsity_by_layer": [round(layer.sparsity, 4) for layer in report.layers],
        "torch": torch.__version__,
    }
    (folder / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    click.echo(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
