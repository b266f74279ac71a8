"""A GPT trained in blocks that never see each other.

    python train_gpt.py --blocks 4                         # 13 minutes on one CPU core, no network needed
    python train_gpt.py --baseline                         # the same network, end to end
    python train_gpt.py --eval-only --prompt "The "        # write with what was trained
    python train_gpt.py --recipe paper --out out/paper     # the paper's own choices

Each block is a small GPT with L/B of the layers. Its target is the next token, as a point on the unit sphere with noise
on it (heads.py), at the noise levels that the block owns (partition.py). Its loss is `DiffusionBlock.loss` (block.py).
A trained stack writes a token by walking from pure noise to a code vector, handed from block to block on the way
(sampler.py). What it is worth is measured in bits per character, by a bound (likelihood.py).
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn

from data.text import load_text
from nano_db.block import DiffusionBlock, EndToEnd
from nano_db.codes import neighbour_codes, with_codes
from nano_db.errors import UsageError
from nano_db.heads import HEADS, PosteriorHead, make_codebook
from nano_db.laboratory.benchmark import Bench
from nano_db.laboratory.export import export_texts
from nano_db.language import continue_prompt, generate, score_text, writer
from nano_db.layers import Layer, NoiseEmbedding, causal_mask, layer_norm, rotary_angles
from nano_db.machinery.run import Run, command, make_optimizer
from nano_db.machinery.settings import Blocks, Discrete, Training, method, network, output, read_settings, training
from nano_db.partition import make_partition, sampling_grid, split_layers
from nano_db.schedule import Information, LogNormal
from nano_db.stack import put_together


@dataclass
class Settings(Discrete, Blocks, Training):
    data: str = training("pydocs", "text: pydocs, shakespeare, text8, or the path of a UTF-8 file")
    tokenizer: str = training("char", "characters, words, or GPT-2's byte pairs", choices=("char", "word", "gpt2"))
    seq_len: int = network(128, "tokens of context", least=2)
    width: int = network(128, "features of a token", least=2)
    heads: int = network(4, "attention heads", flag=False)
    dropout: float = network(0.0, "on both residual branches", flag=False)
    partition: str = method(
        "probability", "edges of equal mass, or uniform in ln sigma", ("probability", "uniform"), of="blocks"
    )
    codebook: str = method("random", "random: tables are learned; data: codes (codes.py)", ("random", "data"))
    head: str = method("denoising", "output head (heads.py)", choices=tuple(HEADS), of="blocks")
    walk: str = method(
        "averaged", "who answers: the block at work, or all so far", ("last", "averaged"), of="blocks", resumable=True
    )
    calls_per_block: int = method(4, "Euler calls of each block, a token", flag=False, resumable=True)
    eval_windows: int = output(0, "held-out windows to evaluate on; 0: all", least=0)
    export: int = output(0, "held-out texts to continue after their first quarter (texts.jsonl)", least=0, once=True)
    prompt: str = output("", "what samples continue (default: the first held-out tokens)", once=True, needs="samples")
    temperature: float = output(0.8, "of the samples; below 1 is more cautious", least=0.01, needs="samples export")
    sample_length: int = output(500, "tokens to write", flag=False)


PRESETS = {
    "tiny": dict(
        layers=12, width=24, heads=2, seq_len=16, batch_size=8, steps=40, warmup=5, sample_length=40, eval_windows=32,
    ),
    "laptop": dict(layers=8, width=128, heads=4, seq_len=128, batch_size=16, steps=2000, warmup=100, rounds=4),
    "gpu": dict(
        layers=12, width=384, heads=6, seq_len=256, batch_size=64, steps=3000, warmup=150, rounds=4, dropout=0.1,
    ),
    "paper": dict(
        layers=12, width=768, heads=12, seq_len=256, batch_size=256, steps=100_000, warmup=2500, learning_rate=3e-4,
        tokenizer="gpt2", data="",  # LM1B or OpenWebText, which --data has to name
    ),
}  # fmt: skip
RECIPES = {
    "nano": dict(head="denoising", walk="averaged", loss_weight="none", noise="nano"),
    "paper": dict(head="paper", walk="last", loss_weight="edm", noise="paper"),
}
NOISE = {
    # Where z alone names the token (for 65 characters below sigma = 0.35) there is nothing to learn of the text: ours
    # spends 5% of its draws there, and the others where the text must help. The paper's is EDM's, made for images.
    "nano": LogNormal(p_mean=0.3, p_std=0.8, sigma_min=0.05, sigma_max=20.0),
    "paper": LogNormal(p_mean=-1.2, p_std=1.2, sigma_min=0.002, sigma_max=80.0),
}


class GPT(nn.Module):
    """Embedding and `layers` causal layers: features of the next token, (B, T, width), for the head to read.

    By itself it is a plain GPT: the trunk of a block with a denoising head, and the baseline. With shows_z it is the
    paper's network of two streams: a clean copy of the sequence, and a noisy one in which position t holds the noisy
    token t + 1 and looks at the clean past and at itself.
    """

    def __init__(self, classes, settings, layers, shows_z=False):
        super().__init__()
        width, self.head_width = settings.width, settings.width // settings.heads
        self.embedding = nn.Embedding(classes, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        cond_width = max(8, width // 6) if shows_z else 0
        if shows_z:
            self.noise_embedding = NoiseEmbedding(cond_width)
            self.from_z = nn.Linear(width, width, bias=False)
        self.layers = nn.ModuleList(Layer(width, settings.heads, cond_width, settings.dropout) for _ in range(layers))

    def forward(self, x, z=None, c_noise=None, cache=None):
        """x (B, T) tokens; of two streams also z (B, T, width), scaled noisy targets, and c_noise (B,)."""
        T, past = x.shape[1], cache.length if cache else 0
        positions = torch.arange(past, past + T, device=x.device)
        h = self.embedding(x)  # (B, T, width)
        cond, causal = None, past == 0 and T > 1
        mask = causal_mask(T, past, x.device) if past and T > 1 else None
        if z is not None:
            cond = self.noise_embedding(c_noise)
            h = torch.cat([h, self.from_z(z)], dim=1)  # (B, 2T, width)
            positions = torch.cat([positions, positions + 1])  # the noisy token stands where it will be written
            causal, mask = False, two_stream_mask(T, past, x.device)
        rotary = rotary_angles(positions, self.head_width)
        for i, layer in enumerate(self.layers):
            remember = None if cache is None else partial(cache.extend, i, keep=T)
            h = layer(h, rotary, cond, mask, causal, remember)
        return layer_norm(h[:, -T:])


def two_stream_mask(T, past, device):
    """(2T, past + 2T): clean queries see clean positions up to their own; noisy ones these and themselves."""
    clean, itself = causal_mask(T, past, device), torch.eye(T, dtype=torch.bool, device=device)
    return torch.cat([torch.cat([clean, torch.zeros_like(itself)], 1), torch.cat([clean, itself], 1)])


def main():
    settings = read_settings("gpt", Settings, PRESETS, RECIPES, __doc__)
    if settings.walk == "averaged" and settings.head != "denoising":
        raise UsageError("--walk averaged needs --head denoising: take --walk last")
    text = load_text(settings.data, settings.tokenizer, seq_len=settings.seq_len, export=settings.export)
    text.tokenizer.encode(settings.prompt)  # a character that is not in the data: say so now, not after the training
    classes, device = text.tokenizer.classes, settings.device

    # What every block knows without being told: the code vectors, the noise levels, and who owns which.
    codebook = make_codebook(classes, settings.width, settings.seed)
    noise = NOISE.get(settings.noise) or Information(text.frequencies(), codebook, seed=settings.seed)
    blocks = 1 if settings.baseline else settings.blocks
    partition = make_partition(noise, blocks, settings.partition, settings.overlap)
    layers = split_layers(settings.layers, blocks)
    sigmas = sampling_grid(noise, partition, settings.calls_per_block * blocks)
    average = settings.walk == "averaged"

    def make_block(b):
        head = HEADS[settings.head]
        network = GPT(classes, settings, layers[b], shows_z=not head.sees_z)
        span = partition.training_range(b)
        return DiffusionBlock(network, head(codebook), noise, span, loss_weight=settings.loss_weight)

    def make_baseline(b):
        return EndToEnd(GPT(classes, settings, settings.layers), PosteriorHead(codebook))

    def write(networks, count):  # the cost of a sample is measured by 16 tokens
        first = torch.zeros(count, 1, dtype=torch.long, device=device)
        model = put_together(networks, partition, average)
        return generate(model, first, 16, settings.seq_len, sigmas)

    run = Run("gpt", settings, data_sha256=text.sha256, edges=[round(edge, 5) for edge in partition.edges])
    if settings.codebook == "data":
        codes = run.keep("codes", lambda: neighbour_codes(text.train, classes, settings.width, settings.seed))
        use = partial(with_codes, [rows.to(device) for rows in codes], text.frequencies())  # one copy for all
        make_block, make_baseline = use(make_block), use(make_baseline)
    make = make_baseline if settings.baseline else make_block
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
            model = put_together(run.trained_blocks(make), partition, average)
            with run.autocast:  # as in training
                metrics = score_text(model, text, settings.seq_len, settings.eval_windows, settings.seed, device)
                print(f"{metrics['bits_per_char']:.4f} bits per character", "" if settings.baseline else "(bound)")
                print("nats by block:", *(f"{share:.4f}" for share in metrics["nats_per_block"]))
                run.log_evaluation(metrics)
                run.keep_samples(continue_prompt(model, text, settings, sigmas))
                export_texts(run, text, writer(model, settings, sigmas))
            del model  # all blocks at once: the next round has no room for them
    if run.complete():
        bench.report(metrics, "bits_per_char", "bits per character")


if __name__ == "__main__":
    command(main)
