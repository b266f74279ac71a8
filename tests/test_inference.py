import torch

from nano_db.inference import PeakBytes, cost_of_use, count_layers
from nano_db.layers import Layer


def test_the_peak_counts_what_is_alive_at_one_time():
    with PeakBytes() as tensors:
        a = torch.zeros(1000)  # 4,000 bytes
        a.view(10, 100).add_(1)  # a view, in place: nothing new
        b = a * 2
        assert tensors.now == 8000
        del b
        assert tensors.now == 4000
        c = torch.ones(500)
    assert tensors.peak == 8000 and tensors.now == 6000 and len(c) == 500


def test_tensors_made_before_are_not_counted():
    weights = torch.ones(1000)
    with PeakBytes() as tensors:
        weights.view(10, 100)
        weights.mul_(2)
    assert tensors.peak == 0


def test_layer_evaluations_are_counted_a_sample():
    networks = [torch.nn.ModuleList([Layer(8, 2), Layer(8, 2)]), torch.nn.ModuleList([Layer(8, 2)])]

    def use(networks, count):
        for network in networks:
            for layer in network:
                layer(torch.zeros(count, 3, 8))

    assert count_layers(networks, lambda: use(networks, 5)) == 15
    cost = cost_of_use(networks, use, "cpu")
    assert cost["layer_evaluations"] == 3
    assert cost["weights"] == 2 * 12 * 8 * 8 * 4, "of the larger network: two layers of 12 d^2 weights"
    assert cost["seconds"] > 0 and cost["tensors"] >= 3 * 8 * 4
