import torch
import torch.nn as nn

from nano_db.block import DiffusionBlock
from nano_db.regression import EDMHead
from nano_db.schedule import LogNormal, edm_coefficients, sample_sigma


class Zero(nn.Module):
    """A network that has learnt nothing: F = 0."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x, z, c_noise):
        return self.scale * z


def test_the_head_blends_z_and_features():
    z, features, sigma = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.tensor([0.2, 4.0])
    denoised = EDMHead(0.5)(features, z, sigma)
    for i in range(2):
        c_skip, c_out, _, _ = edm_coefficients(sigma[i], 0.5)
        torch.testing.assert_close(denoised[i], c_skip * z[i] + c_out * features[i])
    assert not list(EDMHead().parameters())


def test_a_block_trains_on_the_error_of_f_against_its_unit_variance_target():
    """w(sigma) * |D - y|^2 is |F - (y - c_skip z) / c_out|^2: here against a slow loop, with F = 0."""
    noise = LogNormal()
    block, y = DiffusionBlock(Zero(), EDMHead(), noise, (0.3, 80.0), loss_weight="edm"), 0.5 * torch.randn(2000, 3)
    torch.manual_seed(1)
    loss = block.loss((None, y))
    torch.manual_seed(1)
    sigma, total = sample_sigma(noise, 2000, 0.3, 80.0).float(), 0.0
    eps = torch.randn_like(y)
    for i in range(2000):
        c_skip, c_out, _, _ = edm_coefficients(sigma[i], 0.5)
        total += ((y[i] - c_skip * (y[i] + sigma[i] * eps[i])) / c_out).square().mean()
    torch.testing.assert_close(loss, total / 2000)
    assert abs(loss.item() - 1) < 0.1  # unit variance, whatever sigma


def test_the_loss_is_one_number_a_sample():
    denoised, y = torch.randn(5, 2, 3), torch.randn(5, 2, 3)
    loss = EDMHead().loss(denoised, y)
    assert loss.shape == (5,)
    torch.testing.assert_close(loss[3], ((denoised[3] - y[3]) ** 2).mean())
