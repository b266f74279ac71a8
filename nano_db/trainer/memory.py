"""Where the training memory goes: weights, gradients, optimizer state, and activations kept for the backward pass, in
bytes.
"""

from contextlib import nullcontext

import torch

from nano_db.layers import watch_recomputing

PARTS = ("weights", "gradients", "optimizer", "activations")


def training_bytes(module, batch, optimizer, context=nullcontext()):  # noqa: B008
    """Take one training step of `module` and count bytes. Returns {part: bytes} for PARTS and their "total".

    Activations are the tensors that autograd saves in the forward pass, each storage once, weights excluded. For parts
    that are recomputed (layers.py) their inputs count, plus what the largest one saves when evaluated again. Target
    embeddings and other fixed buffers count as weights. context: the autocast to compute in.
    """
    fixed = [*module.parameters(), *module.buffers()]
    activations = _activation_bytes(module, batch, fixed, context)
    with context:
        loss = module.loss(*batch)
    loss.backward()
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    optimizer.step()
    state = [v for per_weight in optimizer.state.values() for v in per_weight.values() if torch.is_tensor(v)]
    count = dict(zip(PARTS, (_bytes(fixed), _bytes(gradients), _bytes(state), activations), strict=True))
    count["total"] = sum(count[part] for part in PARTS)
    return count


def allocator_peak(module, batch, optimizer, context=nullcontext()):  # noqa: B008
    """Take one more training step on CUDA. Returns the peak of allocated bytes: besides the PARTS, they include
    temporaries, and whatever else is on the device. Call it after a first step: before that, AdamW has no averages.
    """
    optimizer.zero_grad()
    torch.cuda.reset_peak_memory_stats()
    with context:
        loss = module.loss(*batch)
    loss.backward()
    optimizer.step()
    return torch.cuda.max_memory_allocated()


def _activation_bytes(module, batch, fixed, context):
    """See training_bytes. Recomputed parts are watched, to see what each saves when it is evaluated again."""
    # By _cdata: the fake tensors of experiments/plan.py have no data_ptr.
    fixed = {tensor.untyped_storage()._cdata for tensor in fixed}
    levels, held = [({}, [0])], []  # {storage: its bytes} kept; what each part keeps while it is evaluated again

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in fixed and not any(storage._cdata in kept for kept, _ in levels):
            levels[-1][0][storage._cdata] = storage.nbytes()
        return tensor.detach()  # else a reference cycle: the tensor, its graph, what the graph saved

    def look_inside(function, *inputs, **named):
        held.append(inputs)  # keeps the graphs behind them alive
        for tensor in filter(torch.is_tensor, inputs):
            note(tensor)
        levels.append(({}, [0]))
        result = function(*inputs, **named)
        kept, inside = levels.pop()
        levels[-1][1].append(sum(kept.values()) + max(inside))
        return result.detach().requires_grad_()  # what was saved inside is freed

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with watch_recomputing(look_inside), hooks, context:
        module.loss(*batch)
    [(kept, inside)] = levels
    return sum(kept.values()) + max(inside)


def _bytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
