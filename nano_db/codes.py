"""Codes from the data: unit vectors of tokens, found in the text before any training, in place of learned tables.

With V tokens and width d, an embedding and a readout have V * d weights each, with gradients and averages, and every
block owns both. Where V is much larger than d, they are most of a block. But much of what such tables learn stands in
counts: which token follows which. So the text gives the codes, and a block learns d x d maps between codes and
features. Codes need no gradient, and every block knows them without being told, like the targets' codebook (heads.py).
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from nano_db.errors import UsageError
from nano_db.heads import make_codebook


def neighbour_codes(tokens, classes, width, seed=0):
    """Codes of each token as the first and as the second of two neighbours: [left, right], (V, d) each, unit rows.

    They are the two sides of a truncated singular value decomposition of the positive pointwise mutual information,
    max(0, ln(p(i, j) / (p(i) p(j)))), of tokens i directly before j (Levy & Goldberg 2014). tokens (N,): the training
    text. A token of which this says nothing gets a random row.
    """
    if classes <= width:
        raise UsageError(f"--codebook data is for more tokens than --width {width}, and there are {classes}: drop it")
    tokens = tokens.cpu().long()
    pairs, counts = torch.unique(tokens[:-1] * classes + tokens[1:], return_counts=True)
    i, j, counts = pairs // classes, pairs % classes, counts.double()
    first, second = (torch.bincount(side, counts, classes) for side in (i, j))
    information = (counts * counts.sum() / (first[i] * second[j])).log().clamp(min=0)  # of the pairs that occur
    matrix = torch.sparse_coo_tensor(torch.stack([i, j]), information, (classes, classes), check_invariants=False)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        left, values, right = torch.svd_lowrank(matrix, min(classes, width + 16), niter=4)  # 16 more: to be exact
    codes = []
    for side in (left, right):
        side, rows = (side * values.sqrt())[:, :width], make_codebook(classes, width, seed)
        found = side.norm(dim=-1) > 1e-6
        rows[found] = F.normalize(side[found], dim=-1).float()
        codes.append(rows)
    return codes


class CodeEmbedding(nn.Module):
    """In place of a learned embedding: the token's code, then a learned map."""

    def __init__(self, codes):
        super().__init__()
        self.register_buffer("codes", codes, persistent=False)
        self.map = nn.Linear(codes.shape[1], codes.shape[1], bias=False)

    def forward(self, x):
        return self.map(self.codes[x])


class CodeReadout(nn.Module):
    """In place of a linear readout: a learned map, then products with the codes. At the start it answers with the
    tokens' `frequencies` (V,), whatever the features.
    """

    def __init__(self, codes, frequencies):
        super().__init__()
        self.register_buffer("codes", codes, persistent=False)
        self.map = nn.Linear(codes.shape[1], codes.shape[1], bias=False)
        nn.init.zeros_(self.map.weight)
        self.bias = nn.Parameter(frequencies.log().float())

    def forward(self, features):
        return F.linear(self.map(features), self.codes, self.bias)


def with_codes(codes, frequencies, make):
    """make(b) builds a block or the end-to-end network. Returns a function that builds it with the codes of [left,
    right] in place of its tables, and with the right ones as its targets.
    """

    def make_with_codes(b):
        module, (left, right) = make(b), codes
        module.network.embedding, module.head.readout = CodeEmbedding(left), CodeReadout(right, frequencies)
        module.head.codebook = right
        return module

    return make_with_codes
