import math

import numpy as np
import pytest
import torch

from nano_db.block import DiffusionBlock, EndToEnd
from nano_db.codes import CodeEmbedding, CodeReadout, neighbour_codes, with_codes
from nano_db.errors import UsageError
from nano_db.heads import DenoisingHead, PosteriorHead, make_codebook
from nano_db.machinery.run import make_optimizer
from nano_db.schedule import LogNormal
from train_gpt import GPT, Settings

CLASSES, WIDTH = 13, 4


@pytest.fixture
def tokens():
    """In which some tokens follow others more often than by chance; the last class never occurs."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(1, 4, (400,), generator=generator).cumsum(0) % (CLASSES - 1)
    return torch.where(torch.rand(400, generator=generator) < 0.3, steps.flip(0), steps).int()


def slow_codes(tokens, classes, width):
    """By loops over all pairs of classes, and a dense decomposition."""
    pairs = list(zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True))
    information = np.zeros((classes, classes))
    for i in range(classes):
        for j in range(classes):
            together = sum(pair == (i, j) for pair in pairs) / len(pairs)
            alone = sum(a == i for a, _ in pairs) * sum(b == j for _, b in pairs) / len(pairs) ** 2
            if together:
                information[i, j] = max(0.0, math.log(together / alone))
    left, values, right = np.linalg.svd(information)
    sides = [side[:, :width] * np.sqrt(values[:width]) for side in (left, right.T)]
    return [side / np.maximum(1e-9, np.linalg.norm(side, axis=1, keepdims=True)) for side in sides]


def test_codes_are_the_two_sides_of_the_decomposed_information_of_neighbours(tokens):
    """Both sides at once may be turned: so their products are compared."""
    found, expected = neighbour_codes(tokens, CLASSES, WIDTH), slow_codes(tokens, CLASSES, WIDTH)
    for a in range(2):
        for b in range(2):
            products = (found[a] @ found[b].T).numpy()[:-1, :-1]
            np.testing.assert_allclose(products, (expected[a] @ expected[b].T)[:-1, :-1], atol=1e-5)


def test_rows_are_of_unit_norm_also_of_a_token_that_never_occurs(tokens):
    for rows in neighbour_codes(tokens, CLASSES, WIDTH):
        assert rows.shape == (CLASSES, WIDTH) and rows.dtype == torch.float32
        torch.testing.assert_close(rows.norm(dim=-1), torch.ones(CLASSES))
        assert torch.equal(rows[-1], make_codebook(CLASSES, WIDTH)[-1])


def test_codes_come_from_data_and_seed_alone(tokens):
    torch.manual_seed(1)
    first, before = neighbour_codes(tokens, CLASSES, WIDTH, seed=3), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(before, torch.get_rng_state()), "the generator of all else is left as it was"
    torch.manual_seed(2)
    assert all(map(torch.equal, first, neighbour_codes(tokens, CLASSES, WIDTH, seed=3)))
    assert not torch.equal(first[0], neighbour_codes(tokens[:200], CLASSES, WIDTH, seed=3)[0])


def test_a_small_vocabulary_is_refused(tokens):
    with pytest.raises(UsageError, match="--codebook data is for more tokens than --width 13, and there are 13"):
        neighbour_codes(tokens, CLASSES, 13)


def test_the_readout_starts_from_the_frequencies_and_the_embedding_from_the_codes():
    codes, frequencies = make_codebook(CLASSES, WIDTH), torch.arange(1.0, CLASSES + 1).double() / 91
    readout = CodeReadout(codes, frequencies)
    said = readout(torch.randn(3, 5, WIDTH)).softmax(-1)
    torch.testing.assert_close(said, frequencies.float().expand(3, 5, -1))
    x, embedding = torch.tensor([[3, 0]]), CodeEmbedding(codes)
    torch.testing.assert_close(embedding(x)[0, 0], embedding.map.weight @ codes[3])


@pytest.mark.parametrize("method", ["blocks", "baseline"])
def test_codes_have_no_gradient_no_average_and_no_place_in_a_file(tokens, method):
    settings = Settings(width=WIDTH, heads=2)
    codes, frequencies = neighbour_codes(tokens, CLASSES, WIDTH), torch.full((CLASSES,), 1 / CLASSES)
    noise, targets = LogNormal(0.3, 0.8, 0.05, 20.0), make_codebook(CLASSES, WIDTH)

    def make(b):
        network = GPT(CLASSES, settings, 1)
        if method == "baseline":
            return EndToEnd(network, PosteriorHead(targets))
        return DiffusionBlock(network, DenoisingHead(targets), noise, (0.05, 20.0))

    module = with_codes(codes, frequencies, make)(0)
    before = [side.clone() for side in codes]
    optimizer = make_optimizer(module, settings)
    x, y = torch.randint(CLASSES, (2, 8, 6))
    losses = []
    for _ in range(30):
        torch.manual_seed(0)
        loss = module.loss(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] and all(map(torch.equal, codes, before))
    assert sum(CLASSES in p.shape for p in module.parameters()) == 1  # the bias of the readout
    assert not any(name.endswith("codes") for name in module.state_dict())
    if method == "baseline":
        assert losses[0] == pytest.approx(math.log(CLASSES))
