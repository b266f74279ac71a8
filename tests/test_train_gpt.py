import dataclasses
import json
import math
import shutil
import sys

import pytest
import torch

import train_gpt
import train_mdm
from data.text import load_text
from nano_db import likelihood
from nano_db.block import DiffusionBlock, EndToEnd
from nano_db.heads import HEADS, PosteriorHead, make_target_embeddings
from nano_db.language import generate, score_text
from nano_db.likelihood import nats_per_block
from nano_db.partition import make_partition
from nano_db.schedule import LogNormal, equal_probability_grid
from nano_db.stack import Ensemble, Stack
from nano_db.trainer.checkpoints import read_metrics
from train_gpt import GPT, Settings

CLASSES, T = 11, 10
NOISE = LogNormal(0.3, 0.8, 0.05, 20.0)
MODES = [("denoising", "averaged"), ("denoising", "active"), ("posterior", "active"), ("paper", "active")]
in_all_modes = pytest.mark.parametrize("head, predict", MODES)


def randomised(module):
    """Zero-initialised weights would hide a leak: give all of them values."""
    generator = torch.Generator().manual_seed(0)
    for p in module.parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=generator)
    return module.eval()


def make_stack(head="denoising", predict="averaged", blocks=2):
    settings = Settings(width=16, heads=2, seq_len=T, blocks=blocks)
    target_embeddings, partition = make_target_embeddings(CLASSES, 16), make_partition(NOISE, blocks)
    stack = []
    for b in range(blocks):
        network = GPT(CLASSES, settings, 2, sees_z=HEADS[head].network_sees_z)
        stack.append(randomised(DiffusionBlock(network, HEADS[head](target_embeddings), NOISE, partition.interval(b))))
    return Stack(stack, partition, average=predict == "averaged")


def make_blind():
    """A stack of one block whose head does not look at z, and its p(y | x)."""
    stack = make_stack(blocks=1)
    (block,) = stack.blocks
    block.head.out.weight.data.zero_()
    return stack, lambda x: block.head.output_projection(block.network(x)).log_softmax(-1)


def make_baseline():
    return randomised(
        EndToEnd(GPT(CLASSES, Settings(width=16, heads=2), 2), PosteriorHead(make_target_embeddings(CLASSES, 16)))
    )


@pytest.fixture
def sequence():
    generator = torch.Generator().manual_seed(1)
    x, z = torch.randint(CLASSES, (2, T), generator=generator), torch.randn(2, T, 16, generator=generator)
    return x, z, generator


@in_all_modes
def test_later_tokens_change_nothing_at_earlier_positions(head, predict, sequence):
    x, z, generator = sequence
    stack = make_stack(head, predict)
    for t in (0, 4, 8):
        changed = x.clone()
        changed[:, t + 1 :] = (
            changed[:, t + 1 :] + 1 + torch.randint(CLASSES - 1, (2, T - t - 1), generator=generator)
        ) % CLASSES
        before, after = (stack.posterior(tokens)(z, 0.7) for tokens in (x, changed))
        torch.testing.assert_close(before[:, : t + 1], after[:, : t + 1], rtol=0, atol=1e-5)
        assert (before[:, t + 1 :] - after[:, t + 1 :]).abs().max() > 1e-2  # and the test can see a difference


@in_all_modes
def test_a_position_sees_no_noise_but_its_own(head, predict, sequence):
    """So nothing leaks: only position t, whose answer it is, knows the noisy token t + 1."""
    x, z, _ = sequence
    stack = make_stack(head, predict)
    changed = z.clone()
    changed[:, 3] += 1.0
    difference = (stack.posterior(x)(z, 0.7) - stack.posterior(x)(changed, 0.7)).abs().amax((0, 2))
    assert difference[3] > 1e-2 and difference[torch.arange(T) != 3].max() < 1e-5


@in_all_modes
def test_cached_and_uncached_answers_agree(head, predict, sequence):
    """A prompt of four tokens at once, then one by one, at two noise levels of different blocks."""
    x, z, _ = sequence
    stack = make_stack(head, predict)
    caches = {}
    whole = stack.posterior(x)
    for start, end in [(0, 4), *((t, t + 1) for t in range(4, T - 3)), (T - 3, T)]:
        part = stack.posterior(x[:, start:end], caches)
        for sigma in (2.0, 0.3):
            torch.testing.assert_close(part(z[:, start:end], sigma), whole(z, sigma)[:, start:end], rtol=0, atol=1e-4)


def test_the_cache_of_the_baseline_agrees_too(sequence):
    x, _, _ = sequence
    baseline, caches = Ensemble([make_baseline()]), {}
    parts = [baseline.log_p(x[:, t : t + 1], caches) for t in range(T)]
    torch.testing.assert_close(torch.cat(parts, 1), baseline.log_p(x), rtol=0, atol=1e-4)


def test_the_score_is_the_mean_over_the_windows_asked_for(tmp_path):
    letters = torch.randint(11, (660,), generator=torch.Generator().manual_seed(0))
    (tmp_path / "text").write_text("".join("abcdefghijk"[letter] for letter in letters))
    text, baseline = load_text(str(tmp_path / "text"), seq_len=T), make_baseline()
    for windows, count in [(1, 1), (2, 2), (0, len(text.heldout) // 2 // T)]:
        found = score_text(Ensemble([baseline]), text, T, windows)
        for half, metric in (("validation", "validation_bits_per_char"), ("test", "bits_per_char")):
            batches = text.heldout_batches(1, T, half=half)
            log_p = [(baseline(x).detach().log_softmax(-1)[0], y[0]) for x, y in batches][:count]
            nats = [float(-answer[torch.arange(T), y].mean()) for answer, y in log_p]
            assert len(nats) == count and found[metric] == pytest.approx(sum(nats) / count / math.log(2))
        assert found["bits_per_char"] == pytest.approx(found["nats_per_token"] / math.log(2))
        assert found["bits_per_char"] != found["validation_bits_per_char"]


def test_the_bound_of_a_head_that_does_not_look_at_z_is_its_exact_cross_entropy():
    stack, log_p = make_blind()
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randint(CLASSES, (4000, T), generator=generator) for _ in range(2))
    with torch.no_grad():
        bound = nats_per_block(stack.posterior(x), y, stack.target_embeddings, stack.partition, generator=generator)
        exact = -log_p(x).gather(-1, y[..., None]).mean()
    assert float(bound.sum()) == pytest.approx(float(exact), rel=0.01)


@pytest.mark.parametrize("predict", ["averaged", "active"])
def test_a_token_takes_16_sampling_steps_of_which_each_calls_a_head_and_the_first_the_trunks(predict):
    stack, trunks, heads = make_stack(predict=predict, blocks=4), [], []
    for b, block in enumerate(stack.blocks):
        block.network.register_forward_hook(lambda *_, b=b: trunks.append(b))
        block.head.output_projection.register_forward_hook(lambda *_, b=b: heads.append(b))
    sigmas, generator = equal_probability_grid(NOISE, 16), torch.Generator().manual_seed(0)
    generate(stack, torch.tensor([[1, 2, 3]]), 1, T, sigmas, generator=generator)
    assert sorted(trunks) == [0, 1, 2, 3] and len(heads) >= 16
    active = [b for b in range(4) for _ in range(4)]  # whose interval each step falls in
    assert heads == ([i for b in active for i in range(b + 1)] if predict == "averaged" else active)


@in_all_modes
def test_generation_with_restarts_of_a_full_context(head, predict):
    stack = make_stack(head, predict)
    sigmas, prompt = equal_probability_grid(NOISE, 4), torch.arange(6).view(2, 3)
    first, again = (
        generate(stack, prompt, 15, T, sigmas, generator=torch.Generator().manual_seed(0)) for _ in range(2)
    )
    assert first.shape == (2, 18) and torch.equal(first[:, :3], prompt) and torch.equal(first, again)


@pytest.mark.parametrize("baseline", [False, True])
def test_at_low_temperature_each_token_is_the_likeliest_after_its_window(baseline):
    """Against a slow loop without caches: the window grows to T tokens, and then begins anew from its later half."""
    stack, log_p = make_blind()
    if baseline:
        stack = Ensemble([make_baseline()])
        log_p = stack.log_p
    sigmas, generator = equal_probability_grid(NOISE, 8), torch.Generator().manual_seed(0)
    prompts = torch.randint(CLASSES, (64, 2), generator=generator)
    tokens = generate(stack, prompts, 22, T, sigmas, temperature=1e-5, generator=generator)
    first = 0
    for t in range(2, 24):
        if t - first > T:
            first = t - T // 2
        assert torch.equal(tokens[:, t], log_p(tokens[:, first:t])[:, -1].argmax(-1))


@in_all_modes
def test_blocks_share_no_trainable_tensor(head, predict):
    stack = make_stack(head, predict, blocks=3)
    owners = {}
    for b, block in enumerate(stack.blocks):
        for p in block.parameters():
            assert owners.setdefault(p.untyped_storage().data_ptr(), b) == b


# --- the command ---


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(("--rounds", "2"), marks=pytest.mark.whole),
        ("--recipe", "paper"),
        pytest.param(("--noise", "paper"), marks=pytest.mark.slow),
        pytest.param(("--head", "posterior", "--predict", "active"), marks=pytest.mark.slow),
        ("--baseline", "--layers", "2", "--ensemble", "2"),
    ],
)
def test_a_run_leaves_all_its_files_and_resumes_to_the_same_result(small, tmp_path, flags):
    code, _, err = small("--out", tmp_path / "run", *flags)
    assert code == 0, err
    result = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    parts = result["memory_bytes"]
    assert parts["total"] == sum(parts[part] for part in ("weights", "gradients", "optimizer", "activations"))
    assert result["metrics"]["nats_per_token"] == pytest.approx(sum(result["metrics"]["nats_per_block"]))
    for name in (
        "config.json",
        "metrics.jsonl",
        "metrics_0.jsonl",
        "samples.txt",
        *(["curves.png"] if "--rounds" in flags else []),
        *(f"block_{b}.pt" for b in range(result["blocks"])),
    ):
        assert (tmp_path / "run" / name).stat().st_size > 0
    code, again, _ = small("--out", tmp_path / "run", *flags)
    assert code == 0 and "loss" not in again  # nothing is trained a second time
    second = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert second["metrics"] == result["metrics"]


def test_eval_only_takes_the_settings_of_the_run_and_continues_the_prompt(small, cli, tmp_path):
    small("--out", tmp_path / "run", "--blocks", "2")
    code, out, err = cli("--eval-only", "--out", tmp_path / "run", "--prompt", "the dog", "--temperature", "0.5")
    assert code == 0 and "the dog|" in out, err
    code, _, err = cli("--eval-only", "--out", tmp_path / "run", "--blocks", "4")
    assert code == 2 and "blocks 2 there, 4 here" in err and "drop these flags" in err and "delete" not in err
    code, _, err = cli("--eval-only", "--out", tmp_path / "nowhere")
    assert code == 2 and "holds no run" in err
    code, _, err = cli("--eval-only", "--out", tmp_path / "run", main=train_mdm.main)
    assert code == 2 and "holds a run of train_gpt.py: choose another --out" in err
    config = tmp_path / "run" / "config.json"
    config.write_text(config.read_text(encoding="utf-8").replace('"width": 16', '"width": "16"'))
    code, _, err = cli("--eval-only", "--out", tmp_path / "run")
    assert code == 2 and "width is '16'" in err


def test_what_was_asked_for_once_is_not_asked_for_again_by_eval_only(small, cli, tmp_path):
    run = ("--out", tmp_path / "run")
    code, out, err = small(*run, "--blocks", "2", "--prompt", "the dog", "--export", "2")
    assert code == 0 and "the dog|" in out, err
    exported = (tmp_path / "run" / "texts.jsonl").read_bytes()
    code, out, err = cli("--eval-only", *run, "--temperature", "2")
    assert code == 0 and "the dog|" not in out and "exported" not in out, err
    assert (tmp_path / "run" / "texts.jsonl").read_bytes() == exported
    small("--out", tmp_path / "two", "--blocks", "2", "--only", "1")
    small("--out", tmp_path / "two", "--blocks", "2", "--only", "0")
    code, out, err = cli("--eval-only", "--out", tmp_path / "two")
    assert code == 0 and "bits per character" in out, err


def test_a_result_says_how_it_was_evaluated(small, tmp_path):
    """A finished run, evaluated again: its config.json stays, and says how it was evaluated first."""
    for predict in ("averaged", "active"):
        code, _, err = small("--out", tmp_path / "run", "--blocks", "2", "--predict", predict)
        assert code == 0, err
        result = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
        assert result["settings"]["predict"] == predict and result["settings"]["width"] == 16
        assert (
            json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))["settings"]["predict"]
            == "averaged"
        )


def test_blocks_are_combined_though_the_same_data_and_network_lay_elsewhere(small, cli, tmp_path, text_file):
    copy = tmp_path / "mounted"
    copy.mkdir()
    assert small("--baseline", "--samples", "0", "--out", tmp_path / "network")[0] == 0
    shutil.copy(text_file, copy / "the text.txt")
    shutil.copytree(tmp_path / "network", copy / "network")
    here = ("--data", text_file, "--init-from", tmp_path / "network")
    there = ("--data", copy / "the text.txt", "--init-from", f"{copy / 'network'}/")
    for b, (name, flags) in enumerate({"a": here, "b": there}.items()):
        code, _, err = small("--blocks", "2", "--only", b, *flags, "--out", tmp_path / name)
        assert code == 0, err
    shutil.copy(tmp_path / "b" / "block_1.pt", tmp_path / "a")
    code, out, err = cli("--eval-only", "--out", tmp_path / "a")
    assert code == 0 and "bits per character" in out, err
    code, out, err = small("--blocks", "2", *there, "--out", tmp_path / "a")  # and the run resumes from there
    assert code == 0 and "loss" not in out, err
    (copy / "the text.txt").write_text("the slow brown fox jumps over the lazy dog. " * 80)
    code, _, err = small("--blocks", "2", *there, "--out", tmp_path / "a")
    assert code == 2 and "other settings (data " in err and err.count("\n") == 1, err
    small("--baseline", "--samples", "0", "--seed", "1", "--out", tmp_path / "other")
    code, _, err = small("--blocks", "2", *here[:2], "--init-from", tmp_path / "other", "--out", tmp_path / "a")
    assert code == 2 and "other settings (init_from " in err and err.count("\n") == 1, err


def test_one_window_is_evaluated_where_one_is_asked_for(small, tmp_path, heldout_windows):
    code, _, err = small("--out", tmp_path / "run", "--eval-windows", "1", "--rounds", "2")
    assert code == 0 and heldout_windows == 2 * [1, 1], "of either half, after each round: " + err


def test_after_a_start_that_failed_the_folder_is_to_be_deleted(small, tmp_path):
    assert small("--out", tmp_path / "run", "--learning-rate", "1e30", "--warmup", "0")[0] == 2
    code, _, err = small("--out", tmp_path / "run")
    assert code == 2 and "learning_rate 1e+30 there, 0.001 here" in err and "delete that folder" in err


def test_only_trains_one_block_and_the_last_one_completes_the_run(small, tmp_path):
    for b in (3, 0, 2):
        code, out, _ = small("--out", tmp_path / "run", "--only", b)
        assert code == 0 and "still to train" in out
    code, out, _ = small("--out", tmp_path / "run", "--only", "1")
    assert code == 0 and "bits per character" in out and (tmp_path / "run" / "result.json").exists()


def test_a_block_that_another_process_finishes_meanwhile_is_left_to_that_process(small, tmp_path, monkeypatch):
    """Between this process's last look at the files and its end."""
    ready, ends = train_gpt.Run.ready, []

    def ready_and_then_the_other_ends(run):
        answer = ready(run)
        if run.settings.only == "0":
            ends.append(small("--out", tmp_path / "run", "--blocks", "2", "--only", "1")[0])
            assert (tmp_path / "run" / "result.json").exists()
        return answer

    monkeypatch.setattr(train_gpt.Run, "ready", ready_and_then_the_other_ends)
    code, _, err = small("--out", tmp_path / "run", "--blocks", "2", "--only", "0")
    assert code == 0 and ends == [0], err


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--recipe", "paper"), ("--noise", "paper")], ids=["nano", "paper", "both"])
def test_the_bound_of_trained_blocks_and_its_shares_are_the_same_in_bfloat16(small, tmp_path, monkeypatch, flags):
    """Also of the whole integral, without the choice of where to decode. The third, our head at the paper's low noise
    levels, is where a rounded product p @ E would count most.
    """
    found = []

    def score_twice(*arguments):
        for margin in (1.0, 0.05):
            monkeypatch.setattr(likelihood, "MARGIN", margin)
            for enabled in (False, True):
                with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                    metrics = score_text(*arguments)
                found.append(metrics["nats_per_block"])
        return metrics

    monkeypatch.setattr(train_gpt, "score_text", score_twice)
    code, _, err = small("--out", tmp_path / "run", *flags, "--steps", "60", "--eval-windows", "8", "--samples", "0")
    assert code == 0, err
    assert len(found) == 4 and all(found[0]), "every share of the integral counts"
    for exact, rounded in (found[:2], found[2:]):
        assert len(exact) == 4 and exact != rounded
        assert rounded == pytest.approx(exact, rel=0.01, abs=0.001 * sum(exact))
        assert sum(rounded) == pytest.approx(sum(exact), rel=0.01)


BAD = {
    ("--blocks", "5"): "5 blocks are too many for 4 layers",
    ("--blocks", "0"): "--blocks must be at least 1",
    ("--steps", "-3"): "--steps must be at least 1",
    ("--batch-size", "x"): "invalid int value",
    ("--learning-rate", "nan"): "finite",
    ("--learning-rate", "0"): "greater than 0",
    ("--overlap", "1"): "less than 1",
    ("--preset", "huge"): "invalid choice",
    ("--no-such-flag",): "unrecognized",
    ("--walk", "last"): "use --predict (active for last)",
    ("--data", "wikipedia"): "pydocs, shakespeare",
    ("--seq-len", "4000"): "too few for --seq-len 4000",
    ("--only", "7"): "must be block numbers from 0 to 3",
    ("--only", "a"): "must be block numbers from 0 to 3",
    ("--prompt", "ÄÖ"): "'Ä' 'Ö'",
    ("--prompt", "\udcff"): "'\\udcff'",
    ("--width", "18"): "width 18 is not a multiple of 4",
    ("--head", "posterior"): "--predict averaged needs --head denoising",
    ("--head", "paper"): "--predict averaged needs --head denoising",
    ("--recipe", "paper", "--predict", "averaged"): "--predict averaged needs --head denoising",
    ("--noise", "white"): "invalid choice",
    ("--baseline", "--overlap", "0.2"): "--overlap does nothing with the baseline method",
    ("--baseline", "--recipe", "paper"): "--recipe does nothing with the baseline method",
    ("--ensemble", "2"): "--ensemble does nothing with the blocks method",
    ("--eval-only",): "holds no run",
    ("--temperature", "0"): "at least 0.01",
    ("--seed", str(2**31)): "at most 2147483647",
}


@pytest.mark.parametrize("flags, message", BAD.items())
def test_bad_input_gets_one_clear_line_and_exit_code_2(small, tmp_path, flags, message):
    code, _, err = small("--out", tmp_path / "run", *flags)
    assert code == 2 and message in err and err.count("\n") == 1, err
    assert not list(tmp_path.glob("run/*.pt"))


def test_cuda_asked_for_and_absent(small, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = small("--out", tmp_path / "run", "--device", "cuda")
    assert code == 2 and "--device cuda" in err and err.count("\n") == 1


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
    assert code == 2 and "choose another --out" in err and err.count("\n") == 1


def test_a_nan_loss_is_one_line_too(small, tmp_path):
    code, _, err = small("--out", tmp_path / "run", "--learning-rate", "1e30", "--warmup", "0")
    assert code == 2 and "block 0: the loss is" in err and "step" in err and err.count("\n") == 1


def test_help_needs_no_plotting(cli):
    sys.modules.pop("matplotlib.pyplot", None)
    code, out, _ = cli("--help")
    assert code == 0 and "--blocks" in out and "matplotlib.pyplot" not in sys.modules
    assert all(f"--{f.name.replace('_', '-')}" in out for f in dataclasses.fields(Settings) if f.metadata["flag"])


def test_checkpointed_activations_change_memory_and_no_weight(small, tmp_path):
    for name, more in (("plain", ()), ("saving", ("--checkpoint-activations",))):
        code, _, err = small("--blocks", "2", *more, "--out", tmp_path / name)
        assert code == 0, err
    plain, ours = (torch.load(tmp_path / name / "block_1.pt")["weights"] for name in ("plain", "saving"))
    for name, weight in plain.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-3, atol=0)
    bytes_of = [
        json.loads((tmp_path / name / "result.json").read_text(encoding="utf-8"))["memory_bytes"]["activations"]
        for name in ("plain", "saving")
    ]
    assert bytes_of[1] < 0.8 * bytes_of[0]


def test_an_evaluation_is_kept_though_sampling_fails(small, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_gpt, "keep_samples", interrupted)
    code, _, _ = small("--out", tmp_path / "run")
    (record,) = read_metrics(tmp_path / "run", "evaluation")
    assert code == 130 and record["step"] == 12 and record["bits_per_char"] > 0
