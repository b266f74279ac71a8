"""A looped transformer, trained without backpropagation through time.

    python train_looped.py                                # one noisy forward pass per step
    python train_looped.py --baseline                     # Huginn's way: about 33 recurrences per step
    python train_looped.py --eval-only --sampling-steps 4
    python -m experiments.compare out/looped-baseline out/looped-blocks

The network (Geiping et al. 2025, "Huginn"): a prelude maps tokens to e; a recurrent core maps a state s and e to the
next s; a coda reads the last s. Huginn starts from a random s, takes a random number of recurrences, and
backpropagates through the last 8. The blocks method treats the loop as what it resembles, an ODE solver: the
state is a noisy next token z, and one recurrence at a random noise level is a full training step. There is nothing to
partition. More sampling steps do not help: by Bayes' rule the first one, which sees only noise in z, already predicts
p(y | x), and further steps only carry out the draw.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn

from data.text import load_text
from nano_db.block import DiffusionBlock
from nano_db.errors import UsageError
from nano_db.heads import HEADS, PosteriorHead, cross_entropy, make_target_embeddings
from nano_db.language import EVALUATION_BATCH, generate, score_text
from nano_db.layers import Layer, NoiseEmbedding, causal_mask, rms_norm, rotary_angles
from nano_db.likelihood import nats_of_walk
from nano_db.partition import make_partition, sampling_grid
from nano_db.schedule import LogNormal
from nano_db.stack import assemble
from nano_db.trainer.checkpoints import kept
from nano_db.trainer.command import command
from nano_db.trainer.report import can_score, continue_prompt, export_texts, keep_samples, note_vocabulary, report
from nano_db.trainer.run import Run, first_weights, make_optimizer, noise_identity
from nano_db.trainer.settings import Discrete, Training, method, network, output, read_settings, training

K_VALUES = (1, 2, 4, 8, 16, 32, 64)  # sampling steps, or recurrences, at which quality is measured


@dataclass
class Settings(Discrete, Training):
    # Skip these at first: begin with main(), at the end, then build(), Looped and Huginn. method, network, training and
    # output are headings of --help; `of`, `idle`, `once`, ... only check flags. More settings: trainer/settings.py.
    data: str = training("python", "text: python, pydocs, shakespeare, text8, or the path of a UTF-8 file")
    tokenizer: str = training("char", "characters, or GPT-2's byte pairs", choices=("char", "gpt2"))
    seq_len: int = network(128, "tokens of context", at_least=2)
    prelude: int = network(2, "layers before the core", at_least=0)
    core: int = network(4, "layers of the recurrent core", at_least=1)
    coda: int = network(2, "layers after the core", at_least=0)
    width: int = network(128, "features of a token", at_least=2)
    heads: int = network(4, "attention heads", flag=False)
    head: str = method("posterior", "output head (heads.py)", choices=("posterior", "paper"), of="blocks")
    recurrences: int = method(
        0, "how often the core runs in training; 0: random (Huginn); 1: no loop", at_least=0, of="baseline"
    )
    mean_recurrence: float = method(32.0, "mean of the Poisson rate of further recurrences", flag=False)
    backprop_depth: int = method(8, "how many last recurrences to backpropagate through", at_least=1, of="baseline")
    eval_windows: int = output(256, "test windows to evaluate on (and as many for validation); 0: all", at_least=0)
    export: int = output(0, "held-out texts to continue after their first quarter (texts.jsonl)", at_least=0, once=True)
    sampling_steps: int = output(16, "K: Euler steps per token; for the baseline, recurrences", at_least=1)
    prompt: str = output("", "text to continue (default: the first held-out tokens)", once=True, needs="samples")
    temperature: float = output(0.8, "below 1: more cautious samples", at_least=0.01, needs="samples export")
    sample_length: int = output(300, "tokens to sample", flag=False)

    def of_baseline(self):
        """Huginn takes its own preset's recurrences per token, unless --sampling-steps differs from the preset's."""
        usual, twin = (PRESETS.get(name, {}) for name in (self.preset, f"{self.preset}-baseline"))
        steps = self.sampling_steps
        if steps == usual.get("sampling_steps", Settings.sampling_steps):
            steps = twin.get("sampling_steps", steps)
        return super().of_baseline() | {"sampling_steps": steps}


PRESETS = {
    "tiny": dict(prelude=1, core=2, coda=1, width=24, heads=2, seq_len=16, batch_size=8, steps=40, warmup=5,
                 sample_length=20, eval_windows=8, sampling_steps=4, data="pydocs"),
    "tiny-baseline": dict(steps=10, sampling_steps=8),
    "laptop": dict(seq_len=64, batch_size=16, steps=3000, warmup=300, rounds=2, learning_rate=3e-3),
    "laptop-baseline": dict(steps=400, warmup=40, sampling_steps=32),  # takes about as long
    "gpu": dict(width=384, heads=6, seq_len=256, batch_size=64, steps=6000, warmup=300),
    "gpu-baseline": dict(steps=800, warmup=40, sampling_steps=32),
    "paper": dict(
        width=512, heads=8, seq_len=256, batch_size=256, steps=100_000, warmup=2500, learning_rate=3e-4,
        tokenizer="gpt2", data="",  # LM1B or OpenWebText, which --data has to name
        checkpoint_activations=True,  # 16 GiB without it (Huginn: 59)
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

    conditioned: the core is modulated by the noise level, for the blocks method. Called like a network of block.py, it
    runs a single recurrence, with z as the state.
    """

    def __init__(self, classes, settings, conditioned):
        super().__init__()
        width, heads, self.head_width = settings.width, settings.heads, settings.width // settings.heads
        cond_width = max(8, width // 6) if conditioned else 0
        self.embedding = nn.Embedding(classes, width)
        self.noise_embedding = NoiseEmbedding(cond_width) if conditioned else None
        self.adapter = nn.Linear(2 * width, width, bias=False)
        self.prelude = nn.ModuleList(Layer(width, heads, sandwich=True) for _ in range(settings.prelude))
        self.coda = nn.ModuleList(Layer(width, heads, sandwich=True) for _ in range(settings.coda))
        self.core = nn.ModuleList(Layer(width, heads, cond_width, sandwich=True) for _ in range(settings.core))
        self.depth = settings.prelude + settings.coda + settings.core * settings.mean_recurrence
        self.apply(self.initialize)

    def initialize(self, module):
        """Huginn's normal initialisation: std sqrt(2 / 5d), divided by sqrt(2 * depth) for weights that write to
        the residual stream. The depth counts Huginn's mean recurrences in both methods, so both start at one scale.
        """
        std = math.sqrt(2 / (5 * self.embedding.embedding_dim))
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=std)  # cut at +-2, so far out that it is a normal draw
        elif isinstance(module, Layer):
            for out in (module.attention.out, module.mlp[2]):
                nn.init.trunc_normal_(out.weight, std=std / math.sqrt(2 * self.depth))
            if module.modulation is not None:
                nn.init.zeros_(module.modulation.weight)

    def embed(self, x, cache=None):
        """e (B, T, width) of tokens x (B, T), and the arguments with which all layers attend."""
        T, past = x.shape[1], cache.begin(x.shape[1]) if cache else 0
        rotary = rotary_angles(torch.arange(past, past + T, device=x.device), self.head_width)
        mask = causal_mask(T, past, x.device) if past and T > 1 else None
        attend = dict(rotary=rotary, mask=mask, causal=past == 0 and T > 1, cache=cache)
        h = self.embedding(x)
        for layer in self.prelude:
            h = layer(h, **attend)
        return h, attend

    def recur(self, s, e, attend, cond=None):
        """One recurrence: the state s (B, T, width) and e, through the adapter and the core."""
        h = self.adapter(torch.cat([s, e], dim=-1))
        for layer in self.core:
            h = layer(h, cond=cond, **attend)
        return h

    def read(self, s, attend):
        """The coda's features of the last state."""
        for layer in self.coda:
            s = layer(s, **attend)
        return rms_norm(s)

    def forward(self, x, z, c_noise, cache=None):
        """x (B, T) tokens, z (B, T, width) scaled noisy targets, c_noise (B,) -> features (B, T, width)."""
        e, attend = self.embed(x, cache)
        return self.read(self.recur(z, e, attend, self.noise_embedding(c_noise)), attend)


class Huginn(nn.Module):
    """The baseline: a random number of recurrences from a random state, and backpropagation through the last few. With
    settings.recurrences 1 it is a plain transformer.
    """

    def __init__(self, network, head, settings):
        super().__init__()
        self.network, self.head, self.settings = network, head, settings

    def features(self, x, recurrences, cache=None, generator=None):
        """The coda's features after `recurrences` recurrences; only the last settings.backprop_depth keep a graph."""
        device = generator.device if generator else x.device
        s = math.sqrt(2 / 5) * torch.randn(*x.shape, self.settings.width, generator=generator, device=device)
        e, attend = self.network.embed(x, cache)
        s = s.to(e)
        if self.settings.recurrences == 1:  # a plain transformer: without a loop there is no state
            s = torch.zeros_like(e)
        for i in range(recurrences):
            with torch.set_grad_enabled(torch.is_grad_enabled() and i >= recurrences - self.settings.backprop_depth):
                s = self.network.recur(s, e, attend)
        return self.network.read(s, attend)

    def forward(self, x, cache=None, recurrences=None):
        """Logits (B, T, V) after `recurrences` (default: sampling_steps), from a random state that depends only on
        x's shape. (So with a cache, each single new token starts from the same state.)
        """
        generator = torch.Generator().manual_seed(0)
        features = self.features(x, recurrences or self.settings.sampling_steps, cache, generator)
        return self.head.output_projection(features).float()

    def loss(self, x, y):
        features = self.features(x, self.settings.recurrences or draw_recurrences(self.settings.mean_recurrence))
        return cross_entropy(self.head.output_projection, y, features, classes=len(self.head.target_embeddings)).mean()


def draw_recurrences(mean):
    """Huginn's draw: 1 + Poisson(exp(tau)), tau ~ N(ln(mean) - 0.5^2 / 2, 0.5^2), so 1 + mean on average."""
    tau = math.log(mean) - 0.5**2 / 2 + 0.5 * torch.randn((), dtype=torch.float64)
    return 1 + int(torch.poisson(tau.exp()))


def layer_evaluations(settings):
    """Layers evaluated in a training step, at the mean number of recurrences: {"forward": ..., "backward": ...}."""
    ends, passes = settings.prelude + settings.coda, 1
    if settings.baseline:
        passes = settings.recurrences or 1 + settings.mean_recurrence
    backward = min(settings.backprop_depth, passes)
    return {"forward": ends + settings.core * passes, "backward": ends + settings.core * backward}


@torch.no_grad()
def quality_by_sampling_steps(model, text, settings):
    """{K: bits per character}, on a part of the held-out text: with K steps (the bound of likelihood.nats_of_walk), or
    with K recurrences of the baseline (exact).
    """
    bits, generator = {}, torch.Generator().manual_seed(settings.seed)
    windows = 4 * EVALUATION_BATCH
    batches = list(text.heldout_batches(EVALUATION_BATCH, settings.seq_len, settings.device, windows, "test"))
    for k in K_VALUES:
        nats = 0.0
        for x, y in batches:
            if settings.baseline:
                log_p = model.networks[0](x, recurrences=k).log_softmax(-1)
                found = -float(log_p.gather(-1, y[..., None]).cpu().double().mean())
            else:
                sigmas = sampling_grid(model.partition, k)
                found = nats_of_walk(model.posterior(x), y, model.target_embeddings, sigmas, generator)
            nats += y.numel() * found  # the last batch may be smaller
        bits[str(k)] = text.bits_per_character(nats / sum(y.numel() for _, y in batches))
    return bits


def prepare(settings):
    """The text, and the noise levels, all owned by one network."""
    if settings.compile and settings.baseline:
        raise UsageError("--compile does nothing for the baseline, whose number of recurrences varies: drop it")
    if settings.baseline and settings.recurrences == 1 and settings.sampling_steps != 1:
        raise UsageError("--recurrences 1 trains a plain transformer, which cannot be looped: add --sampling-steps 1")
    text = load_text(
        settings.data, settings.tokenizer, seq_len=settings.seq_len, export=settings.export, kept=kept(settings)
    )
    note_vocabulary(text.tokenizer.classes, settings)
    text.tokenizer.encode(settings.prompt)  # refuses characters that are not in the data now, not after training
    return text, make_partition(NOISE[settings.noise], 1)


def build(b, settings, text, partition):
    """The one network; with --baseline Huginn's."""
    classes = text.tokenizer.classes
    target_embeddings = make_target_embeddings(classes, settings.width, settings.seed)
    looped = Looped(classes, settings, conditioned=not settings.baseline)
    if settings.baseline:
        return Huginn(looped, PosteriorHead(target_embeddings), settings)
    head = HEADS[settings.head](target_embeddings)
    return DiffusionBlock(looped, head, partition.noise, partition.interval(0), settings.loss_weight)


def batch(size, settings, text, partition):
    """Random windows of text x, and the tokens that follow, y: (size, T) each."""
    return text.batch(size, settings.seq_len, settings.device)


def complete(tokens, length, generator, settings, model, partition):
    """Continue tokens (n, m) by `length`."""
    sigmas = sampling_grid(partition, settings.sampling_steps)
    return generate(model, tokens, length, settings.seq_len, sigmas, settings.temperature, generator)


def sample(networks, count, settings, text, partition):
    """Sample sixteen tokens; the report measures the cost. (samples.txt is made by `complete`.)"""
    first = torch.zeros(count, 1, dtype=torch.long, device=settings.device)
    return complete(first, 16, None, settings, assemble(networks, partition), partition)


def score(model, text, settings):
    """Bits per character of held-out text, also by the number of sampling steps, as metrics."""
    metrics = score_text(model, text, settings.seq_len, settings.eval_windows, settings.seed, settings.device)
    metrics["bits_per_char_by_sampling_steps"] = by_steps = quality_by_sampling_steps(model, text, settings)
    metrics["layer_evaluations"] = layers = layer_evaluations(settings)
    kind = f"after {settings.sampling_steps} recurrences" if settings.baseline else "(upper bound)"
    validation = metrics["validation_bits_per_char"]
    print(f"{metrics['bits_per_char']:.4f} bits per character {kind}; on the validation half {validation:.4f}")
    print("bits per character by K:", *(f"{k}: {bits:.4f}" for k, bits in by_steps.items()))
    print(f"layers evaluated per step: {layers['forward']:g} forward, {layers['backward']:g} backward")
    return metrics


def evaluate(run, networks, text, partition):
    """The score on held-out text, also by the number of sampling steps, as metrics; samples.txt, and exported texts."""
    settings, model = run.settings, assemble(networks, partition)
    with run.autocast:  # as in training
        metrics = score(model, text, settings) if can_score(text) else {}
        run.log_evaluation(metrics)  # before samples, which may fail
        keep_samples(run, continue_prompt(text, complete, settings, model, partition))
        export_texts(run, text, complete, model, partition)
    return metrics


def main(flags=None):
    settings = read_settings("looped", Settings, PRESETS, RECIPES, __doc__, flags)
    text, partition = prepare(settings)
    run = Run("looped", settings, text.keeps(), data_sha256=text.sha256, **noise_identity(partition))

    for _ in run.rounds():  # each trains every block a part of its steps, then evaluates
        for b in run.blocks_to_train():  # the one network
            block = first_weights(build, b, settings, text, partition)  # from seed and b; run.steps loads later ones
            optimizer = make_optimizer(block, settings)
            for _ in run.steps(b, block, optimizer):  # resumes from the file; seeds, sets the rate, logs, saves
                x, y = batch(run.batch_size, settings, text, partition)
                with run.autocast:
                    loss = block.loss(x, y)
                loss.backward()
                run.average_gradients(block)  # does nothing, unless several processes share the block
                norm = nn.utils.clip_grad_norm_(block.parameters(), settings.clip)
                optimizer.step()
                optimizer.zero_grad()
                run.record(loss, norm)
            del block, optimizer, loss  # this block's memory is freed before the next one trains
        if run.ready():  # all blocks have been trained this round
            metrics = evaluate(run, run.trained_blocks(build, text, partition), text, partition)
    if run.finished:  # result.json and curves; memory and time, measured on networks built anew
        report(run, metrics, "bits_per_char", build, batch, sample, text, partition)


if __name__ == "__main__":
    command(main)
