import pytest
import torch
import torch.nn as nn

from nano_db.block import DiffusionBlock, EndToEnd
from nano_db.classify import after_each_block, classify, score_images
from nano_db.heads import DenoisingHead, PosteriorHead, make_target_embeddings
from nano_db.partition import make_partition
from nano_db.schedule import LogNormal, equal_probability_grid
from nano_db.stack import Ensemble, Stack

NOISE, EMBEDDINGS = LogNormal(0.0, 0.8, 0.2, 20.0), make_target_embeddings(4, 8)
PRIOR = torch.tensor([0.1, 0.55, 0.05, 0.3])


class Knows(nn.Module):
    """A network that says ln PRIOR of every image, by way of an output projection that is made the identity."""

    def forward(self, x, z=None, c_noise=None):
        return PRIOR.log().expand(len(x), 4)


def stack_of(blocks, average=False):
    """Blocks whose answer is exact. average: with a head that has the trunk evaluated once, and sees z."""
    partition = make_partition(NOISE, blocks)
    made = []
    for b in range(blocks):
        head = Exact(EMBEDDINGS) if average else PosteriorHead(EMBEDDINGS)
        head.output_projection = nn.Identity()
        made.append(DiffusionBlock(Knows(), head, NOISE, partition.interval(b)))
    return Stack(made, partition, average)


class Exact(DenoisingHead):
    """A denoising head that has learnt that z does not matter."""

    def residual(self, features, z, sigma):
        return features


both_walks = pytest.mark.parametrize("average", [False, True])


@both_walks
def test_the_noise_free_walk_names_the_most_probable_class_and_the_noisy_one_draws(average):
    stack, sigmas = stack_of(3, average), equal_probability_grid(NOISE, 48)
    posterior = stack.posterior(torch.zeros(3000, 1))
    for log_p in after_each_block(posterior, stack, sigmas, torch.zeros(3000, 8)):
        assert (log_p.argmax(-1) == 1).all()
    z = sigmas[0].float() * torch.randn(3000, 8, generator=torch.Generator().manual_seed(0))
    drawn = torch.bincount(after_each_block(posterior, stack, sigmas, z)[-1].argmax(-1), minlength=4) / 3000
    torch.testing.assert_close(drawn, PRIOR, atol=0.06, rtol=0)


@both_walks
def test_each_block_answers_in_order(average):
    stack = stack_of(3, average)
    posterior = stack.posterior(torch.zeros(5, 1))
    answers = after_each_block(posterior, stack, equal_probability_grid(NOISE, 6), torch.zeros(5, 8))
    assert len(answers) == 3 and all(log_p.shape == (5, 4) for log_p in answers)
    assert answers[0][0, 1] < answers[1][0, 1] < answers[2][0, 1] < 0, "a walk from z = 0 grows surer"


def test_under_bfloat16_autocast_a_walk_with_exact_answers_is_the_same():
    stack, sigmas, z = stack_of(3), equal_probability_grid(NOISE, 12), torch.randn(5, 8)
    answers = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            answers.append(after_each_block(stack.posterior(torch.zeros(5, 1)), stack, sigmas, z))
    assert all(map(torch.equal, *answers))


def test_the_metrics_are_shares_of_images_named_right():
    stack, sigmas = stack_of(2), equal_probability_grid(NOISE, 8)
    """Of the images at odd places: those at even places are for choosing settings by."""
    test, validation = torch.tensor([1, 1, 1, 0, 2, 3, 1, 0]), torch.tensor([1, 0, 2, 0, 2, 3, 0, 0])
    both = torch.stack([validation, test], dim=1).flatten()
    batches = [(torch.zeros(12, 1), both[:12]), (torch.zeros(4, 1), both[12:])]
    metrics, log_p, labels = score_images(stack, batches, sigmas, walks=200)
    assert metrics["accuracy"] == metrics["accuracy_noise_free"] == pytest.approx(4 / 8)
    assert metrics["accuracy_noise_free_after_each_block"] == pytest.approx([4 / 8, 4 / 8])
    assert metrics["accuracy_mean_of_walks"] == pytest.approx(4 / 8), "the mean of many draws is p(y | x) again"
    assert len(metrics["accuracy_walk_after_each_block"]) == 2
    assert metrics["accuracy_walk_after_each_block"][-1] == metrics["accuracy_walk"]
    assert metrics["validation_accuracy"] == pytest.approx(1 / 8)
    assert log_p.shape == (16, 4) and torch.equal(labels, both)


def test_end_to_end_networks_answer_at_once():
    head = PosteriorHead(EMBEDDINGS)
    head.output_projection = nn.Identity()
    ensemble, x = Ensemble([EndToEnd(Knows(), head)] * 2), torch.zeros(4, 1)
    torch.testing.assert_close(classify(ensemble, x).exp(), PRIOR.expand(4, 4))
    metrics, log_p, _ = score_images(ensemble, [(x, torch.tensor([1, 1, 1, 0]))])
    assert metrics == {"accuracy": 1 / 2, "validation_accuracy": 1.0} and torch.equal(log_p, classify(ensemble, x))


def test_trunks_are_evaluated_once_for_all_walks():
    stack, calls = stack_of(2, average=True), []
    for block in stack.blocks:
        block.network.register_forward_hook(lambda *_: calls.append(1))
    score_images(
        stack, [(torch.zeros(6, 1), torch.ones(6, dtype=torch.long))], equal_probability_grid(NOISE, 4), walks=5
    )
    assert len(calls) == 2
