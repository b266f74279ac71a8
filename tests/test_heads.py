import pytest
import torch

from nano_db.heads import DenoisingHead, EDMHead, PaperHead, PosteriorHead, log_likelihood, make_target_embeddings
from nano_db.schedule import edm_coefficients

WIDTH, CLASSES = 8, 5
SHAPES = {"labels": (2, WIDTH), "tokens": (2, 3, WIDTH)}


def test_target_embeddings_rows_are_unit_and_orthonormal_where_they_fit():
    narrow, wide = make_target_embeddings(6, 8, seed=3), make_target_embeddings(50, 8, seed=3)
    torch.testing.assert_close(narrow @ narrow.T, torch.eye(6))
    torch.testing.assert_close(wide.norm(dim=-1), torch.ones(50))
    assert torch.equal(narrow, make_target_embeddings(6, 8, seed=3)) and not torch.equal(
        narrow, make_target_embeddings(6, 8, seed=4)
    )


def test_the_likelihood_is_bayes_rule():
    """With p(y|x) known, the answer must be p(y) N(z; E[y], sigma^2) normalised, computed here the long way."""
    target_embeddings = make_target_embeddings(5, 3)  # more classes than dimensions
    prior = torch.tensor([0.4, 0.3, 0.1, 0.1, 0.1])
    z, sigma = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)), 0.6
    normal = torch.distributions.Normal(target_embeddings, sigma).log_prob(z[:, None]).sum(-1)  # (7, 5)
    expected = (prior.log() + normal).softmax(-1)
    torch.testing.assert_close((prior.log() + log_likelihood(z, sigma, target_embeddings)).softmax(-1), expected)


def test_the_likelihood_stays_float32_under_bfloat16_autocast():
    target_embeddings, z = make_target_embeddings(5, 8), torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        inside = log_likelihood(z, 0.05, target_embeddings)
    assert torch.equal(inside, log_likelihood(z, 0.05, target_embeddings))


def inputs(shape):
    """features, z, sigma (B,): a sample of little noise, and one of much."""
    generator = torch.Generator().manual_seed(0)
    features, z = (torch.randn(shape, generator=generator) for _ in range(2))
    return features, z, torch.tensor([0.3, 4.0])


def denoising_head():
    torch.manual_seed(0)
    return DenoisingHead(make_target_embeddings(CLASSES, WIDTH))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_posterior_head_adds_the_likelihood_to_what_the_network_says(shape):
    head = PosteriorHead(make_target_embeddings(CLASSES, WIDTH))
    features, z, sigma = inputs(shape)
    logits = head(features, z, sigma, temperature=0.5)
    assert logits.shape == (*shape[:-1], CLASSES)
    for i in range(2):
        expected = head.output_projection(features[i]) / 0.5 + z[i] @ head.target_embeddings.T / sigma[i] ** 2
        torch.testing.assert_close(logits[i], expected)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_new_denoising_head_is_a_posterior_head(shape):
    head, plain = denoising_head(), PosteriorHead(make_target_embeddings(CLASSES, WIDTH))
    plain.output_projection.load_state_dict(head.output_projection.state_dict())
    logits = head(*inputs(shape))
    assert logits.shape == (*shape[:-1], CLASSES) and torch.equal(logits, plain(*inputs(shape)))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_denoising_head_learns_to_see_z_and_the_noise_level(shape):
    """At the start its output is zero, and so are the gradients of all that stands before; one step, and all learn."""
    head = denoising_head()
    features, z, sigma = inputs(shape)
    y = torch.zeros(shape[:-1], dtype=torch.long)
    before = [head.from_z.weight, head.up.weight, head.modulation.weight, head.modulation.bias]
    for step in range(2):
        head.zero_grad()
        head.loss(features, z, sigma, y).mean().backward()
        assert head.out.weight.grad.abs().max() > 0 and head.output_projection.weight.grad.abs().max() > 0
        assert all((p.grad.abs().max() > 0) == (step > 0) for p in before)
        with torch.no_grad():
            for p in head.parameters():
                p -= 0.5 * p.grad
    head.zero_grad()  # one step more, and the embedding of the noise level learns, too
    head.loss(features, z, sigma, y).mean().backward()
    assert all(p.grad.abs().max() > 0 for p in head.parameters())

    said = head.residual(features, z, sigma)
    assert not torch.allclose(said, head.residual(features, z + 1, sigma))
    assert not torch.allclose(said, head.residual(features, z, sigma / 2))
    assert torch.allclose(said[:1], head.residual(features[:1], z[:1], sigma[:1])), "samples know nothing of each other"


def random_denoising_head():
    head = denoising_head()
    for p in head.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return head


def test_the_denoising_head_is_its_formula():
    """Each position: u = (1 + scale) * h + shift + W_z c_in z; output projection of h + W_out relu(W_up u)."""
    head = random_denoising_head()
    features, z, sigma = inputs(SHAPES["tokens"])
    found = head.residual(features, z, sigma)
    for i in range(2):
        c_in, c_noise = (sigma[i] ** 2 + 0.5**2) ** -0.5, sigma[i].log() / 4
        scale, shift = head.modulation(head.noise_embedding(c_noise[None]))[0].chunk(2)
        for t in range(3):
            u = (1 + scale) * features[i, t] + shift + head.from_z.weight @ (c_in * z[i, t])
            h = features[i, t] + head.out.weight @ torch.nn.functional.relu(head.up.weight @ u)
            torch.testing.assert_close(found[i, t], head.output_projection.weight @ h)


def test_no_position_of_a_denoising_head_sees_another():
    head = random_denoising_head()
    features, z, sigma = inputs(SHAPES["tokens"])
    changed = z.clone()
    changed[:, 1] += 1
    moved = (head.residual(features, z, sigma) - head.residual(features, changed, sigma)).abs().amax((0, 2))
    assert moved[1] > 1e-2 and moved[0] == moved[2] == 0


def test_the_paper_head_is_edm():
    head = PaperHead(make_target_embeddings(CLASSES, WIDTH))
    features, z, sigma = inputs(SHAPES["tokens"])
    c_skip, c_out, _, _ = edm_coefficients(sigma[:, None, None], 0.5)
    torch.testing.assert_close(head(features, z, sigma), head.output_projection(c_skip * z + c_out * features))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_loss_of_a_class_is_one_number_a_sample(shape):
    head, (features, z, sigma) = PosteriorHead(make_target_embeddings(CLASSES, WIDTH)), inputs(shape)
    y = torch.randint(CLASSES, shape[:-1], generator=torch.Generator().manual_seed(0))
    logits, loss = head(features, z, sigma), head.loss(features, z, sigma, y)
    assert loss.shape == (2,)
    for i in range(2):
        torch.testing.assert_close(loss[i], -logits[i].log_softmax(-1).gather(-1, y[i][..., None]).mean())


def test_the_edm_head_blends_z_and_features():
    z, features, sigma = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.tensor([0.2, 4.0])
    denoised = EDMHead(0.5)(features, z, sigma)
    for i in range(2):
        c_skip, c_out, _, _ = edm_coefficients(sigma[i], 0.5)
        torch.testing.assert_close(denoised[i], c_skip * z[i] + c_out * features[i])
    assert not list(EDMHead(0.5).parameters())


def test_the_loss_of_numbers_is_one_number_a_sample():
    features, z, y = torch.randn(3, 5, 2, 3)
    denoised, loss = EDMHead(0.5)(features, z, torch.ones(5)), EDMHead(0.5).loss(features, z, torch.ones(5), y)
    assert loss.shape == (5,)
    torch.testing.assert_close(loss[3], ((denoised[3] - y[3]) ** 2).mean())
