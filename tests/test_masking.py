import pytest
import torch
import torch.nn as nn

from nano_db.masking import (
    MaskedBlock,
    MaskSchedule,
    alpha_range,
    block_at,
    low_discrepancy_times,
    mask_tokens,
    score_masked,
    unmask,
)
from nano_db.stack import Ensemble

KINDS = ("linear", "cosine")


class Unigram(nn.Module):
    """A network that knows the letters' frequencies and nothing else."""

    def __init__(self, p):
        super().__init__()
        self.log_p, self.calls = nn.Parameter(p.log()), []

    def forward(self, x, t):
        self.calls.append(t.clone())
        return self.log_p.expand(*x.shape, -1)


def unigram_blocks(p, blocks=1, kind="linear"):
    return [MaskedBlock(Unigram(p), MaskSchedule(kind), len(p), alpha_range(b, blocks)) for b in range(blocks)]


@pytest.mark.parametrize("kind", KINDS)
def test_schedules_run_from_unmasked_to_masked_and_their_slope_and_inverse_are_right(kind):
    schedule = MaskSchedule(kind)
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    assert float(schedule.alpha(0.0)) == pytest.approx(1) and float(schedule.alpha(1.0)) == pytest.approx(0)
    torch.testing.assert_close(schedule.time(schedule.alpha(t)), t)
    numeric = (schedule.alpha(t + 1e-6) - schedule.alpha(t - 1e-6)) / 2e-6
    torch.testing.assert_close(schedule.slope(t), numeric, rtol=1e-6, atol=1e-8)


def test_blocks_own_equal_parts_of_alpha_and_the_most_masked_runs_first():
    assert [alpha_range(b, 4) for b in range(4)] == [(0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1)]
    assert alpha_range(1, 4, overlap=0.1) == pytest.approx((0.225, 0.525))
    assert alpha_range(0, 4, overlap=0.1)[0] == 0 and alpha_range(3, 4, overlap=0.1)[1] == 1
    assert [block_at(alpha, 3) for alpha in (0, 0.33, 1 / 3, 0.6, 2 / 3, 1.0)] == [0, 0, 1, 1, 2, 2]


def test_times_are_spread_evenly_with_one_shared_offset():
    t = low_discrepancy_times(10, 0.2, 0.7)
    gaps = t.sort().values.diff()
    torch.testing.assert_close(gaps, torch.full((9,), 0.05, dtype=torch.float64))
    assert t.min() >= 0.2 and t.max() < 0.7


def test_tokens_are_masked_at_the_rate_of_their_own_time():
    x, alpha = torch.zeros(3, 20_000, dtype=torch.long), torch.tensor([0.1, 0.5, 0.9])
    noisy, masked = mask_tokens(x, alpha, mask_token=7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(1 - masked.float().mean(1), alpha, atol=0.01, rtol=0)
    assert torch.equal(noisy == 7, masked) and torch.equal(noisy[~masked], x[~masked])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blocks", [1, 3])
def test_training_masks_at_the_rates_of_the_blocks_own_interval(kind, blocks):
    p = torch.full((5,), 0.2)
    for b, block in enumerate(unigram_blocks(p, blocks, kind)):
        torch.manual_seed(0)
        for _ in range(20):
            block.loss(torch.randint(5, (16, 4)))
        alpha = block.schedule.alpha(torch.cat(block.network.calls))
        assert alpha.min() >= b / blocks - 1e-6 and alpha.max() <= (b + 1) / blocks + 1e-6
        assert alpha.max() - alpha.min() > 0.9 / blocks


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_the_bound_of_a_unigram_model_is_its_entropy_and_splits_into_equal_shares(kind, blocks):
    """Its prediction does not depend on what is unmasked, so each alpha costs the same."""
    p = torch.tensor([0.4, 0.3, 0.2, 0.1])
    generator = torch.Generator().manual_seed(0)
    x = torch.multinomial(p, 400 * 50, replacement=True, generator=generator).view(400, 50)
    batches = (x[:150], x[150:])  # of unequal sizes
    nats = score_masked(unigram_blocks(p, blocks, kind), batches, levels=32 // blocks, generator=generator)
    cross_entropy = -float(p.log()[x].double().mean())
    assert float(nats.sum()) == pytest.approx(cross_entropy, rel=0.01)
    torch.testing.assert_close(nats, nats.sum().expand(blocks) / blocks, rtol=0.03, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_training_loss_is_the_mean_of_the_bound_over_the_blocks_own_interval(kind):
    p = torch.tensor([0.4, 0.3, 0.2, 0.1])
    torch.manual_seed(0)
    x = torch.multinomial(p, 500 * 40, replacement=True).view(500, 40)
    for block in unigram_blocks(p, 3, kind):
        with torch.no_grad():
            losses = torch.stack([block.loss(x) for _ in range(8)])
        assert float(losses.mean()) == pytest.approx(-float(p.log()[x].mean()), rel=0.02)


class SurerWithTime(nn.Module):
    """Its answer depends on the time, as a network's does on what is unmasked: -ln p of letter 0 is softplus(-4 t)."""

    def forward(self, x, t):
        logits = torch.zeros(*x.shape, 2)
        logits[..., 0] = 4 * t[:, None]
        return logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("least, most", [(0.0, 1.0), (0.0, 1 / 3), (1 / 3, 2 / 3)])
def test_the_training_loss_weighs_times_so_that_equal_parts_of_alpha_count_the_same(kind, least, most):
    """By -alpha'(t): a mean over t by itself would be another one, for the cosine schedule."""
    schedule = MaskSchedule(kind)
    torch.manual_seed(0)
    with torch.no_grad():
        loss = MaskedBlock(SurerWithTime(), schedule, 2, (least, most)).loss(torch.zeros(4000, 64, dtype=torch.long))
    alpha = least + (most - least) * (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    expected = torch.nn.functional.softplus(-4 * schedule.time(alpha)).mean()
    assert float(loss) == pytest.approx(float(expected), rel=0.01)
    t = torch.linspace(float(schedule.time(most)), float(schedule.time(least)), 10_000, dtype=torch.float64)
    unweighted = torch.nn.functional.softplus(-4 * t).mean()
    assert kind == "linear" or abs(float(unweighted / expected) - 1) > 0.015, "and the test can tell"


class Bigram(nn.Module):
    """The exact p(masked | unmasked) of two-letter texts with a known joint distribution P (V, V)."""

    def __init__(self, joint):
        super().__init__()
        self.joint = joint

    def forward(self, x, t):
        classes, logits = len(self.joint), []
        for first, second in x.tolist():
            p_first = self.joint.sum(1) if second == classes else self.joint[:, second]
            p_second = self.joint.sum(0) if first == classes else self.joint[first]
            logits.append(torch.stack([p_first, p_second]).log())
        return torch.stack(logits)


def test_unmasking_with_an_oracle_samples_the_right_distribution():
    """Chi-square over the 9 pairs, 8 degrees of freedom: 26.1 is exceeded by one seed in a thousand. With 40 steps
    the two letters fall in the same step, and lose sight of each other, in one text of 40.
    """
    joint = torch.tensor([[0.30, 0.02, 0.02], [0.02, 0.25, 0.03], [0.05, 0.01, 0.30]])
    blocks = [MaskedBlock(Bigram(joint), MaskSchedule(), 3) for _ in range(2)]
    count = 1500
    start = torch.full((count, 2), 3)
    *_, (alpha, x) = unmask(blocks, start, 40, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(3 * x[:, 0] + x[:, 1], minlength=9)
    independent = joint.sum(1)[:, None] * joint.sum(0)
    expected = count * (39 / 40 * joint + 1 / 40 * independent).flatten()
    assert alpha == 1 and float(((counts - expected) ** 2 / expected).sum()) < 26.1
    mistaken = count * independent.flatten()
    assert float(((counts - mistaken) ** 2 / mistaken).sum()) > 300  # and the test can tell


def test_what_is_unmasked_never_changes_and_reveals_keep_pace():
    p = torch.full((5,), 0.2)
    generator = torch.Generator().manual_seed(0)
    start = torch.where(
        torch.rand(50, 200, generator=generator) < 0.3, torch.randint(5, (50, 200), generator=generator), 5
    )
    before = start
    for alpha, x in unmask(unigram_blocks(p, 2), start, 10, generator=generator):
        assert torch.equal(x[before != 5], before[before != 5])
        assert float((x == 5).float().mean()) == pytest.approx(1 - alpha, abs=0.03)
        before = x
    assert (x != 5).all()


def test_a_text_without_masks_stays_as_it_is():
    x = torch.randint(5, (3, 7))
    for _, after in unmask(unigram_blocks(torch.full((5,), 0.2), 2), x, 4):
        assert torch.equal(after, x)


def test_each_block_is_called_for_its_own_interval():
    blocks = unigram_blocks(torch.full((3,), 1 / 3), 3)
    for _ in unmask(blocks, torch.full((1, 4), 3), 6):
        pass
    alphas = [block.schedule.alpha(torch.cat(block.network.calls)).tolist() for block in blocks]
    assert [len(a) for a in alphas] == [2, 2, 2]
    assert alphas[1] == pytest.approx([1 / 3, 1 / 2], abs=1e-6)


def test_an_average_is_the_mean_of_the_log_probabilities():
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.2, 0.2, 0.6])
    both = MaskedBlock(Ensemble([Unigram(p), Unigram(q)]), MaskSchedule(), len(p))
    mean = (p.log() + q.log()) / 2
    torch.testing.assert_close(both.network(torch.zeros(1, 1), torch.zeros(1))[0, 0], mean)
