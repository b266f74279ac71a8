import sys

import pytest

import train_dit
from experiments import plan
from experiments.benchmark import script_and_settings
from nano_db.errors import UsageError
from nano_db.trainer.report import costs_of, end_to_end

THIN = ["--preset", "tiny", "--layers", "3", "--device", "cpu"]


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["plan", *map(str, flags)])
    plan.main()


@pytest.mark.parametrize(
    "name, more",
    [
        pytest.param("vit", ["--glyphs", "150"], marks=pytest.mark.slow),
        pytest.param("dit", [], marks=pytest.mark.slow),
        ("mdm", []),
        pytest.param("gpt", ["--recipe", "paper"], marks=pytest.mark.slow),
    ],
)
def test_what_is_planned_is_what_a_true_step_takes(monkeypatch, name, more):
    planned = {(blocks, checkpointed): count for blocks, checkpointed, count in plan.plans(name, [*THIN, *more])}
    assert [*planned] == [(1, False), (1, True), (2, False), (2, True), (3, False), (3, True)]
    for blocks, checkpointed in [(1, False), (2, False), (3, True)]:
        saving = ["--checkpoint-activations"] * checkpointed
        script, settings = script_and_settings(name, [*THIN, *more, "--blocks", str(blocks), *saving])
        shared = script.prepare(settings)
        if blocks == 1:
            settings = end_to_end(settings)
        costs = costs_of(settings, script.build, script.batch, script.sample, *shared)
        assert planned[blocks, checkpointed] == costs["memory_bytes"]


def test_preset_paper_is_planned_without_its_text():
    small = ["--tokenizer", "char", "--layers", "1", "--width", "24", "--seq-len", "8", "--batch-size", "2"]
    plans = list(plan.plans("gpt", ["--preset", "paper", "--device", "cpu", *small]))
    assert [blocks for blocks, _, _ in plans] == [1, 1] and all(count["total"] > 0 for _, _, count in plans)


@pytest.mark.parametrize("form", ["--data={}", "--data {}"])
def test_a_text_that_is_named_is_the_one_that_is_planned_for(text_file, form):
    usual = [*THIN[:2], "--layers", "1", "--device", "cpu"]
    flags = [*usual, *form.format(text_file).split()]
    manual, named = ([count["weights"] for _, _, count in plan.plans("gpt", some)] for some in (usual, flags))
    assert max(named) < min(manual), "fewer characters, a smaller table"


def test_more_blocks_than_sampling_steps_are_planned_for(monkeypatch):
    monkeypatch.setitem(train_dit.PRESETS, "tiny", {**train_dit.PRESETS["tiny"], "sampling_steps": 2})
    assert max(blocks for blocks, _, _ in plan.plans("dit", THIN)) == 3


def test_the_smallest_number_of_blocks_that_fits_is_named(monkeypatch, capsys):
    counts = {(1, False): 900, (1, True): 700, (2, False): 500, (2, True): 400, (3, False): 300, (3, True): 200}

    def plans(script, flags):
        assert (script, flags) == ("gpt", ["--width", "8"])
        for (blocks, checkpointed), total in counts.items():
            yield blocks, checkpointed, dict.fromkeys((*plan.PARTS, "total"), total * 2**20)

    monkeypatch.setattr(plan, "plans", plans)
    run(monkeypatch, "gpt", "--memory", "0.6 GB", "--width", "8")
    assert (
        capsys.readouterr().out.splitlines()[-1] == "0.6 GB (572.2 MiB): enough for 2 blocks; or 2 blocks, checkpointed"
    )
    run(monkeypatch, "gpt", "--memory", "250MiB", "--width", "8")
    assert capsys.readouterr().out.splitlines()[-1] == "250MiB (250.0 MiB): enough for 3 blocks, checkpointed"
    with pytest.raises(UsageError, match=r"nothing fits; the minimum is 200\.0 MiB"):
        run(monkeypatch, "gpt", "--memory", "190 MiB", "--width", "8")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["gpt", "--memory", "lots"], "write it like 8GB"),
        (["gpt", "--memory", "0GB"], "write it like 8GB"),
        (["gpt", "--blocks", "3"], "--blocks is for this command to choose"),
        (["gpt", "--blocks=3"], "--blocks is for this command to choose"),
        (["mdm", "--checkpoint-activations"], "--checkpoint-activations is for this command"),
        (["gpt", "--layer", "3"], "unrecognized arguments: --layer"),
    ],
)
def test_bad_demands_get_one_line(monkeypatch, capsys, flags, message):
    with pytest.raises((UsageError, SystemExit)) as error:
        run(monkeypatch, *flags)
    printed = capsys.readouterr()
    assert message in f"{error.value} {printed.err}" and printed.out == ""


@pytest.mark.parametrize(
    "flags, names_none", [("--recipe paper", False), ("--preset paper", True), ("--preset=paper", True)]
)
def test_only_a_preset_without_a_text_is_counted_with_the_manual(monkeypatch, flags, names_none):
    """The vocabulary's size counts."""
    asked = []
    monkeypatch.setattr(plan, "script_and_settings", lambda name, flags: asked.append(flags) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(plan.plans("gpt", flags.split()))
    assert ("pydocs" in asked[0]) == names_none
