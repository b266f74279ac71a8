"""The head for targets that are themselves numbers, such as points and pixels: the answer is D, the denoised target."""

import torch.nn as nn

from nano_db.codebook import broadcast
from nano_db.schedule import edm_coefficients


class EDMHead(nn.Module):
    """D = c_skip * z + c_out * F (EDM, eq. 7), with the network's features as F. It has no parameters.

    It keeps the contract of a head (codebook.DiscreteHead). With DiffusionBlock(loss_weight="edm") a block trains on
    EDM's weighted squared error, in which F regresses on a target of unit variance at every sigma.
    """

    def __init__(self, sigma_data=0.5):
        super().__init__()
        self.sigma_data = sigma_data

    def clean(self, y):
        return y

    def forward(self, features, z, sigma, temperature=1.0):
        """features and z (B, ...) of one shape -> D (B, ...). D is no distribution: temperature must stay 1."""
        assert features.shape == z.shape and temperature == 1.0
        c_skip, c_out, _, _ = edm_coefficients(broadcast(sigma, z), self.sigma_data)
        return c_skip * z + c_out * features

    def loss(self, denoised, y):
        """Squared error, the mean over everything but the batch. (B,)"""
        assert denoised.shape == y.shape
        return (denoised - y).square().flatten(1).mean(1)
