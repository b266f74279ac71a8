"""The command that asks a GPU what it does with this project, on a CPU."""

import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

import train_dit
import train_gpt
import train_looped
import train_mdm
import train_vit
from data import cifar
from experiments.gpu import __main__ as gpu
from experiments.gpu import apart, job, memory, plain, report, speed, works
from experiments.gpu.cases import ALL_METHODS, OUT_OF_MEMORY, Options, attempt, baseline_of, configure
from nano_db.errors import UsageError
from nano_db.trainer import run as trainer_run

FORK = pytest.mark.skipif(sys.platform != "linux", reason="forks")
CPU = ("--device", "cpu")


@pytest.fixture
def options(tmp_path):
    return Options("cpu", "tiny", minutes=9, out=tmp_path, scratch=tmp_path, seconds=60)


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
    yield "a killer"
    os._exit(3)


def test_what_a_stage_finds_arrives_while_it_runs(options):
    found = apart.found_by(stub([{"a": 1}, {"b": 2}], wait_for=60), options)
    clock = time.monotonic()
    assert [next(found), next(found)] == [{"a": 1}, {"b": 2}] and time.monotonic() - clock < 30
    found.close()
    assert not multiprocessing.active_children()


def test_a_stage_that_takes_too_long_is_killed(options):
    found = []
    with pytest.raises(TimeoutError):
        found += apart.found_by(stub([{"a": 1}], wait_for=60), replace(options, seconds=0.5))
    assert not multiprocessing.active_children()


@FORK
def test_what_a_stage_has_started_ends_with_it(options):
    def work(options):
        yield subprocess.Popen(["sleep", "60"]).pid
        time.sleep(60)

    found = apart.found_by(work, options)
    pid = next(found)
    assert is_alive(pid)
    found.close()
    wait_until(lambda: not is_alive(pid))


def test_a_stage_whose_process_dies_says_so(options):
    found = apart.found_by(killed, options)
    assert next(found) == {"passed": True} and next(found) == "a killer"
    with pytest.raises(RuntimeError, match="its process ended with exit code 3"):
        next(found)


def test_a_process_that_is_spawned_works_as_one_that_is_forked(options, monkeypatch):
    monkeypatch.setattr(apart, "PROCESSES", multiprocessing.get_context("spawn"))
    device, software, *_ = apart.found_by(apart.describe, options)
    assert device["device"].startswith("a CPU") and software == {"torch": f"PyTorch {torch.__version__}"}
    assert apart.work_apart.__module__ == "experiments.gpu.apart", "what is spawned must not be part of __main__"


@pytest.fixture
def stages(monkeypatch):
    """stages(work, ...) puts these in the place of the true ones."""

    def put(*works):
        named = enumerate(zip(report.SECTIONS, works, strict=False), 1)
        stages = [gpu.Stage(number, name, f"What of {name}?", work, 0.2) for number, (name, work) in named]
        monkeypatch.setattr(gpu, "STAGES", stages)

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
        json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8")),
        (tmp_path / "out" / "report.md").read_text(encoding="utf-8"),
    )


def test_a_stage_that_fails_is_reported_and_passed_over(tmp_path, stages, capsys):
    stages(broken, killed, stub([{"passed": True}]), stub([{"script": "gpt", "passed": False, "said": "no good"}]))
    code, found, text = started(tmp_path)
    assert code == 1 and [s["status"] for s in found["stages"]] == ["failed", "failed", "passed", "failed"]
    assert "**failed**: the stage itself: ValueError: a fault" in text and "**failed**: gpt: no good" in text
    assert "its process ended with exit code 3: see log.txt; last activity: a killer" in text
    assert "| first | 1 of 1 | 0 |" in text
    _, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and lines[0].startswith("1. What of works?") and "1 of 2 failed" in lines[0]
    assert lines[1] == "   **failed**: the stage itself: ValueError: a fault"
    assert all(line.endswith(" left") for line in lines if line[0].isdigit())
    assert "ValueError: a fault\nof two lines" in (tmp_path / "out" / "log.txt").read_text(encoding="utf-8")


@pytest.fixture
def hurried(monkeypatch):
    """A minute, of which all but two seconds are over."""
    clock = time.monotonic
    monkeypatch.setattr(gpu, "RESERVE", 0.2)
    begun = iter([clock() - 58])
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: next(begun, None) or clock()))
    return ("--minutes", "1")


def test_what_the_time_does_not_allow_is_left_out(tmp_path, stages, hurried):
    stages(stub(["here", {"passed": True}], wait_for=60), stub([{"passed": True}]))
    gpu.STAGES[:] = [stage._replace(share=0.01) for stage in gpu.STAGES]  # 0.6 s of the minute
    code, found, text = started(tmp_path, *hurried)
    assert code == 0
    assert [s["status"] for s in found["stages"]] == ["passed as far as time allowed", "passed"]
    assert "2. What of speed? | passed (1 of 1 passed" in text


@pytest.mark.parametrize("number", [0, 1])
def test_a_stage_that_hangs_before_its_first_result_has_failed(tmp_path, stages, hurried, number):
    stages(stub(["a check", {"passed": None, "said": "no"}][: 1 + number], wait_for=60))
    code, _, text = started(tmp_path, *hurried)
    assert code == 1 and "no result in " in text and "last activity: a check" in text


def test_a_stage_in_which_all_is_left_out_has_not_passed(tmp_path, stages):
    stages(stub([{"passed": None, "said": "no"}]), stub([]))
    code, found, _ = started(tmp_path)
    assert code == 0 and [s["status"] for s in found["stages"]] == ["left out for lack of time"] * 2


def test_only_the_stages_asked_for_run(tmp_path, stages):
    stages(broken, stub([{"passed": True}]), broken)
    code, found, text = started(tmp_path, "--stages", "2")
    assert code == 0 and [s["number"] for s in found["stages"]] == [2] and "2. What of speed?" in text


def is_alive(pid):
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").split()[2] != "Z"
    return False


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
@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM", "SIGINT"])  # Windows does not know the first
def test_killed_in_the_middle_of_a_stage_it_leaves_the_report_of_those_before(tmp_path, stages, number, how):
    folder = tmp_path / "out"

    def slow(options):
        (folder / "worker").write_text(str(os.getpid()))
        yield "a check"
        yield {"check": "half", "case": "a", "passed": True, "difference": 0.0, "limit": 0.0, "said": ""}
        time.sleep(60)

    stages(*[stub([{"passed": True}])] * (number - 1), slow, *[broken] * (4 - number))
    process = multiprocessing.get_context("fork").Process(target=run_in_a_process, args=(folder,))
    process.start()

    def begun():
        with suppress(OSError, ValueError, LookupError):
            return json.loads((folder / "report.json").read_text(encoding="utf-8"))["stages"][number - 1]["records"]

    try:
        wait_until(begun)
        os.kill(process.pid, getattr(signal, how))
        process.join(30)
    finally:
        process.kill()
    found, text = (
        json.loads((folder / "report.json").read_text(encoding="utf-8")),
        (folder / "report.md").read_text(encoding="utf-8"),
    )
    this = "not finished" if how == "SIGKILL" else "stopped by the user"
    expected = ["passed"] * (number - 1) + [this] + ["not begun"] * (4 - number)
    assert [s["status"] for s in found["stages"]] == expected
    assert len(found["stages"][number - 1]["records"]) == 1 and f"{this}, at a check (1 of 1 passed" in text
    worker = int((folder / "worker").read_text(encoding="utf-8"))
    wait_until(lambda: not is_alive(worker))


def test_an_interruption_says_where_the_report_is(tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "run_stages", interrupted)
    with pytest.raises(SystemExit) as stop:
        gpu.main([*CPU, "--out", str(tmp_path / "out")])
    assert stop.value.code == 130 and "there are no results yet" in capsys.readouterr().err


def test_no_gpu_is_one_line(tmp_path):
    with pytest.raises(UsageError, match=r"finds no CUDA device \(.*; --device cpu"):
        gpu.main(["--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_anything_stays_as_it_is(tmp_path):
    (tmp_path / "runs").mkdir()
    with pytest.raises(UsageError, match="is not an empty folder: choose another one"):
        gpu.main([*CPU, "--out", str(tmp_path)])
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is not an empty folder"):
        gpu.main([*CPU, "--out", str(tmp_path / "file")])
    assert len(list(tmp_path.iterdir())) == 2


def test_a_device_that_does_not_answer_is_one_line(monkeypatch, options):
    def describe(text):
        def work(options):
            if text == "hangs":
                time.sleep(60)
            if text == "breaks later":
                yield {"device": "a card"}
            raise RuntimeError("CUDA error: busy")

        return work

    monkeypatch.setattr(gpu, "ANSWERS", 0.5)
    monkeypatch.setattr(gpu, "describe", describe("hangs"))
    with pytest.raises(UsageError, match=r"does not answer \(in 0.5 s\); --device cpu"):
        gpu.ask_device(options)
    monkeypatch.setattr(gpu, "ANSWERS", 60)
    monkeypatch.setattr(gpu, "describe", describe("breaks"))
    with pytest.raises(UsageError, match="RuntimeError: CUDA error: busy; --device cpu"):
        gpu.ask_device(options)
    monkeypatch.setattr(gpu, "describe", describe("breaks later"))
    assert gpu.ask_device(options) == {"device": "a card"}


def test_after_an_error_of_cuda_a_stage_ends(options):
    records = [{"passed": False, "said": "AcceleratorError: CUDA error: an illegal memory access"}, {"passed": True}]
    found = list(apart.found_by(stub(records), options))
    assert found[0] == records[0] and len(found) == 2 and "the rest was left out" in found[1]["said"]


def test_a_report_that_cannot_be_written_does_not_end_the_stage(tmp_path, stages, monkeypatch, capsys):
    stages(stub([{"passed": True}, {"passed": True}]))
    write, calls = report.write, []

    def full(*args):
        calls.append(args)
        if len(calls) in (2, 3):
            raise UsageError("cannot write: make room on the disk")
        write(*args)

    monkeypatch.setattr(report, "write", full)
    code, found, _ = started(tmp_path)
    assert code == 0 and len(found["stages"][0]["records"]) == 2
    assert capsys.readouterr().err.count("warning: cannot write") == 2


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="start it without torchrun"):
        gpu.main([*CPU, "--out", str(tmp_path / "out")])


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--minutes", "0.9"), "give a number from 1 to"),
        (("--minutes", "nan"), "give a number from 1 to"),
        (("--out", ""), "is not an empty folder"),
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
    record = {"watched": "gpt", "method": "blocks", "passed": False, "said": "2 places"}
    assert report.miss(record) == "**failed**: gpt, blocks: 2 places"
    assert report.miss({"passed": None, "said": "no time"}) == "left out: the stage itself: no time"


def test_what_stands_in_the_report_does_not_name_the_folders_of_this_machine(tmp_path, stages):
    stages(stub([{"passed": False, "said": f"cannot read {tmp_path}/out/runs/block_0.pt"}]))
    _, _, text = started(tmp_path)
    assert "cannot read runs/block_0.pt" in text and str(tmp_path) not in text


# --- stage 1 ---


def case(tmp_path, name="gpt", method="blocks", dtype="float32"):
    script, settings, _ = configure(name, "tiny", *CPU, *ALL_METHODS[method])
    return works.Case(name, method, dtype, "cpu", tmp_path, script, script.prepare(settings))


def checked(this, measure):
    *_, record = works.check("", this, measure)
    return record


def judged(measure, *args, **named):
    return checked(case(*args, **named), measure)


def test_the_loss_is_compared(tmp_path, monkeypatch):
    assert judged(works.step_difference, tmp_path)["difference"] == 0
    found = judged(works.step_difference, tmp_path, dtype="bfloat16")
    assert found["passed"] and 0 < found["difference"] <= found["limit"] == 2e-2
    steps = iter([([1.0, 2.0], []), ([1.0, 2.001], []), ([1.0, 2.0], []), ([1.0, math.nan], [])])
    monkeypatch.setattr(works, "first_step", lambda case, **changes: next(steps))
    assert judged(works.step_difference, tmp_path)["passed"] is False
    assert judged(works.step_difference, tmp_path)["said"].endswith("the difference is nan")
    monkeypatch.setattr(works, "first_step", lambda case, **changes: ([1.0], []))
    assert judged(works.step_difference, tmp_path, dtype="bfloat16")["said"].endswith("bfloat16 changes nothing")


def test_a_wrong_gradient_is_found(tmp_path, monkeypatch):
    first_step = works.first_step

    def turned(case, **changes):
        losses, gradients = first_step(case, **changes)
        return losses, gradients if changes else [gradient.roll(1) for gradient in gradients]

    monkeypatch.setattr(works, "first_step", turned)
    assert "the gradient is" in judged(works.step_difference, tmp_path)["said"]


def test_noise_is_drawn_on_the_cpu_and_weights_are_perturbed(tmp_path):
    elsewhere = torch.zeros(3, device="meta")  # draws nothing by itself
    for draw in (lambda: torch.randn(3, device="meta"), lambda: torch.randn_like(elsewhere)):
        torch.manual_seed(0)
        torch.randn(3)
        expected = torch.randn(2)
        torch.manual_seed(0)
        with works.DrawnOnCPU():
            assert draw().device.type == "meta"
        assert torch.equal(torch.randn(2), expected), "three numbers of the CPU's generator were taken"
    network = torch.nn.Linear(3, 3).requires_grad_(False)
    before = network.weight.clone()
    works.perturb(network, 0)
    assert 0.01 < float((network.weight - before).norm()) < 1


def test_a_run_that_does_not_resume_is_found(tmp_path, monkeypatch):
    assert judged(works.resumed_difference, tmp_path / "a")["said"] == "bit for bit"
    monkeypatch.setattr(trainer_run, "_load_moments", lambda optimizer, state: None)
    found = judged(works.resumed_difference, tmp_path / "b")
    assert found["passed"] is False and found["difference"] > found["limit"]
    assert "not deterministic: nothing that PyTorch names" in found["said"] and found["limit"] == 1e-5


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


@pytest.mark.parametrize("name", ["gpt", "dit", pytest.param("mdm", marks=pytest.mark.slow)])
def test_the_bound_is_compared(tmp_path, monkeypatch, name):
    this = case(tmp_path, name)
    works.train(this.run("whole"), this.script, this.shared)
    found = checked(this, works.bound_difference)
    assert found["passed"] and 0 < found["difference"] <= found["limit"] == 1e-2
    monkeypatch.setattr(trainer_run, "autocast", lambda settings: nullcontext())
    assert checked(this, works.bound_difference)["said"].endswith("bfloat16 changes nothing")


@pytest.mark.slow
@pytest.mark.usefixtures("cli")
def test_a_script_that_cannot_finish_a_run_is_found(tmp_path, monkeypatch):
    assert judged(works.finished_elsewhere, tmp_path / "a")["passed"] is True

    def evaluate(*args):
        raise UsageError("no evaluation today")

    monkeypatch.setattr(train_gpt, "evaluate", evaluate)
    assert judged(works.finished_elsewhere, tmp_path / "b")["said"].endswith("error: no evaluation today")
    monkeypatch.undo()
    monkeypatch.setattr(works, "outcome", lambda case, folder: (0, ""))
    (tmp_path / "c" / "moved").mkdir(parents=True)
    result = {"device": "cpu", "settings": {"dtype": "bfloat16"}}
    (tmp_path / "c" / "moved" / "result.json").write_text(json.dumps(result))
    assert "finished on ('cpu', 'bfloat16')" in judged(works.finished_elsewhere, tmp_path / "c")["said"]


@pytest.mark.parametrize(
    "code, said, passes",
    [
        (2, "warning: no locks here\ngpu: error: out of memory: try more\n", True),
        (0, "", False),
        (1, "Traceback\n ... error: out of memory: \n", False),
        (2, "gpu: error: something else\n", False),
    ],
)
def test_what_a_script_says_where_memory_runs_out(tmp_path, monkeypatch, code, said, passes):
    fractions = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(works, "outcome", lambda *args: (code, said))
    assert judged(works.out_of_memory, tmp_path)["passed"] is passes and fractions == [1e-6, 1.0]


def test_without_bfloat16_the_rest_is_checked(options, monkeypatch):
    monkeypatch.setattr(works, "computes_bfloat16", lambda device: False)
    monkeypatch.setattr(works, "judge", lambda case, measure: {"passed": case.dtype == "float32"})
    monkeypatch.setattr(works, "SCRIPTS", ("gpt", "mdm"))
    first, *rest = records_of(works.run(options))
    assert first["check"] == "bfloat16" and first["passed"] is None
    assert {record["passed"] for record in rest if "out of memory" not in record["check"]} == {True}
    assert not any("bound" in record["check"] for record in rest) and len(rest) == 2 * 5 + 2 + 2


@pytest.mark.slow
def test_a_script_that_cannot_be_prepared_costs_only_its_own(options, monkeypatch):
    def prepare(settings):
        raise ValueError("no data")

    monkeypatch.setattr(works, "judge", lambda case, measure: {"passed": case.name == "gpt"})
    monkeypatch.setattr(train_mdm, "prepare", prepare)
    for module in (works, memory):
        monkeypatch.setattr(module, "SCRIPTS", ("gpt", "mdm"))
    found = records_of(works.run(options))
    assert [r["case"] for r in found if r["passed"] is False] == ["mdm, blocks", "mdm, end to end"]
    found = records_of(memory.run(options))
    assert [r["passed"] for r in found] == [True] * 4 + [False] and found[-1]["said"] == "ValueError: no data"


@pytest.mark.slow
def test_a_compiled_network_that_stays_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)  # compiling itself: in the slow test
    this, kept, build = case(tmp_path), [], train_gpt.build
    works.train(this.run("whole"), this.script, this.shared)
    assert checked(this, works.compiled_difference)["difference"] == 0
    monkeypatch.setattr(train_gpt, "build", lambda *args: kept.append(build(*args)) or kept[-1])
    found = checked(replace(this, folder=tmp_path / "b"), works.compiled_difference)
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


@pytest.mark.slow
def test_two_sides_are_timed_and_their_work_is_counted(monkeypatch):
    monkeypatch.setattr(speed, "SECONDS", {"cpu": 0})
    script, settings, _ = configure("gpt", "tiny", *CPU)
    for name in ("gpt", "plain"):
        found = speed.beside(name, script, settings, peak=1e12)
        assert found["ratio"][0] <= found["ratio"][1] <= found["ratio"][2] and found["unit"] == "tokens"
        tokens = settings.batch_size * settings.seq_len
        assert found["per_second"] == [tokens / seconds for seconds in found["seconds"]]
        work = [share * seconds for share, seconds in zip(found["utilisation"], found["seconds"], strict=True)]
        assert name == "plain" or work[0] > 1.05 * work[1], "heads cost operations, too"
    work = [share * seconds * 1e12 for share, seconds in zip(found["utilisation"], found["seconds"], strict=True)]
    weights = settings.layers * 12 * settings.width**2 + settings.width * script.prepare(settings)[0].tokenizer.classes
    assert work[0] == pytest.approx(6 * tokens * weights, rel=0.01) == work[1]  # without attention, on a CPU


def test_a_line_that_waits_is_named(options, monkeypatch):
    """PyTorch warns of each wait: here a script does in its place, in every step, and once before it is watched."""
    modes, batch = [], train_mdm.batch
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    names = (
        ["cudaLaunchKernel"] * 7
        + ["cuLaunchKernelEx", "Memcpy DtoD"]
        + ["Memcpy HtoD (Pageable)"] * 5
        + ["Memcpy DtoH"]
    )
    events = [SimpleNamespace(name=name, device_type=DeviceType.CUDA) for name in names]
    events += [SimpleNamespace(name="cudaLaunchKernel", device_type=DeviceType.CPU)] * 8

    def profiled(activities):
        warnings.warn("Synchronization debug mode does not yet detect all synchronizing operations", stacklevel=1)
        return nullcontext(SimpleNamespace(events=lambda: events))

    def waiting(*args):
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        return batch(*args)

    monkeypatch.setattr(speed, "profile", profiled)
    assert speed.waits_and_copies("mdm", options)["passed"]
    monkeypatch.setattr(train_mdm, "batch", waiting)
    found = speed.waits_and_copies("mdm", options)
    assert modes == ["warn", "default"] * 2
    assert found["passed"] is False and found["waits"] == 1 and found["said"].startswith("test_gpu.py:")
    assert found["copies"] == 1.5 and found["kernels"] == 2
    monkeypatch.setattr(speed, "profile", lambda **_: nullcontext(SimpleNamespace(events=list)))
    found = speed.waits_and_copies("mdm", options)
    assert found["waits"] == 1 and "kernels" not in found, "a profiler that sees nothing"


def test_a_batch_too_large_for_the_memory_is_halved(options, monkeypatch):
    tried = []

    def beside(name, script, settings, peak):
        tried.append(settings.batch_size)
        if settings.batch_size > 2:
            raise torch.OutOfMemoryError("too much")
        return {"passed": True}

    monkeypatch.setattr(speed, "beside", beside)
    assert speed.fitting("gpt", options, 1e12) == {"passed": True} and tried == [8, 4, 2]


def test_a_failure_frees_the_memory(monkeypatch):
    freed = []
    monkeypatch.setattr("experiments.gpu.cases.is_true_gpu", lambda device: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(1) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attempt(int, "no number")
    assert freed == [1]


def test_a_failure_is_one_line_and_costs_nothing_else(capsys):
    def fails(error):
        raise error

    assert attempt(fails, ValueError("a\nb")) == {"passed": False, "said": "ValueError: a"}
    for text in ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling"):
        assert attempt(fails, RuntimeError(text))["said"] == OUT_OF_MEMORY
    assert attempt(fails, torch.OutOfMemoryError("too much"))["said"] == OUT_OF_MEMORY
    assert "in fails" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["gpt", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dit", "looped"))])
def test_what_is_planned_is_what_a_true_step_takes(name):
    each = memory.without_data("tiny", name, "cpu").values()
    found = {(m, c): memory.step_held(*each, m, c) for m in ("blocks", "end to end") for c in (False, True)}
    assert all(record["passed"] and record["counted"] == record["planned"] for record in found.values())
    assert found["blocks", True]["planned"] < found["blocks", False]["planned"] < found["end to end", False]["planned"]


def test_a_plan_that_is_wrong_is_found(monkeypatch):
    monkeypatch.setattr(memory, "step_bytes", lambda *_: {"total": 1})
    each = memory.without_data("tiny", "mdm", "cpu").values()
    assert memory.step_held(*each, "blocks", False)["passed"] is False


def test_the_peak_is_that_of_the_step(monkeypatch):
    script, settings, shared = memory.without_data("tiny", "mdm", "cpu").values()
    monkeypatch.setattr(memory, "is_true_gpu", lambda device: True)
    monkeypatch.setattr(memory, "allocator_peak", lambda *args: 1000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 300)
    assert memory.true_step(script, settings, shared)["peak"] == 700


@pytest.mark.parametrize("name, classes", [("gpt", 50257), ("looped", 50257), ("mdm", 27), ("dit", 10), ("vit", 100)])
def test_the_papers_sizes_need_no_data(name, classes):
    script, settings, shared = memory.without_data("paper", name, "cpu").values()
    small = replace(settings, width=16, heads=2, batch_size=2)
    network = script.build(0, small, *shared)
    batch = script.batch(2, small, *shared)
    assert torch.isfinite(network.loss(*batch))
    data = shared[0]
    assert classes == (data.tokenizer.classes if hasattr(data, "tokenizer") else len(data.classes))


# --- data, and stage 4 ---


def test_photographs_that_are_not_here_are_replaced_by_glyphs_and_their_noise(monkeypatch):
    monkeypatch.setattr(cifar, "is_here", lambda name: False)
    _, settings, _ = configure("dit", "gpu", *CPU)
    assert settings.data == "glyphs" and settings.width == train_dit.PRESETS["gpu"]["width"]
    assert settings.p_mean is settings.sigma_data is None, "the data says"
    assert configure("vit", "gpu", *CPU)[1].pooling == "token" != train_vit.PRESETS["gpu"]["pooling"]
    assert configure("mdm", "gpu", *CPU)[1].data == "python"
    monkeypatch.setattr(cifar, "is_here", lambda name: True)
    _, settings, _ = configure("dit", "gpu", *CPU)
    assert settings.data == "cifar10"


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


def records_of(found):
    """What a stage finds, without the texts that say what it is at."""
    return [record for record in found if isinstance(record, dict)]


@pytest.fixture
def jobs(monkeypatch):
    """jobs(seconds of a step by method, seconds besides) trains in no time: returns what was trained, as (name, steps,
    flags), and the clock that such a training moves.
    """
    now, trained = [0.0], []
    monkeypatch.setattr(job, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def put(paces, fixed, bits=2.0):
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
            result = {"seconds_per_step_all_blocks": pace, "blocks": 1, "metrics": {"bits_per_char": bits, "other": 1}}
            result |= {
                "one_sample": {"seconds": 0.0},
                "settings": {"data": "pydocs", "dtype": "float32"},
                "memory_bytes": {"total": 5},
            }
            (folder / "result.json").write_text(json.dumps(result))
            lines = [json.dumps({"kind": "train", "block": 0, "step": s, "seconds": s * pace}) for s in range(1, 11)]
            (folder / "metrics_0.jsonl").write_text("\n".join(lines))
            (folder / "samples.txt").write_text("text")

        for script in (train_gpt, train_dit, train_looped):
            monkeypatch.setattr(script, "main", main)
        return trained, now

    return put


def test_both_methods_take_as_many_steps_as_the_time_allows(jobs, options, tmp_path):
    trained, now = jobs({False: 3.0, True: 2.0}, fixed=200.0)
    options = replace(options, preset="gpu", seconds=4000.0)
    records = records_of(job.run(options))
    assert [r["passed"] for r in records] == [True] * 4 and now[0] <= options.seconds
    for name, full in (("gpt", 3000), ("dit", 20_000)):
        ours, theirs = (r for r in records if r["script"] == name)
        assert ours["steps"] == theirs["steps"] and ours["of"] == theirs["of"] == full
        assert 1500 < 450 + 400 + 5 * ours["steps"] < 2200, "most of its half: the rehearsal, evaluations, steps"
        assert (tmp_path / ours["folder"] / "samples.txt").exists() and ours["sample"] == "text"
        assert ours["quality"] == {"bits_per_char": 2.0}
    (flags,) = [flags for name, _, flags in trained if name == "dit-gpu-blocks"]
    assert "--warmup" not in flags, "it is scaled by itself"
    assert "--rounds" in flags and not (tmp_path / "runs" / "rehearsal").exists()


def test_a_preset_is_not_trained_for_longer_than_it_says(jobs, options):
    jobs({False: 1e-3, True: 1e-3}, fixed=0.0)
    assert [r["steps"] for r in records_of(job.run(replace(options, preset="gpu", seconds=1e6)))] == [
        3000,
        3000,
        20_000,
        20_000,
    ]


def test_too_little_time_is_said(jobs, options):
    jobs({False: 3.0, True: 2.0}, fixed=5.0)
    records = records_of(job.run(replace(options, preset="gpu", seconds=150.0)))
    assert [r["passed"] for r in records] == [None] * 4 and "needs more than the 75 s" in records[0]["said"]


def test_the_evaluation_is_as_thorough_as_the_time_allows(jobs, options):
    trained, _ = jobs({False: 0.1, True: 0.1}, fixed=1.0)
    found = {}
    for seconds in (40, 300, 10_000):
        trained.clear()
        records_of(job.run(replace(options, preset="gpu", seconds=2.0 * seconds)))
        found[seconds] = next(flags for name, _, flags in trained if name == "dit-gpu-blocks")
        shutil.rmtree(options.out / "runs")
        (rehearsed, *_) = (flags for name, _, flags in trained if name == "rehearsal" and "200" in flags)
        assert "0" in rehearsed, "quickly evaluated"
    assert ["10" in found[40], "1000" in found[300], "--frechet-images" in found[10_000]] == [True, True, False]


def test_a_run_that_ends_in_nan_has_failed(jobs, options):
    jobs({False: 0.1, True: 0.1}, fixed=1.0, bits=math.nan)
    records = records_of(job.run(replace(options, preset="gpu", seconds=1e4)))
    assert [r["passed"] for r in records] == [False] * 4 and "the run ended with" in records[0]["said"]


def test_a_preset_shorter_than_the_rehearsal_is_trained(jobs, options):
    jobs({False: 0.1, True: 0.1}, fixed=1.0)
    found = records_of(job.trained("looped", "tiny", {"end to end": ("--baseline",)}, options, 100.0))
    assert found[0]["steps"] == train_looped.PRESETS["tiny-baseline"]["steps"] < job.FEWEST


def test_what_does_not_fit_is_checkpointed(jobs, options):
    jobs({False: 1.0, True: None}, fixed=0.0)
    ours, theirs, *_ = records_of(job.run(replace(options, preset="gpu", seconds=4000.0)))
    assert "--checkpoint-activations" in theirs["flags"] and "--checkpoint-activations" not in ours["flags"]
    assert "end to end, checkpointed" in str(report.of_job([ours, theirs]))


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
    assert record["passed"] is None and "preset paper downloads it" in record["said"]


# --- the whole ---


@pytest.mark.slow
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
    code, found, text = started(tmp_path, "--preset", "tiny", "--minutes", "30")
    assert code == 0 and [s["status"] for s in found["stages"]] == ["passed"] * 4, text
    checks = [record["check"] for record in found["stages"][0]["records"]]
    assert len(checks) == 2 * 26 + 10 + 5 + 2
    assert len(found["stages"][2]["records"]) == 20
    assert [r["steps"] for r in found["stages"][3]["records"]] == [40] * 4
    for folder, picture in (("gpt-tiny-blocks", "samples.txt"), ("dit-tiny-end-to-end", "samples.png")):
        assert (tmp_path / "out" / "runs" / folder / picture).exists()
    assert text.count("\n## ") == 4 and str(tmp_path) not in text.replace(found["command"], "")
