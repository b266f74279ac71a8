"""The trained blocks put together: at each noise level, one block answers.

A Stack turns a condition x into a function of (z, sigma), the form that the sampler and the likelihood bound take:

    posterior = stack.posterior(x)
    posterior(z, sigma)                # ln p(y | z, x), (B, ..., V), by the block that owns sigma
"""

import torch

from nano_db.codebook import log_likelihood
from nano_db.layers import Cache


class Stack:
    """blocks: DiffusionBlocks, noisiest first, with their Partition; or EndToEnd networks without one.

    average: for networks that are not shown z, let block b speak for all blocks so far: the mean of their ln p(y | x).
    The walk is at block b after it has passed blocks 0..b, and each has had its say, so that this is an ensemble at no
    extra cost (ours). End-to-end networks have no order: their mean is an ordinary ensemble.
    """

    def __init__(self, blocks, partition=None, average=False):
        self.blocks, self.partition, self.average = blocks, partition, average
        self.codebook = blocks[0].head.codebook
        self.denoises = partition is not None
        self.shows_z = self.denoises and blocks[0].shows_z
        assert not (average and self.shows_z), "an average needs networks that are not shown z"

    def priors(self, x, caches=None):
        """ln p(y | x) as each block says it, for networks not shown z: a list of (B, ..., V); of an ensemble, one."""
        said = [block.log_prior(x, **_cache(caches, b)) for b, block in enumerate(self.blocks)]
        if not self.denoises:
            return [torch.stack(said).mean(0).log_softmax(-1)]
        if self.average:
            said = [torch.stack(said[: b + 1]).mean(0).log_softmax(-1) for b in range(len(said))]
        return said

    def posterior(self, x, caches=None, temperature=1.0):
        """A function (z, sigma) -> ln p(y | z, x).

        A network that is shown z answers anew at each call; one that is not is asked once, however many calls the walk
        makes. caches: a dict in which networks keep keys and values between positions, the former for each noise level.
        temperature T sharpens the network's part: p(y | x)^(1/T) with a posterior head, which leaves the likelihood of
        z as it is; the whole answer with the paper's head.
        """
        priors = None if self.shows_z else self.priors(x, caches)

        def posterior(z, sigma):
            sigma = float(sigma)
            b = self.partition.route(sigma)
            if self.shows_z:
                logits = self.blocks[b](x, z, sigma, temperature, **_cache(caches, sigma))
            else:
                logits = priors[b] / temperature + log_likelihood(z, sigma, self.codebook)
            return logits.log_softmax(-1)

        return posterior


def _cache(caches, key):
    return {} if caches is None else {"cache": caches.setdefault(key, Cache())}
