"""What a Stack of next-token predictors is for: a score in bits per character, and writing."""

import torch

from nano_db.likelihood import measure, nats_of_priors, quadrature, split_by_block
from nano_db.run import write_text
from nano_db.sampler import draw, sample_classes

SAMPLE_TOKENS = 16  # to write, for the figures of one sample
EVALUATION_BATCH = 16  # windows at a time: larger ones gain nothing, and logits take memory


@torch.no_grad()
def evaluate(stack, text, seq_len, windows=0, seed=0, device="cpu"):
    """Score the held-out text (data/text.py): exact for a baseline, for blocks the bound of likelihood.py.

    windows: how many to score, 0 for all. Returns bits_per_char, nats_per_token and its split, nats_per_block.
    """
    generator = torch.Generator().manual_seed(seed)
    edges = stack.partition.edges[1:-1] if stack.denoises else ()
    levels = quadrature(stack.partition) if stack.shows_z else []
    summed, tokens = 0.0, 0
    for x, y in text.heldout_batches(EVALUATION_BATCH, seq_len, device):
        if stack.shows_z:
            sigmas = [sigma for _, sigma in levels]
            found = measure(stack.posterior(x), y, stack.codebook, sigmas, generator)
        else:
            found = nats_of_priors(stack.priors(x), y, stack.codebook, edges, generator)
        summed, tokens = summed + y.numel() * found, tokens + y.numel()
        if windows and tokens >= windows * seq_len:
            break
    nats = split_by_block(levels, summed / tokens) if stack.shows_z else summed / tokens
    total = float(nats.sum())
    return {
        "bits_per_char": text.bits_per_character(total),
        "nats_per_token": total,
        "nats_per_block": nats.tolist(),
    }


@torch.no_grad()
def generate(stack, tokens, length, seq_len, sigmas=None, temperature=1.0, generator=None):
    """Continue tokens (n, m) by `length`, each by a walk along `sigmas`. When the context is full (seq_len), it
    starts anew from its later half: rotary positions would allow longer contexts, but none was trained. Returns (n, m
    + length).
    """
    caches, first, cached = {}, 0, 0  # the window begins at token `first`; tokens before `cached` are in the caches
    for _ in range(length):
        if tokens.shape[1] - first > seq_len:
            caches, first = {}, tokens.shape[1] - seq_len // 2
            cached = first
        new = _next_token(stack, tokens[:, cached:], caches, sigmas, temperature, generator)
        cached = tokens.shape[1]
        tokens = torch.cat([tokens, new], dim=1)
    return tokens


def write_some(stack, count, seq_len, sigmas=None):
    """Write SAMPLE_TOKENS tokens after a first one, `count` times at once: what inference.py measures."""
    first = torch.zeros(count, 1, dtype=torch.long, device=stack.codebook.device)
    return generate(stack, first, SAMPLE_TOKENS, seq_len, sigmas, generator=torch.Generator().manual_seed(0))


def _next_token(stack, x, caches, sigmas, temperature, generator):
    """Draw the token after x (n, m), tokens whose keys and values the `caches` do not hold yet. (n, 1)"""
    if not stack.denoises:
        log_p = stack.priors(x, caches)[-1][:, -1:]
        return draw((log_p / temperature).log_softmax(-1), generator)
    posterior = stack.posterior(x, caches, temperature)
    known = stack.codebook[x[:, 1:]]  # what the z of earlier positions are noisy versions of

    def at_last_position(z, sigma):
        noisy = known + sigma * torch.randn(known.shape, generator=generator).to(known.device)
        return posterior(torch.cat([noisy, z], dim=1), sigma)[:, -1:]

    return sample_classes(at_last_position, stack.codebook, (len(x), 1), sigmas, generator)


def write_samples(stack, text, settings, sigmas, folder=None):
    """Print settings.samples texts that continue settings.prompt, and leave them in `folder`/samples.txt.

    A bar divides the prompt from what was written. Without a prompt, the first held-out tokens serve.
    """
    if not settings.samples:
        return
    prompt = list(text.tokenizer.encode(settings.prompt)) or text.heldout[:16].tolist()
    tokens = torch.tensor([prompt] * settings.samples, device=stack.codebook.device)
    generator, temperature = torch.Generator().manual_seed(settings.seed), settings.temperature
    tokens = generate(stack, tokens, settings.sample_length, settings.seq_len, sigmas, temperature, generator)
    decode = text.tokenizer.decode
    samples = [decode(row[: len(prompt)]) + "|" + decode(row[len(prompt) :]) for row in tokens.tolist()]
    print("", *samples, sep="\n---\n")
    if folder:
        write_text(folder / "samples.txt", "\n---\n".join(samples))
