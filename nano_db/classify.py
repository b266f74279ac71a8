"""Predict a class with a Stack: by a walk from noise, by a walk without noise, or by the mean of several walks.

The walk draws a class from p(y | x), as a sampler should. A classifier should predict the most probable class instead:
so the walk may start from z = 0, where there is no noise to mislead it, or many walks may be averaged.
"""

import torch

from nano_db.heads import mean_embedding
from nano_db.images import TEST, VALIDATION
from nano_db.sampler import euler_walk
from nano_db.stack import Ensemble


def after_each_block(posterior, stack, sigmas, z):
    """ln p(y | z, x) at the last step of each block, for a walk along `sigmas` (which end at 0) from z (B, d).

    posterior: stack.posterior(x). Returns a list of (B, V), noisiest block first.
    """
    answers = {}

    def denoise(z, sigma):
        log_p = answers[stack.partition.route(sigma)] = posterior(z, sigma)  # keeps each block's last answer
        return mean_embedding(log_p, stack.target_embeddings)

    for _ in euler_walk(denoise, z, sigmas):
        pass
    return list(answers.values())


@torch.no_grad()
def classify(stack, x, sigmas=None):
    """ln p(y | x) for images x (B, ...), (B, V): by the noise-free walk; for an Ensemble, directly."""
    if isinstance(stack, Ensemble):
        return stack.log_p(x)
    nothing = torch.zeros(len(x), stack.target_embeddings.shape[1], device=x.device)
    return after_each_block(stack.posterior(x), stack, sigmas, nothing)[-1]


@torch.no_grad()
def score_images(stack, batches, sigmas=None, walks=8, seed=0):
    """Accuracies on held-out images. batches: yields (x, labels).
    For an Ensemble: accuracy. For blocks: accuracy_walk, with one walk from noise (the paper's way),
    accuracy_mean_of_walks, and accuracy_noise_free (also as `accuracy`); the first and the last also after each block.
    All are measured on the test half (images.TEST); validation_accuracy is measured on the other half.

    Returns (metrics, log_p (N, V) behind `accuracy`, labels (N,)), both on the CPU.
    """
    generator, right, all_log_p, all_labels = torch.Generator().manual_seed(seed), {}, [], []

    def count(name, answers, labels):
        hits = torch.stack([log_p.argmax(-1) == labels for log_p in answers])  # (answers, B)
        right.setdefault(name, []).append(hits.cpu().double())

    for x, labels in batches:
        if isinstance(stack, Ensemble):
            log_p = stack.log_p(x)
            count("accuracy", [log_p], labels)
        else:
            nothing = torch.zeros(len(x), stack.target_embeddings.shape[1], device=x.device)
            posterior = stack.posterior(x)  # for all walks: trunks are evaluated once
            noise_free = after_each_block(posterior, stack, sigmas, nothing)
            count("accuracy_noise_free", noise_free, labels)
            noise = [float(sigmas[0]) * torch.randn(nothing.shape, generator=generator) for _ in range(walks)]
            noisy = [after_each_block(posterior, stack, sigmas, z.to(x.device)) for z in noise]
            count("accuracy_walk", noisy[0], labels)
            count("accuracy_mean_of_walks", [torch.stack([answers[-1].exp() for answers in noisy]).mean(0)], labels)
            log_p = noise_free[-1]
        all_log_p.append(log_p.float().cpu())
        all_labels.append(labels.cpu())
    log_p, labels = torch.cat(all_log_p), torch.cat(all_labels)
    hits = {name: torch.cat(parts, dim=1) for name, parts in right.items()}  # (answers, N)
    shares = {name: found[:, TEST].mean(1).tolist() for name, found in hits.items()}
    metrics = {name: after[-1] for name, after in shares.items()}
    best = "accuracy" if isinstance(stack, Ensemble) else "accuracy_noise_free"
    metrics |= {"accuracy": metrics[best], "validation_accuracy": float(hits[best][-1, VALIDATION].mean())}
    if not isinstance(stack, Ensemble):
        for name in ("walk", "noise_free"):
            metrics[f"accuracy_{name}_after_each_block"] = shares[f"accuracy_{name}"]
    return metrics, log_p, labels
