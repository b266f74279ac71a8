"""A GPT trained in blocks that never see each other.

    python train_gpt.py --blocks 4                         # 5.6 minutes on two CPU cores, no network needed
    python train_gpt.py --baseline                         # the same network, end to end
    python train_gpt.py --eval-only --prompt "The "        # write with what was trained
    python train_gpt.py --recipe paper --out out/paper     # the paper's own choices

Each block is a small GPT. Its target is the next token, as a point on the unit sphere with noise on it (codebook.py),
at the noise levels that the block owns (partition.py). A trained stack writes a token by walking from pure noise to a
code vector, handed from block to block on the way (sampler.py). What it is worth is measured in bits per character,
by a bound (likelihood.py).
"""

from dataclasses import dataclass

import torch
import torch.nn as nn

from data.text import load_text
from nano_db.block import DiffusionBlock, EndToEnd
from nano_db.codebook import PosteriorHead, make_codebook, make_head
from nano_db.device import pick_device
from nano_db.errors import UsageError
from nano_db.language import evaluate, write_samples, write_some
from nano_db.layers import Layer, NoiseEmbedding, causal_mask, check_width, rms_norm, rotary_angles
from nano_db.partition import make_partition, split_layers
from nano_db.schedule import GRIDS, make_noise
from nano_db.script import read_settings, run_script
from nano_db.settings import DiscreteSettings, RunSettings, check_discrete, command, option
from nano_db.stack import Stack


@dataclass
class Settings(DiscreteSettings, RunSettings):
    data: str = option("pydocs", "text: pydocs, shakespeare, text8, or the path of a UTF-8 file")
    tokenizer: str = option("char", "characters, or GPT-2's byte pairs", choices=("char", "gpt2"))
    width: int = option(128, "features of a token", least=2)
    heads: int = option(4, "attention heads", least=1)
    mlp: str = option("gelu", "kind of MLP", choices=("gelu", "swiglu"))
    dropout: float = option(0.0, "on both residual branches", least=0, below=1)
    seq_len: int = option(128, "tokens of context", least=2)
    eval_windows: int = option(0, "held-out windows to evaluate on; 0: all", least=0, free=True)

    streams: int = option(1, "1: noise rides on the tokens; 2: a noisy copy beside them", choices=(1, 2), only="blocks")

    # Writing.
    calls_per_block: int = option(4, "Euler calls of each block, a token", least=1, free=True, only="blocks")
    prompt: str = option("", "what the samples continue (default: the first held-out tokens)", free=True)
    temperature: float = option(0.8, "of the samples; below 1 is more cautious", least=0.01, free=True)
    sample_length: int = option(500, "tokens to write", least=1, free=True)


PRESETS = {
    "tiny": dict(
        layers=12, width=24, heads=2, seq_len=16, batch_size=8, steps=40, warmup=5, log_every=10,
        sample_length=40, eval_windows=32,
    ),
    "laptop": dict(layers=8, width=128, heads=4, seq_len=128, batch_size=16, steps=2000, warmup=100, rounds=4),
    "gpu": dict(
        layers=12, width=384, heads=6, seq_len=256, batch_size=64, steps=3000, warmup=150, rounds=4, dropout=0.1,
    ),
    "paper": dict(
        layers=12, width=768, heads=12, seq_len=256, batch_size=256, steps=100_000, warmup=2500, learning_rate=3e-4,
        tokenizer="gpt2",
    ),
}  # fmt: skip

RECIPES = {
    "paper": dict(
        head="paper", loss_weight="edm", streams=2, range="own", z="inside", walk="last",
        p_mean=-1.2, p_std=1.2, sigma_min=0.002, sigma_max=80.0,
    ),
    "nano": dict(
        head="posterior", loss_weight="none", streams=1, range="upward", z="outside", walk="averaged",
        p_mean=0.3, p_std=0.8, sigma_min=0.05, sigma_max=20.0,
    ),
}  # fmt: skip


class GPT(nn.Module):
    """Embedding and `layers` causal layers: features of the next token, (B, T, width), for the head to read.

    One stream: position t's input is emb(x_t) + W(c_in * z_t), with z_t the noisy version of token t + 1. What a
    position before t carries is a noisy x that t knows already, so nothing leaks; and a step costs what a plain GPT's
    costs. Two streams (the paper's): a clean copy of the sequence, and a noisy one that looks at the clean past and
    at itself.
    """

    def __init__(self, classes, settings, layers, shows_z):
        super().__init__()
        width, self.head_width = settings.width, settings.width // settings.heads
        self.two_streams = shows_z and settings.streams == 2
        self.embedding = nn.Embedding(classes, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        cond_width = max(8, width // 6) if shows_z else 0
        if shows_z:
            self.noise_embedding = NoiseEmbedding(cond_width)
            self.from_z = nn.Linear(width, width, bias=False)
            if not self.two_streams:
                nn.init.zeros_(self.from_z.weight)  # at the start, the plain GPT
        self.layers = nn.ModuleList(
            Layer(width, settings.heads, settings.mlp, cond_width, settings.dropout) for _ in range(layers)
        )

    def forward(self, x, z, c_noise, cache=None):
        """x (B, T) tokens; z (B, T, width) scaled noisy targets and c_noise (B,), or None for both."""
        T, past = x.shape[1], cache.length if cache else 0
        positions = torch.arange(past, past + T, device=x.device)
        h = self.embedding(x)  # (B, T, width)
        cond = None if z is None else self.noise_embedding(c_noise)
        causal, mask = past == 0 and T > 1, None
        if past and T > 1:
            mask = causal_mask(T, past, x.device)
        if self.two_streams:
            h = torch.cat([h, self.from_z(z)], dim=1)  # (B, 2T, width)
            positions = torch.cat([positions, positions + 1])  # the noisy token stands where it will be written
            causal, mask = False, two_stream_mask(T, past, x.device)
        elif z is not None:
            h = h + self.from_z(z)
        rotary = rotary_angles(positions, self.head_width)
        for i, layer in enumerate(self.layers):
            remember = None if cache is None else lambda k, v, i=i: cache.extend(i, k, v, keep=T)
            h = layer(h, rotary, cond, mask, causal, remember)
        return rms_norm(h[:, -T:])


def two_stream_mask(T, past, device):
    """(2T, past + 2T): clean queries see clean positions up to their own; noisy ones these and themselves."""
    clean, itself = causal_mask(T, past, device), torch.eye(T, dtype=torch.bool, device=device)
    return torch.cat([torch.cat([clean, torch.zeros_like(itself)], 1), torch.cat([clean, itself], 1)])


def main():
    settings = read_settings("gpt", Settings, PRESETS, RECIPES, __doc__)
    check_width(settings.width, settings.heads)
    check_discrete(settings)
    if settings.z == "outside" and settings.streams != 1:
        raise UsageError("--streams 2 needs --z inside: the second stream is the noisy target's")
    device = pick_device(settings.device)
    text = load_text(settings.data, settings.tokenizer, settings.data_dir, settings.seq_len)
    text.tokenizer.encode(settings.prompt)  # a character the data has not: say so now, not after the training
    classes = text.tokenizer.classes
    codebook = make_codebook(classes, settings.width, settings.seed)
    noise = make_noise(settings, text.frequencies(), codebook)
    blocks = 1 if settings.baseline else settings.blocks
    layers = split_layers(settings.layers, blocks, settings.layer_split)
    partition = make_partition(noise, blocks, settings.partition, settings.overlap)
    sigmas = GRIDS[settings.grid](noise, settings.calls_per_block * blocks)

    def make_baseline(b=0):
        return EndToEnd(GPT(classes, settings, settings.layers, shows_z=False), PosteriorHead(codebook))

    def make_block(b):
        shows_z = settings.z == "inside"
        network = GPT(classes, settings, layers[b], shows_z)
        head = make_head(settings.head, codebook, settings.sigma_data)
        span = partition.training_range(b, upward=settings.range == "upward")
        return DiffusionBlock(network, head, noise, span, settings.sigma_data, settings.loss_weight, shows_z)

    def make_stack(networks):
        if isinstance(networks[0], EndToEnd):
            return Stack(networks)
        return Stack(networks, partition, settings.walk == "averaged")

    def evaluate_and_write(networks, folder):
        stack = make_stack(networks)
        metrics = evaluate(stack, text, settings.seq_len, settings.eval_windows, settings.seed, device)
        print(f"{metrics['bits_per_char']:.4f} bits per character", "" if settings.baseline else "(bound)")
        print("nats by block:", *(f"{share:.4f}" for share in metrics["nats_per_block"]))
        write_samples(stack, text, settings, sigmas, folder)
        return metrics

    run_script(
        "gpt",
        settings,
        text.sha256,
        device,
        make=make_baseline if settings.baseline else make_block,
        make_baseline=make_baseline,
        draw_batch=lambda: text.batch(settings.batch_size, settings.seq_len, device),
        evaluate=evaluate_and_write,
        metric="bits_per_char",
        unit="bits per character",
        use=lambda networks, count: write_some(make_stack(networks), count, settings.seq_len, sigmas),
    )


if __name__ == "__main__":
    command(main)
