import pytest
import torch
import torch.nn as nn

from nano_db.images import ImageStack, edm_loss, patch_positions, patchify, unpatchify
from nano_db.partition import make_partition
from nano_db.sampler import euler_walk
from nano_db.schedule import LogNormal, edm_weight, equal_probability_grid, karras_grid
from nano_db.stack import Ensemble

SHAPE, MEANS = (1, 2, 2), torch.tensor([[[[0.5]]], [[[-0.5]]], [[[0.0]]]])  # of class 0, class 1 and no class


# --- patches ---


@pytest.mark.parametrize("shape, patch", [((3, 8, 8), 4), ((1, 6, 9), 3), ((2, 4, 4), 1)])
def test_unpatchify_is_the_inverse_of_patchify(shape, patch):
    images = torch.randn(5, *shape)
    patches = patchify(images, patch)
    assert patches.shape == (5, shape[1] * shape[2] // patch**2, shape[0] * patch**2)
    assert torch.equal(unpatchify(patches, patch, shape[1]), images)


def test_patches_go_row_by_row():
    images = torch.arange(36.0).view(1, 1, 6, 6)
    patches = patchify(images, 3)
    assert patches[0, 1].tolist() == [3, 4, 5, 9, 10, 11, 15, 16, 17], "the second patch is the upper right one"


def test_positions_tell_rows_and_columns_apart():
    positions = patch_positions((3, 32, 16), 4, 16)
    assert positions.shape == (32, 16)
    assert torch.pdist(positions).min() > 0.1
    torch.testing.assert_close(positions.square().mean(1), torch.ones(32))
    grid = positions.view(8, 4, 16)
    assert torch.equal(grid[2, :, :4], grid[2, :1, :4].expand(4, 4)), "the first quarter knows only the row"


# --- blocks that denoise images ---


class Gaussian(nn.Module):
    """The exact denoiser of images y ~ N(mean of the class, std^2): a block that has learnt all there is to learn."""

    def __init__(self, std=0.5):
        super().__init__()
        self.std, self.calls = std, []

    def forward(self, labels, z, sigma):
        self.calls.append((float(sigma), labels.tolist()))
        share = self.std**2 / (self.std**2 + sigma**2)
        return share * z + (1 - share) * MEANS[labels]


@pytest.fixture
def stack():
    return ImageStack([Gaussian() for _ in range(3)], make_partition(LogNormal(), 3), SHAPE, null_label=2)


def test_each_call_of_the_walk_is_answered_by_the_block_that_trained_there(stack):
    noise = LogNormal()
    sigmas = equal_probability_grid(noise, 12)
    list(stack.walk(torch.tensor([0, 1]), sigmas, generator=torch.Generator().manual_seed(0)))
    for b, block in enumerate(stack.blocks):
        low, high = stack.partition.interval(b)
        assert len(block.calls) == 4 and all(low < sigma <= high for sigma, _ in block.calls)


def test_guidance_1_is_no_guidance_and_costs_one_call(stack):
    labels, z = torch.tensor([0, 1]), torch.randn(2, *SHAPE)
    plain = stack.blocks[0](labels, z, 5.0)
    stack.blocks[0].calls.clear()
    assert torch.equal(stack.denoiser(labels, guidance=1.0)(z, 5.0), plain) and len(stack.blocks[0].calls) == 1
    without = stack.blocks[0](torch.tensor([2, 2]), z, 5.0)
    torch.testing.assert_close(stack.denoiser(labels, guidance=3.0)(z, 5.0), without + 3 * (plain - without))
    torch.testing.assert_close(stack.denoiser(labels, guidance=0.0)(z, 5.0), without)


def test_the_walk_samples_the_distribution_of_its_class(stack):
    sigmas, generator = karras_grid(LogNormal(), 60), torch.Generator().manual_seed(0)
    labels = torch.arange(4000) % 2
    *_, last = stack.walk(labels, sigmas, generator=generator)
    for label in (0, 1):
        sampled = last.z[labels == label]
        assert float(sampled.mean()) == pytest.approx(float(MEANS[label]), abs=0.02)
        assert float(sampled.std()) == pytest.approx(0.5, rel=0.05)


def test_the_edm_loss_of_an_exact_denoiser_is_known_and_adds_up(stack):
    """E |D - y|^2 = std^2 sigma^2 / (std^2 + sigma^2), which is 1 / w for std = sigma_data: the loss is 1."""
    y = MEANS[torch.arange(6000) % 2] + 0.5 * torch.randn(6000, *SHAPE, generator=torch.Generator().manual_seed(1))
    batches = [(y[:2500], torch.arange(2500) % 2), (y[2500:], torch.arange(2500, 6000) % 2)]
    found = edm_loss(stack, batches, sigma_data=0.5)
    assert found["edm_loss"] == pytest.approx(1.0, rel=0.02)
    assert sum(found["edm_loss_by_block"]) == pytest.approx(found["edm_loss"])
    torch.testing.assert_close(torch.tensor(found["edm_loss_by_block"]), torch.full((3,), 1 / 3), rtol=0.03, atol=0)
    assert edm_loss(stack, batches, sigma_data=0.5) == found, "the noise is fixed"
    assert found["validation_edm_loss"] == pytest.approx(1.0, rel=0.02)


def test_the_edm_loss_is_reported_of_images_at_odd_places(stack):
    """Those at even places are for choosing settings by: here they are far off, and nothing of it is reported."""
    y = MEANS[torch.arange(2000) % 2] + 0.5 * torch.randn(2000, *SHAPE, generator=torch.Generator().manual_seed(1))
    y[::2] += 10.0
    found = edm_loss(stack, [(y, torch.arange(2000) % 2)], sigma_data=0.5)
    assert found["edm_loss"] == pytest.approx(1.0, rel=0.05) and found["validation_edm_loss"] > 100


def test_a_mean_of_denoisers_errs_less_than_they_do():
    """Two networks that are wrong by +1 and by -1 in every pixel are right together."""

    class Wrong(Gaussian):
        def __init__(self, by):
            super().__init__()
            self.by = by

        def forward(self, labels, z, sigma):
            return super().forward(labels, z, sigma) + self.by

    blocks, labels, z = [Wrong(+1.0), Wrong(-1.0)], torch.tensor([0, 1]), torch.randn(2, *SHAPE)
    torch.testing.assert_close(Ensemble(blocks)(labels, z, 2.0), Gaussian()(labels, z, 2.0))
    y = MEANS[torch.arange(1000) % 2] + 0.5 * torch.randn(1000, *SHAPE, generator=torch.Generator().manual_seed(1))
    batches, whole = [(y, torch.arange(1000) % 2)], make_partition(LogNormal(), 1)
    mean, *each = (
        edm_loss(ImageStack([block], whole, SHAPE, 2), batches, sigma_data=0.5)["edm_loss"]
        for block in (Ensemble(blocks), *blocks)
    )
    assert mean == pytest.approx(1.0, rel=0.05) and min(each) > 2 * mean


def test_the_walk_is_the_sampler_s(stack):
    sigmas, labels = equal_probability_grid(LogNormal(), 6), torch.tensor([1])
    *_, last = stack.walk(labels, sigmas, generator=torch.Generator().manual_seed(3))
    z = float(sigmas[0]) * torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(3))
    *_, expected = euler_walk(lambda z, sigma: stack.blocks[0](labels, z, sigma), z, sigmas)
    assert torch.equal(last.z, expected.z)
    assert float(edm_weight(torch.tensor(0.5), 0.5)) == pytest.approx(8.0)
