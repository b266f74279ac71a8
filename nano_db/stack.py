"""Trained networks assembled: the blocks, of which one is active at each noise level; or end-to-end networks.

A Stack turns a condition x into a function of (z, sigma), the form that the sampler and the likelihood bound take:

    posterior = stack.posterior(x)
    posterior(z, sigma)                # ln p(y | z, x), (B, ..., V), for the noise level sigma
"""

import torch
import torch.nn as nn

from nano_db.block import DiffusionBlock
from nano_db.heads import log_likelihood
from nano_db.layers import Cache

PREDICT = ("active", "averaged")  # who predicts at a noise level: the block that owns it, or all blocks so far


class Stack:
    """blocks: DiffusionBlocks, noisiest first. partition: which is active at which noise level (partition.py).

    average: blocks with a DenoisingHead predict together (ours). The walk has passed blocks 0..b when it is at block b.
    By Bayes' rule all of them estimate the same ln p(y | x), so the mean of their residuals (each normalised to ln p)
    takes the place of block b's own: an ensemble. When sigma lies below the levels that a block was trained on, the
    block is given the lowest of them, since its answer should not depend on the level.
    """

    def __init__(self, blocks, partition, average=False):
        self.blocks, self.partition, self.average = blocks, partition, average
        self.target_embeddings = blocks[0].head.target_embeddings
        if average:
            assert not any(block.head.network_sees_z for block in blocks), "only denoising heads answer together"

    def posterior(self, x, caches=None, temperature=1.0):
        """A function (z, sigma) -> ln p(y | z, x).

        Trunks of blocks with a DenoisingHead are evaluated here, once for all calls; other networks at each call.
        caches: a dict in which networks keep keys and values of earlier positions; a network that is shown z has one
        for each noise level. temperature T: with a posterior or denoising head the network's part becomes
        p(y | x)^(1/T), and the likelihood of z stays as it is; the paper's head has its whole answer sharpened.
        """
        network_sees_z = self.blocks[0].head.network_sees_z
        if not network_sees_z:
            features = [block.network(x, **_cache(caches, b)) for b, block in enumerate(self.blocks)]

        def posterior(z, sigma):
            b = self.partition.route(sigma)
            if network_sees_z:
                return self.blocks[b](x, z, sigma, temperature, **_cache(caches, float(sigma))).log_softmax(-1)
            residuals = []
            for i in range(b + 1) if self.average else (b,):
                level = max(float(sigma), self.blocks[i].span[0])  # not below what it was trained on
                levels = torch.full((len(z),), level, dtype=z.dtype, device=z.device)
                residuals.append(self.blocks[i].head.residual(features[i], z, levels).log_softmax(-1))
            residual = torch.stack(residuals).mean(0)
            return (residual / temperature + log_likelihood(z, float(sigma), self.target_embeddings)).log_softmax(-1)

        return posterior


class Ensemble(nn.Module):
    """End-to-end networks, trained independently and used as one; usually there is just one. The answer is the mean
    of their answers: D, each an estimate of E[y | z]; or logits, whose mean is, once normalised, that of ln p.
    """

    def __init__(self, networks):
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, *inputs, caches=None):
        answers = [network(*inputs, **_cache(caches, i)) for i, network in enumerate(self.networks)]
        return torch.stack([answer.float() for answer in answers]).mean(0)

    def log_p(self, x, caches=None):
        """ln p(y | x) of networks for labels or tokens, (B, ..., V). caches: as in Stack.posterior."""
        return self(x, caches=caches).log_softmax(-1)

    @property
    def target_embeddings(self):
        return self.networks[0].head.target_embeddings


def assemble(networks, partition, predict="active"):
    """Trained DiffusionBlocks as a Stack, end-to-end networks as an Ensemble. predict: one of PREDICT."""
    assert predict in PREDICT, predict
    if isinstance(networks[0], DiffusionBlock):
        return Stack(networks, partition, average=predict == "averaged")
    return Ensemble(networks)


def _cache(caches, key):
    return {} if caches is None else {"cache": caches.setdefault(key, Cache())}
