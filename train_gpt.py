"""A GPT trained in blocks that never see each other.

    python train_gpt.py --blocks 4                         # 10 minutes on one CPU core, no download needed
    python train_gpt.py --baseline                         # the same layers, end to end
    python train_gpt.py --eval-only --prompt "def "        # sample from what was trained
    python train_gpt.py --recipe paper --out out/paper     # the paper's own choices

Each block is a small GPT with L/B of the layers. Its target is the next token, as a point on the unit sphere with noise
added (heads.py), at the noise levels that the block owns, and a little beyond (partition.py). Its loss is
`DiffusionBlock.loss` (block.py): no other block is in it. To sample a token, a point walks from pure noise through the
levels of block 0, then of block 1, and so on; at the last level the token is drawn (sampler.py). We evaluate the blocks
with an upper bound on bits per character (likelihood.py).
"""

from dataclasses import dataclass

import torch
import torch.nn as nn

from data.text import load_text
from nano_db.block import DiffusionBlock, EndToEnd
from nano_db.errors import UsageError
from nano_db.heads import HEADS, PosteriorHead, make_target_embeddings
from nano_db.language import generate, score_text
from nano_db.layers import Layer, NoiseEmbedding, causal_mask, rms_norm, rotary_angles
from nano_db.partition import make_partition, sampling_grid, split_layers
from nano_db.schedule import LogNormal
from nano_db.stack import PREDICT, assemble
from nano_db.trainer.checkpoints import kept
from nano_db.trainer.command import command
from nano_db.trainer.report import can_score, continue_prompt, export_texts, keep_samples, note_vocabulary, report
from nano_db.trainer.run import Run, first_weights, make_optimizer, noise_identity
from nano_db.trainer.settings import Blocks, Discrete, Training, method, network, output, read_settings, training


@dataclass
class Settings(Discrete, Blocks, Training):
    # Skip these at first: begin with main(), at the end, then build() and GPT. method, network, training and output are
    # headings of --help; `of`, `needs`, `once`, ... only check flags. More settings: trainer/settings.py (layers, ...).
    data: str = training("python", "text: python, pydocs, shakespeare, text8, or the path of a UTF-8 file")
    tokenizer: str = training("char", "characters, or GPT-2's byte pairs", choices=("char", "gpt2"))
    seq_len: int = network(128, "tokens of context", at_least=2)
    width: int = network(128, "features of a token", at_least=2)
    heads: int = network(4, "attention heads", flag=False)
    dropout: float = training(0.0, "on both residual branches", flag=False)
    head: str = method("denoising", "output head (heads.py)", choices=tuple(HEADS), of="blocks")
    clean_weight: float = method(
        0.0, "weight of the loss at z = 0 (recipe nano: 1)", at_least=0, of="blocks", idle=Discrete.other_head
    )
    predict: str = method("averaged", "the active block, or mean of all so far", PREDICT, of="blocks", resumable=True)
    sampling_steps_per_block: int = method(4, "Euler steps of each block, per token", flag=False, resumable=True)
    eval_windows: int = output(256, "test windows to evaluate on (and as many for validation); 0: all", at_least=0)
    export: int = output(0, "held-out texts to continue after their first quarter (texts.jsonl)", at_least=0, once=True)
    prompt: str = output("", "text to continue (default: the first held-out tokens)", once=True, needs="samples")
    temperature: float = output(0.8, "below 1: more cautious samples", at_least=0.01, needs="samples export")
    sample_length: int = output(500, "tokens to sample", flag=False)


PRESETS = {
    "tiny": dict(layers=12, width=24, heads=2, seq_len=16, batch_size=8, steps=40, warmup=5, sample_length=40,
                 eval_windows=16, data="pydocs"),
    "laptop": dict(layers=8, width=128, heads=4, seq_len=128, batch_size=16, steps=1000, warmup=100, rounds=2,
                   learning_rate=3e-3),
    "gpu": dict(layers=12, width=384, heads=6, seq_len=256, batch_size=64, steps=3000, warmup=150, rounds=4,
                dropout=0.1),
    "paper": dict(layers=12, width=768, heads=12, seq_len=256, batch_size=256, steps=100_000, warmup=2500,
                  learning_rate=3e-4, tokenizer="gpt2", data=""),  # LM1B or OpenWebText, which --data has to name
}  # fmt: skip
RECIPES = {
    "nano": dict(head="denoising", predict="averaged", loss_weight="none", noise="nano", clean_weight=1.0),
    "paper": dict(head="paper", predict="active", loss_weight="edm", noise="paper"),
}
NOISE = {
    # Below sigma = 0.2, z by itself identifies 98% of 96 characters, and the text is not needed. Ours draws 1% of its
    # levels there, and the rest where the text must help. The paper's is EDM's, made for images.
    "nano": LogNormal(p_mean=0.3, p_std=0.8, sigma_min=0.05, sigma_max=20.0),
    "paper": LogNormal(p_mean=-1.2, p_std=1.2, sigma_min=0.002, sigma_max=80.0),
}


class GPT(nn.Module):
    """Embedding and `layers` causal layers: features of the next token, (B, T, width), for the head to read.

    Without sees_z it is a plain GPT: the trunk of a block with a denoising head, and the baseline. With it, it is the
    paper's network of two streams: a clean copy of the sequence, and a noisy one in which position t holds the noisy
    token t + 1 and attends to the clean past and itself.
    """

    def __init__(self, classes, settings, layers, sees_z=False):
        super().__init__()
        width, self.head_width = settings.width, settings.width // settings.heads
        self.embedding = nn.Embedding(classes, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        cond_width = max(8, width // 6) if sees_z else 0
        if sees_z:
            self.noise_embedding = NoiseEmbedding(cond_width)
            self.from_z = nn.Linear(width, width, bias=False)
        shape = width, settings.heads, cond_width, settings.dropout
        self.layers = nn.ModuleList(Layer(*shape, depth=layers) for _ in range(layers))

    def forward(self, x, z=None, c_noise=None, cache=None):
        """x (B, T) tokens; with two streams also z (B, T, width), scaled noisy targets, and c_noise (B,). cache: what
        layers keep of earlier tokens while text is generated.
        """
        T = x.shape[1]
        past = cache.begin(T) if cache else 0
        positions = torch.arange(past, past + T, device=x.device)
        h = self.embedding(x)  # (B, T, width)
        cond, mask = None, None
        causal = past == 0 and T > 1
        if past and T > 1:  # (a single new token attends to everything)
            mask = causal_mask(T, past, x.device)
        if z is not None:
            cond = self.noise_embedding(c_noise)
            h = torch.cat([h, self.from_z(z)], dim=1)  # (B, 2T, width)
            positions = torch.cat([positions, positions + 1])  # the noisy token stands where its clean one will
            causal, mask = False, two_stream_mask(T, past, x.device)
        rotary = rotary_angles(positions, self.head_width)
        for layer in self.layers:
            h = layer(h, rotary, cond, mask, causal, cache)
        return rms_norm(h[:, -T:])  # of two streams, the noisy one


def two_stream_mask(T, past, device):
    """(2T, past + 2T): clean queries see clean positions up to their own; noisy ones see these and themselves.

    clean: [causal, 0     ]
    noisy: [causal, itself]
    """
    clean, itself = causal_mask(T, past, device), torch.eye(T, dtype=torch.bool, device=device)
    return torch.cat([torch.cat([clean, torch.zeros_like(itself)], 1), torch.cat([clean, itself], 1)])


def prepare(settings):
    """What all blocks share, and none trains: the text, and which noise levels are whose."""
    if settings.predict == "averaged" and settings.head != "denoising":
        raise UsageError("--predict averaged needs --head denoising: use --predict active")
    text = load_text(
        settings.data, settings.tokenizer, seq_len=settings.seq_len, export=settings.export, kept=kept(settings)
    )
    note_vocabulary(text.tokenizer.classes, settings)
    text.tokenizer.encode(settings.prompt)  # refuses characters that the data lacks: now, and not after training
    blocks = 1 if settings.baseline else settings.blocks
    return text, make_partition(NOISE[settings.noise], blocks, overlap=settings.overlap)


def build(b, settings, text, partition):
    """Block b; with --baseline the whole network."""
    classes = text.tokenizer.classes
    target_embeddings = make_target_embeddings(classes, settings.width, settings.seed)
    if settings.baseline:  # of its head, only the output projection is used
        return EndToEnd(GPT(classes, settings, settings.layers), PosteriorHead(target_embeddings))
    head = HEADS[settings.head](target_embeddings)
    layers = split_layers(settings.layers, settings.blocks)[b]
    gpt = GPT(classes, settings, layers, sees_z=head.network_sees_z)
    clean_weight = 0.0 if head.network_sees_z else settings.clean_weight  # the recipe sets it, whatever the head
    span = partition.training_range(b)
    return DiffusionBlock(gpt, head, partition.noise, span, settings.loss_weight, clean_weight)


def batch(size, settings, text, partition):
    """Random windows of text x, and the tokens that follow, y: (size, T) each."""
    return text.batch(size, settings.seq_len, settings.device)


def complete(tokens, length, generator, settings, model, partition):
    """Continue tokens (n, m) by `length`."""
    sigmas = sampling_grid(partition, settings.sampling_steps_per_block * partition.blocks)
    return generate(model, tokens, length, settings.seq_len, sigmas, settings.temperature, generator)


def sample(networks, count, settings, text, partition):
    """Sample sixteen tokens; the report measures the cost. (samples.txt is made by `complete`.)"""
    first = torch.zeros(count, 1, dtype=torch.long, device=settings.device)
    return complete(first, 16, None, settings, assemble(networks, partition, settings.predict), partition)


def score(model, text, settings):
    """Bits per character of held-out text, and each block's share of the nats, as metrics."""
    metrics = score_text(model, text, settings.seq_len, settings.eval_windows, settings.seed, settings.device)
    kind = "" if settings.baseline else " (upper bound)"
    validation = metrics["validation_bits_per_char"]
    print(f"{metrics['bits_per_char']:.4f} bits per character{kind}; on the validation half {validation:.4f}")
    print("nats per token, by block:", *(f"{share:.4f}" for share in metrics["nats_per_block"]))
    return metrics


def evaluate(run, networks, text, partition):
    """The score on held-out text, as metrics; samples.txt, and texts to export."""
    settings, model = run.settings, assemble(networks, partition, run.settings.predict)
    with run.autocast:  # as in training
        metrics = score(model, text, settings) if can_score(text) else {}
        run.log_evaluation(metrics)  # before samples, which may fail
        keep_samples(run, continue_prompt(text, complete, settings, model, partition))
        export_texts(run, text, complete, model, partition)
    return metrics


def main(flags=None):
    settings = read_settings("gpt", Settings, PRESETS, RECIPES, __doc__, flags)
    text, partition = prepare(settings)
    run = Run("gpt", settings, text.keeps(), data_sha256=text.sha256, **noise_identity(partition))

    for _ in run.rounds():  # each trains every block a part of its steps, then evaluates
        for b in run.blocks_to_train():  # every block in turn; with --only or torchrun, some of them
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
