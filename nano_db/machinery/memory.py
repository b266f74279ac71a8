"""Where the training memory goes: weights, gradients, optimizer state, and activations kept for the backward pass, in
bytes.
"""

import sys
from contextlib import nullcontext

import torch

from nano_db.layers import Layer, checkpoint_layers

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
    """See training_bytes. Counted in a forward pass without checkpoints, in which we note who saves what."""
    fixed_storages = {tensor.untyped_storage().data_ptr() for tensor in fixed}
    kept, inside, current = {}, [], None  # bytes by storage: kept all the time; saved in each checkpointed evaluation

    def note(tensor, where):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in fixed_storages:
            where[storage.data_ptr()] = storage.nbytes()

    def pack(tensor):
        note(tensor, kept if current is None else current)
        return tensor

    def enter(layer, args):
        nonlocal current
        if torch.is_grad_enabled():
            note(args[0], kept)
            inside.append({})
            current = inside[-1]

    def leave(layer, args, result):
        nonlocal current
        current = None

    layers = [m for m in module.modules() if isinstance(m, Layer) and m.checkpointed]
    handles = [layer.register_forward_pre_hook(enter) for layer in layers]
    handles += [layer.register_forward_hook(leave) for layer in layers]
    checkpoint_layers(module, False)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), context or nullcontext():
        module.loss(*batch)
    for handle in handles:
        handle.remove()
    for layer in layers:
        layer.checkpointed = True
    again = [sum(size for storage, size in saved.items() if storage not in kept) for saved in inside]
    return sum(kept.values()) + max(again, default=0)


def _bytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def peak_resident_bytes():
    """The most physical memory this process has held so far (the operating system's own count); None on Windows."""
    if sys.platform == "win32":
        return None
    import resource  # a Unix module

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in kilobytes
