"""Where the training memory goes: weights, gradients, optimizer state, and activations kept for the backward pass, in
bytes.
"""

from contextlib import nullcontext
from unittest.mock import patch

import torch

from nano_db import layers

PARTS = ("weights", "gradients", "optimizer", "activations")


def training_bytes(module, batch, optimizer, context=None):
    """Take one training step of `module` and count. Returns {part: bytes} for PARTS and their "total".

    Activations are the tensors that autograd saves in the forward pass, each storage once, weights excluded. Of layers
    that are checkpointed (layers.py) their inputs count, and what the largest of them saves when it is evaluated again.
    Codebooks and other fixed buffers count as weights. On CUDA "allocator_peak" is added: the most the allocator held
    during the step, which also has the temporaries. `context`: the autocast to compute in.
    """
    fixed = [*module.parameters(), *module.buffers()]
    on_cuda = fixed[0].is_cuda
    activations = _activation_bytes(module, batch, fixed, context)
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    with context or nullcontext():
        loss = module.loss(*batch)
    loss.backward()
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    optimizer.step()
    state = [v for per_weight in optimizer.state.values() for v in per_weight.values() if torch.is_tensor(v)]
    count = {
        "weights": _bytes(fixed),
        "gradients": _bytes(gradients),
        "optimizer": _bytes(state),
        "activations": activations,
    }
    count["total"] = sum(count[part] for part in PARTS)
    if on_cuda:
        count["allocator_peak"] = torch.cuda.max_memory_allocated()
    return count


def _activation_bytes(module, batch, fixed, context):
    """See training_bytes. We take the place of `checkpoint`, to see what a function saves when evaluated alone."""
    fixed = {tensor.untyped_storage().data_ptr() for tensor in fixed}
    kept, inside, held = {}, [0], []  # bytes by storage that are kept all the time; of each function; what must live

    def noting(found):
        def note(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in fixed and storage.data_ptr() not in kept:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()  # itself would be a circle: an output, its graph, and what the graph saved

        return torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)

    def look_inside(function, *inputs, use_reentrant, **named):
        if not torch.is_grad_enabled():  # nothing is kept: a turn of a loop before the last few
            return function(*inputs, **named)
        for tensor in filter(torch.is_tensor, inputs):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        held.append(inputs)
        with noting(found := {}):
            result = function(*inputs, **named)
        inside.append(sum(found.values()))
        return result.detach().requires_grad_()  # what was saved inside is free again

    with patch.object(layers, "checkpoint", look_inside), noting(kept), context or nullcontext():
        module.loss(*batch)
    return sum(kept.values()) + max(inside)


def _bytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
