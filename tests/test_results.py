import dataclasses
import importlib
import json
import re
import shutil
import statistics
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from unittest import mock

import pytest

import nano_db
from data.images import NOISE_LEVELS
from experiments import figures, results, summary
from experiments.comparisons import NEIGHBOURS, ON_CIFAR10
from experiments.neighbours import shared
from experiments.tables import DEPTHS, MDM_TIMES, SCALES, Experiment, experiments
from nano_db.errors import UsageError
from nano_db.trainer.memory import PARTS
from nano_db.trainer.settings import read_settings

ROOT = Path(__file__).parent.parent
VIT = ("--preset", "tiny", "--layers", "3", "--steps", "4", "--glyphs", "180", "--samples", "0", "--device", "cpu")


ALL_TABLES = ("tiny", "cpu", "gpu")  # scales that have all tables of tables.py


def settings_of(experiment):
    """The flags of an experiment as its script reads them: whatever it refuses ends the test."""
    if experiment.command(0)[0] == "-m":
        return neighbours_settings(experiment)
    script = importlib.import_module(f"train_{experiment.script}")
    with mock.patch.object(sys, "argv", ["train", *experiment.flags]):
        return read_settings(experiment.script, script.Settings, script.PRESETS, getattr(script, "RECIPES", None))


class Read(Exception):
    """What a neighbour has read, before it does anything with it."""


def neighbours_settings(experiment):
    _, module, *flags = experiment.command(0)
    script = importlib.import_module(module)

    def read_and_stop(*args, **kwargs):
        raise Read(shared.read_arguments(*args, **kwargs))

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(sys, "argv", ["x", *flags, "--out", folder]),
        mock.patch.object(script, "read_arguments", read_and_stop),
        pytest.raises(Read) as read,
    ):
        script.main()
    return read.value.args[0]


@pytest.mark.parametrize("scale", [*ALL_TABLES, "real"])
def test_rows_differ_only_in_what_they_name(scale):
    rows = experiments(scale)
    assert len({(row.group, row.name) for row in rows}) == len(rows)
    runs = {(row.script, *row.flags) for row in rows}  # a row may be in two tables, and is run once
    assert len({row.name for row in rows}) == len(runs) == len({(row.name, *row.flags) for row in rows})
    same = ("data", "batch_size", "learning_rate", "weight_decay", "dropout", "width", "ema", "preset", "dtype")
    for group, script in {(row.group, row.script) for row in rows}:
        read = {row.name: settings_of(row) for row in rows if (row.group, row.script) == (group, script)}
        first, *others = read.values()
        for name in same:
            assert all(getattr(other, name, None) == getattr(first, name, None) for other in others), (group, name)
        steps = {settings.steps for name, settings in read.items() if "times" not in name}
        expected = len(MDM_TIMES) if group == "mdm-steps" else 1
        assert len(steps) == expected, f"{group}: the baseline takes as many steps as every block"
    looped = {row.name: settings_of(row).steps for row in rows if row.group == "looped"}
    for name in ("looped-nano", "looped-one-recurrence") if looped else ():
        assert looped[f"{name}-7-times"] == 7 * looped[name]


@pytest.mark.parametrize("scale", ALL_TABLES)
def test_every_row_that_was_promised_is_there(scale):
    by_group = {}
    for row in experiments(scale):
        by_group.setdefault(row.group, []).append((row, settings_of(row)))
    for group in ("vit", "dit", "mdm", "gpt"):
        read = [settings for _, settings in by_group[group]]
        deep, blocks = max(s.layers for s in read), next(s.blocks for s in read if not s.baseline)
        shallow = [s for s in read if s.baseline and s.layers == deep // blocks]
        assert [s.ensemble for s in shallow] == [1, blocks]
        assert any(s.baseline and s.layers == deep for s in read)
        if group in ("vit", "gpt"):
            assert {s.recipe for s in read if not s.baseline} == {"nano", "paper"}
    assert {s.recipe for _, s in by_group["looped"] if not s.baseline} == {"nano", "paper"}
    plain = [s for row, s in by_group["looped"] if "one-recurrence" in row.name]
    assert {(s.recurrences, s.sampling_steps) for s in plain} == {(1, 1)}
    for group in ("vit", "dit", "mdm", "gpt", "looped"):
        assert sum(bool(row.note) for row, _ in by_group[group]) == 2, "the paper's end to end, and its blocks"
        three = [row for row, _ in by_group[group] if group == "looped" or row.name != f"{group}-paper"]  # far off
        saving = [s for row, s in by_group["checkpointing"] if row.script == group]
        assert {(s.baseline, s.checkpoint_activations) for s in saving} == set(product((True, False), repeat=2))
        assert {row.seeds for row in three} == {2 if scale == "tiny" else 3}

    read = [s for _, s in by_group["dit-ablations"]]
    splits = {(s.partition, s.layer_split) for s in read if s.layer_split}
    assert len(splits) == 8 and {split for _, split in splits} == {"4,4,4", "3,6,3", "6,4,2", "2,4,6"}
    assert {s.overlap for s in read if not s.baseline} == {0.0, 0.05, 0.1}
    assert {1 if s.baseline else s.blocks for s in read} == {1, 2, 3, 4, 6}
    first, *others = (s for _, s in by_group["gpt-ablations"])
    changed = [{name for name in vars(first) if getattr(first, name) != getattr(s, name)} for s in others]
    assert changed == [{"loss_weight"}, {"head"}, {"predict"}] and first.predict == "active"
    usual = next(s.steps for _, s in by_group["mdm"])
    steps = [s.steps for _, s in by_group["mdm-steps"]]
    assert steps == [round(times * usual) for times in MDM_TIMES for _ in range(4)]
    for times in range(len(MDM_TIMES)):
        deep, blocks, *shallow = (s for _, s in by_group["mdm-steps"][4 * times : 4 * times + 4])
        assert deep.baseline and not blocks.baseline and deep.layers == blocks.layers
        B, layers = blocks.blocks, deep.layers // blocks.blocks
        assert [(s.layers, s.ensemble) for s in shallow] == [(layers, 1), (layers, B)]
    for script in ("vit", "dit", "gpt"):
        depths = {True: [], False: []}
        for _, s in by_group[f"{script}-depth"]:
            assert s.baseline or s.layers == 12
            depths[s.baseline].append(s.layers if s.baseline else s.layers // s.blocks)
        assert depths == {True: [1, 2, 3, 4, 6, 12], False: [1, 2, 3, 4, 6]}
    assert [(s.blocks, s.layers) for _, s in by_group["dit-intervals"]] == [(3, 3 * depth) for depth in DEPTHS]
    assert len(by_group["memory"]) == 3 * 3 * 2


def test_neighbours_stand_beside_our_own_on_the_same_images():
    rows = experiments("neighbours")
    read = {row.name: settings_of(row) for row in rows}
    for table, data in (("neighbours-glyphs", "glyphs"), ("neighbours-cifar10", "cifar10")):
        mine = {name.removeprefix(f"{table}-"): s for name, s in read.items() if name.startswith(f"{table}-")}
        assert mine.keys() == {name for name, *_ in NEIGHBOURS if data == "glyphs" or name in ON_CIFAR10}
        assert {s.data for s in mine.values()} == {data}
    greedy, vit, blocks = (read[f"neighbours-glyphs-{name}"] for name in ("greedy", "end-to-end", "blocks"))
    for name in ("layers", "blocks", "patch", "width", "heads", "steps", "batch_size", "weight_decay"):
        assert getattr(greedy, name) == getattr(blocks, name), name
        assert name == "blocks" or getattr(greedy, name) == getattr(vit, name), name
    ahead = [read[f"neighbours-glyphs-{name}"].look_ahead for name in ("greedy", "greedy-1-ahead", "greedy-2-ahead")]
    assert ahead == [0, 1, 2]
    assert len({(row.script, row.flags) for row in rows}) == len(rows)


def test_blocks_that_start_from_a_network_have_its_shape_and_its_seed():
    rows = {row.name: row for row in experiments("conversion")}
    read = {name: settings_of(row) for name, row in rows.items()}
    for name, row in rows.items():
        script = name.split("-")[0]
        network, mine = f"{script}-conversion-network", read[name]
        assert (mine.layers, mine.batch_size) == (read[network].layers, read[network].batch_size)
        way = name.split("-")[2]
        assert mine.baseline == (way in ("network", "further"))
        assert row.init_from(1) == (f"{network}-s1" if way in ("further", "started") else "")
        assert f"out/results/conversion/{network}-s1" in row.command(1) or way in ("network", "nothing")
        assert row.seeds <= rows[network].seeds
    assert rows["dit-conversion-started-200"].seeds == 3 and read["dit-conversion-network"].steps == 400


@pytest.fixture
def few(monkeypatch, cli, tmp_path):
    """few(rows, *flags): the command with these rows for the scale `tiny`: (exit code, stdout, stderr)."""

    def run(rows, *flags):
        monkeypatch.setattr(summary, "experiments", lambda scale: rows)
        where = ("--out", tmp_path / "out", "--results", tmp_path / "results")
        return cli("--scale", "tiny", *where, *flags, main=results.main)

    return run


def row(name, *flags, seeds=1):
    return Experiment(name, "vit", name, "vit", (*VIT, *flags), seeds)


@pytest.mark.slow
def test_runs_are_made_kept_and_skipped_and_a_failing_one_is_named(few, tmp_path, monkeypatch):
    rows = [row("vit-bad", "--patch", "5"), row("vit-baseline", "--baseline"), row("vit-blocks", seeds=2)]
    code, out, err = few(rows[:2], "--jobs", 2)
    assert code == 2 and "1 of 2 runs failed: vit-bad-s0" in err and "must divide" in err and err.count("\n") == 1
    folder = tmp_path / "results" / "tiny"
    record = json.loads((folder / "vit-baseline-s0.json").read_text(encoding="utf-8"))
    assert record["command"] == f"python train_vit.py {' '.join(VIT)} --baseline --seed 0"
    assert record["machine"]["cores"] >= 1 and record["result"]["versions"].keys() >= {"python", "torch"}
    config = json.loads((tmp_path / "out/tiny/vit-baseline-s0/config.json").read_text(encoding="utf-8"))
    assert record["data_sha256"] == config["depends_on"]["data_sha256"]
    assert (
        "not run" in (folder / "summary.md").read_text(encoding="utf-8") and not (folder / "vit-bad-s0.json").exists()
    )

    started = []
    begin = results.start
    monkeypatch.setattr(results, "start", lambda e, seed, out: started.append(e.file(seed)) or begin(e, seed, out))
    code, out, err = few(rows[1:])
    assert code == 0 and started == ["vit-blocks-s0", "vit-blocks-s1"], err
    assert "2/2 vit-blocks-s1: done" in out
    page = (folder / "summary.md").read_text(encoding="utf-8")
    assert few(rows[1:])[0] == 0 and len(started) == 2
    assert (folder / "summary.md").read_text(encoding="utf-8") == page

    code, out, _ = few([row("vit-baseline", "--baseline", "--width", "32"), rows[2]], "--summary-only")
    assert code == 0 and "vit-baseline-s0.json is left out" in out and len(started) == 2
    code, out, _ = few(rows, "--list")
    assert "to run: 1;" in out and "vit-bad" in out and len(started) == 2
    pages = [tmp_path / name for name in ("a.md", "b.md")]
    for path in pages:
        path.write_text("<!-- results: tiny vit -->\n<!-- end -->\n")
    assert few(rows, "--summary-only", "--readme", *pages)[0] == 0
    assert all("| vit-blocks | 4 | 2 |" in path.read_text(encoding="utf-8") for path in pages)


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_that_starts_from_another_waits_until_that_has_ended(tmp_path, monkeypatch, fails):
    started = row("vit-started", "--init-from", "{out}/tiny/vit-network-s{seed}", seeds=2)
    network, events = row("vit-network", "--baseline", seeds=2), []

    class Process:
        """Ends when it is asked for the third time."""

        def __init__(self, name):
            self.name, self.asked, self.returncode = name, 0, int(fails and "network" in name)

        def poll(self):
            self.asked += 1
            return self.returncode if self.asked == 3 else None

    def start(experiment, seed, out):
        name = experiment.file(seed)
        events.append(f"start {name}")
        (tmp_path / f"{name}.log").write_text("no")
        return Process(name)

    monkeypatch.setattr(results, "start", start)
    monkeypatch.setattr(
        results, "keep_record", lambda experiment, seed, *_: events.append(f"end {experiment.file(seed)}")
    )
    monkeypatch.setattr(results.time, "sleep", lambda seconds: None)
    todo = [(started, 0), (network, 0), (started, 1), (network, 1)]
    failed = results.run_all(todo, 3, tmp_path, tmp_path)
    assert events[:2] == ["start vit-network-s0", "start vit-network-s1"] and len(events) == (6 if fails else 8)
    assert len(failed) == 2 * fails, "and it does not wait for ever"
    for seed in range(0 if fails else 2):
        assert events.index(f"end vit-network-s{seed}") < events.index(f"start vit-started-s{seed}")


@pytest.mark.slow
def test_blocks_start_from_the_network_that_was_trained_before_them(few, tmp_path):
    started = row("vit-started", "--init-from", "{out}/tiny/vit-network-s{seed}")
    code, _, err = few([started, row("vit-network", "--baseline")], "--jobs", 2)
    assert code == 0, err
    record = json.loads((tmp_path / "results/tiny/vit-started-s0.json").read_text(encoding="utf-8"))
    assert "--init-from out/results/tiny/vit-network-s0 " in record["command"]
    assert len(record["init_from_sha256"]) == 64 and "init_from" not in record["settings"]
    (tmp_path / "results/tiny/vit-started-s0.json").unlink()
    shutil.rmtree(tmp_path / "out")  # the network's record is there, and its weights are not
    code, out, err = few([started, row("vit-network", "--baseline")])
    assert code == 0 and "2/2 vit-started-s0: done" in out, err


@pytest.mark.slow
def test_a_neighbours_run_is_kept_like_a_scripts(few, tmp_path):
    flags = ("--steps", "2", "--warmup", "1", "--batch-size", "8", "--glyphs", "180", "--device", "cpu")
    neighbour = Experiment("greedy", "neighbours-glyphs", "greedy", "greedy", flags, 1, "features")
    code, _, err = few([neighbour])
    assert code == 0, err
    record = json.loads((tmp_path / "results/tiny/greedy-s0.json").read_text(encoding="utf-8"))
    line = f"python -m experiments.neighbours.greedy {' '.join(flags)} --seed 0"
    assert record["command"] == line and record["settings"]["glyphs"] == 180 and len(record["data_sha256"]) == 64
    page = (tmp_path / "results/tiny/summary.md").read_text(encoding="utf-8")
    assert "| what passes between blocks |" in page and "| greedy | 2 | 1 |" in page and "| features |" in page


@pytest.mark.slow
def test_an_interruption_lets_the_run_save_and_the_same_command_goes_on(few, tmp_path, monkeypatch):
    """A request to stop that comes as soon as the run has written its first block."""
    rows = [row("vit-blocks", "--steps", "200")]
    stop, really_sleep = [], time.sleep

    def sleep(seconds):
        really_sleep(seconds)
        if (tmp_path / "out/tiny/vit-blocks-s0/block_0.pt").exists():
            stop.append(15)

    class Requests:
        def __enter__(self):
            return stop

        def __exit__(self, *_):
            pass

    with monkeypatch.context() as patched:
        patched.setattr(results, "stop_requests", Requests)
        patched.setattr(results.time, "sleep", sleep)
        code, _, err = few(rows)
    assert code == 130 and "goes on" in err and not (tmp_path / "results/tiny/vit-blocks-s0.json").exists()
    code, _, err = few(rows)
    assert code == 0 and (tmp_path / "results/tiny/vit-blocks-s0.json").exists(), err


@pytest.mark.parametrize("flags, message", [(("--only", "gtp"), "no table 'gtp'"), (("--jobs", 0), "at least 1")])
def test_bad_flags_get_one_clear_line(few, flags, message):
    code, _, err = few([], *flags)
    assert code == 2 and message in err and err.count("\n") == 1


def write(folder, experiment, seed, metrics=(), **parts):
    folder.mkdir(parents=True, exist_ok=True)
    counts = {part: float(parts.get(part, 2**20)) for part in PARTS}
    record = {
        "command": experiment.command_line(seed), "seed": seed, "machine": {"cpu": "slide rule"},
        "data_sha256": "abc", "settings": {"data": "pydocs", "batch_size": 2, "seq_len": 4, "width": 8},
        "result": {
            "script": experiment.script, "steps": 7, "parameters": 2_500_000, "metrics": dict(metrics),
            "memory_bytes": {**counts, "total": sum(counts.values())}, "seconds_per_step_all_blocks": 0.5,
            "one_sample": {"layer_evaluations": 1234, "seconds": 0.002}, "versions": {"python": "3"},
        },
    }  # fmt: skip
    path = folder / f"{experiment.file(seed)}.json"
    path.write_text(json.dumps(record))
    return path


@pytest.fixture
def cpu(tmp_path):
    """The folder of a scale in which the seeds 0 and 1 of all rows of gpt are done but those of its last row."""
    folder = tmp_path / "results" / "cpu"
    for experiment in [row for row in experiments("cpu") if row.group == "gpt"][:-1]:
        for seed in range(min(2, experiment.seeds)):
            write(folder, experiment, seed, {"bits_per_char": 2.0 + 0.3 * seed})
    return folder


def test_a_table_says_what_the_files_say(cpu):
    found, stale = summary.read_records(cpu, "cpu")
    lines = summary.table("gpt", found).splitlines()
    assert not stale and len(lines) == 2 + 5
    assert lines[-1].startswith("| control: mean of 4 such networks | not run |")
    spread = f"2.150 ± {statistics.stdev([2.0, 2.3]):.3f}"
    sizes = "4.0: 1.0 + 1.0 + 1.0 + 1.0"
    assert (
        lines[2]
        == f"| end to end | 7 | 2 of 3 | {spread} | 2.50 M | {sizes} | 500 | 1,234 | 2.0 | LM1B 0.50, OWT 0.85 |"
    )
    assert "| 7 | 1 | 2.000 | 2.50 M |" in lines[4], "one seed has no spread"
    assert len({line.count("|") for line in lines}) == 1


def test_the_main_table_has_each_architecture_and_what_its_blocks_cost(cpu):
    for experiment in experiments("cpu"):  # a second architecture, which has another metric, and no row `ensemble`
        if experiment.name in ("dit-baseline", "dit-blocks"):
            activations = 2**20 * (9 if experiment.name == "dit-baseline" else 1)
            write(cpu, experiment, 0, {"edm_loss": 0.2}, activations=activations)
    header, _, *lines = summary.main_table(summary.read_records(cpu, "cpu")[0]).splitlines()
    assert [line.split("|")[1].strip().split(":")[0] for line in lines] == [
        "Diffusion transformer", "Autoregressive transformer",
    ]  # fmt: skip
    cells = dict(zip(header.split(" | "), lines[0].split(" | "), strict=True))
    assert cells["end to end"] == cells["blocks"] == "0.2000" and cells["control: mean of B such"] == "–"
    assert cells["training memory"] == f"{4 / 12:.2f}"
    assert "| FID 39.83; 37.20 |" in lines[0] and "| MAUVE LM1B 0.50, OWT 0.85; LM1B 0.71, OWT 0.82 |" in lines[1]
    assert summary.fill("<!-- results: cpu main -->\n<!-- end -->", cpu.parent).count("\n") == 5
    for marked in ("cpu neighbours-glyphs", "real dit", "cup gpt"):
        with pytest.raises(UsageError, match=f"{marked}.*no such scale or table"):
            summary.fill(f"<!-- results: {marked} -->\n<!-- end -->", cpu.parent)


def test_a_ratio_is_taken_within_seeds():
    """A machine that becomes ten times slower from seed to seed changes no ratio."""
    slow = [{"seed": seed, "result": {"a": {"b": 10.0**seed}}} for seed in range(3)]
    slower = [{"seed": seed, "result": {"a": {"b": 1.5 * 10**seed}}} for seed in (2, 0)]
    assert summary.ratio(slower, slow, "a", "b") == pytest.approx(1.5)
    assert summary.ratio(slow, slower, "a", "b") == pytest.approx(1 / 1.5)


def test_marked_tables_are_filled_and_a_changed_number_is_found(cpu):
    text = "before\n<!-- results: cpu gpt -->\n<!-- end -->\nafter <!-- results: cpu vit -->\nold\n<!-- end -->\n"
    filled = summary.fill(text, cpu.parent)
    assert filled.startswith("before\n<!-- results: cpu gpt -->\n| run | steps |") and "old" not in filled
    assert summary.fill(filled, cpu.parent) == filled
    assert summary.fill(filled.replace("2.150", "2.149", 1), cpu.parent) == filled
    with pytest.raises(UsageError, match="no such scale or table"):
        summary.fill(text.replace("cpu gpt", "cpu gtp"), cpu.parent)


def test_a_summary_says_what_each_table_was_measured_on(cpu):
    path = write(cpu, next(row for row in experiments("cpu") if row.group == "looped"), 0, {"bits_per_char": 2.0})
    path.write_text(path.read_text(encoding="utf-8").replace("slide rule", "abacus"))
    page = summary.summary(summary.read_records(cpu, "cpu")[0], "cpu")
    measured = [line.split("Measured on: ")[1] for line in page.splitlines() if "Measured on" in line]
    gpt, looped = (f"cpu: {name}, python: 3; pydocs abc." for name in ("slide rule", "abacus"))
    of_groups = dict.fromkeys((row.group for row in experiments("cpu")), "–.")
    shared_rows = {"gpt-ablations": gpt, "gpt-depth": gpt}
    assert measured == list((of_groups | {"gpt": gpt, "looped": looped} | shared_rows).values())


def test_a_damaged_file_is_named(cpu):
    (cpu / "gpt-nano-s0.json").write_text("{")
    with pytest.raises(UsageError, match=r"gpt-nano-s0\.json is missing or damaged"):
        summary.read_records(cpu, "cpu")


def test_the_memory_table_has_every_part(tmp_path):
    rows = {row: [] for row in experiments("cpu") if row.group == "memory"}
    first = next(iter(rows))
    rows[first] = [
        json.loads(write(tmp_path, first, 0, weights=2**21, activations=3 * 2**20).read_text(encoding="utf-8"))
    ]
    _, _, line, other, *_ = summary.memory_table(rows).splitlines()
    assert line == f"| {first.row} | 7.0: 2.0 + 1.0 + 1.0 + 3.0 |" and "not run" in other


def test_the_table_of_checkpointing_has_shares(tmp_path):
    for experiment in experiments("cpu"):
        if experiment.name.startswith("checkpointing-mdm"):
            write(tmp_path, experiment, 0, activations=2**20 * (9 if experiment.name.endswith("baseline") else 1))
    _, _, *lines = summary.table("checkpointing", summary.read_records(tmp_path, "cpu")[0]).splitlines()
    assert lines[2] == "| Masked diffusion | 12.0: 1.0 + 1.0 + 1.0 + 9.0 | 500 | 0.33, 1.00 | 0.33, 1.00 | 0.33, 1.00 |"
    assert len(lines) == 5 and lines[0] == "| Vision transformer | not run | – | – | – | – |"


def test_the_table_of_conversion_has_three_ways_to_spend_further_steps(tmp_path):
    numbers = {"network": 0.4, "further-200": 0.3, "nothing-200": 0.5, "started-200": 0.2}
    for experiment in experiments("conversion"):
        way = experiment.name.removeprefix("dit-conversion-")
        for seed in range(experiment.seeds) if way in numbers else ():
            write(tmp_path, experiment, seed, {"edm_loss": numbers[way] + seed / 100})
    found, _ = summary.read_records(tmp_path, "conversion")
    _, _, *lines = summary.conversion_table(found).splitlines()
    cells = next(line for line in lines if "| 200 |" in line).split(" | ")
    assert cells[1:6] == ["0.4100 ± 0.0100 after 400", "200", "0.3000", "0.5000", "0.2100 ± 0.0100"]
    assert cells[6:] == ["1,234 / 1,234", "4.0 / 4.0 |"]
    assert summary.conversion_table(summary.read_records(tmp_path, "cpu")[0]) == ""


def test_the_loss_of_each_block_is_shown_by_its_layers(tmp_path):
    for experiment in [row for row in experiments("cpu") if row.group == "dit-intervals"][:2]:
        write(tmp_path, experiment, 0, {"edm_loss": 0.6, "edm_loss_by_block": [0.3, 0.2, 0.1]})
    found, _ = summary.read_records(tmp_path, "cpu")
    assert "| 3 blocks of 1 layer | 7 | 1 | 0.3000 | 0.2000 | 0.1000 |" in summary.table("dit-intervals", found)
    (lines,) = summary.depth_panels(found).values()
    assert lines == {f"block {b}": {1: [loss], 2: [loss]} for b, loss in enumerate((0.3, 0.2, 0.1))}


def test_the_figure_of_depth_has_each_row_at_the_layers_of_a_network_or_of_a_block(tmp_path):
    """A row counts once it has been run: here plain networks and blocks of every depth but 3."""
    rows = [row for row in experiments("cpu") if row.group == "gpt-depth" and " 3 layers" not in row.row]
    for row in rows:
        depth = int(row.row.split(" of ")[1].split()[0])  # "plain network of 4 layers", "3 blocks of 4 layers"
        bits = depth + (0.5 if "blocks" in row.row else 0.0)
        for seed in range(row.seeds):
            write(tmp_path, row, seed, {"bits_per_char": bits + seed})
    panels = summary.depth_panels(summary.read_records(tmp_path, "cpu")[0])
    lines = panels["Autoregressive transformer", "bits per character (less is better)"]
    assert list(panels) == [("Autoregressive transformer", "bits per character (less is better)")]
    plain, blocks = lines.values()
    assert plain == {**{depth: [depth] for depth in (1, 2, 4, 6)}, 12: [12, 13, 14]}
    assert blocks == {depth: [depth + 0.5] for depth in (1, 2, 4, 6)}
    figures.draw_depth(tmp_path / "depth.png", panels)
    assert (tmp_path / "depth.png").read_bytes().startswith(b"\x89PNG")


# --- what is committed ---


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_marked_tables_are_those_of_the_files(page):
    text = page.read_text(encoding="utf-8")
    assert text.count("<!-- results:") == len(summary.MARKED.findall(text)), "a mark without its end"
    assert summary.fill(text, ROOT / "results") == text, "python -m experiments.results --summary-only --readme"


def test_committed_results_are_those_of_todays_presets():
    """A preset that has changed since makes a file stale, although its command is still the same.

    Settings count that a row uses, and that both its file and today's script name. A file that says "lognormal" is
    older than the names of noise levels, and has their numbers.
    """
    stale = []
    for folder in [ROOT / "results" / scale for scale in SCALES]:
        for experiment, records in summary.read_records(folder, folder.name)[0].items():
            settings = settings_of(experiment)
            if dataclasses.is_dataclass(settings):
                used = [f for f in dataclasses.fields(settings) if f.metadata["of"] in (None, settings.method)]
                today = {f.name: getattr(settings, f.name) for f in used if not f.metadata["resumable"]}
            else:  # a neighbour's, which chooses some sizes itself
                today = {name: value for name, value in vars(settings).items() if value is not None}
            if experiment.script == "dit":  # where no flag has named them, the data has
                known = dict(zip(("p_mean", "sigma_data"), NOISE_LEVELS[settings.data], strict=True))
                today |= {name: value for name, value in known.items() if today[name] is None}
            del today["seed"]
            for record in records:
                kept = record["settings"]
                if "noise" in today and kept["noise"] == "lognormal":
                    noise = importlib.import_module(f"train_{experiment.script}").NOISE[today["noise"]]
                    numbers = ("p_mean", "p_std", "sigma_min", "sigma_max")
                    same = all(kept[name] == getattr(noise, name) for name in numbers)
                    kept = {**kept, "noise": today["noise"] if same else [kept[name] for name in numbers]}
                if kept.get("dtype") == "auto" and record["result"]["device"] == "cpu":
                    kept = {**kept, "dtype": "float32"}  # what it meant there
                if any(kept[name] != today[name] for name in kept.keys() & today.keys()):
                    stale.append(f"{experiment.file(record['seed'])}.json")
    assert not stale, "delete these, and run them again"


def test_no_table_mixes_rows_of_versions_whose_numbers_differ():
    """Records that do not name their version are of 0.1.0, and their tables stay until made anew as a whole."""
    versions = {}
    for folder in [ROOT / "results" / scale for scale in SCALES]:
        for experiment, records in summary.read_records(folder, folder.name)[0].items():
            of_table = versions.setdefault((folder.name, experiment.group), set())
            of_table.update(record["result"]["versions"].get("nano_db", "0.1.0") for record in records)
    mixed = {table: of_table for table, of_table in versions.items() if len(of_table) > 1}
    assert not mixed, "delete the older rows' files, and run the command of their scale again"
    assert set.union(*versions.values()) <= {"0.1.0", nano_db.__version__}


@pytest.mark.parametrize("path", ["pyproject.toml", "CITATION.cff"])
def test_the_version_is_the_same_everywhere(path):
    found = re.findall(r'^version[: =]+"?([\d.]+)', (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
    assert found == [nano_db.__version__]


def test_committed_summaries_are_those_of_their_files():
    folders = [path for path in (ROOT / "results").glob("*") if path.is_dir()]
    assert {path.name for path in folders} <= {*SCALES, "target_embeddings"}
    folders = [path for path in folders if path.name in SCALES and any(path.glob("*.json"))]
    for folder in folders:
        found, stale = summary.read_records(folder, folder.name)
        assert (folder / "summary.md").read_text(encoding="utf-8") == summary.summary(found, folder.name), folder
        known = {experiment.file(seed) for experiment in found for seed in range(experiment.seeds)}
        assert not stale and {path.stem for path in folder.glob("*.json")} <= known, "files of no experiment"
    assert sum(path.stat().st_size for folder in folders for path in folder.iterdir()) < 5_000_000


@pytest.mark.slow
def test_the_whole_tiny_scale_runs(cli, tmp_path):
    where = ("--out", tmp_path / "out", "--results", tmp_path / "results")
    code, _, err = cli("--scale", "tiny", "--jobs", 2, *where, main=results.main)
    assert code == 0, err
    assert "not run" not in (tmp_path / "results" / "tiny" / "summary.md").read_text(encoding="utf-8")
