"""The trained blocks put together: at each noise level, one block answers.

A Stack turns a condition x into a function of (z, sigma), the form that the sampler and the likelihood bound take:

    posterior = stack.posterior(x)         # says nothing yet
    posterior(z, sigma)                    # ln p(y | z, x), (B, ..., V), by the block that owns sigma
"""

import torch

from nano_db.codebook import log_likelihood
from nano_db.layers import Cache


class Stack:
    """blocks: DiffusionBlocks, noisiest first, with their Partition; or EndToEnd networks without one, an ensemble.

    average: the averaged walk (ours), for networks that are not shown z. When the walk is at block b, blocks 0..b have
    each said their ln p(y | x); the mean of that, and the likelihood of z, is the answer: an ensemble at no extra cost.
    """

    def __init__(self, blocks, partition=None, average=False):
        assert not (average and blocks[0].shows_z), "an average needs networks that are not shown z"
        self.blocks, self.partition, self.average = blocks, partition, average
        self.codebook = blocks[0].head.codebook
        self.denoises = partition is not None
        self.shows_z = self.denoises and blocks[0].shows_z

    def prior(self, x, caches=None, temperature=1.0):
        """The ensemble's ln p(y | x): the normalised mean of all that the networks say. (B, ..., V)"""
        said = [block.log_prior(x, **_cache(caches, b)) for b, block in enumerate(self.blocks)]
        return (torch.stack(said).mean(0) / temperature).log_softmax(-1)

    def posterior(self, x, caches=None, temperature=1.0):
        """A function (z, sigma) -> ln p(y | z, x).

        A network that is shown z answers anew at each call; one that is not is asked once, however many calls the walk
        makes. caches: a dict in which networks keep keys and values between positions, the former for each noise level.
        temperature T sharpens the network's part, p(y | x)^(1/T), and leaves the likelihood of z as it is.
        """
        said = {}

        def word(b):
            if b not in said:
                said[b] = self.blocks[b].log_prior(x, **_cache(caches, b))
            return said[b]

        def posterior(z, sigma):
            b = self.partition.route(float(sigma))
            if self.shows_z:
                logits = self.blocks[b](x, z, float(sigma), temperature, **_cache(caches, float(sigma)))
            else:
                prior = sum(word(i) for i in range(b + 1)) / (b + 1) if self.average else word(b)
                logits = prior / temperature + log_likelihood(z, float(sigma), self.codebook)
            return logits.log_softmax(-1)

        return posterior


def _cache(caches, key):
    return {} if caches is None else {"cache": caches.setdefault(key, Cache())}
