"""Forward-Forward (Hinton 2022, arXiv 2212.13345): no backward pass between layers at all.

    python -m experiments.neighbours.forward_forward                  # an MLP, as in the paper
    python -m experiments.neighbours.forward_forward --network vit    # a vision transformer

A layer sees an image together with a label. Its *goodness* is how active it is. It learns to be active if the label is
right, and quiet if the label is wrong. Its input is normalised to a fixed length first, so that it cannot simply read
off the goodness of the layer before. To classify, every label is tried, and the highest goodness wins.

Each class has a code of its own. An existing ViT of this kind sets one of the 48 values of a patch per class: the 100
classes of CIFAR-100 share 42 codes, so accuracy cannot exceed 42%. That is a limit of these codes, not of the method.
"""

import time

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.images import load_images
from experiments.neighbours.shared import progress, read_arguments, report, share_right, start, whole
from nano_db.heads import make_target_embeddings
from nano_db.images import patch_positions, patchify
from nano_db.layers import Layer
from nano_db.trainer.memory import training_bytes
from nano_db.trainer.run import learning_rate, make_optimizer, seed_from

# Goodness is a logit. The paper's is the sum of 1000 squares minus 1000: 1000 times ours without SHARPNESS. In a short
# run, nearly every sample would then saturate the sigmoid.
SHARPNESS = 10.0
LOUDNESS = 5.0  # of the MLP's label code. At 1, it would be drowned out by some hundred bright pixels


class Pixels(nn.Module):
    """The MLP's input: the label's one-hot code and then the pixels, in [0, 1]. (B, V + C H W)"""

    def __init__(self, shape, classes):
        super().__init__()
        self.register_buffer("codes", LOUDNESS * torch.eye(classes), persistent=False)
        self.width = classes + shape[0] * shape[1] * shape[2]

    def forward(self, x, y):
        return torch.cat([self.codes[y], (x.flatten(1) + 1) / 2], dim=1)


class Patches(nn.Module):
    """The ViT's input: a label token and the patches, (B, 1 + T, width). The label's code goes through a linear layer.

    It is added to every patch, too. With only the label token a short run learns next to nothing: the label meets the
    image only through attention, and the mean over tokens shows little of it.
    """

    def __init__(self, shape, classes, patch, width):
        super().__init__()
        self.patch, self.linear, self.label = patch, nn.Linear(shape[0] * patch**2, width), nn.Linear(width, width)
        self.register_buffer("positions", patch_positions(shape, patch, width), persistent=False)
        self.register_buffer("codes", width**0.5 * make_target_embeddings(classes, width), persistent=False)

    def forward(self, x, y):
        patches = self.linear(patchify(x, self.patch)) + self.positions
        label = self.label(self.codes[y])[:, None]
        return torch.cat([label, patches + label], dim=1)


class DenseLayer(nn.Module):
    """Goodness: the mean square of a ReLU layer's output, minus 1, times SHARPNESS."""

    def __init__(self, inputs, width):
        super().__init__()
        self.linear = nn.Linear(inputs, width)

    def forward(self, h):
        return F.relu(self.linear(F.rms_norm(h, h.shape[-1:])))

    def goodness(self, h):
        return SHARPNESS * (h.square().mean(-1) - 1)  # (B,)


class AttentionLayer(nn.Module):
    """Goodness: the mean square of the output's mean over all tokens, minus 1, times SHARPNESS."""

    def __init__(self, width, heads):
        super().__init__()
        self.layer = Layer(width, heads)

    def forward(self, h):
        return self.layer(F.rms_norm(h, h.shape[1:]))  # one length for the whole sequence, not for each token

    def goodness(self, h):
        return SHARPNESS * (h.mean(1).square().mean(-1) - 1)  # (B,)


class Stage(nn.Module):
    """One layer in training. The first stage also contains the embedding of the input, `embed(x, y)`."""

    def __init__(self, layer, embed=None):
        super().__init__()
        self.layer, self.embed = layer, embed

    def forward(self, h):
        """h: (x, y) for the first stage, otherwise the output of the stage before."""
        return self.layer(self.embed(*h) if self.embed else h)

    def judge(self, h, right):
        """(loss, output without a gradient). right (B,): 1 where the label is the image's, otherwise 0."""
        answer = self(h)
        goodness = self.layer.goodness(answer)
        return F.binary_cross_entropy_with_logits(goodness, right), answer.detach()

    def loss(self, h, right):
        return self.judge(h, right)[0]


def wrong_labels(y, classes):
    """For each label another one, all others being equally probable. (B,)"""
    return (y + torch.randint(1, classes, y.shape, device=y.device)) % classes


def make_stages(args, shape, classes):
    if args.network == "mlp":
        embed = Pixels(shape, classes)
        layers = [DenseLayer(embed.width if i == 0 else args.width, args.width) for i in range(args.layers)]
    else:
        embed = Patches(shape, classes, args.patch, args.width)
        layers = [AttentionLayer(args.width, args.heads) for _ in range(args.layers)]
    return [Stage(layers[0], embed), *map(Stage, layers[1:])]


def scores(stages, x, classes):
    """The goodness of every label, summed over the stages, (B, V). The first stage does not count (as in the paper),
    unless it is the only one.
    """
    total = []
    for label in range(classes):
        h, goodness = (x, torch.full((len(x),), label, device=x.device)), []
        for stage in stages:
            h = stage(h)
            goodness.append(stage.layer.goodness(h))
        total.append(torch.stack(goodness[1:] or goodness).sum(0))
    return torch.stack(total, dim=1)


def add_flags(parser):
    parser.add_argument("--network", choices=("mlp", "vit"), default="mlp")
    parser.add_argument("--layers", type=whole(1), help="number of layers (default: 3; vit: 5)")
    parser.add_argument("--width", type=whole(4), help="features per layer (default: 1000; vit: 96)")
    parser.add_argument("--patch", type=whole(1), default=8, help="side of a patch in pixels (vit)")
    parser.add_argument("--heads", type=whole(1), default=4, help="attention heads (vit)")


def main():
    args = read_arguments("forward_forward", __doc__, (), add_flags, steps=2000, weight_decay=3e-4)
    args.layers = args.layers or {"mlp": 3, "vit": 5}[args.network]
    args.width = args.width or {"mlp": 1000, "vit": 96}[args.network]
    images = load_images(args.data, count=args.glyphs)
    classes = len(images.classes)
    seed_from(args.seed)
    stages = [stage.to(args.device) for stage in make_stages(args, images.shape, classes)]
    optimizers = [make_optimizer(stage, args) for stage in stages]

    def batch():
        """Every image with its own label, and with a wrong one: (x, y) of twice the batch size, and which are right."""
        x, y = images.batch(args.batch_size, args.augment, args.device)
        right = (torch.arange(2 * len(x), device=x.device) < len(x)).float()
        return (torch.cat([x, x]), torch.cat([y, wrong_labels(y, classes)])), right

    began = time.perf_counter()
    for step in range(args.steps):
        h, right = batch()
        losses = []
        for stage, optimizer in zip(stages, optimizers, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args)
            loss, h = stage.judge(h, right)  # h has no gradient: the next stage cannot change this one
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        progress("layers", step, args, losses)
    seconds = (time.perf_counter() - began) / args.steps
    metrics = {"accuracy": share_right(lambda x: scores(stages, x, classes), images, args)}

    h, right = batch()
    memory = []
    for stage in stages:
        memory.append(training_bytes(stage, (h, right), make_optimizer(stage, args)))
        h = stage(h).detach()
    report(args, images, metrics, stages, max(memory, key=lambda count: count["total"]), seconds)


if __name__ == "__main__":
    start(main)
