"""A diffusion transformer (DiT) on pixels, trained in blocks: each block paints at its own noise levels.

    python train_dit.py                                 # glyphs, drawn on the spot: no network needed
    python train_dit.py --baseline                      # the same network, end to end
    python train_dit.py --eval-only --guidance 1        # paint again, without guidance
    python train_dit.py --data cifar10 --p-mean -1.2 --sigma-data 0.5 --out out/cifar     # photographs: EDM's constants

Here the noisy target z is the image itself. A block is a denoiser in EDM form (heads.EDMHead), told the noise level and
the class by adaLN-Zero, and trained at the noise levels it owns; the baseline is the same with one block for all of
them. In the walk from noise to image one block is at work per call: of L layers, L/B are evaluated.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.images import NAMES, load_images
from nano_db.block import DiffusionBlock
from nano_db.errors import UsageError
from nano_db.heads import EDMHead
from nano_db.images import ImageStack, MeanDenoiser, edm_loss, patch_positions, patchify, unpatchify
from nano_db.laboratory.benchmark import Bench
from nano_db.laboratory.export import refuse_old_images
from nano_db.laboratory.frechet import FEATURES, FrechetSmall
from nano_db.layers import Layer, NoiseEmbedding, layer_norm
from nano_db.machinery.run import OneAtATime, Run, command, make_optimizer
from nano_db.machinery.settings import Blocks, Training, method, network, output, read_settings, training
from nano_db.partition import make_partition, sampling_grid, split_layers
from nano_db.schedule import LogNormal

PAINT_BATCH, PAINT_TOGETHER = 250, 5000  # images that a block sees at a time; images on their way at a time


def paints_nothing(settings):
    """The flags of an evaluation alone that is to paint nothing."""
    nothing = settings.eval_only and not (settings.samples or settings.frechet_images or settings.export)
    return nothing and "--samples 0 --frechet-images 0"


@dataclass
class Settings(Blocks, Training):
    data: str = training("glyphs", "labelled images", choices=NAMES)
    glyphs: int = training(18_000, "how many glyphs to draw for training", flag=False)
    augment: str = training("flip", "mirror training images, where that leaves the class", flag=False)
    label_dropout: float = training(0.1, "share of training images whose class is not told", flag=False)
    weight_decay: float = training(0.01, "AdamW's, on matrices only", least=0)
    patch: int = network(4, "side of a patch in pixels", least=1)
    width: int = network(96, "features of a patch", least=4)
    heads: int = network(4, "attention heads", flag=False)
    dropout: float = network(0.0, "on both residual branches", flag=False)
    layer_split: str = network("", "layers of each block, noisiest first, like 3,6,3 (default: even)", of="blocks")
    partition: str = method(
        "probability", "edges of equal mass, or uniform in ln sigma", ("probability", "uniform"), of="blocks"
    )
    p_mean: float = method(-1.2, "mean of ln sigma, for blocks and baseline")
    p_std: float = method(1.2, "standard deviation of ln sigma", flag=False)
    sigma_min: float = method(0.002, "least noise level", flag=False)
    sigma_max: float = method(80.0, "greatest noise level", flag=False)
    sigma_data: float = method(0.5, "standard deviation of clean pixels (EDM)", above=0)
    calls: int = output(50, "Euler steps of the walk from noise to image", least=1, idle=paints_nothing)
    guidance: float = output(2.0, "classifier-free guidance; 1: none", least=0, idle=paints_nothing)
    test_images: int = output(1000, "held-out images to evaluate the loss on; 0: all", least=0)
    samples: int = output(39, "images to paint for samples.png", least=0)
    export: int = output(0, "images to paint into the folder `images` of --out, a PNG each", least=0, once=True)
    frechet_images: int = output(500, "images to paint for frechet_small; 0: none", least=0)
    frechet_steps: int = output(300, "training steps of the classifier behind frechet_small", flag=False)


PRESETS = {
    "tiny": dict(
        blocks=3, layers=12, width=16, heads=2, patch=8, batch_size=16, steps=40, warmup=5,
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

    Classes are numbered from 0; the next number is the null label, which says nothing.
    """

    def __init__(self, shape, classes, settings, layers):
        super().__init__()
        self.patch, width = settings.patch, settings.width
        pixels = shape[0] * settings.patch**2
        self.embedding = nn.Linear(pixels, width)
        self.register_buffer("positions", patch_positions(shape, settings.patch, width), persistent=False)
        self.label_embedding = nn.Embedding(classes + 1, width)
        nn.init.normal_(self.label_embedding.weight, std=0.02)
        self.noise_embedding = NoiseEmbedding(width)
        self.layers = nn.ModuleList(Layer(width, settings.heads, width, settings.dropout) for _ in range(layers))
        self.modulation = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, pixels)
        for layer in (self.modulation, self.output):  # at the start F = 0, and D = c_skip * z
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x, z, c_noise):
        """x (B,) labels, z (B, C, H, W) scaled noisy images, c_noise (B,)."""
        h = self.embedding(patchify(z, self.patch)) + self.positions  # (B, T, width)
        cond = self.noise_embedding(c_noise) + self.label_embedding(x)  # (B, width)
        for layer in self.layers:
            h = layer(h, cond=cond)
        shift, scale = self.modulation(F.silu(cond))[:, None].chunk(2, dim=-1)
        return unpatchify(self.output(layer_norm(h) * (1 + scale) + shift), self.patch, z.shape[2])


def drop_labels(labels, share, null_label):
    """In training some labels are not told: so one network learns both terms of classifier-free guidance. (B,)"""
    return torch.where(torch.rand(len(labels), device=labels.device) < share, null_label, labels)


def paint(stack, count, sigmas, settings, first=0):
    """Walk to `count` images, of each class in turn, numbered from `first`. Yields the States (sampler.py)."""
    generator = torch.Generator().manual_seed(settings.seed + first)
    labels = torch.arange(first, first + count, device=settings.device) % stack.null_label
    return stack.walk(labels, sigmas, settings.guidance, generator)


def paint_many(stack, count, sigmas, settings):
    """Yield (first, images (B, C, H, W)), PAINT_BATCH at a time. PAINT_TOGETHER images take each step together, so that
    a block is needed, and its file read, once for all of them. States are forgotten as the walk goes on.
    """
    for begin in range(0, count, PAINT_TOGETHER):
        end = min(begin + PAINT_TOGETHER, count)
        firsts = range(begin, end, PAINT_BATCH)
        walks = [paint(stack, min(PAINT_BATCH, end - first), sigmas, settings, first) for first in firsts]
        for states in zip(*walks, strict=True):
            last = [state.z for state in states]
        yield from ((first, z.clamp(-1, 1).cpu()) for first, z in zip(firsts, last, strict=True))


def score_and_paint(stack, images, noise, sigmas, settings, run):
    """The held-out EDM loss and frechet_small, as metrics; samples.png, and images to export. sigmas: of the walk."""
    batches = list(images.test_batches(250, settings.test_images, settings.device))
    with run.autocast:  # as in training
        metrics = edm_loss(stack, batches, noise, settings.sigma_data, seed=settings.seed)
    print(f"EDM loss {metrics['edm_loss']:.4f}, by block", *(f"{p:.4f}" for p in metrics["edm_loss_by_block"]))
    if settings.frechet_images:
        frechet = FrechetSmall(images, settings.frechet_images, settings.frechet_steps, settings.device)
        with run.autocast:  # of the blocks, and not of the classifier that judges them
            painted = torch.cat([images for _, images in paint_many(stack, settings.frechet_images, sigmas, settings)])
        metrics |= {"frechet_small": frechet(painted), "frechet_small_real": frechet.floor}
        print(f"frechet_small {metrics['frechet_small']:.4f} (real images: {frechet.floor:.4f})")
    if settings.samples:
        from nano_db.laboratory.plots import draw_images  # matplotlib is slow to import

        owners = [stack.partition.route(float(sigma)) for sigma in sigmas[:-1]]
        names = [images.classes[i % len(images.classes)] for i in range(settings.samples)]
        with run.autocast:
            states = list(paint(stack, settings.samples, sigmas, settings))
        draw_images(run.picture(), states, owners, names, settings.sigma_data)
    with run.autocast:
        for first, painted in paint_many(stack, settings.export if run.last_round else 0, sigmas, settings):
            from nano_db.laboratory.plots import save_images

            save_images(run.folder / "images", painted, first)
    return metrics


def main():
    settings = read_settings("dit", Settings, PRESETS, description=__doc__)
    images, device = load_images(settings.data, count=settings.glyphs), settings.device
    if settings.frechet_images and not FEATURES < settings.frechet_images <= len(images.train) // 2:
        limits = f"more than {FEATURES}, and at most half of the {len(images.train)} training images"
        raise UsageError(f"--frechet-images {settings.frechet_images}: the distance needs {limits}")
    shape, classes = tuple(images.train.shape[1:]), len(images.classes)

    # What every block knows without being told: the noise levels, and who owns which.
    noise = LogNormal(settings.p_mean, settings.p_std, settings.sigma_min, settings.sigma_max)
    blocks = 1 if settings.baseline else settings.blocks
    partition = make_partition(noise, blocks, settings.partition, settings.overlap)
    layers = split_layers(settings.layers, blocks, settings.layer_split)
    sigmas = sampling_grid(noise, partition, settings.calls)

    def make_block(b, layers=layers, partition=partition):
        network, span = DiT(shape, classes, settings, layers[b]), partition.training_range(b)
        return DiffusionBlock(network, EDMHead(settings.sigma_data), noise, span, settings.sigma_data, "edm")

    def make_baseline(b):
        return make_block(0, [settings.layers], make_partition(noise, 1))

    def put_together(networks):
        if settings.ensemble > 1:
            networks = [MeanDenoiser(networks)]
        return ImageStack(networks, make_partition(noise, len(networks), settings.partition), shape, classes)

    def batch():
        y, labels = images.batch(run.batch_size, settings.augment, device)
        return drop_labels(labels, settings.label_dropout, classes), y

    make = make_baseline if settings.baseline else make_block
    run = Run("dit", settings, data_sha256=images.sha256, edges=[round(edge, 5) for edge in partition.edges])
    if settings.export:
        refuse_old_images(run.folder / "images")  # now, not after the training
    bench = Bench(
        run,
        make_block,
        make_baseline,
        batch,
        lambda networks, count: list(paint(put_together(networks), count, sigmas, settings)),
    )

    for _ in run.rounds():
        for b in run.turns():  # every block in turn; with --only or torchrun, mine
            block = run.build(make, b)  # first weights: from the seed and b alone
            optimizer = make_optimizer(block, settings)
            for _ in run.steps(b, block, optimizer):  # resumes from the block's file; seeds each step; logs and saves
                labels, y = batch()
                with run.autocast:
                    loss = block.loss(labels, y)
                loss.backward()
                run.average_gradients(block)  # does nothing, unless several processes share the block
                norm = nn.utils.clip_grad_norm_(block.parameters(), settings.clip)
                optimizer.step()
                optimizer.zero_grad()
                run.record(loss, norm)
            del block, optimizer, loss  # of this block nothing is in memory while the next one trains
        if run.ready():  # all blocks are there
            # One block at a time is enough in memory; but networks that are averaged are asked together.
            trained = run.trained_blocks(make) if settings.ensemble > 1 else OneAtATime(run, make)
            metrics = score_and_paint(put_together(trained), images, noise, sigmas, settings, run)
            run.log_evaluation(metrics)
            del trained
    if run.complete():
        bench.report(metrics, "edm_loss", "held-out EDM loss")


if __name__ == "__main__":
    command(main)
