"""A vision transformer that denoises its label, trained in blocks.

    python train_vit.py                                    # glyphs, no download (on a GPU: cifar10, downloaded)
    python train_vit.py --baseline                         # the same layers, end to end
    python train_vit.py --recipe paper --out out/vit-paper # the paper's own choices
    python train_vit.py --data cifar10 --out out/cifar     # photographs (downloaded)
    python train_vit.py --data FOLDER --out out/mine       # your own, one subfolder per class

The target is the image's class, as a point on the unit sphere with noise added (heads.py). In recipe paper the noisy
label is added to a ViT's label token. In ours the network is a plain ViT, and a small head sees its features, the noisy
label and the noise level. Either way the walk from noise to a class passes through all blocks.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn

from data.images import NAMES, load_images, to_floats
from nano_db.block import DiffusionBlock, EndToEnd
from nano_db.classify import classify, score_images
from nano_db.errors import UsageError
from nano_db.heads import HEADS, PosteriorHead, make_target_embeddings
from nano_db.images import patch_positions, patchify
from nano_db.layers import Layer, NoiseEmbedding, rms_norm
from nano_db.partition import make_partition, sampling_grid, split_layers
from nano_db.schedule import LogNormal
from nano_db.stack import PREDICT, assemble
from nano_db.trainer.checkpoints import kept
from nano_db.trainer.command import command
from nano_db.trainer.report import picture, refuse_inside, report
from nano_db.trainer.run import Run, first_weights, make_optimizer, noise_identity
from nano_db.trainer.settings import Blocks, Discrete, Training, method, network, output, read_settings, training


def other_data(settings):
    """The flag that leaves --glyphs without effect."""
    return settings.data != "glyphs" and f"--data {settings.data}"


def named_data(settings):
    """The flag that leaves --image-size without effect."""
    return settings.data in NAMES and f"--data {settings.data}"


@dataclass
class Settings(Discrete, Blocks, Training):
    # Skip these at first: begin with main(), at the end, then build() and ViT. method, network, training and output are
    # headings of --help; `of`, `idle`, `once`, ... only check flags. More settings: trainer/settings.py (layers, ...).
    data: str = training("glyphs", f"images: {', '.join(NAMES)}, or a folder with a subfolder per class")
    image_size: int = training(32, "side of a folder's images, in pixels", at_least=4, below=1025, idle=named_data)
    glyphs: int = training(18_000, "how many glyphs to draw for training", at_least=100, idle=other_data)
    augment: str = training("standard", "image augmentation", choices=("none", "flip", "standard"), flag=False)
    patch: int = network(4, "side of a patch in pixels", at_least=1)
    positions: float = network(1.0, "size (root mean square) of the patches' position embeddings", at_least=0)
    width: int = network(96, "features of a patch", at_least=4)
    heads: int = network(4, "attention heads", flag=False)
    dropout: float = training(0.0, "on both residual branches", flag=False)
    pooling: str = network(
        "token", "features to classify: the label token's, or all tokens' mean", choices=("token", "mean")
    )
    head: str = method("denoising", "output head (heads.py)", choices=tuple(HEADS), of="blocks")
    clean_weight: float = method(
        0.0, "weight of the loss at z = 0 (recipe nano: 1)", at_least=0, of="blocks", idle=Discrete.other_head
    )
    predict: str = method("averaged", "the active block, or mean of all so far", PREDICT, of="blocks", resumable=True)
    sampling_steps_per_block: int = method(1, "Euler steps of each block", flag=False, resumable=True)
    walks: int = output(8, "walks from noise to average", flag=False)
    samples: int = output(25, "hardest test images to show in samples.png; 0: no picture", at_least=0)
    test_images: int = output(0, "test images to evaluate on (and as many for validation); 0: all", at_least=0)


PRESETS = {
    "tiny": dict(blocks=3, layers=12, width=16, heads=2, patch=8, batch_size=16, steps=40, warmup=5, glyphs=500,
                 overlap=0.05),
    "laptop": dict(blocks=3, layers=12, patch=8, batch_size=64, steps=2000, warmup=200, rounds=2, weight_decay=0.05,
                   overlap=0.05, learning_rate=3e-3),
    "gpu": dict(
        blocks=3, layers=12, width=192, heads=6, batch_size=256, steps=10_000, warmup=500, weight_decay=0.05,
        overlap=0.05, dropout=0.1, data="cifar10", positions=0.3,
        pooling="mean",  # on photographs blocks do better with it, on glyphs with the token
    ),
    "paper": dict(blocks=3, layers=12, width=128, heads=4, batch_size=128, steps=195_500, warmup=3910,
                  learning_rate=5e-4, weight_decay=0.05, overlap=0.05, dropout=0.1, data="cifar100", positions=0.3),
}  # fmt: skip

RECIPES = {
    "nano": dict(head="denoising", predict="averaged", loss_weight="none", noise="nano", clean_weight=1.0),
    "paper": dict(head="paper", predict="active", loss_weight="edm", noise="paper"),
}
NOISE = {
    # Below sigma = 0.25, z by itself identifies 98% of 10 classes, and the image is not needed. Ours draws nearly all
    # of its levels above that. The paper's is EDM's, made for noisy images.
    "nano": LogNormal(p_mean=1.0, p_std=0.8, sigma_min=0.2, sigma_max=20.0),
    "paper": LogNormal(p_mean=-1.2, p_std=1.2, sigma_min=0.002, sigma_max=80.0),
}


class ViT(nn.Module):
    """Label token and patches through `layers` layers with full attention: features of the class, (B, width).

    The label token is learned, like [CLS]; if the network is shown the noisy label z, W(c_in * z) is added to it.
    """

    def __init__(self, shape, settings, layers, sees_z=False):
        super().__init__()
        width, self.patch, self.pooling = settings.width, settings.patch, settings.pooling
        cond_width = max(8, width // 6) if sees_z else 0
        self.embedding = nn.Linear(shape[0] * settings.patch**2, width)
        positions = settings.positions * patch_positions(shape, settings.patch, width)
        self.register_buffer("positions", positions, persistent=False)
        self.label_token = nn.Parameter(torch.randn(width))
        if sees_z:
            self.from_z = nn.Linear(width, width, bias=False)
            self.noise_embedding = NoiseEmbedding(cond_width)
        sizes = width, settings.heads, cond_width, settings.dropout
        self.layers = nn.ModuleList(Layer(*sizes, depth=layers) for _ in range(layers))

    def forward(self, x, z=None, c_noise=None):
        """x (B, C, H, W) images; with sees_z also z (B, width), scaled noisy labels, and c_noise (B,)."""
        patches = self.embedding(patchify(x, self.patch)) + self.positions  # (B, T, width)
        label = self.label_token.expand(len(x), 1, -1)
        cond = None if z is None else self.noise_embedding(c_noise)
        if z is not None:
            label = label + self.from_z(z)[:, None]
        h = torch.cat([label, patches], dim=1)
        for layer in self.layers:
            h = layer(h, cond=cond)
        h = rms_norm(h)
        return h[:, 0] if self.pooling == "token" else h.mean(1)


def prepare(settings):
    """What all blocks share, and none trains: the images, and which noise levels are whose."""
    if settings.data not in NAMES:
        refuse_inside(settings)
    if settings.predict == "averaged" and settings.head != "denoising":
        raise UsageError("--predict averaged needs --head denoising: use --predict active")
    images = load_images(settings.data, count=settings.glyphs, size=settings.image_size, kept=kept(settings))
    if images.missing:
        raise UsageError(f"{images.missing}. A classifier can only be scored, and that needs its data")
    if len(images.classes) < 2:
        raise UsageError(f"--data {settings.data} has a single class: there is nothing to learn")
    patch_positions(images.shape, settings.patch, settings.width)  # do they fit? Say so now, before there is a folder
    blocks = 1 if settings.baseline else settings.blocks
    return images, make_partition(NOISE[settings.noise], blocks, overlap=settings.overlap)


def build(b, settings, images, partition):
    """Block b; with --baseline the whole network."""
    target_embeddings = make_target_embeddings(len(images.classes), settings.width, settings.seed)
    if settings.baseline:  # of its head, only the output projection is used
        return EndToEnd(ViT(images.shape, settings, settings.layers), PosteriorHead(target_embeddings))
    head = HEADS[settings.head](target_embeddings)
    layers = split_layers(settings.layers, settings.blocks)[b]
    vit = ViT(images.shape, settings, layers, sees_z=head.network_sees_z)
    clean_weight = 0.0 if head.network_sees_z else settings.clean_weight  # the recipe sets it, whatever the head
    span = partition.training_range(b)
    return DiffusionBlock(vit, head, partition.noise, span, settings.loss_weight, clean_weight)


def batch(size, settings, images, partition):
    """Random images (size, C, H, W), and their labels (size,)."""
    return images.batch(size, settings.augment, settings.device)


def sample(networks, count, settings, images, partition):
    """Classify `count` images; the report measures the cost."""
    x = to_floats(images.test[torch.arange(count) % len(images.test)]).to(settings.device)
    sigmas = sampling_grid(partition, settings.sampling_steps_per_block * partition.blocks)
    return classify(assemble(networks, partition, settings.predict), x, sigmas)


def evaluate(run, networks, images, partition):
    """The accuracies, as metrics; and samples.png."""
    settings, model = run.settings, assemble(networks, partition, run.settings.predict)
    sigmas = sampling_grid(partition, settings.sampling_steps_per_block * partition.blocks)
    batches = images.test_batches(256, 2 * settings.test_images, settings.device)  # validation and test
    with run.autocast:  # as in training
        metrics, log_p, labels = score_images(model, batches, sigmas, settings.walks, settings.seed)
    for name, shares in metrics.items():
        print(name.replace("_", " "), *(f"{share:.4f}" for share in torch.tensor(shares).view(-1)))
    run.log_evaluation(metrics)  # before samples, which may fail
    if settings.samples:
        from nano_db.trainer.plots import draw_classification  # not at the top: pyplot takes a second

        draw_classification(picture(run), images, log_p, labels, metrics, settings.samples)
    return metrics


def main(flags=None):
    settings = read_settings("vit", Settings, PRESETS, RECIPES, __doc__, flags)
    images, partition = prepare(settings)
    run = Run("vit", settings, images.keeps(), data_sha256=images.sha256, **noise_identity(partition))

    for _ in run.rounds():  # each trains every block a part of its steps, then evaluates
        for b in run.blocks_to_train():  # every block in turn; with --only or torchrun, some of them
            block = first_weights(build, b, settings, images, partition)  # from seed and b; run.steps loads later ones
            optimizer = make_optimizer(block, settings)
            for _ in run.steps(b, block, optimizer):  # resumes from the file; seeds, sets the rate, logs, saves
                x, y = batch(run.batch_size, settings, images, partition)
                with run.autocast:
                    loss = block.loss(x, y)
                loss.backward()
                run.average_gradients(block)  # does nothing, unless several processes share the block
                norm = nn.utils.clip_grad_norm_(block.parameters(), settings.clip)
                optimizer.step()
                optimizer.zero_grad()
                run.record(loss, norm)
            del block, optimizer, loss  # this block's memory is freed before the next one trains
        if run.ready():  # all blocks have been trained this round
            metrics = evaluate(run, run.trained_blocks(build, images, partition), images, partition)
    if run.finished:  # result.json and curves; memory and time, measured on networks built anew
        report(run, metrics, "accuracy", build, batch, sample, images, partition)


if __name__ == "__main__":
    command(main)
