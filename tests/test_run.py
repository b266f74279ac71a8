import json
import os
import signal
import weakref
from dataclasses import dataclass

import pytest
import torch
import torch.nn as nn
from conftest import same, tensors

from nano_db.errors import UsageError
from nano_db.trainer import checkpoints
from nano_db.trainer.checkpoints import read_config, read_metrics
from nano_db.trainer.distributed import Group
from nano_db.trainer.run import Run, ema_decay, first_weights, learning_rate, make_optimizer, seed_from
from nano_db.trainer.settings import Blocks, Training


class Regression(nn.Module):
    """A network to train that is small enough to follow by hand; `corrupt` is called on each loss."""

    def __init__(self, corrupt=lambda loss: loss):
        super().__init__()
        self.network, self.corrupt = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1)), corrupt

    def loss(self, x):
        return self.corrupt((self.network(x) - x.sum(-1, keepdim=True)).square().mean())


@dataclass
class Settings(Blocks, Training):
    pass


def make_run(folder, data="abc", **options):
    """A run of three blocks: of 24 steps, so that it logs every 2 and saves every 10."""
    options = {"steps": 24, "warmup": 2, "blocks": 3, "device": "cpu", **options}
    return Run("regression", Settings(out=str(folder), **options), data_sha256=data)


def build(b, settings):
    return Regression()


def train(run, build=build, batch=lambda: [torch.randn(16, 4)], rounds=None):
    """The loop of the scripts, for so many rounds or for all. Returns the blocks that had steps to go."""
    trained = []
    for r in run.rounds():
        for b in run.blocks_to_train():
            trained.append(b)
            module = first_weights(build, b, run.settings)
            optimizer = make_optimizer(module, run.settings)
            for _ in run.steps(b, module, optimizer):
                with run.autocast:
                    loss = module.loss(*batch())
                loss.backward()
                run.average_gradients(module)
                norm = nn.utils.clip_grad_norm_(module.parameters(), run.settings.clip)
                optimizer.step()
                optimizer.zero_grad()
                run.record(loss, norm)
            del module, optimizer, loss
        if r == rounds:
            break
    return trained


def train_corrupted(run, corrupt):
    return train(run, lambda b, settings: Regression(corrupt))


# --- training ---


def test_rounds_order_and_only_make_no_difference(tmp_path):
    for name, options in {"one": {}, "rounds": {"rounds": 4}, "only": {"only": "2"}, "back": {"only": "2,1,0"}}.items():
        train(make_run(tmp_path / name, **options))
    for name in ("rounds", "back"):
        for b in range(3):
            assert same(tensors(tmp_path / "one", b), tensors(tmp_path / name, b))
    assert same(tensors(tmp_path / "one", 2), tensors(tmp_path / "only", 2))
    assert not (tmp_path / "only" / "block_0.pt").exists()
    assert not same(tensors(tmp_path / "one", 1), tensors(tmp_path / "one", 2))  # blocks do differ


def test_training_a_block_touches_no_other_file(tmp_path):
    assert train(make_run(tmp_path, rounds=6), rounds=1) == [0, 1, 2]
    before = {b: (tmp_path / f"block_{b}.pt").read_bytes() for b in range(3)}
    assert train(make_run(tmp_path, only="2")) == [2]
    after = {b: (tmp_path / f"block_{b}.pt").read_bytes() for b in range(3)}
    assert before[0] == after[0] and before[1] == after[1] and before[2] != after[2]
    assert train(make_run(tmp_path, only="2")) == []  # nothing left to do


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_to_stop_saves_at_a_step_boundary_and_resumes_exactly(tmp_path, number):
    train(make_run(tmp_path / "whole", only="1"))
    calls = []

    def interrupt(loss):
        calls.append(1)
        if len(calls) == 7:
            os.kill(os.getpid(), number)
        return loss

    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt, match="progress is saved"):
        train_corrupted(make_run(tmp_path / "cut", only="1"), interrupt)
    assert signal.getsignal(number) == before
    assert torch.load(tmp_path / "cut" / "block_1.pt", weights_only=True)["step"] == 7
    train(make_run(tmp_path / "cut", only="1"))
    assert same(tensors(tmp_path / "whole", 1), tensors(tmp_path / "cut", 1))
    steps = [record["step"] for record in read_metrics(tmp_path / "cut", "train")]
    assert steps == sorted(set(steps)) and steps[-1] == 24


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_and_names_block_and_step(tmp_path, poison):
    calls = []

    def corrupt(loss):
        calls.append(1)
        return loss * poison if len(calls) == 13 else loss

    with pytest.raises(UsageError, match=r"block 1: .* at step 13; .*keeps the last good state"):
        train_corrupted(make_run(tmp_path, only="1"), corrupt)
    kept = torch.load(tmp_path / "block_1.pt", weights_only=True)
    assert kept["step"] == 10 and all(torch.isfinite(t).all() for t in kept["weights"].values())


def test_a_finite_loss_with_an_infinite_gradient_stops_before_it_is_saved(tmp_path):
    calls = []

    def corrupt(loss):  # at the first step that is saved
        calls.append(1)
        return loss * 0 + (loss * 0).sqrt() if len(calls) == 10 else loss  # 0, with the gradient of a square root at 0

    with pytest.raises(UsageError, match="gradient's norm nan at step 10"):
        train_corrupted(make_run(tmp_path), corrupt)
    assert not (tmp_path / "block_0.pt").exists()


def test_ema_is_the_moving_average_of_the_weights(tmp_path):
    run = make_run(tmp_path, ema=0.9, rounds=24)  # of a step each: the average must survive its file
    expected = first_weights(build, 0, run.settings).state_dict()
    for step in range(1, 5):
        train(run, rounds=step)
        state = torch.load(tmp_path / "block_0.pt", weights_only=True)
        assert state["step"] == step
        for name, tensor in state["weights"].items():
            decay = step / (9 + step)  # 0.1, 0.18, ...: of the ramp, (1 + k) / (10 + k) with k steps taken before
            expected[name] = decay * expected[name] + (1 - decay) * tensor
    trained = run.trained_block(0, build).state_dict()
    for name in expected:
        torch.testing.assert_close(trained[name], expected[name])


def test_the_average_of_a_short_run_is_not_of_its_first_weights(tmp_path):
    """With a decay of 0.9999 for all of 24 steps they would be 99.8% of it."""
    run = make_run(tmp_path, ema=0.9999, only="0")
    first = first_weights(build, 0, run.settings).state_dict()
    train(run)
    state, shares, share = torch.load(tmp_path / "block_0.pt", weights_only=True), [], 1.0
    for name, tensor in state["weights"].items():
        moved = (tensor - first[name]).norm()
        assert (state["ema"][name] - first[name]).norm() > 0.3 * moved
    for k in range(24):
        shares.append(ema_decay(k, run.settings))
        share *= shares[-1]
    assert shares == sorted(shares) and shares[0] == 0.1 and share < 1e-6
    assert ema_decay(89, Settings(ema=0.9)) == ema_decay(10**6, Settings(ema=0.9)) == 0.9


def test_the_learning_rate_warms_up_and_follows_a_cosine():
    settings = Settings(steps=110, warmup=10, learning_rate=2.0, final_rate=0.1)
    rates = [learning_rate(step, settings) for step in range(111)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[60] == pytest.approx(1.1) and rates[110] == pytest.approx(0.2)


def test_weight_decay_shrinks_matrices_and_no_vectors():
    """A step with gradients of zero: all that moves a weight is its decay."""
    module, settings = nn.Linear(3, 2), Settings(learning_rate=0.1, weight_decay=0.5)
    before = [p.detach().clone() for p in (module.weight, module.bias)]
    optimizer = make_optimizer(module, settings)
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(module.weight.data, (1 - 0.1 * 0.5) * before[0])
    assert torch.equal(module.bias.data, before[1])


def test_a_trained_block_is_in_evaluation_mode(tmp_path):
    run = make_run(tmp_path, only="0")
    train(run)
    block, x = run.trained_block(0, build), torch.randn(64, 4)
    assert torch.equal(block.loss(x), block.loss(x)), "no dropout"
    assert not any(module.training for module in block.modules())


def test_the_rate_of_each_step_reaches_the_optimizer(tmp_path):
    run, seen = make_run(tmp_path, only="0"), []
    for _ in run.rounds():
        module = first_weights(build, 0, run.settings)
        optimizer = make_optimizer(module, run.settings)
        for _ in run.steps(0, module, optimizer):
            seen.append({group["lr"] for group in optimizer.param_groups})
            run.record(torch.zeros(()), torch.zeros(()))
    assert seen == [{learning_rate(step, run.settings)} for step in range(24)]


@pytest.mark.parametrize("steps, every", [(7, 1), (24, 2), (600, 50)])
def test_a_run_logs_ten_times_or_every_fifty_steps(tmp_path, steps, every):
    train(make_run(tmp_path, steps=steps, only="0"))
    records = read_metrics(tmp_path, "train")
    assert [record["step"] for record in records] == list(range(every, steps + 1, every))


def test_seeds_of_different_steps_are_unrelated_and_repeatable():
    draws = {}
    for key in [(0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 2), (0, 0, 1, 1)]:  # the last: another member of a group
        seed_from(*key)
        draws[key] = float(torch.rand(()))
    assert len(set(draws.values())) == 5
    seed_from(0, 1, 0)
    assert float(torch.rand(())) == draws[0, 1, 0]


def test_compile_leaves_the_names_of_the_weights(tmp_path, monkeypatch):
    """Compilation itself needs a C++ compiler: here it is enough that the network is compiled in place."""
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, *a, **k: compiled.append(self))
    train(make_run(tmp_path, compile=True, only="0"))
    weights = torch.load(tmp_path / "block_0.pt", weights_only=True)["weights"]
    assert len(compiled) == 1 and not any("_orig_mod" in name for name in weights)


def test_a_compiled_network_is_freed_before_the_next_is_built(tmp_path, monkeypatch):
    """It refers to itself, so that `del` does not free it. TorchDynamo's own backend needs no C++ compiler."""
    compile, built = nn.Module.compile, []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile(self, backend="eager"))

    def build(b, settings):
        assert not [b for b, weights in built if weights() is not None]
        module = Regression()
        built.append((b, weakref.ref(module.network[0].weight)))
        return module

    run = make_run(tmp_path, compile=True, rounds=2)
    train(run, build)
    assert len(built) == 6
    run.trained_block(0, build)


def test_the_first_weights_and_the_steps_draw_from_streams_of_their_own(tmp_path):
    draws = []
    run = make_run(tmp_path, only="0")
    first_weights(lambda b, settings: draws.append(torch.randn(100)) or Regression(), 0, run.settings)
    train(run, batch=lambda: draws.append(torch.randn(100)) or [torch.randn(16, 4)])
    first, *steps = draws
    assert len(steps) == 24 and not any(torch.isin(first, draw).any() for draw in steps)


def test_a_step_is_seeded_by_seed_block_step_and_rank_and_by_nothing_else(tmp_path, monkeypatch):
    """A further number would change the draws of all runs, even if it were 0."""
    seen = []
    monkeypatch.setattr("nano_db.trainer.run.seed_from", lambda *numbers: seen.append(numbers))
    train(make_run(tmp_path, only="1", steps=3, seed=7))
    assert seen == [(7, 1, 0, 0, 1), (7, 1, 0, 0), (7, 1, 1, 0), (7, 1, 2, 0)]


def test_each_member_of_a_group_draws_a_batch_of_its_own(tmp_path):
    draws = []
    for rank in (0, 1, 0):
        run = make_run(tmp_path / str(len(draws)), only="0", steps=2)
        run.group = Group(rank)  # of size 1, so that it waits for nobody
        train(run, batch=lambda: draws.append(torch.randn(16, 4)) or draws[-1:])
    assert len(draws) == 6 and all(map(torch.equal, draws[:2], draws[4:]))
    assert not any(torch.isin(mine, his).any() for mine in draws[:2] for his in draws[2:4])


def test_a_block_that_is_named_twice_is_trained_once(tmp_path):
    assert train(make_run(tmp_path, only="1,1")) == [1]
    assert make_run(tmp_path, only="2,0,2").mine == [2, 0]


def test_only_names_blocks_that_exist(tmp_path):
    assert make_run(tmp_path).mine == [0, 1, 2] and make_run(tmp_path, only="2,0").mine == [2, 0]
    for wrong in ("7", "-1", "x", "1,"):
        with pytest.raises(UsageError):
            make_run(tmp_path, only=wrong, blocks=4)


def test_who_has_seen_all_blocks_finished_reports_and_nobody_else(tmp_path):
    first, second = (make_run(tmp_path, only=b, blocks=2) for b in "01")
    train(first)
    assert not first.ready()
    train(second)
    assert not first.finished and second.ready() and second.finished
    again = make_run(tmp_path, blocks=2, eval_only=True)
    train(again)
    assert again.ready() and not again.finished


# --- files ---


def take(run):
    """Let the folder be the run's own, as before training."""
    next(run.rounds())
    return run


def save(run, b=0, value=1.0):
    run.save_block(b, 5, 1.5, {"w": torch.full((4000,), value)}, {"state": {}})


def test_a_block_comes_back_as_it_was_saved(tmp_path):
    run = take(make_run(tmp_path))
    assert run.step_of(0) == 0
    with pytest.raises(UsageError, match=r"block_0\.pt is missing: block 0 has not been trained yet"):
        run.trained_block(0, build)
    save(run)
    state = run.load_block(0)
    assert (state["step"], state["seconds"], run.step_of(0)) == (5, 1.5, 5)
    settings = state["settings"]
    assert (settings["script"], settings["data_sha256"], settings["blocks"]) == ("regression", "abc", 3)
    assert "rounds" not in settings and "out" not in settings  # weights do not depend on them
    assert torch.equal(state["weights"]["w"], torch.ones(4000))


def test_a_config_json_says_script_settings_data_and_versions(tmp_path):
    take(make_run(tmp_path))
    config = read_config(tmp_path)
    assert config["script"] == "regression" and config["depends_on"] == {"data_sha256": "abc"}
    assert config["settings"]["steps"] == 24 and config["settings"]["rounds"] == 1
    assert config["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("more", [{}, {"eval_only": True}])
def test_what_another_version_has_begun_is_left_to_it(tmp_path, more):
    """Its weights have other names, its random numbers other streams: what came of both is no result of either."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nano_db.trainer.run.__version__", "0.2.0")
        train(make_run(tmp_path))
    config = read_config(tmp_path)
    config["versions"]["nano_db"] = "0.2.0"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"version '0\.2\.0' there"):
        take(make_run(tmp_path, **more))


def test_a_folder_belongs_to_one_setting_and_one_text(tmp_path):
    save(take(make_run(tmp_path)))
    take(make_run(tmp_path, rounds=2))  # weights do not depend on it
    with pytest.raises(UsageError, match="layers 8 there, 9 here"):
        take(make_run(tmp_path, layers=9))
    with pytest.raises(UsageError, match="the data has changed"):
        take(make_run(tmp_path, "xyz"))


def test_a_folder_in_which_nothing_was_trained_is_free_for_other_settings(tmp_path):
    """As after a typo that is refused when the network is built. But a process may hold one of its blocks."""
    take(make_run(tmp_path, layers=9))
    take(make_run(tmp_path, layers=8))
    assert read_config(tmp_path)["settings"]["layers"] == 8
    if checkpoints.fcntl:
        with (
            checkpoints.lock(tmp_path / ".block_1.lock", "block 1"),
            pytest.raises(UsageError, match="8 there, 9 here"),
        ):
            take(make_run(tmp_path, layers=9))
    save(take(make_run(tmp_path, layers=8)))
    with pytest.raises(UsageError, match="8 there, 9 here"):
        take(make_run(tmp_path, layers=9))


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint", "half", "flipped"])
def test_a_damaged_block_is_named(tmp_path, damage):
    run = take(make_run(tmp_path))
    save(run)
    content = bytearray(run.paths[0].read_bytes())
    if damage == "half":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        content[len(content) // 2 : len(content) // 2 + 64] = bytes(64)
    run.paths[0].write_bytes(damage if isinstance(damage, bytes) else content)
    with pytest.raises(UsageError, match=r"block_0\.pt"):
        run.load_block(0)


def test_foreign_and_misplaced_blocks_are_named(tmp_path):
    run = take(make_run(tmp_path / "a"))
    save(run)
    run.paths[0].rename(run.paths[1])
    with pytest.raises(UsageError, match="holds block 0"):
        run.load_block(1)
    torch.save({"some": "tensors"}, run.paths[0])
    with pytest.raises(UsageError, match="not a nano_db block"):
        run.load_block(0)
    other = take(make_run(tmp_path / "b", layers=9))
    save(other)
    other.paths[0].rename(run.paths[0])
    with pytest.raises(UsageError, match="layers 9 there, 8 here"):
        run.load_block(0)


def test_a_block_that_would_run_code_is_refused(tmp_path):
    class Attack:
        def __reduce__(self):
            return print, ("code ran",)

    run = take(make_run(tmp_path))
    torch.save({"format": "nano_db block 1", "weights": Attack()}, run.paths[0])
    with pytest.raises(UsageError, match="damaged or not a nano_db block"):
        run.load_block(0)


def test_a_screen_that_is_gone_costs_no_save(tmp_path, monkeypatch):
    """As in `python train_gpt.py | head -1`."""

    def gone(line, **_):
        if "step 10/" in line:
            raise BrokenPipeError

    monkeypatch.setattr("builtins.print", gone)
    with pytest.raises(BrokenPipeError):
        train(make_run(tmp_path))
    assert torch.load(tmp_path / "block_0.pt", weights_only=True)["step"] == 10


def test_a_full_disk_leaves_the_last_good_file(tmp_path):
    """The limit on file size stands in for the disk: writing past it fails in the same way."""
    resource = pytest.importorskip("resource", reason="Windows has no such limit")
    run = take(make_run(tmp_path, blocks=1))
    save(run, value=1.0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(UsageError, match=r"cannot write .*block_0\.pt; .*untouched"):
            save(run, value=2.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(run.load_block(0)["weights"]["w"], torch.ones(4000))
    files = [".block_0.lock", ".config.lock", "block_0.pt", "config.json"]
    assert sorted(path.name for path in tmp_path.glob("*")) == files


def test_a_folder_that_cannot_be_made_or_holds_strange_files_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot make "):
        take(make_run(tmp_path / "file" / "out"))
    (tmp_path / "block_0.pt").write_text("")
    with pytest.raises(UsageError, match=r"no config\.json"):
        take(make_run(tmp_path))
    with pytest.raises(UsageError, match="holds no run"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match="damaged"):
        read_config(tmp_path)


def test_half_a_line_left_by_a_kill_is_skipped_and_repeated_steps_count_once(tmp_path):
    run = take(make_run(tmp_path))
    run.log("train", block=0, step=1, loss=3.0)
    run.log("train", block=0, step=2, loss=2.0)
    with open(tmp_path / "metrics_0.jsonl", "a") as file:
        file.write('{"kind": "tr')
    run.log("train", block=0, step=2, loss=1.0)
    records = read_metrics(tmp_path, "train")
    assert [(r["step"], r["loss"]) for r in records] == [(1, 3.0), (2, 1.0)]
