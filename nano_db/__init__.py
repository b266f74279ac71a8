"""nano_db: train a deep network block by block, each block a denoiser for its own noise levels.

Reading order: schedule (noise levels) -> partition (who owns which) -> codebook (what discrete targets are denoised to)
-> layers, block (one denoiser and its loss) -> stack (the blocks put together) -> sampler (the walk from noise to data)
-> likelihood (an honest score) -> run, trainer (files, resume, one loop for everything) -> memory, compare, plots.
"""
