"""Masked diffusion in blocks: masked text is filled in step by step, and each block serves its own range of masking.

    python train_mdm.py                                      # no download needed
    python train_mdm.py --baseline                           # the same layers as one network, for all ranges
    python train_mdm.py --eval-only --fill "The ???? of" --gap "?"     # fill the gaps of a text

Here noise is masking (masking.py): at time t each letter is still unmasked with probability alpha(t), which falls from
1 at t = 0 to 0 at t = 1. There is no z and no head. Each block is a small bidirectional transformer that predicts the
masked letters, trained independently on its own interval of alpha (its loss is masking.MaskedBlock.loss). To sample,
masking.unmask starts with all letters masked, and reveals some of them at each step; the block that owns alpha predicts
them. Unlike in a GPT, a block sees the data itself, partly masked: it is a specialist for its degree of masking.
"""

from dataclasses import dataclass
from math import ceil

import torch
import torch.nn as nn

from data.text import load_text
from nano_db.errors import UsageError
from nano_db.language import text_metrics
from nano_db.layers import Layer, NoiseEmbedding, rms_norm, rotary_angles
from nano_db.masking import MaskedBlock, MaskSchedule, alpha_range, block_at, score_masked, unmask, unmasked_share
from nano_db.partition import split_layers
from nano_db.stack import Ensemble
from nano_db.trainer.checkpoints import kept
from nano_db.trainer.command import command
from nano_db.trainer.report import can_score, export_texts, keep_samples, note_vocabulary, report
from nano_db.trainer.run import Run, first_weights, make_optimizer
from nano_db.trainer.settings import Blocks, Training, method, network, output, read_settings, training

GAP = "▁"  # a masked character, in --fill and in samples.txt


@dataclass
class Settings(Blocks, Training):
    # Skip these at first: begin with main(), at the end, then build() and Unmasker. method, network, training, output
    # are headings of --help; `of`, `needs`, `once`, ... only check flags. More: trainer/settings.py (layers, ...).
    data: str = training("python", "text: python, pydocs, shakespeare, text8, or the path of a UTF-8 file")
    seq_len: int = network(128, "characters of a text", at_least=2)
    width: int = network(128, "features of a character", at_least=2)
    heads: int = network(4, "attention heads", flag=False)
    dropout: float = training(0.0, "on both residual branches", flag=False)
    layer_split: str = network("", "layers of each block, most masked first, like 3,6,3 (default: even)", of="blocks")
    schedule: str = method("linear", "unmasked share alpha(t)", choices=("linear", "cosine"))
    eval_windows: int = output(256, "test windows to evaluate on (and as many for validation); 0: all", at_least=0)
    export: int = output(0, "held-out texts to continue after their first quarter (texts.jsonl)", at_least=0, once=True)
    sampling_steps: int = output(128, "steps from all masked to none", at_least=1, needs="samples export")
    temperature: float = output(0.6, "below 1: more cautious samples", at_least=0.01, needs="samples export")
    fill: str = output("", "a text with gaps for the samples to fill", once=True, needs="samples")
    gap: str = output(GAP, "the character that marks a gap in --fill", once=True, needs="fill")


PRESETS = {
    "tiny": dict(blocks=3, layers=12, width=24, heads=2, seq_len=16, batch_size=8, steps=40, warmup=5,
                 sampling_steps=12, eval_windows=16, overlap=0.05, data="pydocs"),
    "laptop": dict(blocks=3, layers=12, width=96, seq_len=128, batch_size=16, steps=1200, warmup=120, overlap=0.05,
                   ema=0.99, rounds=2, learning_rate=3e-3),
    "gpu": dict(blocks=3, layers=12, width=384, heads=6, seq_len=256, batch_size=64, steps=5000, warmup=250,
                overlap=0.05, ema=0.999, dropout=0.1),
    "paper": dict(blocks=3, layers=12, width=768, heads=12, seq_len=256, batch_size=256, steps=100_000, warmup=2000,
                  learning_rate=3e-4, weight_decay=0.03, overlap=0.05, ema=0.9999, data="text8", eval_windows=2000),
}  # fmt: skip


class Unmasker(nn.Module):
    """A bidirectional transformer, modulated by the time t: logits at every position, masked or not.

    Characters are numbered from 0; the next number, `classes`, is the mask token, everywhere in this file.
    """

    def __init__(self, classes, settings, layers):
        super().__init__()
        width, self.head_width = settings.width, settings.width // settings.heads
        cond_width = max(8, width // 6)
        self.embedding = nn.Embedding(classes + 1, width)  # the last one is the mask
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.time_embedding = NoiseEmbedding(cond_width)
        shape = width, settings.heads, cond_width, settings.dropout
        self.layers = nn.ModuleList(Layer(*shape, depth=layers) for _ in range(layers))
        self.lm_head = nn.Linear(width, classes, bias=False)
        nn.init.normal_(self.lm_head.weight, std=0.02)

    def forward(self, x, t):
        """x (B, T) with mask tokens, t (B,) -> logits (B, T, V)."""
        h, cond = self.embedding(x), self.time_embedding(t)
        rotary = rotary_angles(torch.arange(x.shape[1], device=x.device), self.head_width)
        for layer in self.layers:
            h = layer(h, rotary, cond)
        return self.lm_head(rms_norm(h))


def prepare(settings):
    """What all blocks share, and none trains: the text, and how much of it is masked at which time."""
    text = load_text(settings.data, seq_len=settings.seq_len, export=settings.export, kept=kept(settings))
    note_vocabulary(text.tokenizer.classes, settings)
    encode_fill(text, settings)  # refuses now, not after training, if it is too long or not in the data
    return text, MaskSchedule(settings.schedule)


def build(b, settings, text, schedule):
    """Block b; with --baseline the whole network."""
    classes = text.tokenizer.classes
    if settings.baseline:
        return MaskedBlock(Unmasker(classes, settings, settings.layers), schedule, classes)
    layers = split_layers(settings.layers, settings.blocks, settings.layer_split)[b]
    span = alpha_range(b, settings.blocks, settings.overlap)  # the unmasked shares that it trains on
    return MaskedBlock(Unmasker(classes, settings, layers), schedule, classes, span)


def assemble(networks, settings):
    """Trained blocks, noisiest first; or a single one that averages the baselines' networks."""
    if not settings.baseline:
        return networks
    first, ensemble = networks[0], Ensemble([block.network for block in networks])
    return [MaskedBlock(ensemble, first.schedule, first.classes)]


def batch(size, settings, text, schedule):
    """Random texts x (size, T), in a tuple: report() calls block.loss(*batch(...))."""
    return text.batch(size, settings.seq_len, settings.device)[:1]


def encode_fill(text, settings):
    """The text of --fill as tokens (T,), gaps as mask tokens; the rest of the length is masked, too."""
    if len(settings.fill) > settings.seq_len:
        raise UsageError(
            f"--fill has {len(settings.fill)} characters, but the network reads {settings.seq_len}: shorten it"
        )
    if len(settings.gap) != 1:
        raise UsageError(f"--gap {settings.gap!r} must be a single character")
    if settings.fill and settings.gap not in settings.fill:
        raise UsageError(f"--fill has no gap: write {settings.gap} for each character to be found (or see --gap)")
    mask, encode = text.tokenizer.classes, text.tokenizer.encode
    tokens = [mask if character == settings.gap else int(encode(character)[0]) for character in settings.fill]
    return torch.tensor(tokens + [mask] * (settings.seq_len - len(tokens)))


def show(text, tokens):
    """Tokens as text, masked ones as gaps."""
    return "".join(GAP if token == text.tokenizer.classes else text.tokenizer.decode([token]) for token in tokens)


def sample(networks, count, settings, text, schedule):
    """Unmask texts in 16 steps, whatever --sampling-steps: report() measures the cost."""
    mask = text.tokenizer.classes
    masked = torch.full((count, settings.seq_len), mask, device=settings.device)
    return list(unmask(assemble(networks, settings), masked, 16))


def complete(tokens, length, generator, settings, blocks):
    """Continue tokens (n, m) by `length`."""
    start = torch.cat([tokens, tokens.new_full((len(tokens), length), blocks[0].classes)], dim=1)
    *_, (_, x) = unmask(blocks, start, settings.sampling_steps, settings.temperature, generator)
    return x


def draw_texts(blocks, text, settings):
    """The texts of samples.txt: --fill with its gaps filled, or all from masks. Before them stands how far the first
    one is unmasked after each block.
    """
    start = encode_fill(text, settings).expand(settings.samples, -1).to(settings.device)
    length = len(settings.fill) or settings.seq_len
    generator = torch.Generator().manual_seed(settings.seed)
    strip, alpha = {}, unmasked_share(start, text.tokenizer.classes)
    for alpha_next, x in unmask(blocks, start, settings.sampling_steps, settings.temperature, generator):
        strip[block_at(alpha, len(blocks))] = show(text, x[0, :length].tolist())  # keeps the last state of each block
        alpha = alpha_next
    masked = f"masked: {show(text, start[0, :length].tolist())}"
    lines = [masked, *(f"after block {b}: {line}" for b, line in strip.items())]
    return ["\n\n".join(lines), *(show(text, row[:length].tolist()) for row in x)]


def score(blocks, text, settings):
    """The upper bound on the negative log-likelihood of held-out text, as metrics."""
    nats, levels = {}, ceil(48 / len(blocks))  # of alpha per block: about as many in all for blocks and the baseline
    for half in ("validation", "test"):
        windows = text.heldout_batches(32, settings.seq_len, settings.device, settings.eval_windows, half)
        generator = torch.Generator().manual_seed(settings.seed)
        nats[half] = score_masked(blocks, (x for x, _ in windows), levels, generator)
    metrics = text_metrics(text, nats)
    validation = metrics["validation_bits_per_char"]
    print(f"{metrics['bits_per_char']:.4f} bits per character (upper bound); on the validation half {validation:.4f}")
    print("nats per token, by block:", *(f"{share:.4f}" for share in metrics["nats_per_block"]))
    return metrics


def evaluate(run, networks, text, schedule):
    """The score on held-out text, as metrics; samples.txt, and texts to export."""
    settings, blocks = run.settings, assemble(networks, run.settings)
    with run.autocast:  # as in training
        metrics = score(blocks, text, settings) if can_score(text) else {}
        run.log_evaluation(metrics)  # before samples, which may fail
        if settings.samples:
            keep_samples(run, draw_texts(blocks, text, settings))
        export_texts(run, text, complete, blocks)
    return metrics


def main(flags=None):
    settings = read_settings("mdm", Settings, PRESETS, description=__doc__, flags=flags)
    text, schedule = prepare(settings)
    run = Run("mdm", settings, text.keeps(), data_sha256=text.sha256)

    for _ in run.rounds():  # each trains every block a part of its steps, then evaluates
        for b in run.blocks_to_train():  # every block in turn; with --only or torchrun, some of them
            block = first_weights(build, b, settings, text, schedule)  # from seed and b; run.steps loads later ones
            optimizer = make_optimizer(block, settings)
            for _ in run.steps(b, block, optimizer):  # resumes from the file; seeds, sets the rate, logs, saves
                (x,) = batch(run.batch_size, settings, text, schedule)
                with run.autocast:
                    loss = block.loss(x)
                loss.backward()
                run.average_gradients(block)  # does nothing, unless several processes share the block
                norm = nn.utils.clip_grad_norm_(block.parameters(), settings.clip)
                optimizer.step()
                optimizer.zero_grad()
                run.record(loss, norm)
            del block, optimizer, loss  # this block's memory is freed before the next one trains
        if run.ready():  # all blocks have been trained this round
            metrics = evaluate(run, run.trained_blocks(build, text, schedule), text, schedule)
    if run.finished:  # result.json and curves; memory and time, measured on networks built anew
        report(run, metrics, "bits_per_char", build, batch, sample, text, schedule)


if __name__ == "__main__":
    command(main)
