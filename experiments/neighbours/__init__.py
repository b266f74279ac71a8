"""Neighbours of DiffusionBlocks, one file per method: other ways to train without end-to-end backpropagation."""
