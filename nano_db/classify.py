"""Reading a class out of a Stack: by a walk from noise, by a walk without noise, or by the mean of several walks.

The walk draws a class from p(y | x), which is right for a sampler. A classifier should name the most probable class
instead: so the walk may start from z = 0, where no noise leads it astray, or many walks may be averaged.
"""

import torch

from nano_db.sampler import euler_walk


def after_each_block(stack, x, sigmas, z):
    """ln p(y | z, x) at the last call of each block, for a walk along `sigmas` from z (B, d). A list of (B, V),
    noisiest block first. The last of `sigmas` is 0.
    """
    return _walk(stack, stack.posterior(x), sigmas, z)


def _walk(stack, posterior, sigmas, z):
    said = {}

    def denoise(z, sigma):
        log_p = said[stack.partition.route(sigma)] = posterior(z, sigma)  # a block's last word stays
        return log_p.exp() @ stack.codebook

    for _ in euler_walk(denoise, z, sigmas):
        pass
    return list(said.values())


@torch.no_grad()
def classify(stack, x, sigmas=None):
    """ln p(y | x) of images x (B, ...), (B, V): by the noise-free walk; of end-to-end networks, at once."""
    if not stack.denoises:
        return stack.priors(x)[-1]
    return after_each_block(stack, x, sigmas, torch.zeros(len(x), stack.codebook.shape[1], device=x.device))[-1]


@torch.no_grad()
def evaluate(stack, batches, sigmas=None, walks=8, seed=0):
    """Shares of test images named right. batches: yields (x, labels).

    For end-to-end networks: accuracy. For blocks: accuracy_walk, of one walk from noise (the paper's readout),
    accuracy_mean_of_walks, accuracy_noise_free, and of the first and the last of these also the accuracy
    that they have reached after each block; `accuracy` is that of the noise-free walk.

    Returns (metrics, log_p (N, V) of the readout behind `accuracy`, labels (N,)), both on the CPU.
    """
    generator, right, all_log_p, all_labels = torch.Generator().manual_seed(seed), {}, [], []

    def count(name, said, labels):
        hits = torch.tensor([float((log_p.argmax(-1) == labels).sum()) for log_p in said])
        right[name] = right.get(name, 0) + hits

    for x, labels in batches:
        if stack.denoises:
            nothing = torch.zeros(len(x), stack.codebook.shape[1], device=x.device)
            posterior = stack.posterior(x)  # once for all walks: networks that are not shown z answer here
            noise_free = _walk(stack, posterior, sigmas, nothing)
            count("accuracy_noise_free", noise_free, labels)
            noise = [float(sigmas[0]) * torch.randn(nothing.shape, generator=generator) for _ in range(walks)]
            noisy = [_walk(stack, posterior, sigmas, z.to(x.device)) for z in noise]
            count("accuracy_walk", noisy[0], labels)
            count("accuracy_mean_of_walks", [torch.stack([said[-1].exp() for said in noisy]).mean(0)], labels)
            log_p = noise_free[-1]
        else:
            log_p = classify(stack, x)
            count("accuracy", [log_p], labels)
        all_log_p.append(log_p.float().cpu())
        all_labels.append(labels.cpu())
    log_p, labels = torch.cat(all_log_p), torch.cat(all_labels)
    shares = {name: (hits / len(labels)).tolist() for name, hits in right.items()}
    metrics = {name: after[-1] for name, after in shares.items()}
    if stack.denoises:
        metrics["accuracy"] = metrics["accuracy_noise_free"]
        for name in ("walk", "noise_free"):
            metrics[f"accuracy_{name}_after_each_block"] = shares[f"accuracy_{name}"]
    return metrics, log_p, labels
