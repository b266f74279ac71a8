"""Neighbours of DiffusionBlocks: other ways to train without backpropagation through the whole network, a file each."""
