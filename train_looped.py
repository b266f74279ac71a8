"""A looped transformer, trained without backpropagation through time.

    python train_looped.py                                # one noisy forward pass a step
    python train_looped.py --baseline                     # Huginn's way: about 33 turns of the loop a step
    python train_looped.py --eval-only --calls 16         # write with another number of calls
    python -m nano_db.compare out/looped-baseline out/looped-blocks     # also draws quality against K

The network (Geiping et al. 2025, "Huginn"): a prelude turns tokens into e; a core, looped, turns a state s and e into
the next s; a coda reads the last s. Huginn starts from a random s, takes a random number of turns, and backpropagates
through the last 8. The blocks method takes the loop for what it resembles, the solver of an ODE: the state is a noisy
next token z, and one turn of the loop at a random noise level is a full training step. There is nothing to partition.

What Bayes' rule says about K, the number of calls when writing: the first call, at sigma_max, sees no more than noise
in z, and its answer is p(y | x), which is all there is to know of the next token. A perfect network gains nothing
from a second call: the walk only carries out the draw that one call has already described. So if quality grows with K,
the network is better at little noise than at much; if it falls, low noise levels cost more than they bring, or the
bound by which we measure does: for few calls it is a coarse sum in the place of an integral. (It falls, by about what
that sum costs an exact posterior: README.)
"""

import math
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.text import load_text
from nano_db.block import DiffusionBlock
from nano_db.codebook import PosteriorHead, make_codebook, make_head
from nano_db.device import pick_device
from nano_db.errors import UsageError
from nano_db.language import EVALUATION_BATCH, evaluate, write_samples, write_some
from nano_db.layers import Layer, NoiseEmbedding, causal_mask, check_width, rms_norm, rotary_angles
from nano_db.likelihood import nats_of_walk
from nano_db.partition import make_partition
from nano_db.schedule import equal_mass_grid, make_noise
from nano_db.script import read_settings, run_script
from nano_db.settings import NoiseSettings, RunSettings, command, option
from nano_db.stack import Stack

K_VALUES = (1, 2, 4, 8, 16, 32, 64)  # calls, or turns of the loop, at which quality is measured


@dataclass
class Settings(NoiseSettings, RunSettings):
    no_flags: ClassVar = ("blocks", "layers", "layer_split", "overlap", "partition", "ensemble", "only")
    blocks: int = option(1, "one network, all noise levels")
    overlap: float = option(0.0, "nothing to overlap with")

    data: str = option("pydocs", "text: pydocs, shakespeare, text8, or the path of a UTF-8 file")
    tokenizer: str = option("char", "characters, or GPT-2's byte pairs", choices=("char", "gpt2"))
    prelude: int = option(2, "layers before the loop", least=0)
    core: int = option(4, "layers of the loop", least=1)
    coda: int = option(2, "layers after the loop", least=0)
    width: int = option(128, "features of a token", least=2)
    heads: int = option(4, "attention heads", least=1)
    mlp: str = option("gelu", "kind of MLP", choices=("gelu", "swiglu"))
    seq_len: int = option(128, "tokens of context", least=2)
    head: str = option("posterior", "output head (codebook.py)", choices=("posterior", "paper"), only="blocks")
    mean_recurrence: float = option(
        32.0, "mean of the Poisson rate of further turns", above=0, below=10_000, only="baseline"
    )
    backprop_turns: int = option(8, "last turns of the loop that keep a graph", least=1, only="baseline")

    eval_windows: int = option(0, "held-out windows to evaluate on; 0: all", least=0, free=True)
    calls: int = option(16, "K: Euler calls a token; for the baseline, turns of the loop", least=1, free=True)
    prompt: str = option("", "what the samples continue (default: the first held-out tokens)", free=True)
    temperature: float = option(0.8, "of the samples; below 1 is more cautious", least=0.01, free=True)
    sample_length: int = option(300, "tokens to write", least=1, free=True)


PRESETS = {
    "tiny": dict(
        prelude=1, core=2, coda=1, width=24, heads=2, seq_len=16, batch_size=8, steps=40, warmup=5, log_every=10,
        sample_length=20, eval_windows=16, calls=4,
    ),
    "tiny-baseline": dict(steps=10, log_every=5, calls=8),
    "laptop": dict(seq_len=64, batch_size=16, steps=4000, warmup=200, rounds=2),
    "laptop-baseline": dict(steps=500, warmup=25, log_every=10, calls=32),  # about the same seconds
    "gpu": dict(width=384, heads=6, seq_len=256, batch_size=64, steps=6000, warmup=300),
    "gpu-baseline": dict(steps=800, warmup=40, calls=32),
    "paper": dict(
        width=512, heads=8, seq_len=256, batch_size=256, steps=100_000, warmup=2500, learning_rate=3e-4,
        tokenizer="gpt2",
    ),
}  # fmt: skip

# z stays inside the network in both recipes: without it the loop would have nothing to carry.
RECIPES = {
    "paper": dict(head="paper", loss_weight="edm", p_mean=-1.2, p_std=1.2, sigma_min=0.002, sigma_max=80.0),
    "nano": dict(head="posterior", loss_weight="none", p_mean=0.3, p_std=0.8, sigma_min=0.05, sigma_max=20.0),
}


class Looped(nn.Module):
    """Prelude, core and coda of sandwich-normalised causal layers: features of the next token, (B, T, width).

    conditioned: the core is modulated by the noise level, for the blocks method. Called like any network of block.py it
    makes a single turn, with z as the state.
    """

    def __init__(self, classes, settings, conditioned):
        super().__init__()
        width, self.head_width = settings.width, settings.width // settings.heads
        cond_width = max(8, width // 6) if conditioned else 0
        self.embedding = nn.Embedding(classes, width)
        self.noise_embedding = NoiseEmbedding(cond_width) if conditioned else None
        self.adapter = nn.Linear(2 * width, width, bias=False)

        def layers(count, cond_width=0):
            make = lambda: Layer(width, settings.heads, settings.mlp, cond_width, sandwich=True)  # noqa: E731
            return nn.ModuleList(make() for _ in range(count))

        self.prelude, self.coda = layers(settings.prelude), layers(settings.coda)
        self.core = layers(settings.core, cond_width)
        depth = settings.prelude + settings.coda + settings.core * settings.mean_recurrence
        self.apply(lambda module: huginn_init(module, width, depth))

    def context(self, x, cache):
        """What all turns share: e (B, T, width) of tokens x (B, T), and what applies layers."""
        T, past = x.shape[1], cache.length if cache else 0
        rotary = rotary_angles(torch.arange(past, past + T, device=x.device), self.head_width)
        mask = causal_mask(T, past, x.device) if past and T > 1 else None
        apply = LayerRunner(rotary, mask, causal=past == 0 and T > 1, cache=cache, keep=T)
        return apply(self.prelude, self.embedding(x)), apply

    def turn(self, s, e, apply, cond=None):
        """One turn of the loop: the state s (B, T, width) and e, through the adapter and the core."""
        return apply(self.core, self.adapter(torch.cat([s, e], dim=-1)), cond)

    def forward(self, x, z, c_noise, cache=None):
        e, apply = self.context(x, cache)
        return rms_norm(apply(self.coda, self.turn(z, e, apply, self.noise_embedding(c_noise))))


class LayerRunner:
    """Applies layers in order. With a cache, each application, not each layer, has keys and values of its own."""

    def __init__(self, rotary, mask, causal, cache, keep):
        self.rotary, self.mask, self.causal, self.cache, self.keep = rotary, mask, causal, cache, keep
        self.applied = 0

    def __call__(self, layers, h, cond=None):
        for layer in layers:
            remember = None
            if self.cache is not None:
                remember = lambda k, v, i=self.applied: self.cache.extend(i, k, v, self.keep)  # noqa: E731
            h = layer(h, self.rotary, cond, self.mask, self.causal, remember)
            self.applied += 1
        return h


def huginn_init(module, width, depth):
    """Huginn's normal initialisation: std sqrt(2 / 5d), and that over sqrt(2 * depth) for what writes to the residual
    stream. `depth` counts Huginn's mean turns for both methods, so that both start from weights of the same scale.
    """
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=math.sqrt(2 / (5 * width)))
    elif isinstance(module, Layer):
        for out in (module.attention.out, module.mlp.out):
            nn.init.trunc_normal_(out.weight, std=math.sqrt(2 / (5 * width)) / math.sqrt(2 * depth))
        if module.modulation is not None:
            nn.init.zeros_(module.modulation.weight)


class Huginn(nn.Module):
    """The baseline: a random number of turns from a random state, and backpropagation through the last few."""

    def __init__(self, network, head, settings):
        super().__init__()
        self.network, self.head, self.settings = network, head, settings

    def features(self, x, turns, cache=None, generator=None, rows=slice(None)):
        """The coda's features after `turns` turns of the loop; only the last settings.backprop_turns keep a graph.

        rows: the sequences to compute (block.py); the random state is drawn for all of them.
        """
        s = math.sqrt(2 / 5) * torch.randn(*x.shape, self.settings.width, generator=generator)[rows]
        e, apply = self.network.context(x[rows], cache)
        s = s.to(e)
        for i in range(turns):
            with torch.set_grad_enabled(torch.is_grad_enabled() and i >= turns - self.settings.backprop_turns):
                s = self.network.turn(s, e, apply)
        return rms_norm(apply(self.network.coda, s))

    def log_prior(self, x, cache=None, turns=None):
        """ln p(y | x) (B, T, V) after `turns` turns (default: settings.calls), always from the same random state."""
        generator = torch.Generator().manual_seed(0)
        return self.head.log_prior(self.features(x, turns or self.settings.calls, cache, generator))

    def loss(self, batch, rows=slice(None)):
        x, y = batch
        turns = recurrences(self.settings.mean_recurrence)
        logits = self.head.readout(self.features(x, turns, rows=rows)).float()
        return F.cross_entropy(logits.flatten(0, -2), y[rows].flatten())


def recurrences(mean):
    """Huginn's number of turns: 1 + Poisson(exp(tau)), tau ~ N(ln(mean) - 0.5^2 / 2, 0.5^2), so 1 + mean on average."""
    tau = math.log(mean) - 0.5**2 / 2 + 0.5 * torch.randn((), dtype=torch.float64)
    return 1 + int(torch.poisson(tau.exp()))


def layer_evaluations(settings):
    """Layers evaluated in one training step, at the mean number of turns: {"forward": ..., "backward": ...}."""
    ends, turns = settings.prelude + settings.coda, 1 + settings.mean_recurrence
    if not settings.baseline:
        return {"forward": ends + settings.core, "backward": ends + settings.core}
    return {
        "forward": ends + settings.core * turns,
        "backward": ends + settings.core * min(settings.backprop_turns, turns),
    }


@torch.no_grad()
def quality_by_calls(network, stack, text, settings, noise, device):
    """{K: bits per character}, on a part of the held-out text: with K calls (the bound of likelihood.nats_of_walk), or
    with K turns of the baseline's loop (exact).
    """
    bits, generator = {}, torch.Generator().manual_seed(settings.seed)
    for k in K_VALUES:
        nats, batches = 0.0, list(islice(text.heldout_batches(EVALUATION_BATCH, settings.seq_len, device), 4))
        for x, y in batches:
            if settings.baseline:
                nats -= float(network.log_prior(x, turns=k).gather(-1, y[..., None]).cpu().double().mean())
            else:
                nats += nats_of_walk(stack.posterior(x), y, stack.codebook, equal_mass_grid(noise, k), generator)
        bits[str(k)] = text.bits_per_character(nats / len(batches))
    return bits


def main():
    settings = read_settings("looped", Settings, PRESETS, RECIPES, __doc__)
    check_width(settings.width, settings.heads)
    if settings.compile and settings.baseline:
        raise UsageError("--compile does nothing for the baseline, whose turns change in number: drop it")
    device = pick_device(settings.device)
    text = load_text(settings.data, settings.tokenizer, settings.data_dir, settings.seq_len)
    text.tokenizer.encode(settings.prompt)  # a character the data has not: say so now, not after the training
    classes = text.tokenizer.classes
    codebook = make_codebook(classes, settings.width, settings.seed)
    noise = make_noise(settings, text.frequencies(), codebook)
    partition, sigmas = make_partition(noise, 1), equal_mass_grid(noise, settings.calls)

    def make_baseline(b=0):
        return Huginn(Looped(classes, settings, conditioned=False), PosteriorHead(codebook), settings)

    def make_block(b):
        network = Looped(classes, settings, conditioned=True)
        head = make_head(settings.head, codebook, settings.sigma_data)
        span = (noise.sigma_min, noise.sigma_max)
        return DiffusionBlock(network, head, noise, span, settings.sigma_data, settings.loss_weight)

    def make_stack(networks):
        return Stack(networks) if isinstance(networks[0], Huginn) else Stack(networks, partition)

    def evaluate_and_write(networks, folder):
        stack = make_stack(networks)
        metrics = evaluate(stack, text, settings.seq_len, settings.eval_windows, settings.seed, device)
        kind = f"after {settings.calls} turns" if settings.baseline else "(bound)"
        print(f"{metrics['bits_per_char']:.4f} bits per character {kind}")
        by_calls = quality_by_calls(networks[0], stack, text, settings, noise, device)
        print("bits per character by K:", *(f"{k}: {bits:.4f}" for k, bits in by_calls.items()))
        layers = layer_evaluations(settings)
        print(f"layers evaluated a step: {layers['forward']:g} forward, {layers['backward']:g} backward")
        write_samples(stack, text, settings, sigmas, folder)
        return {**metrics, "bits_per_char_by_calls": by_calls, "layer_evaluations": layers}

    run_script(
        "looped",
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
