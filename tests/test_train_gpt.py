import dataclasses
import json
import sys

import pytest
import torch

import train_mdm
from nano_db.block import DiffusionBlock, EndToEnd
from nano_db.codebook import PosteriorHead, make_codebook
from nano_db.language import generate
from nano_db.layers import Cache
from nano_db.likelihood import nats_of_priors, nats_per_block
from nano_db.partition import make_partition
from nano_db.schedule import LogNormal, equal_mass_grid
from nano_db.stack import Stack
from train_gpt import GPT, Settings

CLASSES, T = 11, 10
NOISE = LogNormal(0.3, 0.8, 0.05, 20.0)
MODES = [dict(z="inside", streams=1), dict(z="inside", streams=2), dict(z="outside", streams=1, walk="averaged")]


def randomised(module):
    """Zero-initialised weights would hide a leak: give all of them values."""
    generator = torch.Generator().manual_seed(0)
    for p in module.parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=generator)
    return module.eval()


def make_stack(blocks=2, **options):
    settings = Settings(width=16, heads=2, seq_len=T, mlp="swiglu", blocks=blocks, **options)
    codebook, partition = make_codebook(CLASSES, 16), make_partition(NOISE, blocks)
    shows_z = settings.z == "inside"
    networks = [GPT(CLASSES, settings, 2, shows_z) for _ in range(blocks)]
    stack = [
        randomised(DiffusionBlock(network, PosteriorHead(codebook), NOISE, partition.interval(b), shows_z=shows_z))
        for b, network in enumerate(networks)
    ]
    return Stack(stack, partition, average=settings.walk == "averaged"), settings


@pytest.fixture
def sequence():
    generator = torch.Generator().manual_seed(1)
    x, z = torch.randint(CLASSES, (2, T), generator=generator), torch.randn(2, T, 16, generator=generator)
    return x, z, generator


@pytest.mark.parametrize("options", MODES)
def test_later_tokens_change_nothing_at_earlier_positions(options, sequence):
    x, z, generator = sequence
    stack, _ = make_stack(**options)
    for t in (0, 4, 8):
        changed = x.clone()
        changed[:, t + 1 :] = (
            changed[:, t + 1 :] + 1 + torch.randint(CLASSES - 1, (2, T - t - 1), generator=generator)
        ) % CLASSES
        before, after = (stack.posterior(tokens)(z, 0.7) for tokens in (x, changed))
        torch.testing.assert_close(before[:, : t + 1], after[:, : t + 1], rtol=0, atol=1e-5)
        assert (before[:, t + 1 :] - after[:, t + 1 :]).abs().max() > 1e-2  # and the test can see a difference


@pytest.mark.parametrize("options", MODES[:2])
def test_later_noise_changes_nothing_at_earlier_positions(options, sequence):
    x, z, _ = sequence
    stack, _ = make_stack(**options)
    changed = z.clone()
    changed[:, 5:] += 1.0
    posterior = stack.posterior(x)
    torch.testing.assert_close(posterior(z, 0.7)[:, :5], posterior(changed, 0.7)[:, :5], rtol=0, atol=1e-5)


def test_in_two_streams_a_position_sees_no_noise_but_its_own(sequence):
    x, z, _ = sequence
    stack, _ = make_stack(**MODES[1])
    changed = z.clone()
    changed[:, 3] += 1.0
    difference = (stack.posterior(x)(z, 0.7) - stack.posterior(x)(changed, 0.7)).abs().amax((0, 2))
    assert difference[3] > 1e-2 and difference[torch.arange(T) != 3].max() < 1e-5


@pytest.mark.parametrize("options", MODES)
def test_cached_and_uncached_answers_agree(options, sequence):
    """A prompt of four tokens at once, then one by one, at two noise levels of different blocks."""
    x, z, _ = sequence
    stack, _ = make_stack(**options)
    caches = {}
    whole = stack.posterior(x)
    for start, end in [(0, 4), *((t, t + 1) for t in range(4, T - 3)), (T - 3, T)]:
        part = stack.posterior(x[:, start:end], caches)
        for sigma in (2.0, 0.3):
            torch.testing.assert_close(part(z[:, start:end], sigma), whole(z, sigma)[:, start:end], rtol=0, atol=1e-4)


def test_the_cache_of_the_baseline_agrees_too(sequence):
    x, _, _ = sequence
    baseline = randomised(
        EndToEnd(GPT(CLASSES, Settings(width=16, heads=2), 2, False), PosteriorHead(make_codebook(CLASSES, 16)))
    )
    cache = Cache()
    parts = [baseline.log_prior(x[:, t : t + 1], cache=cache) for t in range(T)]
    torch.testing.assert_close(torch.cat(parts, 1), baseline.log_prior(x), rtol=0, atol=1e-4)


def test_the_bound_of_a_network_that_sees_no_z_is_its_exact_cross_entropy():
    stack, _ = make_stack(blocks=1, z="outside")
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randint(CLASSES, (4000, T), generator=generator) for _ in range(2))
    with torch.no_grad():
        bound = nats_per_block(stack.posterior(x), y, stack.codebook, stack.partition, generator=generator)
        exact = -stack.blocks[0].log_prior(x).gather(-1, y[..., None]).mean()
    assert float(bound.sum()) == pytest.approx(float(exact), rel=0.01)


def test_without_z_in_the_network_the_bound_needs_no_integral():
    """Blocks of different p(y | x): what nats_of_priors says must be what the integral says, in all and by block."""
    stack, _ = make_stack(blocks=3, z="outside", walk="averaged")
    generator = torch.Generator().manual_seed(0)
    for block in stack.blocks:
        block.head.readout.weight.data = 0.3 * torch.randn(CLASSES, 16, generator=generator)
    x, y = (torch.randint(CLASSES, (3000, T), generator=generator) for _ in range(2))
    with torch.no_grad():
        integral = nats_per_block(stack.posterior(x), y, stack.codebook, stack.partition, generator)
        closed = nats_of_priors(stack.priors(x), y, stack.codebook, stack.partition.edges[1:-1], generator)
    assert float(closed.sum()) == pytest.approx(float(integral.sum()), rel=0.01)
    torch.testing.assert_close(closed, integral, rtol=0.03, atol=0.02)


def test_the_averaged_walk_is_the_mean_of_what_was_said(sequence):
    x, z, _ = sequence
    stack, _ = make_stack(blocks=2, z="outside", walk="averaged")
    first, second = (block.log_prior(x) for block in stack.blocks)
    posterior = stack.posterior(x)
    sigma_first, sigma_last = 5.0, 0.2
    z = z * 0  # no likelihood: the prior alone
    torch.testing.assert_close(posterior(z, sigma_first), first)
    torch.testing.assert_close(posterior(z, sigma_last), ((first + second) / 2).log_softmax(-1))


@pytest.mark.parametrize("options", MODES)
def test_generation_with_restarts_of_a_full_context(options):
    stack, _ = make_stack(**options)
    sigmas, prompt = equal_mass_grid(NOISE, 4), torch.arange(6).view(2, 3)
    first, again = (
        generate(stack, prompt, 15, T, sigmas, generator=torch.Generator().manual_seed(0)) for _ in range(2)
    )
    assert first.shape == (2, 18) and torch.equal(first[:, :3], prompt) and torch.equal(first, again)


def test_generation_at_low_temperature_takes_the_likeliest_token():
    stack, _ = make_stack(blocks=1, z="outside")
    sigmas, generator = equal_mass_grid(NOISE, 8), torch.Generator().manual_seed(0)
    tokens = generate(stack, torch.tensor([[1, 2]]), 5, T, sigmas, temperature=0.01, generator=generator)
    likeliest = stack.blocks[0].log_prior(tokens[:, :-1]).argmax(-1)
    assert torch.equal(tokens[0, 2:], likeliest[0, 1:])


def test_blocks_share_no_trainable_tensor():
    stack, _ = make_stack(blocks=3)
    owners = {}
    for b, block in enumerate(stack.blocks):
        for p in block.parameters():
            assert owners.setdefault(p.untyped_storage().data_ptr(), b) == b


# --- the command ---


@pytest.mark.parametrize(
    "flags",
    [
        ("--rounds", "2"),
        ("--recipe", "paper"),
        ("--noise", "information", "--partition", "uniform", "--layer-split", "1,1,1,1"),
        ("--head", "posterior", "--z", "inside", "--walk", "last", "--streams", "1", "--grid", "karras"),
        ("--baseline", "--layers", "2", "--ensemble", "2"),
    ],
)
def test_a_run_leaves_all_its_files_and_resumes_to_the_same_result(small, tmp_path, flags):
    code, _, err = small("--out", tmp_path / "run", *flags)
    assert code == 0, err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    parts = result["memory_bytes"]
    assert parts["total"] == sum(parts[part] for part in ("weights", "gradients", "optimizer", "activations"))
    assert result["metrics"]["nats_per_token"] == pytest.approx(sum(result["metrics"]["nats_per_block"]))
    for name in (
        "config.json",
        "metrics.jsonl",
        "metrics_0.jsonl",
        "curves.png",
        "samples.txt",
        *(f"block_{b}.pt" for b in range(result["blocks"])),
    ):
        assert (tmp_path / "run" / name).stat().st_size > 0
    code, again, _ = small("--out", tmp_path / "run", *flags)
    assert code == 0 and "loss" not in again  # nothing is trained a second time
    assert json.loads((tmp_path / "run" / "result.json").read_text())["metrics"] == result["metrics"]


def test_eval_only_takes_the_settings_of_the_run_and_continues_the_prompt(small, cli, tmp_path):
    small("--out", tmp_path / "run", "--blocks", "2")
    code, out, err = cli("--eval-only", "--out", tmp_path / "run", "--prompt", "the dog", "--temperature", "0.5")
    assert code == 0 and "the dog|" in out, err
    code, _, err = cli("--eval-only", "--out", tmp_path / "run", "--blocks", "4")
    assert code == 2 and "blocks 2 there, 4 here" in err
    code, _, err = cli("--eval-only", "--out", tmp_path / "nowhere")
    assert code == 2 and "holds no run" in err
    code, _, err = cli("--eval-only", "--out", tmp_path / "run", main=train_mdm.main)
    assert code == 2 and "holds no run of train_mdm.py" in err
    config = tmp_path / "run" / "config.json"
    config.write_text(config.read_text().replace('"width": 16', '"width": "16"'))
    code, _, err = cli("--eval-only", "--out", tmp_path / "run")
    assert code == 2 and "width 16 there, '16' here" in err


def test_a_finished_run_keeps_its_peak_memory_when_it_is_run_again(small, tmp_path):
    peaks = []
    for _ in range(2):
        small("--out", tmp_path / "run")
        peaks.append(json.loads((tmp_path / "run" / "result.json").read_text())["peak_resident_bytes"])
    assert peaks[0] == peaks[1] > 0


def test_a_start_that_failed_leaves_the_folder_free(small, tmp_path):
    assert small("--out", tmp_path / "run", "--learning-rate", "1e30", "--warmup", "0", "--clip", "1e30")[0] == 2
    assert small("--out", tmp_path / "run", "--only", "0")[0] == 0


def test_only_trains_one_block_and_the_last_one_completes_the_run(small, tmp_path):
    for b in (3, 0, 2):
        code, out, _ = small("--out", tmp_path / "run", "--only", b)
        assert code == 0 and "still to train" in out
    code, out, _ = small("--out", tmp_path / "run", "--only", "1")
    assert code == 0 and "bits per character" in out and (tmp_path / "run" / "result.json").exists()


BAD = {
    ("--blocks", "5"): "--blocks 5 is more than --layers 4",
    ("--layer-split", "1,1,1"): "--layer-split",
    ("--blocks", "0"): "--blocks must be at least 1",
    ("--steps", "-3"): "--steps must be at least 1",
    ("--batch-size", "x"): "invalid int value",
    ("--learning-rate", "nan"): "finite",
    ("--overlap", "1"): "less than 1",
    ("--preset", "huge"): "invalid choice",
    ("--no-such-flag",): "unrecognized",
    ("--data", "wikipedia"): "pydocs, shakespeare",
    ("--seq-len", "4000"): "too few for --seq-len 4000",
    ("--only", "7"): "no block 7",
    ("--prompt", "ÄÖ"): "'Ä' 'Ö'",
    ("--heads", "3"): "multiple of twice --heads",
    ("--sigma-min", "30"): "less than --sigma-max",
    ("--head", "paper"): "--z outside needs",
    ("--z", "inside"): "--walk averaged needs",
    ("--baseline", "--overlap", "0.2"): "does nothing for the baseline",
    ("--ensemble", "2"): "does nothing for the blocks",
    ("--noise", "information", "--p-mean", "1"): "do nothing for --noise information",
    ("--eval-only",): "--preset does nothing with --eval-only",
    ("--temperature", "0"): "at least 0.01",
    ("--seed", str(2**31)): "less than",
    ("--p-mean", "50"): "no mass",
    ("--prompt", "\udcff"): "'\\udcff'",
}


@pytest.mark.parametrize("flags, message", BAD.items())
def test_bad_input_gets_one_clear_line_and_exit_code_2(small, tmp_path, flags, message):
    code, _, err = small("--out", tmp_path / "run", *flags)
    assert code == 2 and message in err and err.count("\n") == 1, err
    assert not list(tmp_path.glob("run/*.pt"))


def test_cuda_asked_for_and_absent(small, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = small("--out", tmp_path / "run", "--device", "cuda")
    assert code == 2 and "no CUDA device" in err and err.count("\n") == 1


def test_other_settings_in_the_same_folder_are_named_and_nothing_is_lost(small, tmp_path):
    small("--out", tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    code, _, err = small("--out", tmp_path / "run", "--learning-rate", "0.1", "--baseline")
    assert code == 2 and "learning_rate 0.001 there, 0.1 here" in err and err.count("\n") == 1
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}


def test_a_damaged_block_and_an_unwritable_folder_are_named(small, tmp_path):
    small("--out", tmp_path / "run", "--only", "1")
    (tmp_path / "run" / "block_1.pt").write_bytes(b"damaged")
    code, _, err = small("--out", tmp_path / "run")
    assert code == 2 and "block_1.pt is damaged" in err and err.count("\n") == 1
    (tmp_path / "file").write_text("")
    code, _, err = small("--out", tmp_path / "file" / "run")
    assert code == 2 and "cannot make the output folder" in err and err.count("\n") == 1


def test_a_nan_loss_is_one_line_too(small, tmp_path):
    code, _, err = small(
        "--out",
        tmp_path / "run",
        "--learning-rate",
        "1e30",
        "--warmup",
        "0",
        "--clip",
        "1e30",
        "--z",
        "inside",
        "--walk",
        "last",
    )
    assert code == 2 and "block 0: the loss is" in err and "step" in err and err.count("\n") == 1


def test_help_needs_no_plotting(cli):
    sys.modules.pop("matplotlib.pyplot", None)
    code, out, _ = cli("--help")
    assert code == 0 and "--blocks" in out and "matplotlib.pyplot" not in sys.modules
    assert all(f"--{f.name.replace('_', '-')}" in out for f in dataclasses.fields(Settings))


def test_checkpointed_activations_change_memory_and_no_weight(small, tmp_path):
    flags = ("--blocks", "2", "--z", "inside", "--walk", "last")
    for name, more in (("plain", ()), ("checkpointed", ("--checkpoint-activations",))):
        code, _, err = small(*flags, *more, "--out", tmp_path / name)
        assert code == 0, err
    plain, checkpointed = (torch.load(tmp_path / name / "block_1.pt") for name in ("plain", "checkpointed"))
    assert all(torch.equal(checkpointed["weights"][name], weight) for name, weight in plain["weights"].items())
    bytes_of = [
        json.loads((tmp_path / name / "result.json").read_text())["memory_bytes"]["activations"]
        for name in ("plain", "checkpointed")
    ]
    assert bytes_of[1] < 0.8 * bytes_of[0]
