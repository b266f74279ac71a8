import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL

import train_gpt
import train_mdm
from experiments import benchmark
from nano_db.errors import UsageError
from nano_db.layers import Layer
from nano_db.trainer.report import cost_of_use


def test_layer_evaluations_are_counted_per_sample():
    networks = [torch.nn.ModuleList([Layer(8, 2), Layer(8, 2)]), torch.nn.ModuleList([Layer(8, 2)])]
    settings, rounded, counts = SimpleNamespace(device="cpu", dtype="bfloat16"), [], []

    def sample(built, count, given, rows):
        assert built is networks and given is settings
        rounded.append(torch.is_autocast_enabled("cpu"))
        counts.append(count)
        for network in networks:
            for layer in network:
                layer(torch.zeros(rows * count, 3, 8))

    cost = cost_of_use(settings, networks, sample, 5)
    assert rounded == [True] * 5, "as the run computes"
    assert counts == [1, 16, 16, 16, 16], "once to count, once to warm up, three times by the clock"
    assert cost["layer_evaluations"] == 3 * 5, "of a single sample, which passes each layer five times"
    assert cost["weights"] == 2 * 12 * 8 * 8 * 4, "of the larger network: two layers of 12 d^2 weights"
    assert cost["seconds"] > 0


@pytest.mark.usefixtures("real_costs")
def test_what_sixteen_tokens_cost_in_layers(small, cli, text_file, tmp_path, monkeypatch):
    """By hand: a cached token passes each layer once per call. The trunks of the nano recipe are evaluated once for all
    sampling steps; networks that are shown z are evaluated at each step, one block at a time.
    """
    layers, sampling_steps_per_block = 4, 2
    monkeypatch.setitem(train_gpt.PRESETS["tiny"], "sampling_steps_per_block", sampling_steps_per_block)

    def evaluations(*flags):
        assert small("--out", tmp_path / "run", *flags)[0] == 0
        folder = tmp_path / "run"
        count = json.loads((folder / "result.json").read_text(encoding="utf-8"))["one_sample"]["layer_evaluations"]
        shutil.rmtree(folder)
        return count

    assert evaluations("--baseline") == 16 * layers
    assert evaluations("--baseline", "--layers", 1, "--ensemble", 3) == 16 * 3
    assert evaluations() == 16 * layers
    assert evaluations("--recipe", "paper") == 16 * sampling_steps_per_block * layers
    mdm = ("--preset", "tiny", "--layers", 6, "--steps", 2, "--eval-windows", 1, "--device", "cpu", "--data", text_file)
    for flags, expected in (((), 16 * 2), (("--baseline", "--ensemble", 2), 16 * 6 * 2)):
        assert cli(*mdm, "--out", tmp_path / "mdm", *flags, main=train_mdm.main)[0] == 0
        result = json.loads((tmp_path / "mdm" / "result.json").read_text(encoding="utf-8"))
        assert result["one_sample"]["layer_evaluations"] == expected
        shutil.rmtree(tmp_path / "mdm")


@pytest.fixture
def benchmark_of(monkeypatch, capsys):
    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, flags)])
        benchmark.main()
        return capsys.readouterr().out

    return run


def test_a_benchmark_prints_ratios_and_costs_and_leaves_no_file(benchmark_of, text_file, tmp_path, monkeypatch):
    rounded, generate = [], train_gpt.generate
    monkeypatch.setattr(
        train_gpt, "generate", lambda *a: rounded.append(torch.is_autocast_enabled("cpu")) or generate(*a)
    )
    monkeypatch.chdir(tmp_path)
    before = {*tmp_path.iterdir()}
    flags = ("--data", text_file, "--dtype", "bfloat16")
    out = benchmark_of("gpt", "--pairs", 2, *SMALL, *flags)
    assert rounded and all(rounded), "samples are computed as in training"
    assert out.count("ratio in pairs") == 2 and {*tmp_path.iterdir()} == before
    lines = [line.split() for line in out.splitlines()]
    total = next(line for line in lines if line and line[0] == "total")
    assert total[-1] == "(1.000)" and 0 < float(total[1]) < float(total[4])


def test_bad_demands_on_a_benchmark_get_one_line(benchmark_of):
    for flags, message in (
        (("--pairs", 0), "--pairs must be at least 1"),
        (("--baseline",), "the end-to-end network is timed anyway"),
    ):
        with pytest.raises(UsageError, match=message):
            benchmark_of("vit", *flags)


def test_what_lies_in_the_usual_folder_has_no_say(tmp_path, monkeypatch):
    (tmp_path / "out" / "gpt-blocks").mkdir(parents=True)
    (tmp_path / "out" / "gpt-blocks" / "config.json").write_text("damaged")
    monkeypatch.chdir(tmp_path)
    _, settings = benchmark.script_and_settings("gpt", ["--preset", "tiny", "--device", "cpu"])
    assert settings.dtype == "float32"


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["benchmark", "gpt", "--preset", "tiny", "--device", "cpu"])
    with pytest.raises(UsageError, match="start it without torchrun"):
        benchmark.main()


@pytest.mark.parametrize("flag", ["--out=there", "--eval-only", "--init-from=there", "--only=1"])
def test_flags_of_a_run_are_refused_where_there_is_none(flag):
    with pytest.raises(UsageError, match="has no effect here, where no run is made"):
        benchmark.script_and_settings("gpt", ["--preset", "tiny", flag])
