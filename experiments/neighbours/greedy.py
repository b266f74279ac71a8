"""Greedy blocks of a vision transformer: each reads what the frozen blocks before it make of the image.

    python -m experiments.neighbours.greedy                    # every block with a classifier of its own
    python -m experiments.neighbours.greedy --look-ahead 2     # and two more layers, thrown away afterwards

Blocks are trained in turn, by cross-entropy (Belilovsky et al. 2019). Memory is that of one block, as with
DiffusionBlocks. The two methods give up different things for it. A block of DiffusionBlocks needs no other: it begins
with the pixels, and has only its own few layers. A greedy block has all layers before it, but must wait for them.

A block whose own layers feed a classifier directly keeps only what identifies the class, and loses what later layers
need. During training, look-ahead layers stand between the two. There are never more of them than layers that are still
to come, so the last block has none, and its classifier is the network's.
"""

import time

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.images import load_images
from experiments.neighbours.shared import progress, read_arguments, report, share_right, start, whole
from nano_db.images import patch_positions, patchify
from nano_db.layers import Layer, rms_norm
from nano_db.partition import split_layers
from nano_db.trainer.memory import training_bytes
from nano_db.trainer.run import learning_rate, make_optimizer, seed_from


class Embedding(nn.Module):
    """Images (B, C, H, W) -> a learned label token and the patches, (B, 1 + T, width), as in train_vit.py."""

    def __init__(self, shape, patch, width):
        super().__init__()
        self.patch, self.linear = patch, nn.Linear(shape[0] * patch**2, width)
        self.register_buffer("positions", patch_positions(shape, patch, width), persistent=False)
        self.label_token = nn.Parameter(torch.randn(width))

    def forward(self, x):
        patches = self.linear(patchify(x, self.patch)) + self.positions
        return torch.cat([self.label_token.expand(len(x), 1, -1), patches], dim=1)


class GreedyBlock(nn.Module):
    """`own`: the layers that are kept (in the first block, after the embedding). The rest is only used in training."""

    def __init__(self, first, layers, look_ahead, width, heads, classes):
        super().__init__()
        self.own = nn.Sequential(*first, *(Layer(width, heads) for _ in range(layers)))
        self.look_ahead = nn.Sequential(*(Layer(width, heads) for _ in range(look_ahead)))
        self.output_projection = nn.Linear(width, classes, bias=False)
        nn.init.normal_(self.output_projection.weight, std=0.02)

    def forward(self, h):
        """h: images, or the output of the block before, (B, 1 + T, width). Returns logits (B, V)."""
        return self.output_projection(rms_norm(self.look_ahead(self.own(h)))[:, 0])

    def loss(self, h, y):
        return F.cross_entropy(self(h), y)


def add_flags(parser):
    parser.add_argument("--look-ahead", type=whole(0), default=0, help="layers that are thrown away afterwards")
    parser.add_argument("--blocks", type=whole(1), default=3)
    parser.add_argument("--layers", type=whole(1), default=6, help="in total, not counting look-ahead layers")
    parser.add_argument("--patch", type=whole(1), default=8, help="side of a patch in pixels")
    parser.add_argument("--width", type=whole(4), default=96)
    parser.add_argument("--heads", type=whole(1), default=4)


def main():
    args = read_arguments("greedy", __doc__, (), add_flags, steps=900, weight_decay=0.05)
    images, layers = load_images(args.data, count=args.glyphs), split_layers(args.layers, args.blocks)
    frozen, after_each_block, memory, seconds = nn.Sequential(), [], [], []
    for b in range(args.blocks):
        seed_from(args.seed, b)
        first = [Embedding(images.shape, args.patch, args.width)] if b == 0 else []
        look_ahead = min(args.look_ahead, sum(layers[b + 1 :]))
        block = GreedyBlock(first, layers[b], look_ahead, args.width, args.heads, len(images.classes)).to(args.device)
        optimizer, began = make_optimizer(block, args), time.perf_counter()
        for step in range(args.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args)
            x, y = images.batch(args.batch_size, args.augment, args.device)
            loss = block.loss(frozen(x), y)
            loss.backward()
            nn.utils.clip_grad_norm_(block.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            progress(f"block {b}", step, args, [loss.detach()])
        seconds.append((time.perf_counter() - began) / args.steps)

        # Evaluated with its look-ahead layers, which are still there.
        after_each_block.append(share_right(nn.Sequential(*frozen, block), images, args))
        x, y = images.batch(args.batch_size, args.augment, args.device)
        memory.append(training_bytes(block, (frozen(x), y), make_optimizer(block, args)))
        for part in ("weights", "total"):  # the frozen blocks run in every step: their weights count
            memory[b][part] += sum(w.nbytes for w in frozen.parameters())
        frozen.append(block.own.eval().requires_grad_(False))  # needs no gradient; the rest of the block is dropped
    metrics = {"accuracy": after_each_block[-1], "accuracy_after_each_block": after_each_block}
    frozen[-1].append(block.output_projection)  # the last block's classifier is the network's
    report(args, images, metrics, frozen, max(memory, key=lambda count: count["total"]), sum(seconds))


if __name__ == "__main__":
    start(main)
