"""A looped transformer, trained without backpropagation through time.

    python train_looped.py                                # one noisy forward pass a step
    python train_looped.py --baseline                     # Huginn's way: about 33 turns of the loop a step
    python train_looped.py --eval-only --calls 16         # write with another number of calls
    python -m nano_db.laboratory.compare out/looped-baseline out/looped-blocks

The network (Geiping et al. 2025, "Huginn"): a prelude turns tokens into e; a core, looped, turns a state s and e into
the next s; a coda reads the last s. Huginn starts from a random s, takes a random number of turns, and backpropagates
through the last 8. The blocks method takes the loop for what it resembles, the solver of an ODE: the state is a noisy
next token z, and one turn of the loop at a random noise level is a full training step. There is nothing to partition.

How many calls K does writing need? The first call, at sigma_max, sees nothing but noise in z. By Bayes' rule its answer
is p(y | x), all there is to know of the next token, and further calls only carry out the draw. docs/results.md has
what we measured.
"""

import math
from dataclasses import dataclass
from functools import partial
from itertools import count

import torch
import torch.nn as nn

from data.text import load_text
from nano_db.block import DiffusionBlock
from nano_db.errors import UsageError
from nano_db.heads import HEADS, PosteriorHead, cross_entropy, make_codebook
from nano_db.laboratory.benchmark import Bench
from nano_db.laboratory.export import export_texts
from nano_db.language import EVALUATION_BATCH, continue_prompt, generate, score_text, writer
from nano_db.layers import Layer, NoiseEmbedding, causal_mask, layer_norm, rotary_angles
from nano_db.likelihood import nats_of_walk
from nano_db.machinery.run import Run, command, make_optimizer
from nano_db.machinery.settings import Discrete, Training, method, network, output, read_settings, training
from nano_db.partition import make_partition
from nano_db.schedule import Information, LogNormal, equal_mass_grid
from nano_db.stack import put_together

K_VALUES = (1, 2, 4, 8, 16, 32, 64)  # calls, or turns of the loop, at which quality is measured


@dataclass
class Settings(Discrete, Training):
    data: str = training("pydocs", "text: pydocs, shakespeare, text8, or the path of a UTF-8 file")
    tokenizer: str = training("char", "characters, or GPT-2's byte pairs", choices=("char", "gpt2"))
    seq_len: int = network(128, "tokens of context", least=2)
    prelude: int = network(2, "layers before the loop", least=0)
    core: int = network(4, "layers of the loop", least=1)
    coda: int = network(2, "layers after the loop", least=0)
    width: int = network(128, "features of a token", least=2)
    heads: int = network(4, "attention heads", flag=False)
    head: str = method("posterior", "output head (heads.py)", choices=("posterior", "paper"), of="blocks")
    turns: int = method(0, "turns of the loop in training; 0: a random number (Huginn's)", least=0, of="baseline")
    mean_recurrence: float = method(32.0, "mean of the Poisson rate of further turns", flag=False)
    backprop_turns: int = method(8, "last turns of the loop that keep a graph", least=1, of="baseline")
    eval_windows: int = output(0, "held-out windows to evaluate on; 0: all", least=0)
    export: int = output(0, "held-out texts to continue after their first quarter (texts.jsonl)", least=0, once=True)
    calls: int = output(16, "K: Euler calls a token; for the baseline, turns of the loop", least=1)
    prompt: str = output("", "what samples continue (default: the first held-out tokens)", once=True, needs="samples")
    temperature: float = output(0.8, "of the samples; below 1 is more cautious", least=0.01, needs="samples export")
    sample_length: int = output(300, "tokens to write", flag=False)


PRESETS = {
    "tiny": dict(
        prelude=1, core=2, coda=1, width=24, heads=2, seq_len=16, batch_size=8, steps=40, warmup=5,
        sample_length=20, eval_windows=16, calls=4,
    ),
    "tiny-baseline": dict(steps=10, calls=8),
    "laptop": dict(seq_len=64, batch_size=16, steps=4000, warmup=200, rounds=2),
    "laptop-baseline": dict(steps=500, warmup=25, calls=32),  # about the same seconds
    "gpu": dict(width=384, heads=6, seq_len=256, batch_size=64, steps=6000, warmup=300),
    "gpu-baseline": dict(steps=800, warmup=40, calls=32),
    "paper": dict(
        width=512, heads=8, seq_len=256, batch_size=256, steps=100_000, warmup=2500, learning_rate=3e-4,
        tokenizer="gpt2", data="",  # LM1B or OpenWebText, which --data has to name
        checkpoint_activations=True,  # else 16 GiB (Huginn: 59)
    ),
}  # fmt: skip

RECIPES = {
    "nano": dict(head="posterior", loss_weight="none", noise="nano"),
    "paper": dict(head="paper", loss_weight="edm", noise="paper"),
}
NOISE = {  # for the reasons that train_gpt.py gives
    "nano": LogNormal(p_mean=0.3, p_std=0.8, sigma_min=0.05, sigma_max=20.0),
    "paper": LogNormal(p_mean=-1.2, p_std=1.2, sigma_min=0.002, sigma_max=80.0),
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
        layer = partial(Layer, width, settings.heads, sandwich=True)
        self.prelude = nn.ModuleList(layer() for _ in range(settings.prelude))
        self.coda = nn.ModuleList(layer() for _ in range(settings.coda))
        self.core = nn.ModuleList(layer(cond_width=cond_width) for _ in range(settings.core))
        depth = settings.prelude + settings.coda + settings.core * settings.mean_recurrence
        self.apply(lambda module: huginn_init(module, width, depth))

    def apply_layers(self, layers, h, how, cond=None):
        """how: see context. With a cache, each application of a layer has keys and values of its own."""
        for layer in layers:
            remember, i = None, next(how["applied"])
            if how["cache"] is not None:
                remember = partial(how["cache"].extend, i, keep=h.shape[1])
            h = layer(h, how["rotary"], cond, how["mask"], how["causal"], remember)
        return h

    def context(self, x, cache=None):
        """What all turns share: e (B, T, width) of tokens x (B, T), and how layers are to be applied."""
        T, past = x.shape[1], cache.length if cache else 0
        rotary = rotary_angles(torch.arange(past, past + T, device=x.device), self.head_width)
        mask = causal_mask(T, past, x.device) if past and T > 1 else None
        how = dict(rotary=rotary, mask=mask, causal=past == 0 and T > 1, cache=cache, applied=count())
        return self.apply_layers(self.prelude, self.embedding(x), how), how

    def turn(self, s, e, how, cond=None):
        """One turn of the loop: the state s (B, T, width) and e, through the adapter and the core."""
        return self.apply_layers(self.core, self.adapter(torch.cat([s, e], dim=-1)), how, cond)

    def forward(self, x, z, c_noise, cache=None):
        e, how = self.context(x, cache)
        s = self.turn(z, e, how, self.noise_embedding(c_noise))
        return layer_norm(self.apply_layers(self.coda, s, how))


def huginn_init(module, width, depth):
    """Huginn's normal initialisation: std sqrt(2 / 5d), and that over sqrt(2 * depth) for what writes to the residual
    stream. `depth` counts Huginn's mean turns for both methods, so that both start from weights of the same scale.
    """
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=math.sqrt(2 / (5 * width)))
    elif isinstance(module, Layer):
        for out in (module.attention.out, module.mlp[2]):
            nn.init.trunc_normal_(out.weight, std=math.sqrt(2 / (5 * width)) / math.sqrt(2 * depth))
        if module.modulation is not None:
            nn.init.zeros_(module.modulation.weight)


class Huginn(nn.Module):
    """The baseline: a random number of turns from a random state, and backpropagation through the last few."""

    def __init__(self, network, head, settings):
        super().__init__()
        self.network, self.head, self.settings = network, head, settings

    def features(self, x, turns, cache=None, generator=None):
        """The coda's features after `turns` turns of the loop; only the last settings.backprop_turns keep a graph."""
        device = generator.device if generator else x.device
        s = math.sqrt(2 / 5) * torch.randn(*x.shape, self.settings.width, generator=generator, device=device)
        e, how = self.network.context(x, cache)
        s = s.to(e)
        for i in range(turns):
            with torch.set_grad_enabled(torch.is_grad_enabled() and i >= turns - self.settings.backprop_turns):
                s = self.network.turn(s, e, how)
        return layer_norm(self.network.apply_layers(self.network.coda, s, how))

    def log_p(self, x, cache=None, turns=None):
        """ln p(y | x) (B, T, V) after `turns` turns (default: settings.calls), always from the same random state."""
        features = self.features(x, turns or self.settings.calls, cache, torch.Generator().manual_seed(0))
        return self.head.readout(features).float().log_softmax(-1)

    def loss(self, x, y):
        turns = self.settings.turns or recurrences(self.settings.mean_recurrence)
        return cross_entropy(self.head.readout, y, self.features(x, turns), classes=len(self.head.codebook)).mean()


def recurrences(mean):
    """Huginn's number of turns: 1 + Poisson(exp(tau)), tau ~ N(ln(mean) - 0.5^2 / 2, 0.5^2), so 1 + mean on average."""
    tau = math.log(mean) - 0.5**2 / 2 + 0.5 * torch.randn((), dtype=torch.float64)
    return 1 + int(torch.poisson(tau.exp()))


def layer_evaluations(settings):
    """Layers evaluated in one training step, at the mean number of turns: {"forward": ..., "backward": ...}."""
    ends, turns = settings.prelude + settings.coda, settings.turns or 1 + settings.mean_recurrence
    if not settings.baseline:
        return {"forward": ends + settings.core, "backward": ends + settings.core}
    return {
        "forward": ends + settings.core * turns,
        "backward": ends + settings.core * min(settings.backprop_turns, turns),
    }


@torch.no_grad()
def quality_by_calls(model, text, settings, noise):
    """{K: bits per character}, on a part of the held-out text: with K calls (the bound of likelihood.nats_of_walk), or
    with K turns of the baseline's loop (exact).
    """
    bits, generator = {}, torch.Generator().manual_seed(settings.seed)
    batches = list(text.heldout_batches(EVALUATION_BATCH, settings.seq_len, settings.device, 4 * EVALUATION_BATCH))
    for k in K_VALUES:
        nats = 0.0
        for x, y in batches:
            if settings.baseline:
                log_p = model.networks[0].log_p(x, turns=k)
                found = -float(log_p.gather(-1, y[..., None]).cpu().double().mean())
            else:
                found = nats_of_walk(model.posterior(x), y, model.codebook, equal_mass_grid(noise, k), generator)
            nats += y.numel() * found  # the last batch may be smaller
        bits[str(k)] = text.bits_per_character(nats / sum(y.numel() for _, y in batches))
    return bits


def main():
    settings = read_settings("looped", Settings, PRESETS, RECIPES, __doc__)
    if settings.compile and settings.baseline:
        raise UsageError("--compile does nothing for the baseline, whose turns change in number: drop it")
    text = load_text(settings.data, settings.tokenizer, seq_len=settings.seq_len, export=settings.export)
    text.tokenizer.encode(settings.prompt)  # a character that is not in the data: say so now, not after the training
    classes, device = text.tokenizer.classes, settings.device

    codebook = make_codebook(classes, settings.width, settings.seed)
    noise = NOISE.get(settings.noise) or Information(text.frequencies(), codebook, seed=settings.seed)
    span = (noise.sigma_min, noise.sigma_max)  # one network, all noise levels

    def make_block(b):
        network = Looped(classes, settings, conditioned=True)
        return DiffusionBlock(network, HEADS[settings.head](codebook), noise, span, loss_weight=settings.loss_weight)

    def make_baseline(b):
        return Huginn(Looped(classes, settings, conditioned=False), PosteriorHead(codebook), settings)

    def write(networks, count):  # the cost of a sample is measured by 16 tokens
        first, grid = torch.zeros(count, 1, dtype=torch.long, device=device), equal_mass_grid(noise, settings.calls)
        return generate(put_together(networks, make_partition(noise, 1)), first, 16, settings.seq_len, grid)

    make = make_baseline if settings.baseline else make_block
    run = Run("looped", settings, data_sha256=text.sha256, span=list(span))
    batch = partial(text.batch, run.batch_size, settings.seq_len, device)
    bench = Bench(run, make_block, make_baseline, batch, write)

    for _ in run.rounds():
        for b in run.turns():  # every block in turn; with --only or torchrun, mine
            block = run.build(make, b)  # first weights: from the seed and b alone
            optimizer = make_optimizer(block, settings)
            for _ in run.steps(b, block, optimizer):  # resumes from the block's file; seeds each step; logs and saves
                x, y = batch()
                with run.autocast:
                    loss = block.loss(x, y)
                loss.backward()
                run.average_gradients(block)  # does nothing, unless several processes share the block
                norm = nn.utils.clip_grad_norm_(block.parameters(), settings.clip)
                optimizer.step()
                optimizer.zero_grad()
                run.record(loss, norm)
            del block, optimizer, loss  # of this block nothing is in memory while the next one trains
        if run.ready():  # all blocks are there
            model = put_together(run.trained_blocks(make), make_partition(noise, 1))
            with run.autocast:  # as in training
                metrics = score_text(model, text, settings.seq_len, settings.eval_windows, settings.seed, device)
                metrics["bits_per_char_by_calls"] = by_calls = quality_by_calls(model, text, settings, noise)
                metrics["layer_evaluations"] = layers = layer_evaluations(settings)
                kind = f"after {settings.calls} turns" if settings.baseline else "(bound)"
                print(f"{metrics['bits_per_char']:.4f} bits per character {kind}")
                print("bits per character by K:", *(f"{k}: {bits:.4f}" for k, bits in by_calls.items()))
                print(f"layers evaluated a step: {layers['forward']:g} forward, {layers['backward']:g} backward")
                run.log_evaluation(metrics)
                sigmas = equal_mass_grid(noise, settings.calls)
                run.keep_samples(continue_prompt(model, text, settings, sigmas))
                export_texts(run, text, writer(model, settings, sigmas))
            del model
    if run.complete():
        bench.report(metrics, "bits_per_char", "bits per character")


if __name__ == "__main__":
    command(main)
