"""The command that asks a GPU what it does with this project, on a CPU."""

import json
import multiprocessing
import os
import signal
import sys
import time
import warnings
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import draw_glyphs_once

import train_dit
import train_gpt
import train_mdm
import train_vit
from data import cifar, glyphs
from experiments.gpu import __main__ as gpu
from experiments.gpu import job, memory, plain, report, speed, works
from experiments.gpu.cases import OUT_OF_MEMORY, Options, attempt, baseline_of, configure
from nano_db.errors import UsageError
from nano_db.trainer import run as trainer_run

FORK = pytest.mark.skipif(sys.platform != "linux", reason="forks")
CPU = ("--device", "cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(glyphs, "make", draw_glyphs_once)


@pytest.fixture
def options(tmp_path):
    return Options("cpu", "tiny", minutes=9, out=tmp_path, seconds=60)


# --- processes, time and the report ---


def stub(records, wait_for=0.0):
    """A stage that finds these records, and then takes its time."""

    def work(options):
        yield from records
        time.sleep(wait_for)

    return work


def broken(options):
    yield {"check": "first", "case": "a", "passed": True, "difference": 0.0, "limit": 0.0, "said": ""}
    raise ValueError("a fault\nof two lines")


def killed(options):
    yield {"passed": True}
    os._exit(3)


def test_what_a_stage_finds_arrives_while_it_runs(options):
    found = gpu.found_by(stub([{"a": 1}, {"b": 2}], wait_for=60), options)
    clock = time.monotonic()
    assert [next(found), next(found)] == [{"a": 1}, {"b": 2}] and time.monotonic() - clock < 30
    found.close()
    assert not multiprocessing.active_children()


def test_a_stage_that_takes_too_long_is_killed(options):
    found = []
    with pytest.raises(TimeoutError):
        found += gpu.found_by(stub([{"a": 1}], wait_for=60), replace(options, seconds=0.5))
    assert not multiprocessing.active_children()


def test_a_stage_whose_process_dies_says_so(options):
    found = gpu.found_by(killed, options)
    assert next(found) == {"passed": True}
    with pytest.raises(RuntimeError, match=r"its process died \(3\)"):
        next(found)


def test_a_process_that_is_spawned_works_as_one_that_is_forked(options, monkeypatch):
    monkeypatch.setattr(gpu, "PROCESSES", multiprocessing.get_context("spawn"))
    about = dict(gpu.found_by(gpu.describe, options))
    assert about["device"].startswith("CPU") and about["torch"] == f"PyTorch {torch.__version__}"


@pytest.fixture
def stages(monkeypatch):
    """stages(work, ...) puts these in the place of the true ones."""

    def put(*works):
        named = dict(zip(report.SECTIONS, works, strict=False))
        monkeypatch.setattr(gpu, "STAGES", {name: (f"What of {name}?", work, 1.0) for name, work in named.items()})

    return put


def started(tmp_path, *flags):
    """(exit code, report.json, report.md) of the command."""
    code = 0
    try:
        gpu.main([*CPU, "--out", str(tmp_path / "out"), *flags])
    except SystemExit as stop:
        code = stop.code
    return (
        code,
        json.loads((tmp_path / "out" / "report.json").read_text()),
        (tmp_path / "out" / "report.md").read_text(),
    )


def test_a_stage_that_fails_is_reported_and_passed_over(tmp_path, stages, capsys):
    stages(broken, killed, stub([]), stub([{"script": "gpt", "passed": False, "said": "no good"}]))
    code, found, text = started(tmp_path)
    assert code == 1 and [s["status"] for s in found["stages"]] == ["failed", "failed", "passed", "failed"]
    assert "**failed**: : ValueError: a fault of two lines" in text and "its process died (3)" in text
    assert "| first | 1 of 1 | 0 |" in text and "**failed**: gpt: no good" in text
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and lines[0].startswith("1. What of works?") and "1 of 2 failed" in lines[0]
    assert all(line.endswith("min left") for line in lines[:4])
    assert "ValueError: a fault\nof two lines" in (tmp_path / "out" / "log.txt").read_text()


def test_what_the_time_does_not_allow_is_left_out(tmp_path, stages, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "RESERVE", 1)
    stages(stub([{"passed": True}], wait_for=60), stub([]))
    for name, share in (("works", 0.4), ("speed", 0.2)):  # of six seconds
        monkeypatch.setitem(gpu.STAGES, name, (*gpu.STAGES[name][:2], share))
    code, found, text = started(tmp_path, "--minutes", "0.1")
    assert code == 0
    assert [s["status"] for s in found["stages"]] == ["passed as far as the time went", "left out for time"]
    assert "| 2. What of speed? | left out for time |" in text


def test_only_the_stages_asked_for_run(tmp_path, stages):
    stages(broken, stub([]), broken)
    code, found, text = started(tmp_path, "--stages", "2")
    assert code == 0 and [s["number"] for s in found["stages"]] == [2] and "2. What of speed?" in text


def run_in_a_process(folder, *flags):
    with suppress(SystemExit):
        gpu.main([*CPU, "--out", str(folder), *flags])


def wait_until(condition):
    for _ in range(600):
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError("waited half a minute in vain")


@FORK
@pytest.mark.parametrize("number", [1, 2, 3, 4])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_in_the_middle_of_a_stage_it_leaves_the_report_of_those_before(tmp_path, stages, number, how):
    folder = tmp_path / "out"

    def slow(options):
        (folder / "worker").write_text(str(os.getpid()))
        yield {"check": "half", "case": "a", "passed": True, "difference": 0.0, "limit": 0.0, "said": ""}
        time.sleep(60)

    stages(*[stub([{"passed": True}])] * (number - 1), slow, *[stub([])] * (4 - number))
    process = multiprocessing.get_context("fork").Process(target=run_in_a_process, args=(folder,))
    process.start()

    def begun():
        with suppress(OSError, ValueError, LookupError):
            return json.loads((folder / "report.json").read_text())["stages"][number - 1]["records"]

    try:
        wait_until(begun)
        os.kill(process.pid, how)
        process.join(30)
    finally:
        process.kill()
    found, text = json.loads((folder / "report.json").read_text()), (folder / "report.md").read_text()
    assert [s["status"] for s in found["stages"]] == ["passed"] * (number - 1) + ["not finished"]
    assert len(found["stages"][-1]["records"]) == 1 and "not finished (1 done" in text
    worker = int((folder / "worker").read_text())
    wait_until(
        lambda: not Path(f"/proc/{worker}").exists() or "Z" in Path(f"/proc/{worker}/stat").read_text().split()[2]
    )


def test_an_interruption_says_where_the_report_is(tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "run_stages", interrupted)
    with pytest.raises(SystemExit) as stop:
        gpu.main([*CPU, "--out", str(tmp_path / "out")])
    assert stop.value.code == 130 and "report.md" in capsys.readouterr().err


def test_no_gpu_is_one_line(tmp_path):
    with pytest.raises(UsageError, match="finds no CUDA device: with --device cpu"):
        gpu.main(["--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_report_that_is_there_stays(tmp_path):
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(UsageError, match="holds a report: choose another --out"):
        gpu.main([*CPU, "--out", str(tmp_path)])
    assert (tmp_path / "report.json").read_text() == "{}"


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--minutes", "0"), "give a number from 0.1"),
        (("--minutes", "nan"), "give a number from 0.1"),
        (("--stages", "5"), "give numbers from 1 to 4"),
        (("--stages", ""), "give numbers from 1 to 4"),
    ],
)
def test_bad_demands_get_one_line(flags, message):
    with pytest.raises(UsageError, match=message):
        gpu.read_options([*CPU, *flags])


def test_the_report_shows_what_failed_and_hides_no_bar():
    assert report.table(["a"], []) == []
    assert report.table(["a"], [["x|y"]])[-1] == "| x/y |"
    records = [{"watched": "gpt", "method": "blocks", "passed": False, "said": "2 places"}, {"passed": None}]
    assert report.misses(records) == ["", "- **failed**: gpt, blocks: 2 places", "- left out: : "]


# --- stage 1 ---


def case(tmp_path, name="gpt", method="blocks", dtype="float32"):
    script, settings, _ = configure(name, "tiny", *CPU, *works.METHODS[method])
    return works.Case(name, method, dtype, "cpu", tmp_path, script, script.prepare(settings))


def judged(measure, *args, **named):
    return works.check("", case(*args, **named), measure)


def test_the_loss_is_compared(tmp_path, monkeypatch):
    assert judged(works.loss_difference, tmp_path)["difference"] == 0
    found = judged(works.loss_difference, tmp_path, dtype="bfloat16")
    assert found["passed"] and 0 < found["difference"] <= found["limit"] == 2e-2
    losses = iter([[1.0, 2.0], [1.0, 2.001]])
    monkeypatch.setattr(works, "first_losses", lambda case, **changes: next(losses))
    assert judged(works.loss_difference, tmp_path)["passed"] is False
    monkeypatch.setattr(works, "first_losses", lambda case, **changes: [1.0])
    assert judged(works.loss_difference, tmp_path, dtype="bfloat16")["said"].endswith("bfloat16 changes nothing")


def test_a_run_that_does_not_resume_is_found(tmp_path, monkeypatch):
    assert judged(works.resumed_difference, tmp_path / "a")["said"] == "bit for bit"
    monkeypatch.setattr(trainer_run, "_load_moments", lambda optimizer, state: None)
    found = judged(works.resumed_difference, tmp_path / "b")
    assert found["passed"] is False and found["difference"] > found["limit"]
    assert "not deterministic: nothing that PyTorch knows of" in found["said"]


def test_operations_that_are_not_deterministic_are_named(tmp_path):
    class Changing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(4))

        def loss(self, *batch):
            self.weight.detach().clone().put_(torch.tensor([0]), torch.ones(1))
            return self.weight.sum()

    script = SimpleNamespace(build=lambda *_: Changing(), batch=lambda *_: ())
    assert works.changing_operations(replace(case(tmp_path), script=script)) == "put_"


@pytest.mark.parametrize("name", ["gpt", "dit", "mdm"])
def test_the_bound_is_compared(tmp_path, monkeypatch, name):
    this = case(tmp_path, name)
    works.train(this.run("whole"), this.script, this.shared)
    found = works.check("", this, works.bound_difference)
    assert found["passed"] and 0 < found["difference"] <= found["limit"] == 2e-2
    monkeypatch.setattr(trainer_run, "autocast", lambda settings: nullcontext())
    assert works.check("", this, works.bound_difference)["said"].endswith("bfloat16 changes nothing")


@pytest.mark.usefixtures("cli")
def test_a_script_that_cannot_finish_a_run_is_found(tmp_path, monkeypatch):
    assert judged(works.finished_elsewhere, tmp_path / "a")["passed"] is True

    def evaluate(*args):
        raise UsageError("no evaluation today")

    monkeypatch.setattr(train_gpt, "evaluate", evaluate)
    assert judged(works.finished_elsewhere, tmp_path / "b")["said"].endswith("error: no evaluation today")


def test_a_compiled_network_that_stays_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)  # compiling itself: in the slow test
    this, kept, build = case(tmp_path), [], train_gpt.build
    works.train(this.run("whole"), this.script, this.shared)
    assert works.check("", this, works.compiled_difference)["difference"] == 0
    monkeypatch.setattr(train_gpt, "build", lambda *args: kept.append(build(*args)) or kept[-1])
    found = works.check("", replace(this, folder=tmp_path / "b"), works.compiled_difference)
    assert found["said"].endswith("a network was built while another was in memory")


# --- stages 2 and 3 ---


def test_a_plain_gpt_looks_only_back():
    settings = SimpleNamespace(width=16, heads=2, seq_len=8, layers=2, dropout=0.0)
    network = plain.build(0, settings, SimpleNamespace(tokenizer=SimpleNamespace(classes=11)), None).network
    assert sum(p.numel() for p in network.parameters()) == 11 * 16 + 8 * 16 + 2 * (12 * 16**2 + 2 * 16) + 16
    x = torch.randint(11, (3, 8))
    changed = x.clone()
    changed[:, 5:] = (x[:, 5:] + 1) % 11
    assert torch.equal(network(x)[:, :5], network(changed)[:, :5]) and not torch.equal(network(x), network(changed))


def test_two_sides_are_timed_and_their_work_is_counted(monkeypatch):
    monkeypatch.setattr(speed, "SECONDS", {"cpu": 0})
    script, settings, _ = configure("gpt", "tiny", *CPU)
    for name in ("gpt", "plain"):
        found = speed.beside(name, script, settings, peak=1e12)
        assert found["ratio"][0] <= found["ratio"][1] <= found["ratio"][2] and found["unit"] == "tokens"
        tokens = settings.batch_size * settings.seq_len
        assert found["per_second"] == [tokens / seconds for seconds in found["seconds"]]
    work = [share * seconds * 1e12 for share, seconds in zip(found["utilisation"], found["seconds"], strict=True)]
    weights = settings.layers * 12 * settings.width**2 + settings.width * script.prepare(settings)[0].tokenizer.classes
    assert work[0] == pytest.approx(6 * tokens * weights, rel=0.01) == work[1]  # without attention, on a CPU


def test_a_line_that_waits_is_named(options, monkeypatch):
    """PyTorch warns of each wait: here a script does in its place, in every step, and once before it is watched."""
    modes, batch = [], train_mdm.batch
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def waiting(*args):
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        return batch(*args)

    assert speed.waits_and_copies("mdm", options)["passed"]
    monkeypatch.setattr(train_mdm, "batch", waiting)
    found = speed.waits_and_copies("mdm", options)
    assert modes == ["warn", "default"] * 2
    assert found["passed"] is False and found["waits"] == 1 and found["said"].startswith("test_gpu.py:")


def test_a_batch_too_large_for_the_memory_is_halved(options, monkeypatch):
    tried = []

    def beside(name, script, settings, peak):
        tried.append(settings.batch_size)
        if settings.batch_size > 2:
            raise torch.OutOfMemoryError("too much")
        return {"passed": True}

    monkeypatch.setattr(speed, "beside", beside)
    assert speed.fitting("gpt", options, 1e12) == {"passed": True} and tried == [8, 4, 2]


def test_a_failure_is_one_line_and_costs_nothing_else(capsys):
    def fails(error):
        raise error

    assert attempt(fails, ValueError("a\nb")) == {"passed": False, "said": "ValueError: a b"}
    assert attempt(fails, torch.OutOfMemoryError("too much"))["said"] == OUT_OF_MEMORY
    assert "in fails" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["gpt", "dit", pytest.param("looped", marks=pytest.mark.slow)])
def test_what_is_planned_is_what_a_true_step_takes(name):
    each = memory.without_data("tiny", name, "cpu")
    found = {(m, c): memory.held(*each, m, c) for m in ("blocks", "end to end") for c in (False, True)}
    assert all(record["passed"] and record["counted"] == record["planned"] for record in found.values())
    assert found["blocks", True]["planned"] < found["blocks", False]["planned"] < found["end to end", False]["planned"]


def test_a_plan_that_is_wrong_is_found(monkeypatch):
    monkeypatch.setattr(memory, "step_bytes", lambda *_: {"total": 1})
    assert memory.held(*memory.without_data("tiny", "mdm", "cpu"), "blocks", False)["passed"] is False


@pytest.mark.parametrize("name, classes", [("gpt", 50257), ("looped", 50257), ("mdm", 27), ("dit", 10), ("vit", 100)])
def test_the_papers_sizes_need_no_data(name, classes):
    script, settings, shared = memory.without_data("paper", name, "cpu")
    small = replace(settings, width=16, heads=2, batch_size=2)
    network = script.build(0, small, *shared)
    batch = script.batch(2, small, *shared)
    assert torch.isfinite(network.loss(*batch))
    data = shared[0]
    assert classes == (data.tokenizer.classes if hasattr(data, "tokenizer") else len(data.classes))


# --- data, and stage 4 ---


def test_photographs_that_are_not_here_are_replaced_by_glyphs_and_their_noise(monkeypatch):
    monkeypatch.setattr(cifar, "is_here", lambda name: False)
    _, settings, flags = configure("dit", "gpu", *CPU)
    glyph = train_dit.PRESETS["laptop"]
    assert (settings.data, settings.p_mean, settings.sigma_data) == ("glyphs", glyph["p_mean"], glyph["sigma_data"])
    assert settings.width == train_dit.PRESETS["gpu"]["width"] and "--p-mean" in flags
    assert configure("vit", "gpu", *CPU)[1].pooling == "token" != train_vit.PRESETS["gpu"]["pooling"]
    assert configure("mdm", "gpu", *CPU)[1].data == "pydocs"
    monkeypatch.setattr(cifar, "is_here", lambda name: True)
    _, settings, _ = configure("dit", "gpu", *CPU)
    assert (settings.data, settings.p_mean) == ("cifar10", train_dit.Settings.p_mean)


def test_images_are_here_if_their_folder_or_archive_is(tmp_path):
    assert not cifar.is_here("cifar10", tmp_path)
    (tmp_path / "cifar-10-binary.tar.gz").touch()
    (tmp_path / "cifar-100-binary").mkdir()
    assert cifar.is_here("cifar10", tmp_path) and cifar.is_here("cifar100", tmp_path)


def test_the_looped_baseline_takes_its_mean_number_of_recurrences():
    _, settings, _ = configure("looped", "tiny", *CPU)
    assert baseline_of(settings).recurrences == 33 and not hasattr(
        baseline_of(configure("gpt", "tiny", *CPU)[1]), "recurrences"
    )


@pytest.fixture
def jobs(monkeypatch):
    """jobs(seconds of a step by method, seconds besides) trains in no time: returns what was trained, as (name, steps,
    flags), and the clock that such a training moves.
    """
    now, trained = [0.0], []
    monkeypatch.setattr(job, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def put(paces, fixed):
        def main(flags):
            flags = list(flags)
            steps, folder = int(flags[flags.index("--steps") + 1]), Path(flags[flags.index("--out") + 1])
            pace = paces["--baseline" in flags]
            if "--checkpoint-activations" not in flags and pace is None:
                raise torch.OutOfMemoryError("too much")
            pace = pace or 1.0
            now[0] += fixed + steps * pace
            trained.append(("rehearsal" if folder.name == "rehearsal" else folder.name, steps, flags))
            folder.mkdir(parents=True)
            result = {"seconds_per_step_all_blocks": pace, "blocks": 1, "metrics": {"bits_per_char": 2.0, "other": 1}}
            result |= {"settings": {"data": "pydocs", "dtype": "float32"}, "memory_bytes": {"total": 5}}
            (folder / "result.json").write_text(json.dumps(result))
            lines = [json.dumps({"kind": "train", "block": 0, "step": s, "seconds": s * pace}) for s in range(1, 11)]
            (folder / "metrics_0.jsonl").write_text("\n".join(lines))
            (folder / "samples.txt").write_text("text")

        for script in (train_gpt, train_dit):
            monkeypatch.setattr(script, "main", main)
        return trained, now

    return put


def test_both_methods_take_as_many_steps_as_the_time_allows(jobs, options, tmp_path):
    trained, now = jobs({False: 3.0, True: 2.0}, fixed=5.0)
    options = replace(options, preset="gpu", seconds=4000.0)
    records = list(job.run(options))
    assert [r["passed"] for r in records] == [True] * 4 and now[0] <= options.seconds
    for name, full in (("gpt", 3000), ("dit", 20_000)):
        ours, theirs = (r for r in records if r["script"] == name)
        assert ours["steps"] == theirs["steps"] and ours["of"] == theirs["of"] == full
        assert 0.7 * 2000 < 5 * ours["steps"] + 10 + 60 < 2000, "most of its half, less the rehearsal"
        assert (tmp_path / ours["folder"] / "samples.txt").exists() and ours["sample"] == "text"
        assert ours["quality"] == {"bits_per_char": 2.0}
    (flags,) = [flags for name, _, flags in trained if name == "dit-gpu-blocks"]
    warmup = int(flags[flags.index("--warmup") + 1])
    assert warmup == train_dit.PRESETS["gpu"]["warmup"] * records[2]["steps"] // 20_000, "the schedule is scaled, too"
    assert "--rounds" in flags and not (tmp_path / "runs" / "rehearsal").exists()


def test_a_preset_is_not_trained_for_longer_than_it_says(jobs, options):
    jobs({False: 1e-3, True: 1e-3}, fixed=0.0)
    assert [r["steps"] for r in job.run(replace(options, preset="gpu", seconds=1e4))] == [3000, 3000, 20_000, 20_000]


def test_too_little_time_is_said(jobs, options):
    jobs({False: 3.0, True: 2.0}, fixed=5.0)
    records = list(job.run(replace(options, preset="gpu", seconds=150.0)))
    assert [r["passed"] for r in records] == [None] * 4 and "left out for time" in records[0]["said"]


def test_what_does_not_fit_is_checkpointed(jobs, options):
    jobs({False: 1.0, True: None}, fixed=0.0)
    ours, theirs, *_ = job.run(replace(options, preset="gpu", seconds=4000.0))
    assert "--checkpoint-activations" in theirs["flags"] and "--checkpoint-activations" not in ours["flags"]
    assert "end to end, checkpointed" in "\n".join(report.trained([ours, theirs]))


def test_more_minutes_train_more(options, monkeypatch):
    asked = []
    monkeypatch.setattr(job, "trained", lambda *args: asked.append((args[0], args[1], [*args[2]])) or [])
    monkeypatch.setattr(cifar, "is_here", lambda name: True)
    both = ["blocks", "end to end"]
    for minutes, names in ((9, ["gpt", "dit"]), (60, ["gpt", "dit", "vit", "mdm", "looped"])):
        asked.clear()
        assert list(job.run(replace(options, preset="gpu", minutes=minutes))) == []
        assert asked == [(name, "gpu", both) for name in names]
    list(job.run(replace(options, preset="gpu", minutes=600)))
    assert asked[-1] == ("vit", "paper", [*both, "blocks, paper's recipe"])
    monkeypatch.setattr(cifar, "is_here", lambda name: False)
    (record,) = job.run(replace(options, preset="gpu", minutes=600))
    assert record["passed"] is None and "downloads CIFAR-100" in record["said"]


# --- the whole ---


@pytest.mark.usefixtures("cli")
def test_a_script_that_is_broken_costs_only_its_own(tmp_path, monkeypatch):
    def build(*args):
        raise ValueError("no network")

    monkeypatch.setattr(train_gpt, "build", build)
    monkeypatch.setattr(memory, "SCRIPTS", ("gpt", "mdm"))
    monkeypatch.setattr(speed, "SCRIPTS", ("mdm",))
    code, found, text = started(tmp_path, "--stages", "2,3")
    assert code == 1 and text.count("**failed**") == 5 and text.count("ValueError: no network") == 5
    assert [r["passed"] for r in found["stages"][1]["records"]] == [False] * 4 + [True] * 4
    assert [r.get("passed") for r in found["stages"][0]["records"]] == [None, True, False, None]


@pytest.mark.slow
def test_everything_passes_on_a_cpu(tmp_path):
    """As a user starts it. It takes about two minutes on one core."""
    code, found, text = started(tmp_path, "--preset", "tiny", "--minutes", "9")
    assert code == 0 and [s["status"] for s in found["stages"]] == ["passed"] * 4, text
    checks = [record["check"] for record in found["stages"][0]["records"]]
    assert len(checks) == 26 + 26 + 10 + 5 + 1
    assert len(found["stages"][2]["records"]) == 20
    assert [r["steps"] for r in found["stages"][3]["records"]] == [40] * 4
    for folder, picture in (("gpt-tiny-blocks", "samples.txt"), ("dit-tiny-end-to-end", "samples.png")):
        assert (tmp_path / "out" / "runs" / folder / picture).exists()
    assert text.count("\n## ") == 4 and str(tmp_path) not in text.replace(found["command"], "")
