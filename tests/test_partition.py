import pytest
import torch

from nano_db.errors import UsageError
from nano_db.partition import Partition, make_partition, sampling_grid, split_layers
from nano_db.schedule import LogNormal, equal_probability_grid, sample_sigma

# Interior edges of the paper's constants, by hand from exp(-1.2 + 1.2 * Phi^-1(q)).
EDGES = {2: [0.301], 3: [0.505, 0.180], 4: [0.677, 0.301, 0.134], 6: [0.962, 0.505, 0.301, 0.180, 0.094]}


@pytest.mark.parametrize("blocks", EDGES)
def test_equal_probability_edges_to_three_digits(blocks):
    edges = make_partition(LogNormal(), blocks).edges
    assert edges[0] == 80.0 and edges[-1] == 0.002
    assert [round(edge, 3) for edge in edges[1:-1]] == EDGES[blocks]


@pytest.mark.parametrize("blocks", [1, 3, 4])
def test_every_block_gets_its_share_of_the_noise(blocks):
    noise = LogNormal()
    partition = make_partition(noise, blocks)
    sigma = sample_sigma(noise, 200_000, noise.sigma_min, noise.sigma_max, torch.Generator().manual_seed(0))
    shares = torch.bincount(partition.route(sigma), minlength=blocks) / len(sigma)
    torch.testing.assert_close(shares, torch.full((blocks,), 1 / blocks), atol=0.01, rtol=0)


def test_uniform_edges_are_even_in_ln_sigma():
    logs = torch.tensor(make_partition(LogNormal(), 5, "uniform").edges).log()
    torch.testing.assert_close(logs.diff(), logs.diff()[:1].expand(5))


def test_routing_owns_the_upper_edge_and_agrees_with_the_intervals():
    partition = Partition((80.0, 0.7, 0.3, 0.002))
    assert [partition.route(s) for s in (500.0, 80.0, 0.71, 0.7, 0.31, 0.3, 0.002, 0.0)] == [0, 0, 0, 1, 1, 2, 2, 2]
    for b in range(3):
        low, high = partition.interval(b)
        assert partition.route(high) == b and partition.route(low * 1.0001) == b


def test_each_block_is_called_equally_often_and_first_at_its_own_top_edge():
    noise = LogNormal()
    for blocks in (1, 2, 3, 4, 6):
        partition = make_partition(noise, blocks)
        sigmas = equal_probability_grid(noise, 5 * blocks)[:-1]
        owners = partition.route(sigmas).tolist()
        assert owners == [b for b in range(blocks) for _ in range(5)]
        assert [sigmas[5 * b].item() for b in range(blocks)] == list(partition.edges[:-1])


@pytest.mark.parametrize("kind", ["probability", "uniform"])
@pytest.mark.parametrize("blocks, steps", [(1, 5), (3, 3), (3, 7), (4, 16), (12, 50)])
def test_a_sampling_grid_uses_each_block_evenly_and_first_at_its_top_edge(kind, blocks, steps):
    for noise in (LogNormal(), LogNormal(1.0, 0.8, 0.2, 20.0)):
        partition = make_partition(noise, blocks, kind)
        grid = sampling_grid(partition, steps)
        assert len(grid) == steps + 1 and grid[-1] == 0 and (grid.diff() < 0).all()
        owners = partition.route(grid[:-1])
        counts = torch.bincount(owners, minlength=blocks)
        assert counts.min() >= 1 and counts.max() - counts.min() <= 1 and (counts.diff() <= 0).all()
        for b in range(blocks):
            mine = grid[:-1][owners == b]
            assert mine[0] == partition.edges[b]
            probability = noise.cdf(torch.cat([mine, torch.tensor(partition.edges[b + 1 : b + 2])])).diff()
            torch.testing.assert_close(probability, probability[:1].expand(len(probability)), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("p_mean", [-11.0, 10.0])
def test_a_sampling_grid_never_rises_even_far_out_in_a_tail(p_mean):
    """Where a block has next to no probability, the inverse of the cdf is anywhere."""
    noise = LogNormal(p_mean, 1.2, 0.002, 80.0)
    partition = make_partition(noise, 4, "uniform")
    grid = sampling_grid(partition, 8)
    assert (grid.diff() <= 0).all() and set(partition.edges[:-1]) <= set(grid.tolist())


def test_with_equal_probability_a_sampling_grid_is_the_grid_of_equal_probability():
    noise = LogNormal(0.3, 0.8, 0.05, 20.0)
    for blocks in (1, 2, 4):
        grid, partition = equal_probability_grid(noise, 16), make_partition(noise, blocks)
        torch.testing.assert_close(sampling_grid(partition, 16), grid, rtol=1e-12, atol=0)


def test_fewer_steps_than_blocks_are_refused():
    with pytest.raises(UsageError, match="2 sampling steps: each of the 3 blocks needs at least one"):
        sampling_grid(make_partition(LogNormal(), 3), 2)


def test_overlap_stretches_both_ends_inside_the_whole_range():
    partition = Partition((80.0, 0.8, 0.2, 0.002), overlap=0.5)
    assert partition.training_range(1) == pytest.approx((0.1, 1.6))  # a = (0.8 / 0.2)^0.5 = 2
    assert partition.training_range(0)[1] == 80.0 and partition.training_range(2)[0] == 0.002
    assert Partition((80.0, 0.8, 0.2, 0.002)).training_range(1) == (0.2, 0.8)


def test_layers_are_split_evenly_or_as_told():
    assert split_layers(12, 4) == [3, 3, 3, 3]
    assert split_layers(8, 3) == [3, 3, 2]
    assert split_layers(12, 3, "3,6,3") == [3, 6, 3]


@pytest.mark.parametrize("arguments", [(3, 4), (12, 3, "3,6"), (12, 3, "3,6,4"), (12, 3, "6,6,0"), (12, 3, "a,b,c")])
def test_splits_that_do_not_add_up_are_refused(arguments):
    with pytest.raises(UsageError):
        split_layers(*arguments)
