import json
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train_looped
from nano_db.block import DiffusionBlock
from nano_db.heads import PosteriorHead, make_target_embeddings
from nano_db.layers import Cache, checkpoint_layers
from nano_db.partition import make_partition
from nano_db.sampler import sample_classes
from nano_db.schedule import LogNormal, equal_probability_grid
from nano_db.stack import Stack
from nano_db.trainer.memory import training_bytes
from nano_db.trainer.report import end_to_end
from nano_db.trainer.settings import read_settings
from train_looped import Huginn, Looped, Settings, draw_recurrences, layer_evaluations

CLASSES, T, WIDTH = 11, 8, 16
NOISE = LogNormal(0.3, 0.8, 0.05, 20.0)
TINY = ("--preset", "tiny", "--steps", "6", "--device", "cpu", "--eval-windows", "4", "--sampling-steps", "2")
PLAIN = ("--recurrences", "1", "--sampling-steps", "1")  # of the baseline: a plain transformer


def randomised(module):
    generator = torch.Generator().manual_seed(0)
    for p in module.parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=generator)
    return module


def make(baseline=False, recurrences=0):
    shape = dict(width=WIDTH, heads=2, prelude=1, core=2, coda=1)
    settings = Settings(**shape, baseline=baseline, recurrences=recurrences, sampling_steps=5)
    head = PosteriorHead(make_target_embeddings(CLASSES, WIDTH))
    network = Looped(CLASSES, settings, conditioned=not baseline)
    if baseline:
        return randomised(Huginn(network, head, settings))
    return randomised(DiffusionBlock(network, head, NOISE, (0.05, 20.0)))


def recurrences_of(module, action):
    """The recurrences of the core that `action` takes: for each, whether it keeps a graph."""
    recur, seen = module.network.recur, []
    module.network.recur = lambda *args: seen.append(torch.is_grad_enabled()) or recur(*args)
    action()
    return seen


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randint(CLASSES, (2, T), generator=generator) for _ in range(2))


def test_the_number_of_recurrences_has_the_mean_it_should():
    torch.manual_seed(0)
    draws = [draw_recurrences(32.0) for _ in range(4000)]
    # variance: the Poisson's 32, and (e^0.25 - 1) * 32^2 of the rate; the mean of 4000 draws is good to 0.3
    assert sum(draws) / len(draws) == pytest.approx(33, abs=1.0) and min(draws) >= 1


@pytest.mark.parametrize("recurrences, kept", [(20, 8), (3, 3)])
def test_only_the_last_eight_recurrences_of_the_baseline_keep_a_graph(batch, recurrences, kept, monkeypatch):
    monkeypatch.setattr(train_looped, "draw_recurrences", lambda mean: recurrences)
    baseline = make(baseline=True)
    seen = recurrences_of(baseline, lambda: baseline.loss(*batch).backward())
    assert seen == [False] * (recurrences - kept) + [True] * kept
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in baseline.parameters())  # the prelude's, too


def test_recurrences_without_a_graph_take_no_memory_checkpointed_or_not(batch):
    for checkpointed in (False, True):
        total = []
        for recurrences in (8, 30):
            module = make(baseline=True, recurrences=recurrences)
            if checkpointed:
                checkpoint_layers(module)
            total.append(training_bytes(module, batch, torch.optim.AdamW(module.parameters()))["total"])
        assert total[0] == total[1], "only the last 8 recurrences keep a graph"


def test_the_gradient_of_the_baseline_is_that_of_a_loop_cut_by_hand(batch, monkeypatch):
    """Ten recurrences: all of them keep a graph, but behind the second one the state and e are detached by hand."""
    monkeypatch.setattr(train_looped, "draw_recurrences", lambda mean: 10)
    baseline = make(baseline=True)
    torch.manual_seed(3)
    baseline.loss(*batch).backward()
    gradients = [p.grad.clone() for p in baseline.parameters()]
    baseline.zero_grad()

    recur, numbers = baseline.network.recur, count()

    def cut(s, e, *rest):
        return recur(s, e, *rest) if next(numbers) >= 2 else recur(s.detach(), e.detach(), *rest).detach()

    baseline.network.recur, baseline.settings = cut, replace(baseline.settings, backprop_depth=10)
    torch.manual_seed(3)
    baseline.loss(*batch).backward()
    for p, gradient in zip(baseline.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def test_a_step_of_the_blocks_method_takes_a_single_recurrence(batch):
    block = make()
    assert recurrences_of(block, lambda: block.loss(*batch)) == [True]
    baseline, ours = (layer_evaluations(Settings(baseline=baseline)) for baseline in (True, False))
    assert ours == {"forward": 8, "backward": 8} and baseline == {"forward": 136, "backward": 36}
    assert sum(baseline.values()) > 8 * sum(ours.values())


def test_the_control_takes_as_many_recurrences_as_it_is_told(batch):
    control = make(baseline=True, recurrences=1)
    assert recurrences_of(control, lambda: control.loss(*batch).backward()) == [True]
    assert layer_evaluations(Settings(baseline=True, recurrences=1)) == {"forward": 8, "backward": 8}


@pytest.mark.parametrize("generator", [None, torch.Generator().manual_seed(0)])
def test_a_plain_transformer_has_no_random_state_and_huginn_has_one(batch, generator):
    for recurrences in (0, 1, 2):  # of the setting; all are evaluated after one
        baseline = make(baseline=True, recurrences=recurrences)
        e, attend = baseline.network.embed(batch[0])
        without = baseline.network.read(baseline.network.recur(torch.zeros_like(e), e, attend), attend)
        assert torch.equal(baseline.features(batch[0], 1, generator=generator), without) == (recurrences == 1)


class NotOnCPU(TorchDispatchMode):
    """Refuses results of more than a few numbers on the CPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        assert not (torch.is_tensor(result) and result.device.type == "cpu" and result.numel() > 8), function
        return result


def test_a_training_step_draws_the_random_state_where_the_network_is(batch):
    """The device "meta" stands in for a GPU: it has shapes, and no numbers."""
    baseline, (x, y) = make(baseline=True).to("meta"), (tensor.to("meta") for tensor in batch)
    with NotOnCPU():
        baseline.loss(x, y).backward()


def test_in_the_quality_by_sampling_steps_every_window_weighs_the_same():
    """Four windows in a batch, and one in the last. The network knows which letter follows which, and no more."""
    torch.manual_seed(0)
    logits, x, y = torch.randn(CLASSES, CLASSES), *torch.randint(CLASSES, (2, 5, T))
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    text = SimpleNamespace(heldout_batches=lambda *_: batches, bits_per_character=lambda nats: nats)
    model = SimpleNamespace(networks=[lambda x, recurrences: logits[x]])
    found = train_looped.quality_by_sampling_steps(model, text, Settings(baseline=True))
    nats = -float(logits.log_softmax(-1)[x, y].mean())
    assert found == {str(k): pytest.approx(nats) for k in train_looped.K_VALUES}


class BuiltError(Exception):
    """Stops a script at its first optimizer, with the network it has built."""


def first_weights(cli, monkeypatch, *flags):
    def stop(module, settings):
        raise BuiltError({name: tensor.clone() for name, tensor in module.state_dict().items()})

    with monkeypatch.context() as patch:
        patch.setattr(train_looped, "make_optimizer", stop)
        with pytest.raises(BuiltError) as built:
            cli(*TINY, *flags, main=train_looped.main)
    return built.value.args[0]


def test_the_control_of_one_recurrence_starts_from_the_very_weights_of_huginn(cli, text_file, tmp_path, monkeypatch):
    """As the script builds them. So nothing but the number of recurrences differs between the two."""
    flags = ("--data", text_file, "--baseline")
    huginn = first_weights(cli, monkeypatch, *flags, "--out", tmp_path / "huginn")
    control = first_weights(cli, monkeypatch, *flags, *PLAIN, "--out", tmp_path / "control")
    assert huginn.keys() == control.keys() and any("attention.out" in name for name in huginn)
    assert all(torch.equal(control[name], tensor) for name, tensor in huginn.items())
    other = first_weights(cli, monkeypatch, *flags, *PLAIN, "--seed", "1", "--out", tmp_path / "other")
    assert not all(torch.equal(other[name], tensor) for name, tensor in huginn.items())


def test_both_methods_start_from_weights_of_the_same_scale():
    def scales(baseline):
        torch.manual_seed(0)
        network = Looped(CLASSES, Settings(width=64, baseline=baseline), conditioned=not baseline)
        return {name: float(p.detach().std()) for name, p in network.named_parameters() if p.dim() == 2}

    huginn, ours = scales(True), scales(False)
    assert huginn == {name: pytest.approx(ours[name], rel=0.1) for name in huginn}
    usual, depth = (2 / (5 * 64)) ** 0.5, 2 + 2 + 4 * 32  # layers of the network unrolled, on average
    assert max(huginn.values()) == pytest.approx(usual, rel=0.1)
    assert min(huginn.values()) == pytest.approx(usual / (2 * depth) ** 0.5, rel=0.1), "of the output projections"


@pytest.mark.parametrize("baseline", [False, True])
def test_the_state_keeps_unit_size_after_any_number_of_recurrences(batch, baseline):
    network, cond = make(baseline).network, None if baseline else torch.randn(2, max(8, WIDTH // 6))
    e, attend = network.embed(batch[0])
    s = 100 * torch.randn(2, T, WIDTH)
    for _ in range(20):
        s = network.recur(s, e, attend, cond)
    torch.testing.assert_close(s.square().mean(-1).sqrt(), torch.ones(2, T))
    torch.testing.assert_close(e.square().mean(-1).sqrt(), torch.ones(2, T))  # what the prelude makes, too


def test_one_sampling_step_is_one_call_of_the_network(batch):
    block = make().eval()
    stack = Stack([block], make_partition(NOISE, 1))
    seen = []
    posterior = stack.posterior(batch[0])
    counted = lambda z, sigma: seen.append(sigma) or posterior(z, sigma)  # noqa: E731
    y = sample_classes(
        counted, stack.target_embeddings, (2, T), equal_probability_grid(NOISE, 1), torch.Generator().manual_seed(0)
    )
    assert seen == [20.0] and y.shape == (2, T)


@pytest.mark.parametrize("baseline", [False, True])
def test_cached_and_uncached_answers_agree_and_nothing_leaks(batch, baseline):
    x, _ = batch
    module = make(baseline).eval()
    z = torch.randn(2, T, WIDTH, generator=torch.Generator().manual_seed(1))
    if baseline:  # from a state of zeros, which has no position of its own
        recur, numbers = module.network.recur, count()
        module.network.recur = lambda s, *rest: recur(0 * s if next(numbers) % 3 == 0 else s, *rest)
        answer = lambda x, z, cache=None: module(x, cache, recurrences=3)  # noqa: E731
    else:
        answer = lambda x, z, cache=None: module(x, z, 0.7, cache=cache)  # noqa: E731
    cache, whole = Cache(), answer(x, z)
    parts = [answer(x[:, a:b], z[:, a:b], cache) for a, b in [(0, 3), (3, 4), (4, T)]]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-4)
    changed = x.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % CLASSES
    torch.testing.assert_close(answer(changed, z)[:, :5], whole[:, :5], rtol=0, atol=1e-5)
    assert (answer(changed, z)[:, 5:] - whole[:, 5:]).abs().max() > 1e-2


WHOLE = pytest.param((), marks=pytest.mark.whole)
RECIPE = pytest.param(("--recipe", "paper"), marks=pytest.mark.slow)


@pytest.mark.parametrize("flags", [WHOLE, RECIPE, ("--baseline",), ("--baseline", *PLAIN)])
def test_a_run_reports_quality_by_sampling_steps_and_resumes(cli, text_file, tmp_path, monkeypatch, flags):
    monkeypatch.setattr(train_looped, "K_VALUES", (1, 3))
    command = (*TINY, "--data", text_file, "--out", tmp_path / "run", *flags)
    code, _, err = cli(*command, main=train_looped.main)
    assert code == 0, err
    result = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert list(map(int, result["metrics"]["bits_per_char_by_sampling_steps"])) == list(train_looped.K_VALUES)
    code, out, _ = cli(*command, main=train_looped.main)
    assert code == 0 and "loss" not in out
    assert json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))["metrics"] == result["metrics"]
    again = ("--eval-only", *(() if set(PLAIN) < set(flags) else ("--sampling-steps", "3")))
    code, out, err = cli(*again, "--prompt", "the dog", "--out", tmp_path / "run", main=train_looped.main)
    assert code == 0 and "the dog|" in out, err


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--sampling-steps", "0"), "--sampling-steps must be at least 1"),
        (("--core", "0"), "--core must be at least 1"),
        (("--blocks", "2"), "unrecognized"),
        (("--baseline", "--head", "paper"), "--head does nothing with the baseline method"),
        (("--backprop-depth", "4"), "--backprop-depth does nothing with the blocks method"),
        (("--recurrences", "1"), "--recurrences does nothing with the blocks method"),
        (("--baseline", "--recurrences", "-1"), "at least 0"),
        (("--baseline", "--recurrences", "1"), "add --sampling-steps 1"),
        (("--head", "denoising"), "invalid choice"),
        (("--baseline", "--compile"), "--compile does nothing"),
    ],
)
def test_bad_input_gets_one_clear_line(cli, text_file, tmp_path, flags, message):
    code, _, err = cli(*TINY, "--data", text_file, "--out", tmp_path / "run", *flags, main=train_looped.main)
    assert code == 2 and message in err and err.count("\n") == 1, err


@pytest.mark.parametrize("given", [(), ("--sampling-steps", "5")])
def test_blocks_are_shown_beside_the_baseline_that_its_command_trains(given):
    """A run of blocks reports the cost of Huginn with as many recurrences per token as `--baseline` would take."""
    flags = ["--preset", "laptop", "--device", "cpu", *given]
    blocks, baseline = (
        read_settings("looped", Settings, train_looped.PRESETS, train_looped.RECIPES, flags=[*flags, *more])
        for more in ((), ("--baseline",))
    )
    assert end_to_end(blocks).sampling_steps == baseline.sampling_steps == (5 if given else 32)
