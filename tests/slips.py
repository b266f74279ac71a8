"""Wrong answers to the exercises of the notebooks, as slips in the solutions: what a check must not accept.

{exercise: [(what stands in the solution, what stands there in the wrong answer), ...]}, one slip each.
"""

NAN = "float('nan')"
DRAW = "sample_sigma(block.noise, len(y), *block.span).float()"
LOG_UNIFORM = "block.span[0] * (block.span[1] / block.span[0]) ** torch.rand(len(y))"
SEED = "seed_from(settings.seed, b, step)"

SLIPS = {
    "1.1": [(".square()", "")],
    "1.2": [("+ (1 - a)", "- (1 - a)"), ("z = a * z", "z *= a; z = z")],
    "1.3": [("sigmas[0]", "sigmas[1]")],
    "1.4": [("sigma_next**2", "sigma_next"), ("s**2", "0.49")],
    "2.1": [
        ("(y * z)", "(y * y)"),
        ("(y * z).sum() / (z * z).sum()", "0.25 / (0.25 + (z - y).var())"),
        ("(z * z).sum()", "(z - z.mean()).square().sum()"),
    ],
    "2.2": [("** 2 / (", "/ (")],
    "2.3": [("sigma <= edge", "sigma < edge"), ("max(low / stretch, self.edges[-1])", "low / stretch")],
    "2.4": [
        ("1 - float(inside)", "float(inside)"),
        ("1 - float(inside)", NAN),
        ("partition.edges", "make_partition(noise, 4).edges"),
    ],
    "3.1": [
        ("torch.randn_like(y)", "torch.randn(len(y), 1)"),  # one noise for both coordinates
        ("torch.randn_like(y)", "(12**0.5 * (torch.rand_like(y) - 0.5))"),  # uniform noise of variance 1
        (DRAW, "torch.full((len(y),), math.prod(block.span) ** 0.5)"),  # one level
        (DRAW, LOG_UNIFORM),
        (DRAW, f"{DRAW.replace('*block.span', 'noise.sigma_min, noise.sigma_max')}.clamp(*block.span)"),
        ("sigma =", "torch.manual_seed(0); sigma ="),
        ("squared_error = (block(x, z, sigma) - y).square().mean(1)", "return block.loss(x, y)"),
        ("edm_weight(sigma, block.head.sigma_data) *", "edm_weight(sigma, block.head.sigma_data)[:, None] *"),
        ("squared_error).mean()", "squared_error)"),
    ],
    "3.2": [
        (SEED, "seed_from(0, b, step)"),
        (SEED, "seed_from(settings.seed, step)"),
        (SEED, "seed_from(settings.seed, 5 * b + step)"),
        (SEED, "pass"),
        (SEED, "seed_from(settings.seed, b, step % 5)"),
        ("optimizer.zero_grad()", "pass"),
        ("optimizer.step()", "pass"),
        ("range(start, stop)", "range(start, start)"),
    ],
    "3.3": [("block = None  #", "pass  #")],
    "3.4": [
        ("z = z +", "z +="),
        ("0.0 if block is blocks[-1] else partition.edges[b + 1]", "partition.edges[b + 1]"),
        ("(block(", "(0 * block(None, z, sigma) + block("),
    ],
    "4.1": [('"patches"', '"conditions"')],
    "4.2": [
        ("c_noise.flatten()", "sigma"),
        ("c_noise.flatten()", "c_in.flatten()"),
        ("network(labels,", "network(torch.zeros_like(labels),"),
        ("c_in * z", "z"),
        ("edm_weight(sigma, sigma_data) *", ""),
    ],
    "4.3": [("del block, state", "pass")],
    "4.4": [("if strengths[b] == 1:", "if False:")],
    "5.1": [("1 - 1 / classes", "1.0"), ("1 - 1 / classes", NAN)],
    "5.2": [(" - target_embeddings.square().sum(-1) / 2", ""), ("(z @", "(z.mul_(2) / 2 @")],
    "5.3": [("1 - 0.01 / (classes - 1)", "1 + 0.01 / (classes - 1)"), ("math.sqrt(2) *", "")],  # the first is nan
    "5.4": [("max(sigma, block.span[0])", "sigma")],
    "5.5": [("float((p * q).sum(-1).mean())", NAN), ("(p * q)", "(p * p)")],
    "6.1": [
        ("torch.randn(len(y), target_embeddings.shape[1])", "torch.ones(len(y), target_embeddings.shape[1])"),
        ("1 / (2 * sigmas[0] ** 2)", "0.0"),
        ("/ 2 * float(error)", "* float(error)"),
    ],
    "6.2": [("decoding(high) - decoding(low)", "decoding(low) - decoding(high)")],
    "6.3": [("len(sigmas) - 2", "len(sigmas) - 3")],
    "6.4": [("* 2", "")],
    "7.1": [("1 / (steps - k)", "1 / steps"), ("1 / (steps - k)", NAN)],
    "7.2": [
        ("mask_token, x), t)", "mask_token, x), alpha[:, 0].float())"),
        (" * masked  # (n, T)", ""),
        ("nats.mean(1)", "nats.sum(1) / masked.sum(1).clamp(min=1)"),
        ("(weight * nats", "(nats"),
    ],
    "7.3": [("/ blocks", "/ 4")],
    "7.4": [("1 / steps / 2", "1 / steps"), ("1 / steps / 2", NAN)],
    "8.1": [("shrink**recurrences", "shrink"), ("(1 - shrink**window)", NAN)],
    "8.2": [("gradient(window), gradient(32)", "gradient(32), gradient(32)")],
    "8.3": [("min(window, recurrences)", "window")],
    "8.4": [
        ("* z, c_noise)", "* z, sigma)"),
        ("c_noise))", "c_noise).detach())"),
        (" + z @ target_embeddings.T / s**2", ""),
        ("nn.functional.cross_entropy(logits.transpose(1, 2), y)", "(1e3 * logits).exp().log().mean()"),  # not finite
    ],
    "9.1": [
        ("factor = 1 / B - 1 / L", "factor = 1 / L - 1 / B"),
        ("i * (1 - 1 / L)", "i"),
        ("factor > 0", "factor >= 0"),
    ],
    "9.2": [("(H if B > 1 else 0)", "H")],
    "9.3": [("math.ceil", ""), ("math.ceil", "round"), (" - 1e-9", "")],
    "9.4": [("log_p.mean(0)", "log_p.sum(0)")],
}
