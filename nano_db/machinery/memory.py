"""Where the training memory goes: weights, gradients, optimizer state, and activations kept for the backward pass, in
bytes.
"""

from contextlib import nullcontext

import torch

from nano_db.layers import Layer

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
    """See training_bytes. Of a checkpointed layer the forward pass keeps nothing that autograd would show: a hook notes
    its input, and evaluates the layer by itself to see what it saves when its turn in the backward pass comes.
    """
    fixed = {tensor.untyped_storage().data_ptr() for tensor in fixed}
    kept, inside = {}, [0]  # bytes by storage: kept all the time; of each checkpointed layer, when evaluated again

    def saving_into(found):
        def note(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in fixed | kept.keys():
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)

    def look_inside(layer, args, kwargs):
        state = args[0].untyped_storage()
        kept[state.data_ptr()] = state.nbytes()
        with saving_into(found := {}):
            _ = Layer.forward(layer, *args, **kwargs)  # held until all is noted, so that no storage is used twice
        inside.append(sum(found.values()))

    layers = [m for m in module.modules() if isinstance(m, Layer) and m.checkpointed]
    handles = [layer.register_forward_pre_hook(look_inside, with_kwargs=True) for layer in layers]
    with saving_into(kept), context or nullcontext():
        module.loss(*batch)
    for handle in handles:
        handle.remove()
    return sum(kept.values()) + max(inside)


def _bytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
