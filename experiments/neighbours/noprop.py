"""NoProp (Li, Teh, Pascanu 2025, arXiv 2503.24322): blocks that denoise a label, each with a loss of its own.

    python -m experiments.neighbours.noprop                    # DT: one block per diffusion step, T in all
    python -m experiments.neighbours.noprop --method ct        # one network for continuous time
    python -m experiments.neighbours.noprop --method fm        # one network, by flow matching
    python -m experiments.neighbours.noprop --method backprop  # DT's chain of blocks, end to end
    python -m experiments.neighbours.noprop --method blocks    # DiffusionBlocks, with this CNN

Class y has an embedding u_y. Noise on it, z_t ~ N(sqrt(abar_t) u_y, 1 - abar_t), falls while abar rises from near 0 to
near 1. A block sees the image x and z, and predicts u_y. Unlike DiffusionBlocks, blocks share the embeddings and the
output projection theta_out, and train them together: no block can be trained by itself. There is no official code. The
paper uses --channels 32, T = 10, 100 to 150 epochs, no augmentation, and 1,000 inference steps. CT and FM are one
network, so give them T times the steps; embeddings as large as the noise (--embedding 20 --length 4.5) help them.
"""

import math
import time
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

import train_vit
from data.images import load_images
from experiments.neighbours.noprop_network import CNN, Shared, noisy
from experiments.neighbours.shared import positive, progress, read_arguments, report, share_right, start, whole
from nano_db.block import DiffusionBlock
from nano_db.classify import classify
from nano_db.heads import PosteriorHead, make_target_embeddings
from nano_db.partition import make_partition
from nano_db.schedule import equal_probability_grid
from nano_db.stack import Stack
from nano_db.trainer.memory import training_bytes
from nano_db.trainer.run import learning_rate, make_optimizer, seed_from


def cosine_schedule(steps):
    """abar_0 < ... < abar_T, sin^2 of evenly spaced angles, without the ends: SNR = abar / (1 - abar) stays finite."""
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
        self.cnn, self.shared, self.abar, self.before = cnn, shared, abar, abar[t - 1]
        self.a, self.b, self.c = posterior(abar[t - 1], abar[t])
        self.weight = (len(abar) - 1) * eta / 2 * (abar[t] / (1 - abar[t]) - self.before / (1 - self.before))

    def guess(self, x, z):
        return self.cnn(x, z).softmax(-1) @ self.shared.u  # u_hat, (B, d)

    def forward(self, x, z, noise=1.0):
        return self.a * self.guess(x, z) + self.b * z + noise * self.c**0.5 * torch.randn_like(z)

    def loss(self, x, y):
        u = self.shared.u[y]
        error = (self.guess(x, noisy(u, self.before)) - u).square().sum(-1).mean()
        return self.shared.loss(y, self.abar[0], self.abar[-1]) + self.weight * error


class Chain(nn.Module):
    """DT's blocks in a row. With a loss only at the end, and no noise on the way, this is the end-to-end network."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks, self.shared = nn.ModuleList(blocks), blocks[0].shared

    def scores(self, x, noise=0.0):
        z = torch.randn(len(x), self.shared.u.shape[1], device=x.device)
        for block in self.blocks:
            z = block(x, z, noise)
        return self.shared.out(z)

    def loss(self, x, y):
        return F.cross_entropy(self.scores(x), y)


class Flow(nn.Module):
    """One network for all times t in [0, 1], and an ODE that its output drives: what CT and FM have in common."""

    def __init__(self, cnn, shared, inference_steps):
        super().__init__()
        self.cnn, self.shared, self.inference_steps = cnn, shared, inference_steps

    def scores(self, x):
        """Euler steps from noise at t = 0 to t = 1."""
        z, seen = torch.randn(len(x), self.shared.u.shape[1], device=x.device), self.cnn.image(x)
        for step in range(self.inference_steps):
            t = torch.full((len(x), 1), step / self.inference_steps, device=x.device)
            z = z + self.velocity(z, self.cnn(x, z, t[:, 0], seen), t) / self.inference_steps
        return self.shared.out(z)


class CT(Flow):
    """abar(t) = sigmoid(10 t - 7), hence SNR(t) = exp(10 t - 7). The paper's exponent ends at 7: most of the weight
    is then on levels at which z gives the label away. It also learns the schedule between the ends, which affects only
    the variance of the loss, not its expectation (Kingma et al. 2021).
    """

    def loss(self, x, y, eta=1.0):
        u, t = self.shared.u[y], torch.rand(len(y), 1, device=x.device)
        guess = self.cnn(x, noisy(u, torch.sigmoid(10 * t - 7)), t[:, 0]).softmax(-1) @ self.shared.u
        slope = 10 * torch.exp(10 * t - 7)  # of the SNR
        error = (slope * (guess - u).square()).sum(-1).mean()
        return self.shared.loss(y, first=1 / (1 + math.exp(7)), last=1 / (1 + math.exp(-3))) + eta / 2 * error

    def velocity(self, z, answer, t):
        """dz/dt = abar' / (2 (1 - abar)) (u_hat / sqrt(abar) - z), where abar' = 10 abar (1 - abar)."""
        abar = torch.sigmoid(10 * t - 7)
        return 5 * abar * (answer.softmax(-1) @ self.shared.u / abar.sqrt() - z)


class FM(Flow):
    """z_t = t u + (1 - t) z_0. The network's output is v, an estimate of u - z_0; there is no softmax."""

    def loss(self, x, y):
        u, t = self.shared.u[y], torch.rand(len(y), 1, device=x.device)
        start = torch.randn_like(u)
        z = t * u + (1 - t) * start
        v = self.cnn(x, z, t[:, 0])
        nats = F.cross_entropy(self.shared.out(z + (1 - t) * v), y)  # keeps the embeddings apart
        return (v - (u - start)).square().sum(-1).mean() + nats

    def velocity(self, z, answer, t):
        return answer


def build(args, shape, classes):
    """(networks to train, each with a loss of its own; the function scores(x) -> (B, V) that uses them)."""
    d, T = args.embedding, args.blocks
    if args.method == "blocks":
        noise = train_vit.NOISE["nano"]
        target_embeddings = make_target_embeddings(classes, d, args.seed)
        partition = make_partition(noise, T, overlap=0.05)
        networks = [CNN(shape, d, d, args.channels, timed=True) for _ in range(T)]
        head, spans = PosteriorHead, map(partition.training_range, range(T))
        parts = [DiffusionBlock(n, head(target_embeddings), noise, s) for n, s in zip(networks, spans, strict=True)]
        return parts, lambda x: classify(Stack(parts, partition), x, equal_probability_grid(noise, T))
    shared, abar = Shared(classes, d, args.length), cosine_schedule(T)
    if args.method in ("ct", "fm"):
        out, kind = (classes, CT) if args.method == "ct" else (d, FM)
        # The paper has no BatchNorm where time is continuous. In a short run CT learns next to nothing without it.
        cnn = CNN(shape, d, out, args.channels, timed=True, normed=args.method == "ct")
        flow = kind(cnn, shared, args.inference_steps)
        return [flow], flow.scores
    parts = [DT(CNN(shape, d, classes, args.channels), shared, abar, t) for t in range(1, T + 1)]
    chain = Chain(parts)
    return ([chain], chain.scores) if args.method == "backprop" else (parts, partial(chain.scores, noise=1.0))


def add_flags(parser):
    parser.add_argument("--blocks", type=whole(1), default=4, help="T: blocks, or diffusion steps; not for ct and fm")
    parser.add_argument("--channels", type=whole(1), default=8, help="channels of the first convolution")
    parser.add_argument("--embedding", type=whole(2), default=32, help="dimension of a label's embedding")
    parser.add_argument("--length", type=positive, default=1.0, help="initial length of the embeddings")
    parser.add_argument("--inference-steps", type=whole(1), default=200, help="Euler steps of ct and fm")


def main():
    methods = ("dt", "ct", "fm", "backprop", "blocks")
    args = read_arguments("noprop", __doc__, methods, add_flags, steps=600, learning_rate=3e-3)
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
    nn.ModuleList(parts).eval()
    metrics = {"accuracy": share_right(scores, images, args)}
    batch = images.batch(args.batch_size, args.augment, args.device)
    memory = training_bytes(parts[0].train(), batch, make_optimizer(parts[0], args))
    report(args, images, metrics, parts, memory, seconds)


if __name__ == "__main__":
    start(main)
