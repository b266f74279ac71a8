import os
import signal
from dataclasses import dataclass

import pytest
import torch
import torch.nn as nn
from conftest import same, tensors

from nano_db.errors import UsageError
from nano_db.optimizer import learning_rate
from nano_db.run import Run, read_metrics
from nano_db.settings import RunSettings, frozen_fields
from nano_db.trainer import Trainer, chosen_blocks, seed_from


class Regression(nn.Module):
    """A network to train that is small enough to follow by hand; `spoil` is called on each loss."""

    def __init__(self, spoil):
        super().__init__()
        self.network, self.spoil = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1)), spoil

    def loss(self, batch):
        return self.spoil((self.network(batch) - batch.sum(-1, keepdim=True)).square().mean())


@dataclass
class Settings(RunSettings):
    pass


def make_trainer(folder, spoil=lambda loss: loss, **options):
    options = {"steps": 12, "warmup": 2, "blocks": 3, "save_every": 4, "log_every": 2, "device": "cpu", **options}
    settings = Settings(**options)
    run = Run(folder, vars(settings), frozen_fields(Settings))
    return Trainer(run, lambda b: Regression(spoil), lambda: torch.randn(16, 4), settings, "cpu")


def test_rounds_order_and_only_make_no_difference(tmp_path):
    for name, options in {"one": {}, "rounds": {"rounds": 4}, "only": {"only": "2"}, "back": {"only": "2,1,0"}}.items():
        make_trainer(tmp_path / name, **options).train_all(lambda step: None)
    for name in ("rounds", "back"):
        for b in range(3):
            assert same(tensors(tmp_path / "one", b), tensors(tmp_path / name, b))
    assert same(tensors(tmp_path / "one", 2), tensors(tmp_path / "only", 2))
    assert not (tmp_path / "only" / "block_0.pt").exists()
    assert not same(tensors(tmp_path / "one", 1), tensors(tmp_path / "one", 2))  # blocks do differ


def test_training_a_block_touches_no_other_file(tmp_path):
    trainer = make_trainer(tmp_path)
    for b in range(3):
        trainer.train(b, 4)
    before = {b: (tmp_path / f"block_{b}.pt").read_bytes() for b in range(3)}
    assert trainer.train(2, 5)
    after = {b: (tmp_path / f"block_{b}.pt").read_bytes() for b in range(3)}
    assert before[0] == after[0] and before[1] == after[1] and before[2] != after[2]
    assert not trainer.train(2, 5)  # nothing left to do


def test_ctrl_c_saves_at_a_step_boundary_and_resumes_exactly(tmp_path):
    make_trainer(tmp_path / "whole").train(1, 12)
    calls = []

    def interrupt(loss):
        calls.append(1)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return loss

    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path / "cut", interrupt).train(1, 12)
    assert torch.load(tmp_path / "cut" / "block_1.pt", weights_only=True)["step"] == 7
    make_trainer(tmp_path / "cut").train(1, 12)
    assert same(tensors(tmp_path / "whole", 1), tensors(tmp_path / "cut", 1))
    steps = [record["step"] for record in read_metrics(tmp_path / "cut", "train")]
    assert steps == sorted(set(steps)) and steps[-1] == 12


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_and_names_block_and_step(tmp_path, poison):
    calls = []

    def spoil(loss):
        calls.append(1)
        return loss * poison if len(calls) == 7 else loss

    with pytest.raises(UsageError, match=r"block 1: .* at step 7; .*keeps the last good state"):
        make_trainer(tmp_path, spoil).train(1, 12)
    kept = torch.load(tmp_path / "block_1.pt", weights_only=True)
    assert kept["step"] == 4 and all(torch.isfinite(t).all() for t in kept["weights"].values())


def test_a_finite_loss_with_an_infinite_gradient_stops_before_it_is_saved(tmp_path):
    def spoil(loss):
        return loss * 0 + (loss * 0).sqrt()  # 0, with the gradient of a square root at 0

    with pytest.raises(UsageError, match="gradient's norm"):
        make_trainer(tmp_path, spoil).train(0, 12)
    assert not (tmp_path / "block_0.pt").exists()


def test_ema_is_the_moving_average_of_the_weights(tmp_path):
    trainer = make_trainer(tmp_path, ema=0.9, save_every=1)
    expected = {k: v.clone() for k, v in trainer.build(0).state_dict().items()}
    for step in range(1, 5):
        trainer.train(0, step)  # resumes at each step, so the average must survive its file
        for name, tensor in torch.load(tmp_path / "block_0.pt", weights_only=True)["weights"].items():
            expected[name] = 0.9 * expected[name] + 0.1 * tensor
    restored = trainer.restore(0).state_dict()
    for name in expected:
        torch.testing.assert_close(restored[name], expected[name])


def test_the_learning_rate_warms_up_and_follows_a_cosine():
    settings = Settings(steps=110, warmup=10, learning_rate=2.0, final_rate=0.1)
    rates = [learning_rate(step, settings) for step in range(111)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[60] == pytest.approx(1.1) and rates[110] == pytest.approx(0.2)


def test_seeds_of_different_steps_are_unrelated_and_repeatable():
    draws = {}
    for key in [(0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 2)]:
        seed_from(*key)
        draws[key] = float(torch.rand(()))
    assert len(set(draws.values())) == 4
    seed_from(0, 1, 0)
    assert float(torch.rand(())) == draws[0, 1, 0]


def test_compile_leaves_the_names_of_the_weights(tmp_path, monkeypatch):
    """Compilation itself needs a C++ compiler: here it is enough that the network is compiled in place."""
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, *a, **k: compiled.append(self))
    make_trainer(tmp_path, compile=True).train(0, 2)
    weights = torch.load(tmp_path / "block_0.pt", weights_only=True)["weights"]
    assert len(compiled) == 1 and not any("_orig_mod" in name for name in weights)


def test_only_names_blocks_that_exist():
    assert chosen_blocks("", 3) == [0, 1, 2] and chosen_blocks("2,0", 3) == [2, 0]
    for wrong in ("7", "-1", "x", "1,"):
        with pytest.raises(UsageError):
            chosen_blocks(wrong, 4)
