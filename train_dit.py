"""A diffusion transformer (DiT) on pixels, trained in blocks: each block denoises at its own noise levels.

    python train_dit.py                                 # glyphs, no download (on a GPU: cifar10, downloaded)
    python train_dit.py --baseline                      # the same layers, end to end
    python train_dit.py --eval-only --guidance 1        # sample again, without guidance
    python train_dit.py --data cifar10 --out out/cifar  # photographs (downloaded)
    python train_dit.py --data FOLDER --out out/mine    # your own, one subfolder per class

Here the noisy target z is the image itself. A block is a denoiser in EDM form (heads.EDMHead), conditioned on the noise
level and the class by adaLN-Zero, and trained at the noise levels it owns, and a little beyond (its loss is
block.DiffusionBlock.loss). The baseline is one such block for all levels. To sample, images.ImageStack.walk takes Euler
steps from noise to image. Each evaluates only the active block, L/B of L layers (with guidance, the default, twice).
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.images import NAMES, load_images
from nano_db.block import DiffusionBlock
from nano_db.errors import UsageError
from nano_db.heads import EDMHead
from nano_db.images import TOGETHER, ImageStack, edm_loss, patch_positions, patchify, unpatchify
from nano_db.layers import Layer, NoiseEmbedding, rms_norm
from nano_db.partition import KINDS, make_partition, sampling_grid, split_layers
from nano_db.schedule import LogNormal
from nano_db.stack import Ensemble
from nano_db.trainer.checkpoints import kept
from nano_db.trainer.command import command
from nano_db.trainer.frechet import FEATURES, FrechetSmall
from nano_db.trainer.report import can_score, picture, refuse_inside, refuse_old_images, report
from nano_db.trainer.run import OneAtATime, Run, first_weights, make_optimizer, noise_identity
from nano_db.trainer.settings import Blocks, Training, method, network, output, read_settings, training


def samples_nothing(settings):
    """The flags that leave an evaluation with nothing to sample."""
    nothing = settings.eval_only and not (settings.samples or settings.frechet_images or settings.export)
    return nothing and "--samples 0 --frechet-images 0"


def named_data(settings):
    """The flag that leaves --image-size without effect."""
    return settings.data in NAMES and f"--data {settings.data}"


@dataclass
class Settings(Blocks, Training):
    # Skip these at first: begin with main(), at the end, then build() and DiT. method, network, training and output are
    # headings of --help; `of`, `idle`, `once`, ... only check flags. More settings: trainer/settings.py (layers, ...).
    data: str = training("glyphs", f"images: {', '.join(NAMES)}, or a folder with a subfolder per class")
    image_size: int = training(32, "side of a folder's images, in pixels", at_least=4, below=1025, idle=named_data)
    glyphs: int = training(18_000, "how many glyphs to draw for training", flag=False)
    augment: str = training("flip", "mirror training images, where that keeps the class", flag=False)
    label_dropout: float = training(0.1, "share of training images whose class is withheld", flag=False)
    patch: int = network(4, "side of a patch in pixels", at_least=1)
    width: int = network(96, "features of a patch", at_least=4)
    heads: int = network(4, "attention heads", flag=False)
    dropout: float = training(0.0, "on both residual branches", flag=False)
    layer_split: str = network("", "layers of each block, noisiest first, like 3,6,3 (default: even)", of="blocks")
    partition: str = method("probability", "equal-probability edges, or evenly spaced in ln sigma", KINDS, of="blocks")
    p_mean: float | None = method(None, "mean of ln sigma, blocks and baseline (default: from the data)", kind=float)
    p_std: float = method(1.2, "standard deviation of ln sigma", flag=False)
    sigma_min: float = method(0.002, "minimum noise level", flag=False)
    sigma_max: float = method(80.0, "maximum noise level", flag=False)
    sigma_data: float | None = method(
        None, "standard deviation of clean pixels (default: from the data)", above=0, kind=float
    )
    sampling_steps: int = output(50, "Euler steps from noise to image", at_least=1, idle=samples_nothing)
    guidance: float = output(2.0, "classifier-free guidance; 1: none", at_least=0, idle=samples_nothing)
    test_images: int = output(500, "test images to evaluate on (and as many for validation); 0: all", at_least=0)
    samples: int = output(39, "images to sample for samples.png", at_least=0)
    export: int = output(0, "images to sample into the folder `images` of --out, one PNG each", at_least=0, once=True)
    frechet_images: int = output(500, "images to sample for frechet_small; 0: none", at_least=0)
    frechet_steps: int = output(300, "training steps of the classifier behind frechet_small", flag=False)


PRESETS = {
    "tiny": dict(blocks=3, layers=12, width=16, heads=2, patch=8, batch_size=16, steps=40, warmup=5, glyphs=400,
                 overlap=0.05, sampling_steps=12, test_images=16, frechet_images=66, frechet_steps=20),
    "laptop": dict(blocks=3, layers=12, batch_size=16, steps=2400, warmup=240, overlap=0.05, ema=0.995, rounds=2,
                   learning_rate=3e-3, test_images=250, frechet_images=200),
    "laptop-baseline": dict(rounds=1),  # its evaluation takes three times as long
    "gpu": dict(blocks=3, layers=12, width=384, heads=6, patch=2, batch_size=256, steps=20_000, warmup=1000,
                overlap=0.05, ema=0.9995, data="cifar10", learning_rate=3e-4, frechet_images=5000, test_images=0),
    "paper": dict(blocks=3, layers=12, width=384, heads=6, patch=2, batch_size=512, steps=9800, warmup=0,
                  learning_rate=1e-4, overlap=0.05, ema=0.9999, data="cifar10", frechet_images=10_000, test_images=0,
                  final_rate=1.0),
}  # fmt: skip


class DiT(nn.Module):
    """Noisy image and class through `layers` layers (Peebles & Xie 2023). Returns EDM's F, (B, C, H, W), of which the
    head makes D.

    Classes are numbered from 0; the next number is the null label, which stands for no class.
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
        sizes = width, settings.heads, width, settings.dropout
        self.layers = nn.ModuleList(Layer(*sizes, depth=layers) for _ in range(layers))
        self.modulation = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, pixels)
        for layer in (self.modulation, self.output):  # at the start EDM's F = 0, and D = c_skip * z
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x, z, c_noise):
        """x (B,) labels, the condition; z (B, C, H, W) noisy images times c_in; c_noise (B,), ln(sigma) / 4."""
        h = self.embedding(patchify(z, self.patch)) + self.positions  # (B, T, width)
        cond = self.noise_embedding(c_noise) + self.label_embedding(x)  # (B, width)
        for layer in self.layers:
            h = layer(h, cond=cond)
        shift, scale = self.modulation(F.silu(cond))[:, None].chunk(2, dim=-1)
        return unpatchify(self.output(rms_norm(h) * (1 + scale) + shift), self.patch, z.shape[2])


def noise_levels(settings, images):
    """(p_mean, sigma_data): the mean of ln sigma in training, and the standard deviation of clean pixels. From the
    flags, else those that fit the images.
    """
    p_mean = images.p_mean if settings.p_mean is None else settings.p_mean
    return p_mean, settings.sigma_data or images.sigma_data


def frechet_count(settings, images):
    """How many images are sampled for frechet_small: for a folder at most half its training images, or none."""
    if settings.data in NAMES or settings.frechet_images <= FEATURES:
        return settings.frechet_images
    count = min(settings.frechet_images, len(images.train) // 2)
    return count if count > FEATURES else 0


def check_frechet(settings, images):
    """Raise UsageError if frechet_small cannot be computed; say so if it is computed on fewer images than requested."""
    count = frechet_count(settings, images)
    if count and not FEATURES < count <= len(images.train) // 2:
        limits = f"more than {FEATURES}, and at most half of the {len(images.train)} training images"
        raise UsageError(f"--frechet-images {settings.frechet_images}: the distance needs {limits}")
    if count < settings.frechet_images:
        few = f"half of {len(images.train)} training pictures are too few"
        print(f"frechet_small is {f'computed on {count} pictures' if count else 'left out'}: {few}")


def prepare(settings):
    """What all blocks share, and none trains: the images, and which noise levels are whose."""
    if settings.data not in NAMES:
        refuse_inside(settings)
    images = load_images(settings.data, count=settings.glyphs, size=settings.image_size, kept=kept(settings))
    patch_positions(images.shape, settings.patch, settings.width)  # do they fit? Say so now, before there is a folder
    if not images.missing:
        check_frechet(settings, images)
    p_mean, sigma_data = noise_levels(settings, images)
    whys = ["by flag" if given else images.why for given in (settings.p_mean is not None, settings.sigma_data)]
    print(f"noise levels: p_mean {p_mean:.3g} ({whys[0]}), sigma_data {sigma_data:.3g} ({whys[1]})")
    noise = LogNormal(p_mean, settings.p_std, settings.sigma_min, settings.sigma_max)
    blocks = 1 if settings.baseline else settings.blocks
    partition = make_partition(noise, blocks, settings.partition, settings.overlap)
    sampling_grid(partition, settings.sampling_steps)  # refuses too few steps now, not after training
    return images, partition


def build(b, settings, images, partition):
    """Block b; with --baseline the whole network, at all noise levels."""
    noise, layers = partition.noise, settings.layers
    span = noise.sigma_min, noise.sigma_max  # (report() builds a baseline with the blocks' partition)
    if not settings.baseline:
        layers = split_layers(settings.layers, settings.blocks, settings.layer_split)[b]
        span = partition.training_range(b)
    dit = DiT(images.shape, len(images.classes), settings, layers)
    return DiffusionBlock(dit, EDMHead(noise_levels(settings, images)[1]), noise, span, loss_weight="edm")


def assemble(networks, settings, images, partition):
    """Trained blocks, or the mean of baselines, as a sampler of images."""
    if settings.baseline:  # at all noise levels, although report() passes the blocks' partition
        networks, partition = [Ensemble(networks)], make_partition(partition.noise, 1)
    return ImageStack(networks, partition, images.shape, len(images.classes))


def batch(size, settings, images, partition):
    """Labels (size,), the condition x, and images (size, C, H, W), the target y. Some labels are dropped, so that one
    network learns both terms of classifier-free guidance.
    """
    y, labels = images.batch(size, settings.augment, settings.device)
    dropped = torch.rand(size, device=labels.device) < settings.label_dropout
    return torch.where(dropped, len(images.classes), labels), y


def walk(stack, count, settings):
    """Sample `count` images, of each class in turn. Yields the States (sampler.py)."""
    generator = torch.Generator().manual_seed(settings.seed)
    labels = torch.arange(count, device=settings.device) % stack.null_label  # the number of classes
    sigmas = sampling_grid(stack.partition, settings.sampling_steps)
    return stack.walk(labels, sigmas, settings.guidance, generator)


def sample(networks, count, settings, images, partition):
    """A walk whose cost report() measures. (The images of samples.png are sampled in `evaluate`.)"""
    return list(walk(assemble(networks, settings, images, partition), count, settings))


def sample_images(stack, count, settings):
    """The final images of `walk`: (count, C, H, W) in [-1, 1], on the CPU."""
    for state in walk(stack, count, settings):
        images = state.z  # only the last state is kept
    return images.clamp(-1, 1).cpu()


def score(run, stack, images):
    """The held-out EDM loss and frechet_small, as metrics."""
    settings = run.settings
    _, sigma_data = noise_levels(settings, images)
    batches = list(images.test_batches(TOGETHER, 2 * settings.test_images, settings.device))  # every other: validation
    with run.autocast:  # as in training
        metrics = edm_loss(stack, batches, sigma_data, seed=settings.seed)
    by_block = " ".join(f"{part:.4f}" for part in metrics["edm_loss_by_block"])
    validation = metrics["validation_edm_loss"]
    print(f"EDM loss {metrics['edm_loss']:.4f}, by block {by_block}; on the validation half {validation:.4f}")
    if count := frechet_count(settings, images):
        frechet = FrechetSmall(images, count, settings.frechet_steps, settings.device)
        with run.autocast:  # for the blocks, not for the classifier that judges them
            sampled = sample_images(stack, count, settings)
        metrics |= {"frechet_small": frechet(sampled), "frechet_small_real": frechet.floor}
        print(f"frechet_small {metrics['frechet_small']:.4f} (real images: {frechet.floor:.4f})")
    return metrics


def evaluate(run, networks, images, partition):
    """The score on held-out images, as metrics; samples.png, and images to export."""
    settings, stack = run.settings, assemble(networks, run.settings, images, partition)
    metrics = score(run, stack, images) if can_score(images) else {}
    run.log_evaluation(metrics)  # before samples, which may fail
    if settings.samples or settings.export:
        from nano_db.trainer.plots import draw_images, save_images  # not at the top: pyplot takes a second
    if settings.samples:
        with run.autocast:
            states = list(walk(stack, settings.samples, settings))
        draw_images(picture(run), states, stack.partition, images.classes, noise_levels(settings, images)[1])
    if settings.export and run.last_round:
        with run.autocast:
            save_images(run.folder / "images", sample_images(stack, settings.export, settings))
        print(f"exported: {run.folder / 'images'}")
    return metrics


def main(flags=None):
    settings = read_settings("dit", Settings, PRESETS, description=__doc__, flags=flags)
    images, partition = prepare(settings)
    _, sigma_data = noise_levels(settings, images)
    depends_on = {"data_sha256": images.sha256, "sigma_data": sigma_data, **noise_identity(partition)}
    run = Run("dit", settings, images.keeps(), **depends_on)
    if settings.export:
        refuse_old_images(run.folder / "images")  # now, not after training

    for _ in run.rounds():  # each trains every block a part of its steps, then evaluates
        for b in run.blocks_to_train():  # every block in turn; with --only or torchrun, some of them
            block = first_weights(build, b, settings, images, partition)  # from seed and b; run.steps loads later ones
            optimizer = make_optimizer(block, settings)
            for _ in run.steps(b, block, optimizer):  # resumes from the file; seeds, sets the rate, logs, saves
                labels, y = batch(run.batch_size, settings, images, partition)
                with run.autocast:
                    loss = block.loss(labels, y)
                loss.backward()
                run.average_gradients(block)  # does nothing, unless several processes share the block
                norm = nn.utils.clip_grad_norm_(block.parameters(), settings.clip)
                optimizer.step()
                optimizer.zero_grad()
                run.record(loss, norm)
            del block, optimizer, loss  # this block's memory is freed before the next one trains
        if run.ready():  # all blocks have been trained this round
            # OneAtATime: the trained blocks, of which only the last that was asked for is in memory
            metrics = evaluate(run, OneAtATime(run, build, images, partition), images, partition)
    if run.finished:  # result.json and curves; memory and time, measured on networks built anew
        report(run, metrics, "edm_loss", build, batch, sample, images, partition)


if __name__ == "__main__":
    command(main)
