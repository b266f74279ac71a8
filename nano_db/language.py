"""What trained next-token predictors are for: scoring text in bits per character, and generating it."""

import torch

from nano_db.heads import MOST_LOGITS
from nano_db.likelihood import measure, quadrature, split_by_block
from nano_db.sampler import draw, sample_classes
from nano_db.stack import Ensemble

EVALUATION_BATCH = 16  # windows at a time, at most: larger batches gain nothing, and logits take memory


@torch.no_grad()
def score_text(model, text, seq_len, windows=0, seed=0, device="cpu"):
    """Score held-out text (data/text.py): exact for an Ensemble, for a Stack the bound of likelihood.py. windows: how
    many of each half to score, 0 for all. Returns bits_per_char, nats_per_token and its split, nats_per_block, all on
    the test half; and validation_bits_per_char.
    """
    together = max(1, min(EVALUATION_BATCH, MOST_LOGITS // (seq_len * len(model.target_embeddings))))
    nats = {}
    for half in ("validation", "test"):
        batches = text.heldout_batches(together, seq_len, device, windows, half)
        nats[half] = mean_nats(model, batches, torch.Generator().manual_seed(seed))
    return text_metrics(text, nats)


def text_metrics(text, nats):
    """The metrics of a text. nats: {"validation" and "test": nats per token, split by block, (blocks,)}."""
    total, shares = float(nats["test"].sum()), nats["test"].tolist()
    metrics = {"bits_per_char": text.bits_per_character(total), "nats_per_token": total, "nats_per_block": shares}
    return metrics | {"validation_bits_per_char": text.bits_per_character(float(nats["validation"].sum()))}


def mean_nats(model, batches, generator):
    """Nats per token of batches (x, y), split by block. (blocks,) float64"""
    levels = [] if isinstance(model, Ensemble) else quadrature(model.partition)
    sigmas = [sigma for _, sigma in levels]
    summed, tokens = 0.0, 0
    for x, y in batches:
        if isinstance(model, Ensemble):
            found = -model.log_p(x).gather(-1, y[..., None]).cpu().double().mean().view(1)
        else:
            found = measure(model.posterior(x), y, model.target_embeddings, sigmas, generator)
        summed, tokens = summed + y.numel() * found, tokens + y.numel()
    return split_by_block(levels, summed / tokens) if levels else summed / tokens


@torch.no_grad()
def generate(model, tokens, length, seq_len, sigmas=None, temperature=1.0, generator=None):
    """Continue tokens (n, m) by `length`, each drawn by a walk along `sigmas`: (n, m + length). When the context is
    full (seq_len), only its second half is kept: rotary positions would allow more, but no longer one was trained.
    """
    caches, first, cached = {}, 0, 0  # the window begins at token `first`; tokens before `cached` are in the caches
    for _ in range(length):
        if tokens.shape[1] - first > seq_len:
            caches, first = {}, tokens.shape[1] - seq_len // 2
            cached = first
        new = _next_token(model, tokens[:, cached:], caches, sigmas, temperature, generator)
        cached = tokens.shape[1]
        tokens = torch.cat([tokens, new], dim=1)
    return tokens


def _next_token(model, x, caches, sigmas, temperature, generator):
    """Draw the token after x (n, m), the tokens whose keys and values are not in `caches` yet. (n, 1)"""
    if isinstance(model, Ensemble):
        log_p = model.log_p(x, caches)[:, -1:]
        return draw((log_p / temperature).log_softmax(-1), generator)
    posterior = model.posterior(x, caches, temperature)
    # Clean targets of earlier positions. Only a network whose states attend to each other uses them (train_looped.py).
    known = model.target_embeddings[x[:, 1:]]

    def at_last_position(z, sigma):
        noisy = known + sigma * torch.randn(known.shape, generator=generator).to(known.device)
        return posterior(torch.cat([noisy, z], dim=1), sigma)[:, -1:]

    return sample_classes(at_last_position, model.target_embeddings, (len(x), 1), sigmas, generator)
