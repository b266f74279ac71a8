"""AdamW and its learning rate, the same for a block and for the baseline."""

import math

import torch


def make_optimizer(module, settings):
    """AdamW, betas (0.9, 0.99), weight decay on matrices only."""
    matrices = [p for p in module.parameters() if p.dim() >= 2]
    vectors = [p for p in module.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.99), fused=True)


def load_moments(optimizer, state):
    """Fill AdamW with the averages of a state_dict, and with nothing else of it: the rest comes from the settings.

    Raises whatever error comes first where the averages do not fit.
    """
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state["state"]})
    for p, moments in optimizer.state.items():
        assert set(moments) == {"step", "exp_avg", "exp_avg_sq"} and moments["step"].shape == ()
        assert moments["exp_avg"].shape == moments["exp_avg_sq"].shape == p.shape


def learning_rate(step, settings):
    """Linear warm-up, then a cosine from the peak to final_rate of it, at `step` of settings.steps."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    low = settings.final_rate
    return settings.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))
