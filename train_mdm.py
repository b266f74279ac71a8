"""Masked diffusion in blocks: a text is uncovered letter by letter, each block at work for its share of the covering.

    python train_mdm.py --blocks 3                           # no network needed
    python train_mdm.py --baseline                           # the same network, one for all shares
    python train_mdm.py --eval-only --fill "The ____ of"     # fill the gaps of a text

Here noise is hiding (masking.py): at time t each letter is visible with probability alpha(t). Each block is a small
transformer that looks both ways and guesses hidden letters, and trains alone, on its own interval of alpha. Unlike in
a GPT, what a block sees is the data itself, partly hidden: a block is a specialist for how much is hidden, and depth
is not all that the blocks lose or gain.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn

from data.text import load_text
from nano_db.device import pick_device
from nano_db.errors import UsageError
from nano_db.layers import Layer, NoiseEmbedding, check_width, rms_norm, rotary_angles
from nano_db.masking import (
    MaskedBlock,
    MaskSchedule,
    average,
    nats_per_block,
    route,
    unmask,
    visible_range,
    visible_share,
)
from nano_db.partition import split_layers
from nano_db.run import write_text
from nano_db.script import read_settings, run_script
from nano_db.settings import RunSettings, command, option

SAMPLE_STEPS = 16  # to uncover a text, for the figures of one sample
GAP = "_"  # stands for one hidden character in --fill and in samples.txt


@dataclass
class Settings(RunSettings):
    data: str = option("pydocs", "text: pydocs, shakespeare, text8, or the path of a UTF-8 file")
    width: int = option(128, "features of a character", least=2)
    heads: int = option(4, "attention heads", least=1)
    mlp: str = option("gelu", "kind of MLP", choices=("gelu", "swiglu"))
    dropout: float = option(0.0, "on both residual branches", least=0, below=1)
    seq_len: int = option(128, "characters of a text", least=2)
    schedule: str = option("linear", "visible share alpha(t)", choices=("linear", "cosine"))
    eval_windows: int = option(0, "held-out windows to evaluate on; 0: all", least=0, free=True)
    unmask_steps: int = option(128, "steps from hidden to visible", least=1, free=True)
    temperature: float = option(0.6, "of the samples; below 1 is more cautious", least=0.01, free=True)
    fill: str = option("", f"a text whose gaps ({GAP}) are to be filled; the samples are of it", free=True)


PRESETS = {
    "tiny": dict(
        blocks=3, layers=12, width=24, heads=2, seq_len=16, batch_size=8, steps=40, warmup=5, log_every=10,
        unmask_steps=12, eval_windows=32, overlap=0.05,
    ),
    "laptop": dict(
        blocks=3, layers=6, seq_len=128, batch_size=16, steps=3500, warmup=175, overlap=0.05, ema=0.995, rounds=2,
        learning_rate=3e-3,
    ),
    "gpu": dict(
        blocks=3, layers=12, width=384, heads=6, seq_len=256, batch_size=64, steps=5000, warmup=250, overlap=0.05,
        ema=0.999, dropout=0.1,
    ),
    "paper": dict(
        blocks=3, layers=12, width=768, heads=12, seq_len=256, batch_size=256, steps=100_000, warmup=2000,
        learning_rate=3e-4, weight_decay=0.03, overlap=0.05, ema=0.9999, data="text8", eval_windows=2000,
    ),
}  # fmt: skip


class Unmasker(nn.Module):
    """A transformer that looks both ways, modulated by the time t: logits of every character, hidden or not."""

    def __init__(self, classes, settings, layers):
        super().__init__()
        width, self.head_width = settings.width, settings.width // settings.heads
        cond_width = max(8, width // 6)
        self.embedding = nn.Embedding(classes + 1, width)  # the last one is the mask
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.time_embedding = NoiseEmbedding(cond_width)
        self.layers = nn.ModuleList(
            Layer(width, settings.heads, settings.mlp, cond_width, settings.dropout) for _ in range(layers)
        )
        self.readout = nn.Linear(width, classes, bias=False)
        nn.init.normal_(self.readout.weight, std=0.02)

    def forward(self, x, t):
        """x (B, T) with mask tokens, t (B,) -> logits (B, T, V)."""
        h, cond = self.embedding(x), self.time_embedding(t)
        rotary = rotary_angles(torch.arange(x.shape[1], device=x.device), self.head_width)
        for layer in self.layers:
            h = layer(h, rotary, cond)
        return self.readout(rms_norm(h))


def encode_fill(text, settings):
    """The text of --fill as tokens (T,), gaps as mask tokens; the rest of the length is hidden, too."""
    if len(settings.fill) > settings.seq_len:
        raise UsageError(f"--fill has {len(settings.fill)} characters, but the network reads {settings.seq_len}")
    mask = text.tokenizer.classes
    tokens = torch.full((settings.seq_len,), mask)
    for i, character in enumerate(settings.fill):
        if character != GAP:
            tokens[i] = int(text.tokenizer.encode(character)[0])
    return tokens


def show(text, tokens):
    """Tokens as text, hidden ones as gaps."""
    mask = text.tokenizer.classes
    return "".join(GAP if token == mask else text.tokenizer.decode([token]) for token in tokens)


def write_samples(blocks, text, settings, device):
    """Samples, and of the first one a strip: how far it is uncovered when each block has done its part."""
    start = encode_fill(text, settings).expand(settings.samples, -1).to(device)
    length = len(settings.fill) or settings.seq_len
    generator = torch.Generator().manual_seed(settings.seed)
    strip, alpha = {}, visible_share(start, text.tokenizer.classes)
    for alpha_next, x in unmask(blocks, start, settings.unmask_steps, settings.temperature, generator):
        strip[route(alpha, len(blocks))] = show(text, x[0, :length].tolist())  # the last state of each block stays
        alpha = alpha_next
    lines = [f"after block {b}: {line}" for b, line in strip.items()]
    hidden = f"hidden: {show(text, start[0, :length].tolist())}"
    return ["\n\n".join([hidden, *lines]), *(show(text, row[:length].tolist()) for row in x)]


@torch.no_grad()
def evaluate(blocks, text, settings, device):
    """Held-out bits per character by the bound of masking.py, also split by block."""
    generator = torch.Generator().manual_seed(settings.seed)
    nats, windows = torch.zeros(len(blocks), dtype=torch.float64), 0
    for x, _ in text.heldout_batches(32, settings.seq_len, device):
        nats += len(x) * nats_per_block(blocks, x, levels=math.ceil(48 / len(blocks)), generator=generator)
        windows += len(x)
        if settings.eval_windows and windows >= settings.eval_windows:
            break
    nats = nats / windows
    return {
        "bits_per_char": text.bits_per_character(float(nats.sum())),
        "nats_per_token": float(nats.sum()),
        "nats_per_block": nats.tolist(),
    }


def main():
    settings = read_settings("mdm", Settings, PRESETS, None, __doc__)
    check_width(settings.width, settings.heads)
    device = pick_device(settings.device)
    text = load_text(settings.data, "char", settings.data_dir, settings.seq_len)
    encode_fill(text, settings)  # too long, or a character the data has not: say so now, not after the training
    classes, schedule = text.tokenizer.classes, MaskSchedule(settings.schedule)
    blocks = 1 if settings.baseline else settings.blocks
    layers = split_layers(settings.layers, blocks, settings.layer_split)

    def make_baseline(b=0):
        return MaskedBlock(Unmasker(classes, settings, settings.layers), schedule, classes)

    def make_block(b):
        span = visible_range(b, blocks, settings.overlap)
        return MaskedBlock(Unmasker(classes, settings, layers[b]), schedule, classes, span)

    def evaluate_and_write(networks, folder):
        if settings.baseline:
            networks = [average(networks)]
        metrics = evaluate(networks, text, settings, device)
        print(f"{metrics['bits_per_char']:.4f} bits per character (bound)")
        print("nats by block:", *(f"{share:.4f}" for share in metrics["nats_per_block"]))
        samples = write_samples(networks, text, settings, device) if settings.samples else []
        print("", *samples, sep="\n---\n")
        if folder:
            write_text(folder / "samples.txt", "\n---\n".join(samples))
        return metrics

    def uncover_some(networks, count):
        hidden = torch.full((count, settings.seq_len), classes, device=device)
        return list(unmask([average(networks)] if settings.baseline else networks, hidden, SAMPLE_STEPS))

    run_script(
        "mdm",
        settings,
        text.sha256,
        device,
        make=make_baseline if settings.baseline else make_block,
        make_baseline=make_baseline,
        draw_batch=lambda: text.batch(settings.batch_size, settings.seq_len, device)[0],
        evaluate=evaluate_and_write,
        metric="bits_per_char",
        unit="bits per character",
        use=uncover_some,
    )


if __name__ == "__main__":
    command(main)
