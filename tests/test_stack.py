"""The blocks assembled: which is active at a noise level, and that all of them learn one and the same p(y | x)."""

import pytest
import torch
import torch.nn as nn

from nano_db.block import DiffusionBlock, EndToEnd
from nano_db.heads import DenoisingHead, PaperHead, PosteriorHead, log_likelihood, make_target_embeddings
from nano_db.likelihood import nats_per_block
from nano_db.partition import make_partition
from nano_db.sampler import sample_classes
from nano_db.schedule import LogNormal, equal_probability_grid, sample_sigma
from nano_db.stack import Ensemble, Stack

NOISE, WIDTH, CLASSES, CONTEXTS = LogNormal(0.3, 0.8, 0.05, 20.0), 16, 4, 3
EMBEDDINGS = make_target_embeddings(CLASSES, WIDTH)
P = torch.tensor([[0.7, 0.2, 0.05, 0.05], [0.1, 0.4, 0.4, 0.1], [0.25, 0.25, 0.25, 0.25]])  # p(y | x), by context


class Shown(nn.Module):
    """A network that is shown z and the noise level."""

    def __init__(self):
        super().__init__()
        self.embedding, self.from_z = nn.Embedding(CONTEXTS, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, z, c_noise):
        return self.embedding(x) + self.from_z(z) * c_noise.exp()[:, None]


def make_stack(blocks, head=DenoisingHead, average=False, overlap=0.0, random=True):
    """Blocks with random weights, also where new ones would be zero."""
    torch.manual_seed(0)
    partition, made = make_partition(NOISE, blocks, overlap=overlap), []
    for b in range(blocks):
        network = Shown() if head.network_sees_z else nn.Embedding(CONTEXTS, WIDTH)
        made.append(DiffusionBlock(network, head(EMBEDDINGS), NOISE, partition.training_range(b)))
        for p in made[b].parameters() if random else ():
            nn.init.normal_(p, std=0.3)
    return Stack(made, partition, average)


def count_calls(module):
    """A list that grows by one at each call of the module."""
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("average, asked", [(True, 4 * (1 + 2 + 3 + 4)), (False, 16)])
def test_a_walk_of_16_steps_asks_the_heads_at_each_and_the_trunks_once(average, asked):
    stack = make_stack(4, average=average)
    trunks = [count_calls(block.network) for block in stack.blocks]
    heads = [count_calls(block.head.output_projection) for block in stack.blocks]
    x, sigmas = torch.tensor([0, 1, 2]), equal_probability_grid(NOISE, 16)
    y = sample_classes(stack.posterior(x), EMBEDDINGS, (3,), sigmas, torch.Generator().manual_seed(0))
    assert y.shape == (3,) and [len(calls) for calls in trunks] == [1, 1, 1, 1]
    assert sum(map(len, heads)) == asked >= 16
    assert [len(calls) for calls in heads] == ([16, 12, 8, 4] if average else [4, 4, 4, 4])


@pytest.mark.parametrize("head", [PosteriorHead, PaperHead])
def test_a_network_that_is_shown_z_is_asked_at_each_call_of_its_own_interval(head):
    stack = make_stack(4, head)
    networks = [count_calls(block.network) for block in stack.blocks]
    sigmas = equal_probability_grid(NOISE, 16)
    sample_classes(stack.posterior(torch.tensor([0])), EMBEDDINGS, (1,), sigmas, torch.Generator().manual_seed(0))
    assert [len(calls) for calls in networks] == [4, 4, 4, 4]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("average", [True, False])
def test_the_averaged_walk_is_the_mean_of_the_heads_answers_at_this_very_z_and_sigma(average, temperature):
    """Against a slow loop, which asks one block about one sample at a time."""
    stack = make_stack(3, average=average)
    generator = torch.Generator().manual_seed(1)
    x, z = torch.tensor([0, 1, 2, 1]), torch.randn(4, WIDTH, generator=generator)
    posterior = stack.posterior(x, temperature=temperature)
    for sigma in (20.0, 5.0, 1.3, 0.4, 0.05):
        b, answers = stack.partition.route(sigma), posterior(z, sigma)
        for i in range(4):
            said = []
            for block in stack.blocks[: b + 1] if average else [stack.blocks[b]]:
                residual = block.head.residual(
                    block.network(x[i : i + 1]), z[i : i + 1], torch.tensor([max(sigma, block.span[0])])
                )[0]
                said.append(residual - residual.exp().sum().log())  # ln p, normalised
            logits = sum(said) / len(said) / temperature + z[i] @ EMBEDDINGS.T / sigma**2
            torch.testing.assert_close(answers[i], logits - logits.logsumexp(0))


@pytest.mark.parametrize("head", [DenoisingHead, PosteriorHead, PaperHead])
def test_only_the_active_block_answers_as_it_was_trained(head):
    stack, z = make_stack(3, head), torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))
    x = torch.tensor([0, 1, 2])
    for sigma in (5.0, 1.3, 0.4):
        block = stack.blocks[stack.partition.route(sigma)]
        torch.testing.assert_close(stack.posterior(x)(z, sigma), block(x, z, sigma).log_softmax(-1))


def test_only_denoising_heads_can_be_averaged():
    with pytest.raises(AssertionError):
        make_stack(2, PosteriorHead, average=True)


def test_an_ensemble_is_the_mean_of_the_log_probabilities_normalised():
    torch.manual_seed(0)
    networks = [EndToEnd(nn.Embedding(CONTEXTS, WIDTH), PosteriorHead(EMBEDDINGS)) for _ in range(3)]
    for network in networks:
        nn.init.normal_(network.head.output_projection.weight)
    x, product = torch.tensor([0, 1, 2]), torch.ones(3, CLASSES)
    for network in networks:
        product = product * network(x).softmax(-1)
    expected = product ** (1 / 3) / (product ** (1 / 3)).sum(-1, keepdim=True)
    torch.testing.assert_close(Ensemble(networks).log_p(x).exp(), expected)
    torch.testing.assert_close(Ensemble(networks[:1]).log_p(x), networks[0](x).log_softmax(-1))


# --- a task whose p(y | x) is known ---


def draw_contexts(count, generator=None):
    x = torch.randint(CONTEXTS, (count,), generator=generator)
    return x, torch.multinomial(P[x], 1, generator=generator)[:, 0]


def train(block, seed, steps=300):
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(block.parameters(), lr=0.01)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        block.loss(*draw_contexts(256)).backward()
        optimizer.step()
        decay.step()


@pytest.fixture(scope="module")
def trained():
    """Three blocks, each trained only on its own interval."""
    stack = make_stack(3, overlap=0.1, random=False)
    for b, block in enumerate(stack.blocks):
        train(block, seed=b)
    return stack


def answers_at_random_noise(block, interval, count=10_000):
    """Contexts, their z at noise levels of the interval, sigma, and the residual of the block's head as p."""
    generator = torch.Generator().manual_seed(5)
    x, y = draw_contexts(count, generator)
    sigma = sample_sigma(NOISE, count, *interval, generator).float()
    z = EMBEDDINGS[y] + sigma[:, None] * torch.randn(count, WIDTH, generator=generator)
    with torch.no_grad():
        return x, z, sigma, block.head.residual(block.network(x), z, sigma).softmax(-1)


def spread(p, x):
    """How far p (N, V) moves, by z and sigma, about its mean for each context: total variation, the mean over N."""
    means = torch.stack([p[x == k].mean(0) for k in range(CONTEXTS)])
    return float((p - means[x]).abs().sum(-1).mean() / 2)


def test_by_bayes_rule_the_head_says_the_same_p_whatever_z_is(trained):
    """It could use z, but has nothing to gain by it: the likelihood term says all that z tells. The answer p(y | z, x)
    moves with z by 0.10, 0.22 and 0.45 in the three blocks; the head's part of it by 0.001 to 0.003.
    """
    for b, block in enumerate(trained.blocks):
        x, z, sigma, p = answers_at_random_noise(block, trained.partition.interval(b))
        off = (p - P[x]).abs().sum(-1) / 2  # total variation between the head's p and p(y | x)
        assert off.mean() < 0.03 and off.max() < 0.1
        answer = (p.log() + log_likelihood(z, sigma, EMBEDDINGS)).softmax(-1)
        assert spread(p, x) < 0.01 and spread(p, x) < spread(answer, x) / 10


class WithoutBayes(DenoisingHead):
    """The same head without the likelihood term: the network must learn itself what z tells."""

    def forward(self, features, z, sigma, temperature=1.0):
        return self.residual(features, z, sigma) / temperature


def test_a_head_without_the_likelihood_term_does_depend_on_z(trained):
    """The test above would notice: it must learn the whole answer, which moves with z by 0.22."""
    torch.manual_seed(0)
    span = trained.partition.training_range(1)
    block = DiffusionBlock(nn.Embedding(CONTEXTS, WIDTH), WithoutBayes(EMBEDDINGS), NOISE, span)
    train(block, seed=1)
    x, _, _, p = answers_at_random_noise(block, trained.partition.interval(1))
    assert spread(p, x) > 0.1


@pytest.mark.parametrize("average", [True, False])
def test_the_bound_of_trained_blocks_is_near_the_entropy_and_not_below(trained, average):
    """The exact posterior meets the same noise: by its side the noise of the estimate cancels."""
    x, y = draw_contexts(10_000, torch.Generator().manual_seed(6))
    stack = Stack(trained.blocks, trained.partition, average)

    def exact(z, sigma):
        return (P[x].log() + log_likelihood(z, sigma, EMBEDDINGS)).log_softmax(-1)

    with torch.no_grad():
        ours, best = (
            float(nats_per_block(f, y, EMBEDDINGS, stack.partition, torch.Generator().manual_seed(7)).sum())
            for f in (stack.posterior(x), exact)
        )
    entropy = -float(P[x].log().gather(-1, y[:, None]).mean())  # of these very y
    assert best == pytest.approx(entropy, rel=0.02)
    assert best - 1e-4 < ours < 1.01 * best
