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
from nano_db.errors import UsageError
from nano_db.laboratory.benchmark import Bench
from nano_db.laboratory.export import export_texts
from nano_db.layers import Layer, NoiseEmbedding, layer_norm, rotary_angles
from nano_db.machinery.run import Run, command, make_optimizer
from nano_db.machinery.settings import Blocks, Training, method, network, output, read_settings, training
from nano_db.masking import (
    MaskedBlock,
    MaskSchedule,
    average,
    block_at,
    score_masked,
    unmask,
    visible_range,
    visible_share,
)
from nano_db.partition import split_layers

GAP = "_"  # stands for one hidden character in --fill and in samples.txt


@dataclass
class Settings(Blocks, Training):
    data: str = training("pydocs", "text: pydocs, shakespeare, text8, or the path of a UTF-8 file")
    seq_len: int = network(128, "characters of a text", least=2)
    width: int = network(128, "features of a character", least=2)
    heads: int = network(4, "attention heads", flag=False)
    dropout: float = network(0.0, "on both residual branches", flag=False)
    layer_split: str = network("", "layers of each block, most masked first, like 3,6,3 (default: even)", of="blocks")
    schedule: str = method("linear", "visible share alpha(t)", choices=("linear", "cosine"))
    eval_windows: int = output(0, "held-out windows to evaluate on; 0: all", least=0)
    export: int = output(0, "held-out texts to continue after their first quarter (texts.jsonl)", least=0, once=True)
    unmask_steps: int = output(128, "steps from hidden to visible", least=1, needs="samples export")
    temperature: float = output(0.6, "of the samples; below 1 is more cautious", least=0.01, needs="samples export")
    fill: str = output("", f"a text whose gaps ({GAP}) the samples are to fill", once=True, needs="samples")


PRESETS = {
    "tiny": dict(
        blocks=3, layers=12, width=24, heads=2, seq_len=16, batch_size=8, steps=40, warmup=5,
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
        self.layers = nn.ModuleList(Layer(width, settings.heads, cond_width, settings.dropout) for _ in range(layers))
        self.readout = nn.Linear(width, classes, bias=False)
        nn.init.normal_(self.readout.weight, std=0.02)

    def forward(self, x, t):
        """x (B, T) with mask tokens, t (B,) -> logits (B, T, V)."""
        h, cond = self.embedding(x), self.time_embedding(t)
        rotary = rotary_angles(torch.arange(x.shape[1], device=x.device), self.head_width)
        for layer in self.layers:
            h = layer(h, rotary, cond)
        return self.readout(layer_norm(h))


def encode_fill(text, settings):
    """The text of --fill as tokens (T,), gaps as mask tokens; the rest of the length is hidden, too."""
    if len(settings.fill) > settings.seq_len:
        raise UsageError(f"--fill has {len(settings.fill)} characters, but the network reads {settings.seq_len}")
    if settings.fill and GAP not in settings.fill:
        raise UsageError(f"--fill has no gap to fill: write {GAP} in the place of each character to be found")
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


def uncover(blocks, text, settings, device):
    """Samples, and of the first one a strip: how far it is uncovered when each block has done its part."""
    start = encode_fill(text, settings).expand(settings.samples, -1).to(device)
    length = len(settings.fill) or settings.seq_len
    generator = torch.Generator().manual_seed(settings.seed)
    strip, alpha = {}, visible_share(start, text.tokenizer.classes)
    for alpha_next, x in unmask(blocks, start, settings.unmask_steps, settings.temperature, generator):
        strip[block_at(alpha, len(blocks))] = show(text, x[0, :length].tolist())  # the last state of each block stays
        alpha = alpha_next
    lines = [f"after block {b}: {line}" for b, line in strip.items()]
    hidden = f"hidden: {show(text, start[0, :length].tolist())}"
    return ["\n\n".join([hidden, *lines]), *(show(text, row[:length].tolist()) for row in x)]


def writer(blocks, settings):
    """A function of tokens (n, m) that returns them with what follows uncovered, (n, settings.seq_len)."""
    generator = torch.Generator().manual_seed(settings.seed)

    def write(tokens):
        hidden = tokens.new_full((len(tokens), settings.seq_len - tokens.shape[1]), blocks[0].classes)
        start = torch.cat([tokens, hidden], dim=1)
        *_, (_, x) = unmask(blocks, start, settings.unmask_steps, settings.temperature, generator)
        return x

    return write


def main():
    settings = read_settings("mdm", Settings, PRESETS, description=__doc__)
    text, device = load_text(settings.data, seq_len=settings.seq_len, export=settings.export), settings.device
    encode_fill(text, settings)  # too long, or a character not in the data: say so now, not after the training
    classes, schedule = text.tokenizer.classes, MaskSchedule(settings.schedule)
    blocks = 1 if settings.baseline else settings.blocks
    layers = split_layers(settings.layers, blocks, settings.layer_split)

    def make_block(b):
        span = visible_range(b, blocks, settings.overlap)  # what the block owns: shares of visible characters
        return MaskedBlock(Unmasker(classes, settings, layers[b]), schedule, classes, span)

    def make_baseline(b):
        return MaskedBlock(Unmasker(classes, settings, settings.layers), schedule, classes)

    def batch():
        return text.batch(run.batch_size, settings.seq_len, device)[:1]

    def uncover_some(networks, count):  # the cost of a sample is measured by 16 steps
        hidden = torch.full((count, settings.seq_len), classes, device=device)
        return list(unmask([average(networks)] if settings.baseline else networks, hidden, 16))

    make = make_baseline if settings.baseline else make_block
    run = Run("mdm", settings, data_sha256=text.sha256)
    bench = Bench(run, make_block, make_baseline, batch, uncover_some)

    for _ in run.rounds():
        for b in run.turns():  # every block in turn; with --only or torchrun, mine
            block = run.build(make, b)  # first weights: from the seed and b alone
            optimizer = make_optimizer(block, settings)
            for _ in run.steps(b, block, optimizer):  # resumes from the block's file; seeds each step; logs and saves
                (x,) = batch()
                with run.autocast:
                    loss = block.loss(x)
                loss.backward()
                run.average_gradients(block)  # does nothing, unless several processes share the block
                norm = nn.utils.clip_grad_norm_(block.parameters(), settings.clip)
                optimizer.step()
                optimizer.zero_grad()
                run.record(loss, norm)
            del block, optimizer, loss  # of this block nothing is in memory while the next one trains
        if run.ready():  # all blocks are there
            trained = run.trained_blocks(make)
            model = [average(trained)] if settings.baseline else trained
            windows = text.heldout_batches(32, settings.seq_len, device, settings.eval_windows)
            generator = torch.Generator().manual_seed(settings.seed)
            with run.autocast:  # as in training
                nats = score_masked(model, (x for x, _ in windows), math.ceil(48 / blocks), generator)
                total = float(nats.sum())
                metrics = {"bits_per_char": text.bits_per_character(total), "nats_per_token": total}
                metrics["nats_per_block"] = nats.tolist()
                print(f"{metrics['bits_per_char']:.4f} bits per character (bound)")
                print("nats by block:", *(f"{share:.4f}" for share in metrics["nats_per_block"]))
                run.log_evaluation(metrics)
                run.keep_samples(uncover(model, text, settings, device) if settings.samples else [])
                export_texts(run, text, writer(model, settings))
            del trained, model  # all blocks at once: the next round has no room for them
    if run.complete():
        bench.report(metrics, "bits_per_char", "bits per character")


if __name__ == "__main__":
    command(main)
