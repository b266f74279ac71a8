"""What a layer is made of: positions that are relative, gates that are closed at first, sums of unit size."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from nano_db.layers import Layer, open_gates, rms_norm, rotary_angles, rotate

WIDTH, HEADS, T = 16, 2, 6


def filled(module):
    """With values in all weights, zero-initialised ones, too."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.eval()


# --- rotary positions ---


def rotated_scores(q, k, offset=0, base=10_000.0):
    """<q at place i, k at place j>, (T, T), of one vector q and one k put at every place."""
    rotary = rotary_angles(torch.arange(offset, offset + T), len(q), base)
    at_each_place = [rotate(vector.expand(1, 1, T, -1), rotary)[0, 0] for vector in (q, k)]
    return at_each_place[0] @ at_each_place[1].T


def test_scores_of_rotary_positions_depend_on_the_distance_and_on_nothing_else():
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    scores = rotated_scores(q, k)
    for distance in range(1 - T, T):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand(len(diagonal)), rtol=0, atol=1e-5)
    torch.testing.assert_close(rotated_scores(q, k, offset=100), scores, rtol=0, atol=1e-4)
    torch.testing.assert_close(scores.diagonal(), (q @ k).expand(T))  # at distance 0 nothing is turned
    by_distance = torch.stack([scores.diagonal(distance)[0] for distance in range(1 - T, T)])
    assert torch.pdist(by_distance[:, None]).min() > 1e-4, "and they do depend on it"


def test_the_angles_are_those_of_the_paper():
    """Su et al. 2021: channel pair i of a head of width d turns by position * base^(-2 i / d)."""
    cos, sin = rotary_angles(torch.tensor([0, 3]), 8, base=100.0)
    for i in range(4):  # channels i and i + 4: each is turned towards the other
        angle = torch.tensor(3.0) * 100.0 ** (-2 * i / 8)
        torch.testing.assert_close(cos[1, [i, i + 4]], angle.cos().expand(2))
        torch.testing.assert_close(sin[1, [i, i + 4]], angle.sin() * torch.tensor([-1.0, 1.0]))
    assert (cos[0] == 1).all() and (sin[0] == 0).all()
    pair = torch.zeros(1, 1, 2, 8)
    pair[..., 1] = 1.0  # of channels 1 and 5
    turned = rotate(pair, (cos, sin))[0, 0, 1]
    torch.testing.assert_close(turned[[1, 5]], torch.stack([cos[1, 1], sin[1, 5]]))
    assert not turned[[0, 2, 3, 4, 6, 7]].any()


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_the_norm_is_torchs_also_in_its_gradient_and_under_autocast(size):
    torch.manual_seed(0)
    h, g = (size * torch.randn(3, 5, 24)).requires_grad_(), torch.randn(3, 5, 24)
    expected = F.rms_norm(h, (24,))
    torch.testing.assert_close(rms_norm(h), expected)
    torch.testing.assert_close(torch.autograd.grad(rms_norm(h), h, g), torch.autograd.grad(expected, h, g))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(rms_norm(h), expected)
    low = h.detach().bfloat16()
    torch.testing.assert_close(rms_norm(low).float(), F.rms_norm(low.float(), (24,)), rtol=2e-2, atol=0)
    assert not rms_norm(torch.zeros(2, 4)).any()


# --- modulation ---


def modulated():
    return Layer(WIDTH, HEADS, cond_width=5)


@pytest.mark.parametrize("layer", [Layer(WIDTH, HEADS), modulated()], ids=["plain", "modulated"])
def test_a_new_layer_is_the_identity(layer):
    h = torch.randn(2, T, WIDTH)
    assert torch.equal(layer(h, cond=torch.randn(2, 5)), h)


def test_a_modulated_layer_is_its_formula():
    """DiT (Peebles & Xie 2023): h + gate * branch((1 + scale) * norm(h) + shift), for each sample its own three."""
    layer, h, cond = filled(modulated()), torch.randn(2, T, WIDTH), torch.randn(2, 5)
    found = layer(h, cond=cond)
    for i in range(2):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = layer.modulation(F.silu(cond[i])).chunk(6)
        read = rms_norm(h[i : i + 1]) * (1 + scale_a) + shift_a
        after = h[i : i + 1] + gate_a * layer.attention(read, None, None, False, None)
        after = after + gate_m * layer.mlp(rms_norm(after) * (1 + scale_m) + shift_m)
        torch.testing.assert_close(found[i : i + 1], after)


def test_with_open_gates_a_new_modulated_layer_is_the_unmodulated_one():
    plain, layer, h = filled(Layer(WIDTH, HEADS)), modulated().eval(), torch.randn(2, T, WIDTH)
    layer.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(layer(h, cond=torch.randn(2, 5)), h), "behind closed gates it does nothing"
    layer.modulation.bias.data = open_gates(layer.modulation.bias.data)
    torch.testing.assert_close(layer(h, cond=torch.randn(2, 5)), plain(h))


@pytest.mark.parametrize("make", [Layer, lambda *sizes, **more: Layer(*sizes, cond_width=5, **more)])
@pytest.mark.parametrize("depth", [1, 2, 12])
def test_branches_are_divided_by_the_root_of_how_many_there_are(make, depth):
    """The same as a layer without the factor, whose output projections are that much smaller."""
    scaled, plain = (filled(make(WIDTH, HEADS, **more)) for more in (dict(depth=depth), {}))
    for weight in (plain.attention.out.weight, plain.mlp[2].weight):
        weight.data /= (2 * depth) ** 0.5
    h, cond = torch.randn(2, T, WIDTH), torch.randn(2, 5)
    torch.testing.assert_close(scaled(h, cond=cond), plain(h, cond=cond))


# --- norms and attention ---


def test_what_leaves_a_sandwich_layer_has_unit_size():
    """Geiping et al. 2025. So a layer that is applied again and again stays stable."""
    layer, h = filled(Layer(WIDTH, HEADS, sandwich=True)), 100 * torch.randn(2, T, WIDTH)
    for _ in range(50):
        h = layer(h)
    torch.testing.assert_close(h.square().mean(-1).sqrt(), torch.ones(2, T))
    for _ in range(50):  # without it the sums grow
        h = filled(Layer(WIDTH, HEADS))(h)
    assert h.square().mean().sqrt() > 2


def test_attention_is_a_weighted_mean_of_what_it_may_see():
    """Against a slow loop over heads and places, with a mask."""
    attention, h = filled(Layer(WIDTH, HEADS)).attention, torch.randn(1, T, WIDTH)
    mask = torch.ones(T, T, dtype=torch.bool).tril()
    q, k, v = (part.view(T, HEADS, -1) for part in attention.qkv(h)[0].chunk(3, dim=-1))
    for t in range(T):
        heads = []
        for head in range(HEADS):
            weights = (k[: t + 1, head] @ q[t, head] / (WIDTH // HEADS) ** 0.5).softmax(0)
            heads.append(weights @ v[: t + 1, head])
        expected = attention.out(torch.cat(heads))
        torch.testing.assert_close(attention(h, None, mask, False, None)[0, t], expected)
        torch.testing.assert_close(attention(h, None, None, True, None)[0, t], expected)
