import torch
import torch.nn as nn

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


def test_the_table_has_every_part_and_ratios_to_the_last_column():
    count = training_bytes(Chain(), torch.randn(8, 10), torch.optim.SGD(Chain().parameters()))
    lines = memory_table({"a": count, "b": {part: 2 * value for part, value in count.items()}})
    assert len(lines) == 6 and "( 0.500)" in lines[-1] and "( 1.000)" in lines[-1]


def test_the_peak_of_the_process_is_at_least_what_it_holds():
    held = torch.ones(2**24)  # 64 MiB
    assert peak_resident_bytes() > held.nbytes
