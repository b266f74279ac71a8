import pytest
import torch
import torch.nn as nn

from nano_db.block import DiffusionBlock
from nano_db.classify import after_each_block, evaluate
from nano_db.codebook import PosteriorHead, make_codebook
from nano_db.partition import make_partition
from nano_db.schedule import LogNormal, equal_mass_grid
from nano_db.stack import Stack

NOISE, CODEBOOK = LogNormal(0.0, 0.8, 0.2, 20.0), make_codebook(4, 8)
PRIOR = torch.tensor([0.1, 0.55, 0.05, 0.3])


class Knows(nn.Module):
    """A network that says ln PRIOR of every image, by way of a readout that is made the identity."""

    def forward(self, x, z, c_noise):
        return PRIOR.log().expand(len(x), 4)


def stack_of(blocks):
    partition = make_partition(NOISE, blocks)
    made = []
    for b in range(blocks):
        head = PosteriorHead(CODEBOOK)
        head.readout = nn.Identity()
        made.append(DiffusionBlock(Knows(), head, NOISE, partition.interval(b), shows_z=False))
    return Stack(made, partition)


def test_the_noise_free_walk_names_the_most_probable_class_and_the_noisy_one_draws():
    stack, sigmas = stack_of(3), equal_mass_grid(NOISE, 48)
    x = torch.zeros(3000, 1)
    for said in after_each_block(stack, x, sigmas, torch.zeros(3000, 8)):
        assert (said.argmax(-1) == 1).all()
    z = sigmas[0].float() * torch.randn(3000, 8, generator=torch.Generator().manual_seed(0))
    drawn = torch.bincount(after_each_block(stack, x, sigmas, z)[-1].argmax(-1), minlength=4) / 3000
    torch.testing.assert_close(drawn, PRIOR, atol=0.06, rtol=0)


def test_each_block_has_its_say_in_order():
    stack = stack_of(3)
    said = after_each_block(stack, torch.zeros(5, 1), equal_mass_grid(NOISE, 6), torch.zeros(5, 8))
    assert len(said) == 3 and all(log_p.shape == (5, 4) for log_p in said)
    assert said[0][0, 1] < said[1][0, 1] < said[2][0, 1] < 0, "a walk from z = 0 grows surer"


def test_the_metrics_are_shares_of_images_named_right():
    stack, sigmas = stack_of(2), equal_mass_grid(NOISE, 8)
    batches = [(torch.zeros(6, 1), torch.tensor([1, 1, 1, 0, 2, 3])), (torch.zeros(2, 1), torch.tensor([1, 0]))]
    metrics, log_p, labels = evaluate(stack, batches, sigmas, walks=200)
    assert metrics["accuracy"] == metrics["accuracy_noise_free"] == pytest.approx(4 / 8)
    assert metrics["accuracy_noise_free_after_each_block"] == pytest.approx([4 / 8, 4 / 8])
    assert metrics["accuracy_mean_of_walks"] == pytest.approx(4 / 8), "the mean of many draws is p(y | x) again"
    assert log_p.shape == (8, 4) and labels.tolist() == [1, 1, 1, 0, 2, 3, 1, 0]
