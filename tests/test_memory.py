import torch
import torch.nn as nn

from nano_db.inference import PeakBytes
from nano_db.layers import Layer, checkpoint_layers
from nano_db.memory import memory_table, peak_resident_bytes, training_bytes


class Chain(nn.Module):
    """x -> W1 -> relu -> W2 -> mean: small enough to count by hand."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(10, 20, bias=False), nn.Linear(20, 5, bias=False)

    def loss(self, x):
        return self.second(self.first(x).relu()).square().mean()


def test_the_four_parts_of_a_network_counted_by_hand():
    model = Chain()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    count = training_bytes(model, torch.randn(8, 10), optimizer)
    weights = 4 * (10 * 20 + 20 * 5)
    assert count["weights"] == count["gradients"] == weights
    assert count["optimizer"] == 2 * weights + 2 * 4  # two moments, and a step counter a tensor
    # saved: the input of each product (8 x 10, and relu's output 8 x 20, which relu keeps as well: once), the output
    # (8 x 5)
    assert count["activations"] == 4 * (8 * 10 + 8 * 20 + 8 * 5)
    assert count["total"] == sum(count[part] for part in ("weights", "gradients", "optimizer", "activations"))


class Deep(nn.Module):
    """Four equal layers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer(16, 2) for _ in range(4))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.1)

    def loss(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def test_checkpointed_layers_keep_their_inputs_and_one_layer_at_work():
    x, counts = torch.randn(8, 32, 16, requires_grad=True), {}  # so that the first layer is as the others
    for on in (False, True):
        model = Deep()
        checkpoint_layers(model, on)
        counts[on] = training_bytes(model, x, torch.optim.SGD(model.parameters()))["activations"]
        assert all(layer.checkpointed == on for layer in model.layers)
    end = 4 * x.numel()  # what the mean of squares keeps
    one_layer = (counts[False] - end) // 4  # with its input
    assert counts[True] == end + 4 * 4 * x.numel() + one_layer - 4 * x.numel()
    assert counts[True] < 0.5 * counts[False]


def test_checkpoints_lower_the_true_peak_and_change_no_gradient():
    x, peaks, gradients = torch.randn(8, 64, 16), [], []
    for on in (False, True):
        torch.manual_seed(0)
        model = Deep()
        checkpoint_layers(model, on)
        with PeakBytes() as tensors:
            model.loss(x).backward()
        peaks.append(tensors.peak)
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert peaks[1] < 0.75 * peaks[0]
    assert all(map(torch.equal, *gradients))


def test_the_table_has_every_part_and_ratios_to_the_last_column():
    count = training_bytes(Chain(), torch.randn(8, 10), torch.optim.SGD(Chain().parameters()))
    lines = memory_table({"a": count, "b": {part: 2 * value for part, value in count.items()}})
    assert len(lines) == 6 and "( 0.500)" in lines[-1] and "( 1.000)" in lines[-1]


def test_the_peak_of_the_process_is_at_least_what_it_holds():
    held = torch.ones(2**24)  # 64 MiB
    assert peak_resident_bytes() > held.nbytes
