"""nano_db: train a deep network block by block, each block independently, as a denoiser for its own noise levels.

Reading order: schedule (noise levels) -> partition (who owns which) -> heads (what targets are, and who answers) ->
layers -> block (the loss: the whole method) -> stack (the blocks assembled) -> sampler (the walk from noise to data) ->
likelihood (an honest score) -> classify, language (what it is good for) -> masking (the other kind of noise) -> images.
Then a script, train_gpt.py first. You never need trainer/ to understand one, and nothing here imports it.
"""

__version__ = "0.5.0"  # raised whenever a change alters the numbers that runs produce
