"""A diffusion transformer (DiT) on pixels, trained in blocks: each block paints at its own noise levels.

    python train_dit.py                                 # glyphs, drawn on the spot: no network needed
    python train_dit.py --baseline                      # the same network, end to end
    python train_dit.py --eval-only --guidance 1        # paint again, without guidance
    python train_dit.py --data cifar10 --p-mean -1.2 --sigma-data 0.5 --out out/cifar     # photographs: EDM's constants

Here the noisy target z is the image itself. A block is a denoiser in EDM form (regression.py), told the noise level and
the class by adaLN-Zero, and trained at the noise levels it owns; the baseline is the same with one block for all of
them. In the walk from noise to image one block is at work per call: of L layers, L/B are evaluated.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.images import NAMES, load_images
from nano_db.block import DiffusionBlock
from nano_db.device import pick_device
from nano_db.errors import UsageError
from nano_db.frechet import FrechetSmall, check_count
from nano_db.image_stack import ImageStack, MeanDenoiser, edm_loss
from nano_db.layers import Layer, NoiseEmbedding, rms_norm
from nano_db.partition import make_partition, split_layers
from nano_db.patches import check_patches, patch_positions, patchify, unpatchify
from nano_db.regression import EDMHead
from nano_db.schedule import GRIDS, make_noise
from nano_db.script import output_folder, picture_path, read_settings, run_script
from nano_db.settings import NoiseSettings, RunSettings, command, option

EXPORT_BATCH = 250  # images painted at a time


@dataclass
class Settings(NoiseSettings, RunSettings):
    no_flags: ClassVar = ("recipe", "noise")  # one recipe: the paper's
    for_both: ClassVar = ("p_mean", "p_std", "sigma_min", "sigma_max", "sigma_data", "loss_weight")
    loss_weight: str = option("edm", "weight of the loss over sigma", choices=("none", "edm"))

    data: str = option("glyphs", "labelled images", choices=NAMES)
    glyphs: int = option(18_000, "how many glyphs to draw for training", least=100)
    augment: str = option("flip", "mirror training images, where that leaves the class", choices=("none", "flip"))
    patch: int = option(4, "side of a patch in pixels", least=1)
    width: int = option(96, "features of a patch", least=4)
    heads: int = option(4, "attention heads", least=1)
    mlp: str = option("gelu", "kind of MLP", choices=("gelu", "swiglu"))
    dropout: float = option(0.0, "on both residual branches", least=0, below=1)
    label_dropout: float = option(0.1, "share of training images whose class is not told", least=0, below=1)

    calls: int = option(50, "steps of the walk from noise to image", least=1, free=True)
    solver: str = option(
        "euler", "one network call a step, or two (heun: with --grid karras)", choices=("euler", "heun"), free=True
    )
    grid: str = option("equal-mass", "noise levels of the walk", choices=("equal-mass", "karras"), free=True)
    guidance: float = option(2.0, "classifier-free guidance; 1: none", least=0, free=True)
    test_images: int = option(1000, "held-out images to evaluate the loss on; 0: all", least=0, free=True)
    samples: int = option(39, "images to paint for samples.png", least=0, free=True)
    export: int = option(0, "images to paint into the folder `images` of --out, a PNG each", least=0, free=True)
    frechet_steps: int = option(300, "training steps of the classifier behind frechet_small", least=1, free=True)
    frechet_images: int = option(500, "images to paint for frechet_small; 0: none", least=0, free=True)


PRESETS = {
    "tiny": dict(
        blocks=3, layers=12, width=16, heads=2, patch=8, batch_size=16, steps=40, warmup=5, log_every=10,
        glyphs=400, overlap=0.05, calls=12, test_images=32, frechet_images=66, frechet_steps=20,
    ),
    # Glyphs are black or white, and decide what they are under far more noise than photographs.
    "laptop": dict(
        blocks=3, layers=6, batch_size=32, steps=2000, warmup=100, overlap=0.05, ema=0.995, learning_rate=3e-3,
        p_mean=0.5, sigma_data=0.9,
    ),
    "gpu": dict(
        blocks=3, layers=12, width=384, heads=6, patch=2, batch_size=256, steps=20_000, warmup=1000, overlap=0.05,
        ema=0.9995, data="cifar10", learning_rate=3e-4, frechet_images=5000, test_images=0,
    ),
    "paper": dict(
        blocks=3, layers=12, width=384, heads=6, patch=2, batch_size=512, steps=9800, warmup=0, learning_rate=1e-4,
        overlap=0.05, ema=0.9999, data="cifar10", frechet_images=10_000, test_images=0, final_rate=1.0,
    ),
}  # fmt: skip


class DiT(nn.Module):
    """Noisy image and class through `layers` layers (Peebles & Xie 2023): features F of the image, (B, C, H, W).

    Classes are numbered from 0; the next number is the null label, which says nothing (drop_labels).
    """

    def __init__(self, shape, classes, settings, layers):
        super().__init__()
        self.shape, self.patch, width = shape, settings.patch, settings.width
        pixels = shape[0] * settings.patch**2
        self.embedding = nn.Linear(pixels, width)
        self.register_buffer("positions", patch_positions(shape, settings.patch, width), persistent=False)
        self.label_embedding = nn.Embedding(classes + 1, width)
        nn.init.normal_(self.label_embedding.weight, std=0.02)
        self.noise_embedding = NoiseEmbedding(width)
        self.layers = nn.ModuleList(
            Layer(width, settings.heads, settings.mlp, width, settings.dropout) for _ in range(layers)
        )
        self.modulation = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, pixels)
        for layer in (self.modulation, self.output):  # at the start F = 0, and D = c_skip * z
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x, z, c_noise):
        """x (B,) labels, z (B, C, H, W) scaled noisy images, c_noise (B,)."""
        h = self.embedding(patchify(z, self.patch, self.shape)) + self.positions  # (B, T, width)
        cond = self.noise_embedding(c_noise) + self.label_embedding(x)  # (B, width)
        for layer in self.layers:
            h = layer(h, cond=cond)
        shift, scale = self.modulation(F.silu(cond))[:, None].chunk(2, dim=-1)
        return unpatchify(self.output(rms_norm(h) * (1 + scale) + shift), self.patch, self.shape)


def drop_labels(labels, share, null_label):
    """Put the null label in the place of a share of labels (B,): so one network learns both terms of classifier-free
    guidance (Ho & Salimans 2021).
    """
    return torch.where(torch.rand(len(labels)).to(labels.device) < share, null_label, labels)


def check_options(s, images):
    check_patches(images.shape, s.patch, s.width, s.heads)
    if s.guidance != 1 and not s.label_dropout:
        raise UsageError("--guidance needs a network that also knows images without a class: --label-dropout above 0")
    if s.solver == "heun" and s.grid != "karras":
        raise UsageError(
            "--solver heun needs --grid karras: the equal-mass grid leaves sigma_max in a single step, "
            "too long for a second look at its end"
        )
    if s.frechet_images:
        check_count(s.frechet_images, len(images.train))


def main():
    settings = read_settings("dit", Settings, PRESETS, None, __doc__)
    device = pick_device(settings.device)
    images = load_images(settings.data, settings.data_dir, settings.glyphs)
    check_options(settings, images)
    classes = len(images.classes)
    noise = make_noise(settings, None, None)
    blocks = 1 if settings.baseline else settings.blocks
    layers = split_layers(settings.layers, blocks, settings.layer_split)
    partition = make_partition(noise, blocks, settings.partition, settings.overlap)
    sigmas = GRIDS[settings.grid](noise, settings.calls)
    frechet = None  # made when it is first needed

    def make(layers, span):
        network, head = DiT(images.shape, classes, settings, layers), EDMHead(settings.sigma_data)
        drop = partial(drop_labels, share=settings.label_dropout, null_label=classes)
        return DiffusionBlock(network, head, noise, span, settings.sigma_data, settings.loss_weight, drop=drop)

    def make_baseline(b=0):
        return make(settings.layers, (noise.sigma_min, noise.sigma_max))

    def make_block(b):
        return make(layers[b], partition.training_range(b))

    def draw_batch():
        y, labels = images.batch(settings.batch_size, settings.augment, device)
        return labels, y

    def make_stack(networks):
        if settings.ensemble > 1:
            networks = [MeanDenoiser(networks)]
        return ImageStack(networks, make_partition(noise, len(networks), settings.partition), classes)

    def paint(networks, count, seed=settings.seed):
        """Walk to `count` images, of each class in turn. Yields the States."""
        labels, generator = torch.arange(count, device=device) % classes, torch.Generator().manual_seed(seed)
        return make_stack(networks).walk(labels, images.shape, sigmas, settings.guidance, settings.solver, generator)

    def evaluate_and_paint(networks, _):
        nonlocal frechet
        batches = list(images.test_batches(250, settings.test_images, device))
        metrics = edm_loss(make_stack(networks), batches, noise, settings.sigma_data, seed=settings.seed)
        print(f"EDM loss {metrics['edm_loss']:.4f}, by block", *(f"{p:.4f}" for p in metrics["edm_loss_by_block"]))
        if settings.frechet_images:
            frechet = frechet or FrechetSmall(images, settings.frechet_images, settings.frechet_steps, device)
            *_, last = paint(networks, settings.frechet_images)
            metrics |= {"frechet_small": frechet(last.z.clamp(-1, 1)), "frechet_small_real": frechet.floor}
            print(f"frechet_small {metrics['frechet_small']:.4f} (real images: {frechet.floor:.4f})")
        if settings.samples:
            from nano_db.plots import draw_images

            states = list(paint(networks, settings.samples))
            owners = [partition.route(float(sigma)) for sigma in sigmas[:-1]]
            names = [images.classes[i % classes] for i in range(settings.samples)]
            draw_images(picture_path("dit", settings), states, owners, names, settings.sigma_data)
        for first in range(0, settings.export, EXPORT_BATCH):
            from nano_db.plots import save_images

            *_, last = paint(networks, min(EXPORT_BATCH, settings.export - first), settings.seed + first)
            save_images(output_folder("dit", settings) / "images", last.z, first)
        if settings.export:
            print(f"{settings.export} images: {output_folder('dit', settings) / 'images'}")
        return metrics

    run_script(
        "dit",
        settings,
        images.sha256,
        device,
        make=make_baseline if settings.baseline else make_block,
        make_baseline=make_baseline,
        draw_batch=draw_batch,
        evaluate=evaluate_and_paint,
        metric="edm_loss",
        unit="held-out EDM loss",
        use=lambda networks, count: list(paint(networks, count)),
        in_turn=settings.ensemble == 1,  # an ensemble is asked as a whole at each call
    )


if __name__ == "__main__":
    command(main)
