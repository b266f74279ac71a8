"""A vision transformer that denoises its label, trained in blocks.

    python train_vit.py                                    # glyphs, drawn on the spot: no network needed
    python train_vit.py --baseline                         # the same network, end to end
    python train_vit.py --recipe paper --out out/vit-paper # the paper's own choices
    python train_vit.py --data cifar10                     # photographs (downloaded, or in --data-dir)

The target is the image's class, as a point on the unit sphere with noise on it (codebook.py). In the paper's recipe
the noisy label takes the place of a ViT's [CLS] token, and the walk from noise to a class passes through all blocks.
In ours, Bayes' rule brings the noise in, and the network sees the image alone.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn

from data.images import NAMES, load_images
from nano_db.block import DiffusionBlock, EndToEnd
from nano_db.classify import classify, evaluate
from nano_db.codebook import PosteriorHead, make_codebook, make_head
from nano_db.device import pick_device
from nano_db.layers import Layer, NoiseEmbedding, rms_norm
from nano_db.partition import make_partition, split_layers
from nano_db.patches import check_patches, patch_positions, patchify
from nano_db.schedule import GRIDS, make_noise
from nano_db.script import picture_path, read_settings, run_script
from nano_db.settings import DiscreteSettings, RunSettings, check_discrete, command, option
from nano_db.stack import Stack


@dataclass
class Settings(DiscreteSettings, RunSettings):
    data: str = option("glyphs", "labelled images", choices=NAMES)
    glyphs: int = option(18_000, "how many glyphs to draw for training", least=100)
    augment: str = option("standard", "training images", choices=("none", "flip", "standard", "randaugment"))
    patch: int = option(4, "side of a patch in pixels", least=1)
    positions: float = option(1.0, "size (root mean square) of the embeddings of a patch's place", least=0)
    width: int = option(96, "features of a patch", least=4)
    heads: int = option(4, "attention heads", least=1)
    mlp: str = option("gelu", "kind of MLP", choices=("gelu", "swiglu"))
    dropout: float = option(0.0, "on both residual branches", least=0, below=1)
    readout: str = option("token", "where the class is read: the label token, or the mean", choices=("token", "mean"))
    calls_per_block: int = option(1, "Euler calls of each block", least=1, free=True, only="blocks")
    walks: int = option(8, "walks from noise to average", least=1, free=True, only="blocks")
    samples: int = option(25, "hardest test images to show in samples.png; 0: no picture", least=0, free=True)
    test_images: int = option(0, "test images to evaluate on; 0: all", least=0, free=True)


PRESETS = {
    "tiny": dict(
        blocks=3, layers=12, width=16, heads=2, patch=8, batch_size=16, steps=40, warmup=5, log_every=10,
        glyphs=500, overlap=0.05,
    ),
    "laptop": dict(
        blocks=3, layers=6, batch_size=64, steps=1500, warmup=75, rounds=3, weight_decay=0.05, overlap=0.05,
    ),
    "gpu": dict(
        blocks=3, layers=12, width=192, heads=6, batch_size=256, steps=10_000, warmup=500, weight_decay=0.05,
        overlap=0.05, dropout=0.1, data="cifar10", positions=0.3,
        readout="mean",  # on photographs blocks do better with it, on glyphs with the token
    ),
    "paper": dict(
        blocks=3, layers=12, width=128, heads=4, batch_size=128, steps=195_500, warmup=3910, learning_rate=5e-4,
        weight_decay=0.05, overlap=0.05, dropout=0.1, data="cifar100", positions=0.3,
    ),
}  # fmt: skip

RECIPES = {
    "paper": dict(
        head="paper", loss_weight="edm", range="own", z="inside", walk="last",
        p_mean=-1.2, p_std=1.2, sigma_min=0.002, sigma_max=80.0,
    ),
    "nano": dict(
        head="posterior", loss_weight="none", range="upward", z="outside", walk="averaged",
        p_mean=0.0, p_std=0.8, sigma_min=0.2, sigma_max=20.0,
    ),
}  # fmt: skip


class ViT(nn.Module):
    """Label token and patches through `layers` layers that look everywhere: features of the class, (B, width).

    The label token is learned, like [CLS]; where the network is shown the noisy label z, W(c_in * z) is added to it.
    """

    def __init__(self, shape, settings, layers, shows_z):
        super().__init__()
        width, self.shape, self.patch, self.readout = settings.width, shape, settings.patch, settings.readout
        cond_width = max(8, width // 6) if shows_z else 0
        self.embedding = nn.Linear(shape[0] * settings.patch**2, width)
        positions = settings.positions * patch_positions(shape, settings.patch, width)
        self.register_buffer("positions", positions, persistent=False)
        self.label_token = nn.Parameter(torch.randn(width))
        if shows_z:
            self.from_z = nn.Linear(width, width, bias=False)
            self.noise_embedding = NoiseEmbedding(cond_width)
        self.layers = nn.ModuleList(
            Layer(width, settings.heads, settings.mlp, cond_width, settings.dropout) for _ in range(layers)
        )

    def forward(self, x, z, c_noise):
        """x (B, C, H, W) images; z (B, width) scaled noisy labels and c_noise (B,), or None for both."""
        patches = self.embedding(patchify(x, self.patch, self.shape)) + self.positions  # (B, T, width)
        label = self.label_token.expand(len(x), 1, -1)
        cond = None if z is None else self.noise_embedding(c_noise)
        if z is not None:
            label = label + self.from_z(z)[:, None]
        h = torch.cat([label, patches], dim=1)
        for layer in self.layers:
            h = layer(h, cond=cond)
        h = rms_norm(h)
        return h[:, 0] if self.readout == "token" else h.mean(1)


def main():
    settings = read_settings("vit", Settings, PRESETS, RECIPES, __doc__)
    check_discrete(settings)
    device = pick_device(settings.device)
    images = load_images(settings.data, settings.data_dir, settings.glyphs)
    check_patches(images.shape, settings.patch, settings.width, settings.heads)
    classes = len(images.classes)
    codebook = make_codebook(classes, settings.width, settings.seed)
    noise = make_noise(settings, torch.full((classes,), 1 / classes), codebook)
    blocks = 1 if settings.baseline else settings.blocks
    layers = split_layers(settings.layers, blocks, settings.layer_split)
    partition = make_partition(noise, blocks, settings.partition, settings.overlap)
    sigmas = GRIDS[settings.grid](noise, settings.calls_per_block * blocks)

    def make_baseline(b=0):
        return EndToEnd(ViT(images.shape, settings, settings.layers, shows_z=False), PosteriorHead(codebook))

    def make_block(b):
        shows_z = settings.z == "inside"
        network = ViT(images.shape, settings, layers[b], shows_z)
        head = make_head(settings.head, codebook, settings.sigma_data)
        span = partition.training_range(b, upward=settings.range == "upward")
        return DiffusionBlock(network, head, noise, span, settings.sigma_data, settings.loss_weight, shows_z)

    def make_stack(networks):
        if isinstance(networks[0], EndToEnd):
            return Stack(networks)
        return Stack(networks, partition, settings.walk == "averaged")

    def classify_some(networks, count):
        x, _ = next(images.test_batches(count, count, device))
        return classify(make_stack(networks), x, sigmas)

    def evaluate_and_draw(networks, _):
        batches = images.test_batches(256, settings.test_images, device)
        metrics, log_p, labels = evaluate(make_stack(networks), batches, sigmas, settings.walks, settings.seed)
        for name, value in metrics.items():
            print(
                name.replace("_", " "), *(f"{share:.4f}" for share in (value if isinstance(value, list) else [value]))
            )
        if settings.samples:
            from nano_db.plots import draw_classification

            draw_classification(picture_path("vit", settings), images, log_p, labels, metrics, settings.samples)
        return metrics

    run_script(
        "vit",
        settings,
        images.sha256,
        device,
        make=make_baseline if settings.baseline else make_block,
        make_baseline=make_baseline,
        draw_batch=lambda: images.batch(settings.batch_size, settings.augment, device),
        evaluate=evaluate_and_draw,
        metric="accuracy",
        unit="share of test images named right",
        use=classify_some,
    )


if __name__ == "__main__":
    command(main)
