"""NoProp (Li, Teh, Pascanu 2025, arXiv 2503.24322): blocks that denoise a label, each with a loss of its own.

    python -m nano_db.laboratory.neighbours.noprop                    # DT: a block for each of T diffusion steps
    python -m nano_db.laboratory.neighbours.noprop --method ct        # one network for continuous time
    python -m nano_db.laboratory.neighbours.noprop --method fm        # one network, by flow matching
    python -m nano_db.laboratory.neighbours.noprop --method backprop  # DT's chain of blocks, end to end
    python -m nano_db.laboratory.neighbours.noprop --method blocks    # DiffusionBlocks, of this CNN

Class y has an embedding u_y. Noise on it, z_t ~ N(sqrt(abar_t) u_y, 1 - abar_t), falls while abar rises from near 0 to
near 1. A block sees the image x and z, and guesses u_y. Unlike DiffusionBlocks, all blocks share the embeddings and the
readout theta_out, and train them together: no block can be trained by itself. There is no official code. The paper has
--channels 32, T = 10, 100 to 150 epochs, no augmentation, and 1,000 inference steps.
"""

import time

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.images import load_images
from nano_db.block import DiffusionBlock
from nano_db.classify import classify
from nano_db.heads import PosteriorHead, make_codebook
from nano_db.laboratory.neighbours.shared import accuracy, progress, read_arguments, report, start, whole
from nano_db.layers import NoiseEmbedding
from nano_db.machinery.memory import training_bytes
from nano_db.machinery.run import learning_rate, make_optimizer, seed_from
from nano_db.partition import make_partition
from nano_db.schedule import LogNormal, equal_mass_grid
from nano_db.stack import Stack


class CNN(nn.Module):
    """NoProp's block: image x (B, C, H, W), noisy label z (B, d), and time (B,) if `timed` -> (B, out)."""

    def __init__(self, shape, d, out, c, timed=False):
        super().__init__()
        norm = nn.Identity if timed else nn.BatchNorm1d  # for continuous time the paper drops it
        pool, drop, relu = nn.MaxPool2d(2), nn.Dropout(0.2), nn.ReLU()
        convolutions = [nn.Conv2d(m, n, 3, padding=1) for m, n in ((shape[0], c), (c, 2 * c), (2 * c, 4 * c))]
        flat = nn.Linear(4 * c * (shape[1] // 4) * (shape[2] // 4), 8 * c)
        self.image = nn.Sequential(
            *(convolutions[0], relu, pool, drop, convolutions[1], relu, drop, convolutions[2], relu, pool, drop),
            *(nn.Flatten(), flat, norm(8 * c)),
        )
        self.label = nn.Sequential(nn.Linear(d, 8 * c), norm(8 * c), relu)
        deeper = nn.Linear(8 * c, 8 * c), norm(8 * c), relu, nn.Linear(8 * c, 8 * c), norm(8 * c)
        self.deeper = nn.Sequential(*deeper)  # added to what `label` says
        self.time = nn.Sequential(NoiseEmbedding(8 * c, features=64), relu) if timed else None
        first = nn.Linear((24 if timed else 16) * c, 8 * c), norm(8 * c), relu
        self.both = nn.Sequential(*first, nn.Linear(8 * c, 4 * c), norm(4 * c), relu, nn.Linear(4 * c, out))

    def forward(self, x, z, time=None):
        return self.answer(self.image(x), z, time)

    def answer(self, seen, z, time=None):
        """The part after the image's: `seen` does not change during inference, and is computed once."""
        h = self.label(z)
        times = [] if time is None else [self.time(time)]
        return self.both(torch.cat([seen, h + self.deeper(h), *times], dim=-1))


class Shared(nn.Module):
    """What NoProp's blocks train together: the embeddings u_y, (V, d), and the readout theta_out (d -> V)."""

    def __init__(self, classes, d):
        super().__init__()
        self.u, self.out = nn.Parameter(make_codebook(classes, d)), nn.Linear(d, classes)


def noisy(u, abar):
    return abar**0.5 * u + (1 - abar) ** 0.5 * torch.randn_like(u)


def kl_to_noise(u, abar):
    """KL(q(z_0 | y) || N(0, I)), the mean over (B, d) embeddings u."""
    d = u.shape[-1]
    return 0.5 * (abar * u.square().sum(-1) - d * (abar + torch.log1p(-torch.as_tensor(abar)))).mean()


def cosine_schedule(steps):
    """abar_0 < ... < abar_T, sin^2 of evenly spaced angles. The ends are cut off: SNR = abar / (1 - abar) is finite."""
    return (0.5 * torch.pi * torch.linspace(0.05, 0.95, steps + 1)).sin().square().tolist()


def posterior(before, after):
    """(a, b, c) of q(z_t | z_{t-1}, u) = N(a u + b z_{t-1}, c I), from abar_{t-1} and abar_t, by Bayes' rule."""
    alpha = before / after
    a = after**0.5 * (1 - alpha) / (1 - before)
    return a, alpha**0.5 * (1 - after) / (1 - before), (1 - after) * (1 - alpha) / (1 - before)


class DT(nn.Module):
    """Block t of NoProp-DT. abar: the whole schedule; t is 1 to T."""

    def __init__(self, cnn, shared, abar, t, eta=0.1):
        super().__init__()
        self.cnn, self.shared, self.abar, self.t = cnn, shared, abar, t
        self.a, self.b, self.c = posterior(abar[t - 1], abar[t])
        before, after = (level / (1 - level) for level in (abar[t - 1], abar[t]))
        self.weight = (len(abar) - 1) * eta / 2 * (after - before)

    def guess(self, x, z):
        return self.cnn(x, z).softmax(-1) @ self.shared.u  # u_hat, (B, d)

    def loss(self, x, y):
        u = self.shared.u[y]
        error = (self.guess(x, noisy(u, self.abar[self.t - 1])) - u).square().sum(-1).mean()
        named = F.cross_entropy(self.shared.out(noisy(u, self.abar[-1])), y)
        return named + kl_to_noise(u, self.abar[0]) + self.weight * error

    def forward(self, x, z, noise=1.0):
        return self.a * self.guess(x, z) + self.b * z + noise * self.c**0.5 * torch.randn_like(z)


class Chain(nn.Module):
    """DT's blocks in a row: with a loss at the end alone, this is the end-to-end network."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks, self.shared = nn.ModuleList(blocks), blocks[0].shared

    def scores(self, x, noise=1.0):
        z = torch.randn(len(x), self.shared.u.shape[1], device=x.device)
        for block in self.blocks:
            z = block(x, z, noise)
        return self.shared.out(z)

    def loss(self, x, y):
        return F.cross_entropy(self.scores(x, noise=0.0), y)  # noise within would only hinder


class Flow(nn.Module):
    """One network for all times t in [0, 1], and an ODE that its answer drives: what CT and FM have in common."""

    def __init__(self, cnn, shared, inference_steps):
        super().__init__()
        self.cnn, self.shared, self.inference_steps = cnn, shared, inference_steps

    def scores(self, x):
        """Euler steps from noise at t = 0 to t = 1."""
        z, seen = torch.randn(len(x), self.shared.u.shape[1], device=x.device), self.cnn.image(x)
        for step in range(self.inference_steps):
            t = torch.full((len(x), 1), step / self.inference_steps, device=x.device)
            z = z + self.velocity(z, self.cnn.answer(seen, z, t[:, 0]), t) / self.inference_steps
        return self.shared.out(z)


class CT(Flow):
    """abar(t) = sigmoid(14 t - 7), hence SNR(t) = exp(14 t - 7). The paper learns what lies between these ends. The
    expected loss does not depend on that (Kingma et al. 2021): only its variance does.
    """

    def loss(self, x, y, eta=1.0):
        u, t = self.shared.u[y], torch.rand(len(y), 1, device=x.device)
        guess = self.cnn(x, noisy(u, torch.sigmoid(14 * t - 7)), t[:, 0]).softmax(-1) @ self.shared.u
        slope = 14 * torch.exp(14 * t - 7)  # of the SNR
        error = (slope * (guess - u).square()).sum(-1).mean()
        first, last = (float(torch.sigmoid(torch.tensor(level))) for level in (-7.0, 7.0))
        named = F.cross_entropy(self.shared.out(noisy(u, last)), y)
        return named + kl_to_noise(u, first) + eta / 2 * error

    def velocity(self, z, answer, t):
        """dz/dt = abar' / (2 (1 - abar)) (u_hat / sqrt(abar) - z), where abar' = 14 abar (1 - abar)."""
        abar = torch.sigmoid(14 * t - 7)
        return 7 * abar * (answer.softmax(-1) @ self.shared.u / abar.sqrt() - z)


class FM(Flow):
    """z_t = t u + (1 - t) z_0. The network's answer is v, an estimate of u - z_0; there is no softmax."""

    def loss(self, x, y):
        u, t = self.shared.u[y], torch.rand(len(y), 1, device=x.device)
        start = torch.randn_like(u)
        z = t * u + (1 - t) * start
        v = self.cnn(x, z, t[:, 0])
        named = F.cross_entropy(self.shared.out(z + (1 - t) * v), y)  # keeps the embeddings apart
        return (v - (u - start)).square().sum(-1).mean() + named

    def velocity(self, z, answer, t):
        return answer


def build(args, shape, classes):
    """(networks to train, each with a loss of its own; scores(x) of the class, made of them)."""
    d, T = args.embedding, args.blocks
    if args.method == "blocks":
        noise, codebook = LogNormal(1.0, 0.8, 0.2, 20.0), make_codebook(classes, d, args.seed)  # as train_vit.py's
        partition = make_partition(noise, T, overlap=0.05)
        networks = [CNN(shape, d, d, args.channels, timed=True) for _ in range(T)]
        spans = map(partition.training_range, range(T))
        parts = [DiffusionBlock(n, PosteriorHead(codebook), noise, s) for n, s in zip(networks, spans, strict=True)]
        return parts, lambda x: classify(Stack(parts, partition), x, equal_mass_grid(noise, T))
    shared, abar = Shared(classes, d), cosine_schedule(T)
    if args.method in ("ct", "fm"):
        cnn = CNN(shape, d, classes if args.method == "ct" else d, args.channels, timed=True)
        flow = {"ct": CT, "fm": FM}[args.method](cnn, shared, args.inference_steps)
        return [flow], flow.scores
    parts = [DT(CNN(shape, d, classes, args.channels), shared, abar, t) for t in range(1, T + 1)]
    chain = Chain(parts)
    return ([chain], lambda x: chain.scores(x, noise=0.0)) if args.method == "backprop" else (parts, chain.scores)


def add_flags(parser):
    parser.add_argument("--blocks", type=whole(1), default=4, help="T: blocks, or diffusion steps; ct and fm: one")
    parser.add_argument("--channels", type=whole(1), default=8, help="of the first convolution")
    parser.add_argument("--embedding", type=whole(2), default=32, help="numbers of a label's embedding")
    parser.add_argument("--inference-steps", type=whole(1), default=200, help="Euler steps of ct and fm")


def main():
    methods = ("dt", "ct", "fm", "backprop", "blocks")
    args = read_arguments("noprop", __doc__, methods, add_flags, steps=600)
    images = load_images(args.data, count=args.glyphs)
    seed_from(args.seed)
    parts, scores = build(args, images.shape, len(images.classes))
    optimizers = [make_optimizer(part.to(args.device), args) for part in parts]  # the shared weights are in all of DT's
    began = time.perf_counter()
    for step in range(args.steps):
        losses = []
        for part, optimizer in zip(parts, optimizers, strict=True):  # only one block's activations are ever in memory
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args)
            loss = part.train().loss(*images.batch(args.batch_size, args.augment, args.device))
            loss.backward()
            nn.utils.clip_grad_norm_(part.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        progress(args.method, step, args, losses)
    seconds = (time.perf_counter() - began) / args.steps
    for part in parts:
        part.eval()
    metrics = {"accuracy": accuracy(scores, images, args)}
    parameters = sum(p.numel() for p in nn.ModuleList(parts).parameters())  # shared ones count once
    batch = images.batch(args.batch_size, args.augment, args.device)
    memory = training_bytes(parts[0].train(), batch, make_optimizer(parts[0], args))
    report(args, metrics, len(parts), parameters, memory, seconds)


if __name__ == "__main__":
    start(main)
