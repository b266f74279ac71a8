import dataclasses
import importlib
import json
import math
import re
import shutil
import statistics
import sys
import time
from itertools import pairwise
from unittest import mock

import pytest
from conftest import ROOT, one_line

import nano_db
from data.images import NOISE_LEVELS
from experiments import differences, figures, results, summary
from experiments.tables import LONGER, SCALES, SCRIPTS, Experiment, experiments, rates
from nano_db.errors import UsageError
from nano_db.trainer.memory import PARTS
from nano_db.trainer.settings import read_settings

README = ROOT / "README.md"
VIT = ("--preset", "tiny", "--layers", "3", "--steps", "4", "--glyphs", "180", "--samples", "0", "--device", "cpu")


def settings_of(experiment):
    """The flags of an experiment as its script reads them: whatever it refuses ends the test."""
    script = importlib.import_module(f"train_{experiment.script}")
    with mock.patch.object(sys, "argv", ["train", *experiment.flags]):
        return read_settings(experiment.script, script.Settings, script.PRESETS, getattr(script, "RECIPES", None))


def by_slug(table, scale):
    """{what its row is, like "blocks": its settings} of a table of all methods."""
    return {e.name.removeprefix(f"{table}-"): settings_of(e) for e in experiments(scale) if e.group == table}


@pytest.mark.parametrize("scale", SCALES)
def test_no_two_commands_are_the_same_run(scale):
    rows = experiments(scale)
    runs = {(row.script, *row.flags) for row in rows}  # a row may be in two tables, and is run once
    assert len({row.name for row in rows}) == len(runs) == len({(row.name, *row.flags) for row in rows})


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_method_stands_beside_the_others_on_equal_terms(scale, script):
    rows = by_slug(script, scale)
    blocks, whole, shallow = rows["blocks"], rows["baseline"], rows["shallow"]
    assert whole.baseline and shallow.baseline and not blocks.baseline
    same = ["data", "batch_size", "weight_decay", "width", "ema", "heads", "seed", "final_rate"]
    same += ["seq_len"] if script in ("mdm", "gpt", "looped") else ["patch", "dropout"]
    for name in same:
        assert len({getattr(settings, name) for settings in rows.values()}) == 1, name
    if script == "looped":
        assert (shallow.recurrences, shallow.sampling_steps, shallow.steps) == (1, 1, blocks.steps)
        few = [rows[name].steps for name in ("blocks-few", "shallow-few", "baseline") if name in rows]
        assert set(few) == {whole.steps}
        return
    assert len({settings.steps for settings in rows.values()}) == len({s.warmup for s in rows.values()}) == 1
    assert whole.layers == blocks.layers == shallow.layers * blocks.blocks
    assert dataclasses.replace(shallow, ensemble=blocks.blocks, out="") == dataclasses.replace(rows["ensemble"], out="")
    if script in ("vit", "gpt"):
        assert (blocks.recipe, rows["paper"].recipe) == ("nano", "paper")


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_laptop_preset_has_the_papers_proportions(script):
    """12 layers in 3 blocks, of a GPT 8 or 12 in 4; and three seeds."""
    rows = {e.name.removeprefix(f"{script}-"): e for e in experiments("laptop") if e.group == script}
    assert {row.seeds for slug, row in rows.items() if slug != "paper"} == {3}
    assert sum(bool(row.note) for row in rows.values()) == 2, "the paper's end to end, and its blocks"
    settings = settings_of(rows["blocks"])
    if script != "looped":
        assert (settings.layers, settings.blocks) in ([(8, 4), (12, 4)] if script == "gpt" else [(12, 3)])


@pytest.mark.parametrize("script", SCRIPTS)
def test_three_rates_are_tried_of_each_method(script):
    tried = {}
    for e in experiments("laptop"):
        if e.group == "rates" and e.script == script:
            _, method, rate = e.row.split(", ")
            settings = settings_of(e)
            assert settings.learning_rate == float(rate) and settings.baseline == (method != "blocks")
            tried.setdefault(method, []).append(settings.learning_rate)
    assert tried == {method: list(rates(script, method)) for method in ("blocks", "baseline", "shallow")}
    for three in tried.values():
        assert len(three) >= 3 and all(2.9 < b / a < 3.4 for a, b in pairwise(three))


def test_further_questions_change_one_thing_each():
    named = {e.name: settings_of(e) for e in experiments("laptop")}
    usual, deep = named["dit-blocks"], named["dit-baseline"]
    assert named["dit-plateau-blocks"].steps == LONGER * usual.steps
    assert named["dit-conversion-started"].steps == named["dit-conversion-further"].steps == deep.steps // 2
    assert {named[f"vit-cifar10-{row}"].data for row in ("baseline", "blocks", "shallow", "ensemble")} == {"cifar10"}
    rows = [e for e in experiments("laptop") if e.group == "gpt-recipes"]
    first, *others = [settings_of(e) for e in rows]
    ours = {name: getattr(first, name) for name in ("head", "predict", "loss_weight", "noise")}
    changed = [{name for name, value in ours.items() if getattr(other, name) != value} for other in others]
    assert changed[-1] == set(ours), "recipe paper"
    for name in ours:
        assert any(name in names and len(names) <= 2 for names in changed), name


def test_a_run_that_starts_from_another_has_its_seed():
    started = next(e for e in experiments("laptop") if e.name == "dit-conversion-started")
    assert started.init_from(1) == "dit-baseline-s1" and "out/results/laptop/dit-baseline-s1" in started.command(1)


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
    plain, saving = (record["result"][memory] for memory in ("memory_bytes", "checkpointed_bytes"))
    assert saving["activations"] < plain["activations"] and saving["weights"] == plain["weights"]
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
    assert "to run: 1;" in out and len(started) == 2
    assert re.search(r"vit-bad +1 of 1 to run  python train_vit.py .*--seed 0\n", out)
    code, out, _ = few([rows[0], dataclasses.replace(rows[1], group="gpt"), rows[2]], "--list", "--only", "gpt")
    assert re.findall(r"(\S+) +. of . to run", out) == ["vit-baseline"] and "to run: 0;" in out
    pages = [tmp_path / name for name in ("a.md", "b.md")]
    for path in pages:
        path.write_text("<!-- results: tiny vit -->\n<!-- end -->\n")
    assert few(rows, "--summary-only", "--readme", *pages)[0] == 0
    for path in pages:
        table = path.read_text(encoding="utf-8").partition("-->\n")[2].partition("<!--")[0]
        assert {row["run"]: row["ms per step, all blocks"] != "–" for row in cells_of(table)}["vit-blocks"]
    whole = cells_of(summary.table("vit", summary.read_records(folder, "tiny")[0], whole=True))
    assert {row["run"]: (row["steps"], row["seeds"]) for row in whole}["vit-blocks"] == ("4", "2")


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
def test_an_interruption_lets_the_run_save_and_the_same_command_resumes_it(few, tmp_path, monkeypatch):
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
    assert code == 130 and "same command again" in err and not (tmp_path / "results/tiny/vit-blocks-s0.json").exists()
    code, _, err = few(rows)
    assert code == 0 and (tmp_path / "results/tiny/vit-blocks-s0.json").exists(), err


@pytest.mark.parametrize(
    "flags, message",
    [(("--only", "gtp"), "no table 'gtp'"), (("--jobs", 0), "at least 1"), (("--readme", "none.md"), "no such file")],
)
def test_bad_flags_get_one_clear_line(few, flags, message):
    code, _, err = few([], *flags)
    assert code == 2 and message in err and err.count("\n") == 1


def test_folders_that_cannot_be_made_are_one_line_that_names_the_flag(few, tmp_path):
    (tmp_path / "file").write_text("")
    for flag in ("--results", "--out"):
        code, _, err = few([row("vit-blocks")], flag, tmp_path / "file")
        assert code == 2 and f"choose another {flag}" in err and err.count("\n") == 1


def write(folder, experiment, seed, metrics=(), **parts):
    """A record of a run that was never made. `parts` are bytes; the checkpointed ones are half of their total."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = {part: float(parts.get(part, 2**20)) for part in PARTS}
    total = sum(counts.values())
    known = dataclasses.asdict(settings_of(experiment)) | dict(data="python")
    record = {
        "command": experiment.command_line(seed), "seed": seed, "machine": {"cpu": "slide rule"}, "data_sha256": "abc",
        "settings": known,
        "result": {
            "script": experiment.script, "steps": 7, "parameters": 2_500_000, "metrics": dict(metrics),
            "memory_bytes": {**counts, "total": total}, "checkpointed_bytes": {"total": total / 2},
            "seconds_per_step_all_blocks": 0.5, "one_sample": {"layer_evaluations": 1234, "seconds": 0.002},
            "versions": {"python": "3"},
        },
    }  # fmt: skip
    path = folder / f"{experiment.file(seed)}.json"
    path.write_text(json.dumps(record))
    return path


@pytest.fixture
def laptop(tmp_path):
    """The folder of a scale in which the seeds 0 and 1 of all rows of gpt are done but those of its last row."""
    folder = tmp_path / "results" / "laptop"
    for experiment in [row for row in experiments("laptop") if row.group == "gpt"][:-1]:
        for seed in range(min(2, experiment.seeds)):
            write(folder, experiment, seed, {"bits_per_char": 2.0 + 0.3 * seed})
    return folder


def cells_of(table):
    """The rows of a Markdown table, each as {column: cell}."""
    header, _, *lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines())
    assert all(len(line) == len(header) for line in lines)
    return [dict(zip(header, line, strict=True)) for line in lines]


def test_a_table_says_what_the_files_say(laptop):
    found, stale = summary.read_records(laptop, "laptop")
    rows = cells_of(summary.table("gpt", found, whole=True))
    assert not stale and len(rows) == 5
    assert rows[-1]["run"] == "mean of 4 such networks" and rows[-1]["steps"] == "–"
    assert rows[-1]["bits per character (lower is better)"] == "not run"
    assert rows[0] == {
        "run": "end to end", "command": "`python train_gpt.py --baseline`", "steps": "7", "seeds": "2 of 3",
        "learning rate": rows[0]["learning rate"],
        "bits per character (lower is better)": f"2.150 ± {statistics.stdev([2.0, 2.3]):.3f}", "parameters": "2.50 M",
        "training MiB": "4.0", "checkpointed": "2.0", "ms per step, all blocks": "500",
        "one sample: layers evaluated": "1,234", "ms": "2.0", "paper": "LM1B 0.50, OWT 0.85",
    }  # fmt: skip
    assert (
        float(rows[0]["learning rate"]) == settings_of(next(e for e in found if e.name == "gpt-baseline")).learning_rate
    )
    assert rows[2]["bits per character (lower is better)"] == "2.000", "one seed has no spread"
    pages, further = cells_of(summary.table("gpt", found)), cells_of(summary.table("gpt-depth", found))
    assert pages[0]["learning rate"] == rows[0]["learning rate"] and "seeds" not in pages[0]
    assert list(further[0]) == ["run", "command", "bits per character (lower is better)", "training MiB"]


def test_the_main_table_has_the_command_of_each_architecture_and_what_its_blocks_cost(laptop):
    for experiment in experiments("laptop"):  # a second architecture with two metrics, and no row `ensemble`
        if experiment.name in ("dit-baseline", "dit-blocks"):
            activations = 2**20 * (9 if experiment.name == "dit-baseline" else 1)
            write(laptop, experiment, 0, {"edm_loss": 0.2, "frechet_small": 0.5}, activations=activations)
    dit, frechet, gpt = cells_of(summary.main_table(summary.read_records(laptop, "laptop")[0]))
    assert dit["command of the blocks"] == "`python train_dit.py`" and frechet["command of the blocks"] == ""
    assert gpt["command of the blocks"] == "`python train_gpt.py --blocks 4`"
    assert dit["end to end"] == dit["blocks"] == "0.2000" and dit["mean of B such networks"] == "–"
    shares = [dit[name] for name in ("training memory: blocks", "end to end, checkpointed", "both")]
    assert shares == ["0.33", "0.50", "0.17"]
    assert frechet["blocks"] == "0.500" and gpt["blocks"].startswith("2.150 ± ")
    assert summary.fill("<!-- results: laptop main -->\n<!-- end -->", laptop.parent).count("\n") == 6
    for marked in ("laptop glyphs", "real dit", "labtop gpt", "labtop main", "labtop verdicts"):
        with pytest.raises(UsageError, match=f"{marked}.*no such scale or table"):
            summary.fill(f"<!-- results: {marked} -->\n<!-- end -->", laptop.parent)


def test_a_verdict_names_the_better_control_and_what_is_certain(laptop):
    """Shallow networks are worse than their mean, blocks better than both; end to end has other seeds' scatter."""
    named = {e.name: e for e in experiments("laptop")}
    for seed in range(3):
        for slug, bits in (
            ("blocks", 2.0),
            ("baseline", 2.0 + (0.3, -0.2, 0.1)[seed]),
            ("shallow", 2.4),
            ("ensemble", 2.2),
        ):
            bits += 0.001 * seed * (slug != "blocks")
            write(laptop, named[f"gpt-{slug}"], seed, {"bits_per_char": bits, "validation_bits_per_char": bits})
    found = summary.read_records(laptop, "laptop")[0]
    (row,) = cells_of(summary.table("verdicts", found))
    assert row["best control of equal memory"] == "2.201 ± 0.001 (mean of 4)"
    assert row["against end to end, control"] == "tie, win" and row["network"] == "GPT: bits ↓"
    (row,) = cells_of(summary.table("commands", found))
    assert row["command"] == "`python train_gpt.py --blocks 4`" and row["minutes"] == f"{0.5 * 7 / 60:.0f}"
    for slug in ("blocks", "baseline", "shallow", "ensemble"):
        for seed in (1, 2):
            (laptop / f"gpt-{slug}-s{seed}.json").unlink()
    (row,) = cells_of(summary.table("verdicts", summary.read_records(laptop, "laptop")[0]))
    assert row["against end to end, control"] == "–, –"


def test_the_best_rate_is_that_of_the_validation_half(tmp_path):
    """Of an accuracy the highest, of bits the lowest; what is reported does not count."""
    scores = {"vit": ("accuracy", (0.5, 0.7, 0.6)), "gpt": ("bits_per_char", (2.5, 2.2, 2.3))}
    for script, (metric, numbers) in scores.items():
        rows = [e for e in experiments("laptop") if e.group == "rates" and f"{script}, baseline" in e.row]
        for experiment, number in zip(rows, numbers, strict=True):
            write(tmp_path, experiment, 0, {metric: 1 - number, f"validation_{metric}": number})
    lines = summary.table("rates", summary.read_records(tmp_path, "laptop")[0]).splitlines()
    bold = {line.split(" | ")[0]: re.findall(r"\*\*(.*?)\*\*", line) for line in lines if "**" in line}
    middle = f"{rates('vit', 'baseline')[1]:g}"
    assert list(bold.values()) == [[f"{middle}: 0.700"], [f"{middle}: 2.200"]]


def test_the_p_of_a_paired_difference_is_students():
    """Two closed forms, and the two-sided 5% points of his table."""
    for t in (0.0, 0.3, 2.0, 50.0):
        assert differences.student_p(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), abs=1e-6)
        assert differences.student_p(-t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-6)
    for freedom, t in ((2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042)):
        assert differences.student_p(t, freedom) == pytest.approx(0.05, abs=2e-4)
    mean, error, p = differences.paired([1.0, 2.0, 4.0], [0.0, 0.0, 1.0])
    assert (mean, error) == pytest.approx((2.0, 1 / math.sqrt(3))) and p == differences.student_p(mean / error, 2)
    assert differences.paired([1.0, 2.0], [1.0, 2.0]) == (0.0, 0.0, 1.0)
    assert differences.paired([2.0, 3.0], [1.0, 2.0]) == (1.0, 0.0, 0.0)


def test_differences_are_taken_within_seeds_and_better_is_positive(laptop):
    """Blocks are 0.1 bits better with every seed, which differ by much more; the accuracy is worse, but not clearly."""
    named = {e.name: e for e in experiments("laptop")}
    for seed, (bits, noise) in enumerate(((2.0, 0.001), (2.3, -0.001), (1.2, 0.0))):
        write(laptop, named["gpt-baseline"], seed, {"bits_per_char": bits})
        write(laptop, named["gpt-blocks"], seed, {"bits_per_char": bits - 0.1 + noise})
        write(laptop, named["vit-baseline"], seed, {"accuracy": 0.9})
        if seed < 2:
            write(laptop, named["vit-blocks"], seed, {"accuracy": 0.9 - 0.3 * seed, "accuracy_walk": 0.7})
    vit, gpt, shallow = cells_of(summary.table("differences", summary.read_records(laptop, "laptop")[0]))
    assert gpt["compared"] == "4 blocks / end to end" and (gpt["seeds"], shallow["seeds"]) == ("3", "2")
    assert (gpt["the first is better by"], gpt["standard error"], gpt["verdict"]) == ("+0.100", "0.001", "win")
    assert (vit["the first is better by"], vit["p"], vit["verdict"]) == ("-0.150", "0.5", "tie")


def test_a_ratio_is_taken_within_seeds():
    """A machine that becomes ten times slower from seed to seed changes no ratio."""
    slow = [{"seed": seed, "result": {"a": {"b": 10.0**seed}}} for seed in range(3)]
    slower = [{"seed": seed, "result": {"a": {"b": 1.5 * 10**seed}}} for seed in (2, 0)]
    assert summary.ratio(slower, slow, "a", "b") == pytest.approx(1.5)
    assert summary.ratio(slow, slower, "a", "b") == pytest.approx(1 / 1.5)


def test_marked_tables_are_filled_and_a_changed_number_is_found(laptop):
    text = "before\n<!-- results: laptop gpt -->\n<!-- end -->\nafter <!-- results: laptop vit -->\nold\n<!-- end -->\n"
    filled = summary.fill(text, laptop.parent)
    assert filled.startswith("before\n<!-- results: laptop gpt -->\n| run | command |") and "old" not in filled
    assert summary.fill(filled, laptop.parent) == filled
    assert summary.fill(filled.replace("2.150", "2.149", 1), laptop.parent) == filled
    with pytest.raises(UsageError, match="no such scale or table"):
        summary.fill(text.replace("laptop gpt", "laptop gtp"), laptop.parent)


def test_a_summary_says_what_each_table_was_measured_on(laptop):
    path = write(laptop, next(row for row in experiments("laptop") if row.group == "mdm"), 0, {"bits_per_char": 2.0})
    path.write_text(path.read_text(encoding="utf-8").replace("slide rule", "abacus"))
    page = summary.summary(summary.read_records(laptop, "laptop")[0], "laptop")
    sections = dict(re.findall(r"## (.*)\n\n.*Measured on: (.*)\n", page))
    assert sections["Autoregressive transformer"] == "cpu: slide rule, python: 3; python abc."
    assert sections["Masked diffusion"] == "cpu: abacus, python: 3; python abc."
    assert sections["Diffusion transformer"] == "–."


def test_a_damaged_file_is_named(laptop):
    (laptop / "gpt-blocks-s0.json").write_text("{")
    with pytest.raises(UsageError, match=r"gpt-blocks-s0\.json is missing or damaged"):
        summary.read_records(laptop, "laptop")


def test_the_figure_of_depth_has_each_row_at_the_layers_of_a_network_or_of_a_block(tmp_path):
    """A row counts once it has been run: here all but the blocks of 4 layers."""
    for row in experiments("laptop"):
        if row.group == "gpt-depth" and row.row != "2 blocks of 4 layers":
            settings = settings_of(row)
            bits = settings.layers if settings.baseline else settings.layers // settings.blocks + 0.5
            for seed in range(row.seeds):
                write(tmp_path, row, seed, {"bits_per_char": bits + seed})
    panels = summary.depth_panels(summary.read_records(tmp_path, "laptop")[0])
    title = "Autoregressive transformer", "bits per character (lower is better)"
    assert list(panels) == [title]
    assert panels[title] == {
        "plain network": {depth: [depth, depth + 1, depth + 2] for depth in (2, 4, 8)},
        "blocks": {2: [2.5, 3.5, 4.5]},
    }
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


def test_the_table_of_the_readme_is_of_the_commands_that_it_names():
    """Each row is a command; with a seed it is that of a record, whose preset is the default on a CPU."""
    table = re.search(
        r"<!-- results: laptop commands -->\n(.*?)<!-- end -->", README.read_text(encoding="utf-8"), re.DOTALL
    )
    commands = [cells["command"].strip("`") for cells in cells_of(table[1])]
    recorded = {e.command_line(0): records for e, records in committed().items()}
    assert len(commands) == len(SCRIPTS)
    for command in commands:
        script = command.split("train_")[1].split(".py")[0]
        shallow = next(e for e in committed() if e.name == f"{script}-shallow").command_line(0)
        for line in (f"{command} --seed 0", f"python train_{script}.py --baseline --seed 0", shallow):
            assert len(recorded[line]) == 3, line
            assert {record["settings"]["preset"] for record in recorded[line]} <= {"laptop"}


def test_the_numbers_in_the_readmes_text_are_those_of_the_records():
    """What stands outside its tables: the bullets, and the output of the main job, which is seed 0."""
    text = one_line(README)
    runs = committed_by_name()
    (shown,) = re.findall(r"in 3 blocks reaches a loss of (\d\.\d+), the whole network (\d\.\d+)", text)
    assert_means(runs, "dit", shown)
    (shown,) = re.findall(r"with five times the steps the DiT reaches (\d\.\d+), in blocks (\d\.\d+)", text)
    assert_means(runs, "dit", shown, ("plateau-baseline", "plateau-blocks"))
    pattern = r"(\d\.\d+) bits per character; the whole network, and an ensemble of four shallow GPTs, (\d\.\d+)"
    ((blocks, whole),) = re.findall(pattern, text)
    assert_means(runs, "gpt", (blocks, whole, whole), ("blocks", "baseline", "ensemble"))
    (shown,) = re.findall(r"trains the same layers end to end \((\d\.\d+) bits\)", text)
    assert_means(runs, "gpt", [shown], ["baseline"])
    (shown,) = re.findall(r"GPT in 2 blocks: (\d\.\d+) bits, in 4: (\d\.\d+)", text)
    assert_means(runs, "gpt", shown, ["depth-blocks-4", "blocks"])
    (shown,) = re.findall(r"As a loop [^:]*: (\d\.\d+) bits to (\d\.\d+) \(end to end: (\d\.\d+)\)", text)
    assert_means(runs, "looped", shown, ("blocks", "shallow", "baseline"))
    (shown,) = re.findall(r"(\d+) MiB, not (\d+)\. So does \*checkpointing\* \((\d+); with blocks: (\d+)\),", text)
    cases = [("blocks", False), ("baseline", False), ("baseline", True), ("blocks", True)]
    for number, (slug, checkpointed) in zip(shown, cases, strict=True):
        key = "checkpointed_bytes" if checkpointed else "memory_bytes"
        assert f"{summary.median(runs[f'gpt-{slug}'], key, 'total') / 2**20:.0f}" == number
    first = next(record["result"] for record in runs["gpt-blocks"] if record["seed"] == 0)
    assert f"{first['metrics']['bits_per_char']:.4f} bits per character (upper bound)" in text


def committed_by_name():
    return {experiment.name: records for experiment, records in committed().items()}


def assert_means(runs, script, shown, slugs=("blocks", "baseline")):
    """shown: the mean of a script's first metric of each slug, with any number of decimals."""
    metric, *_ = summary.QUALITY[script][0]
    for slug, number in zip(slugs, shown, strict=True):
        mean = statistics.mean(summary.values(runs[f"{script}-{slug}"], metric))
        assert f"{mean:.{len(number.partition('.')[2])}f}" == number, (script, slug)


CLAIMS = [  # (script, what blocks are compared with, the sentence that has both means and p, or only p)
    ("dit", "baseline", r"EDM loss ([\d.]+) against ([\d.]+), p = ([\d.]+)"),
    ("vit", "baseline", r"accuracy ([\d.]+) against ([\d.]+), p = ([\d.]+)"),
    ("looped", "baseline", r"end-to-end baseline, Huginn \(([\d.]+) bits against ([\d.]+), p = ([\d.]+)"),
    ("mdm", "baseline", r"masked diffusion \(([\d.]+) bits against ([\d.]+), p = ([\d.]+)"),
    ("gpt", "baseline", r"autoregressive transformer \(([\d.]+) against ([\d.]+), p = ([\d.]+)"),
    ("looped", "shallow", r"without a loop reaches ([\d.]+) bits \(p = ([\d.]+)"),
    ("mdm", "baseline", r"although they are ahead with every seed \(p = ([\d.]+)"),
    ("vit", "baseline", r"against the whole network by 0\.004 \(p = ([\d.]+)"),
    ("vit", "shallow", r"that lead is not significant \(p = ([\d.]+)"),
    ("vit", "ensemble", r"with the mean of three such networks \(p = ([\d.]+)"),
    ("gpt", "ensemble", r"with the mean of four shallow networks \(p = ([\d.]+)"),
]


@pytest.mark.parametrize("script, other, pattern", CLAIMS)
def test_the_numbers_in_the_text_of_results_are_those_of_the_records(script, other, pattern):
    assert_claim("results.md", script, "blocks", other, pattern)


def assert_claim(page, script, ours, other, pattern):
    """What a page says of two rows of an architecture: the means of both, or of the second, or of none, and p."""
    text = one_line(ROOT / "docs" / page)
    runs = committed_by_name()
    name, column, _ = summary.QUALITY[script][0]
    (shown,) = re.findall(pattern, text)
    *means, p = [shown] if isinstance(shown, str) else shown
    assert_means(runs, script, means, (ours, other)[-len(means) :] if means else ())
    difference = summary.difference(runs[f"{script}-{ours}"], runs[f"{script}-{other}"], name, column)
    assert f"{difference[3]:.2g}" == p
    if "with every seed" in pattern:
        pairs = zip(*(summary.values(runs[f"{script}-{slug}"], name) for slug in (ours, other)), strict=True)
        assert all((first > second) == ("higher" in column) for first, second in pairs)


def test_what_the_page_of_results_says_of_single_seeds_and_of_frechet_small_is_in_the_records():
    text = one_line(ROOT / "docs" / "results.md")
    runs = committed_by_name()
    (shown,) = re.findall(r"behind Huginn with every seed \(([\d.]+), ([\d.]+) and ([\d.]+) bits", text)
    few = summary.values(runs["looped-blocks-few"], "bits_per_char")
    assert [f"{bits:.3f}" for bits in few] == [*shown]
    assert all(
        bits > whole for bits, whole in zip(few, summary.values(runs["looped-baseline"], "bits_per_char"), strict=True)
    )
    (p,) = re.findall(r"over the whole network is not significant \(p = ([\d.]+)\)", text)
    difference = summary.difference(runs["dit-blocks"], runs["dit-baseline"], "frechet_small", "lower is better")
    assert f"{difference[3]:.2g}" == p


def test_memory_and_time_in_the_text_of_results_are_those_of_the_records():
    text = one_line(ROOT / "docs" / "results.md")
    runs = committed_by_name()
    blocks, whole = (
        summary.median(runs[name], key, "total") / 2**20
        for name, key in (("dit-blocks", "memory_bytes"), ("dit-baseline", "checkpointed_bytes"))
    )
    assert f"({blocks:.1f} MiB; the whole network, checkpointed, takes {whole:.1f})" in text
    assert f"(DiT: {whole / blocks - 1:.0%} more)" in text
    for script in sorted({*SCRIPTS} - {"dit"}):  # the others need less
        whole = summary.median(runs[f"{script}-baseline"], "checkpointed_bytes", "total")
        assert whole < summary.median(runs[f"{script}-blocks"], "memory_bytes", "total")
    huginn = summary.median(runs["looped-baseline"], "seconds_per_step_all_blocks")
    ratios = [
        huginn / summary.median(runs[f"looped-{slug}"], "seconds_per_step_all_blocks") for slug in ("blocks", "shallow")
    ]
    assert min(ratios) > 6.5 and max(ratios) < 9.5 and "seven to nine times as long" in text


def test_what_the_page_of_results_says_of_photographs_is_in_the_records():
    text = one_line(ROOT / "docs" / "results.md")
    runs = committed_by_name()
    (shown,) = re.findall(r"Blocks \(([\d.]+)\) are about as good as the mean \(([\d.]+)\)", text)
    assert_means(runs, "vit", shown, ("cifar10-blocks", "cifar10-ensemble"))
    for script, metric, best, first in (
        ("vit", "accuracy", min, "baseline"),  # the whole network is last
        ("dit", "edm_loss", min, "blocks"),
        ("dit", "frechet_small", min, "baseline"),
    ):
        found = {s: summary.values(runs[f"{script}-cifar10-{s}"], metric) for s in summary.MAIN.values()}
        assert best(found, key=found.get) == first, (script, metric)


def test_the_hours_of_training_are_those_of_the_records():
    slugs = ("baseline", "blocks", "shallow", "ensemble", "paper")
    main = {f"{script}-{slug}" for script in SCRIPTS for slug in slugs}
    rows = {experiment.name: records for experiment, records in committed().items() if experiment.name in main}
    results = [record["result"] for records in rows.values() for record in records]
    hours = sum(r["seconds_per_step_all_blocks"] * r["steps"] for r in results) / 3600
    text = one_line(ROOT / "docs" / "results.md")
    assert re.findall(r"Training the five architectures took (\d+) core-hours", text) == [f"{hours:.0f}"]


def test_what_the_page_of_results_says_of_the_run_to_the_plateau_is_in_the_records():
    text = one_line(ROOT / "docs" / "results.md")
    runs = committed_by_name()
    (shown,) = re.findall(r"it reaches (\d\.\d+), blocks (\d\.\d+)", text)
    assert_means(runs, "dit", shown, ("plateau-baseline", "plateau-blocks"))
    (shown,) = re.findall(r"stay ahead of both controls \(([\d.]+) and ([\d.]+)\)", text)
    assert_means(runs, "dit", shown, ("plateau-ensemble", "plateau-shallow"))
    (last,) = (int(step.replace(",", "")) for step in re.findall(r"Blocks are ahead up to ([\d,]+) steps", text))
    blocks, whole = (plateau(runs, slug) for slug in ("blocks", "baseline"))
    assert [step <= last for step in whole] == [blocks[step] < loss for step, loss in whole.items()]


def plateau(runs, slug):
    """{step: held-out EDM loss} of the run to the plateau."""
    return {point["step"]: point["edm_loss"] for point in runs[f"dit-plateau-{slug}"][0]["evaluations"]}


ABLATIONS = [  # (script, a row of a further table, what it is compared with, the sentence with means and p)
    ("vit", "blocks", "depth-blocks-2", r"the ViT's blocks reach ([\d.]+) instead of ([\d.]+) \(p = ([\d.]+)\)"),
    ("gpt", "depth-blocks-4", "blocks", r"the GPT's ([\d.]+) bits instead of ([\d.]+) \(p = ([\d.]+)\)"),
    ("vit", "depth-blocks-2", "baseline", r"six blocks of two layers lose to the whole network \(p = ([\d.]+)\)"),
    ("gpt", "depth-blocks-4", "baseline", r"ahead of it with every seed, but not significantly \(p = ([\d.]+)\)"),
    ("vit", "depth-blocks-2", "depth-plain-2", r"of a ViT reach ([\d.]+) instead of ([\d.]+) \(p = ([\d.]+)\)"),
    (
        "dit",
        "conversion-started",
        "conversion-nothing",
        r"loss of ([\d.]+), blocks from scratch ([\d.]+) \(p = ([\d.]+)\)",
    ),
    ("dit", "conversion-started", "conversion-further", r"beats blocks that start from it: ([\d.]+) \(p = ([\d.]+)\)"),
    ("gpt", "depth-blocks-4", "depth-plain-4", r"of a GPT ([\d.]+) bits instead of ([\d.]+) \(p = ([\d.]+)\)"),
]


@pytest.mark.parametrize("script, ours, other, pattern", ABLATIONS)
def test_the_numbers_in_the_text_of_ablations_are_those_of_the_records(script, ours, other, pattern):
    assert_claim("ablations.md", script, ours, other, pattern)


@pytest.mark.parametrize(
    "script, other, pattern",
    [
        ("mdm", "shallow", r"by ([\d.]+) bits for masked diffusion \(p = ([\d.]+)\)"),
        ("gpt", "shallow", r"by ([\d.]+) for the GPT \(p = ([\d.]+)\)"),
        ("vit", "shallow", r"by ([\d.]+) for the ViT \(p = ([\d.]+)\)"),
        ("dit", "shallow", r"by ([\d.]+) for the DiT \(p = ([\d.]+)\)"),
        ("looped", "shallow", r"behind the plain transformer by ([\d.]+) bits \(p = ([\d.]+)\)"),
        ("looped", "shallow-few", r"after the same number of steps it is ahead by ([\d.]+) \(p = ([\d.]+)\)"),
    ],
)
def test_what_the_page_of_ablations_says_of_deep_against_shallow_is_in_the_records(script, other, pattern):
    text = one_line(ROOT / "docs" / "ablations.md")
    runs = committed_by_name()
    name, column, decimals = summary.QUALITY[script][0]
    _, better, _, p = summary.difference(runs[f"{script}-baseline"], runs[f"{script}-{other}"], name, column)
    assert re.findall(pattern, text) == [(f"{abs(better):.{decimals}f}", f"{p:.2g}")]
    assert (better < 0) == ("behind" in pattern)


def test_what_the_page_of_ablations_says_of_another_processor_is_in_the_records():
    """Its table, and the verdicts that change if seed 0 of the blocks is the other processor's."""
    text, runs, changed = one_line(ROOT / "docs" / "ablations.md"), committed_by_name(), {}
    for script in SCRIPTS:
        metric, column, decimals = summary.QUALITY[script][0]
        decimals = 4 if script == "vit" else decimals
        other = json.loads((ROOT / "results" / "xeon" / f"{script}-blocks-s0.json").read_text())
        blocks = sorted(runs[f"{script}-blocks"], key=lambda record: record["seed"])
        first = blocks[0]["result"]["metrics"][metric]
        assert f"| {column} | {first:.{decimals}f} | {other['metrics'][metric]:.{decimals}f} |" in text
        settings = {k: v for k, v in other["settings"].items() if k not in ("out", "init_from")}
        assert settings.items() <= blocks[0]["settings"].items() and settings["seed"] == 0
        again = [{**blocks[0], "result": {**blocks[0]["result"], "metrics": other["metrics"]}}, *blocks[1:]]
        for name in ("baseline", "shallow", "ensemble"):
            if rows := runs.get(f"{script}-{name}"):
                before, after = (summary.difference(b, rows, metric, column)[3] for b in (blocks, again))
                if (before < 0.05) != (after < 0.05):
                    changed[script, name] = f"(p = {after:.2g}) instead of tying with it (p = {before:.2g})"
        if script == "gpt":
            assert f"another processor got {other['metrics'][metric]:.4f} and" in one_line(README)
    assert list(changed) == [("gpt", "baseline")] and changed["gpt", "baseline"] in text


def test_which_runs_of_the_main_comparison_are_another_processors_is_what_the_page_of_ablations_says():
    runs = committed_by_name()
    elsewhere = {
        (name, record["seed"])
        for name in (f"{script}-{slug}" for script in SCRIPTS for slug in summary.MAIN.values())
        for record in runs.get(name, [])
        if record["machine"]["cpu"] != "AMD EPYC"  # the README's and the page's word for all the others
    }
    means = {(f"{script}-ensemble", seed) for script in ("vit", "dit", "mdm", "gpt") for seed in (1, 2)}
    assert elsewhere == means | {("looped-shallow", seed) for seed in range(3)}


def test_what_the_page_of_ablations_says_of_the_preset_is_in_the_records():
    (shown,) = re.findall(r"scratch reach ([\d.]+) with the preset's", one_line(ROOT / "docs" / "ablations.md"))
    assert_means(committed_by_name(), "dit", [shown], ["blocks"])


def test_what_the_page_of_ablations_says_of_the_clean_term_is_in_the_records():
    text = one_line(ROOT / "docs" / "ablations.md")
    runs = committed_by_name()
    shown = re.findall(r"validation score by ([\d.]+) bits \(three seeds, p = ([\d.]+)\)", text)
    shown += re.findall(r"test half it gains less, ([\d.]+) bits, though with every seed \(p = ([\d.]+)\)", text)
    for metric, (bits, p) in zip(("validation_bits_per_char", "bits_per_char"), shown, strict=True):
        better = summary.difference(runs["gpt-blocks"], runs["gpt-recipes-clean"], metric, "lower is better")
        assert (f"{better[1]:.3f}", f"{better[3]:.2g}") == (bits, p)


def test_what_the_page_of_ablations_says_of_single_options_is_in_the_records():
    text = one_line(ROOT / "docs" / "ablations.md")
    runs = committed_by_name()
    (shown,) = re.findall(
        r"nano reaches ([\d.]+) bits instead of ([\d.]+); with the paper's noise levels, ([\d.]+)\.", text
    )
    assert_means(runs, "gpt", shown, ("recipes-active", "blocks", "recipes-noise"))
    (shown,) = re.findall(r"two streams: the GPT's blocks reach ([\d.]+) bits, close to recipe paper's ([\d.]+)", text)
    assert_means(runs, "gpt", shown, ["recipes-head", "paper"])
    (shown,) = re.findall(r"costs little at our noise levels \(([\d.]+)\)", text)
    assert_means(runs, "gpt", [shown], ["recipes-weight"])


@pytest.mark.parametrize(
    "notebook, script, slugs, pattern",
    [
        ("08_looped_without_bptt", "looped", ("shallow", "blocks"), r"better \(([\d.]+) bits against ([\d.]+)\)"),
        ("09_what_does_it_buy", "gpt", ("blocks", "baseline"), r"whole network \(([\d.]+) bits against ([\d.]+)\)"),
        ("09_what_does_it_buy", "gpt", ("depth-blocks-4",), r"\(([\d.]+), ahead with every seed\)"),
        ("09_what_does_it_buy", "vit", ("depth-blocks-2", "baseline"), r"classify glyphs: ([\d.]+) against ([\d.]+)"),
    ],
)
def test_the_numbers_in_the_text_of_notebooks_are_those_of_the_records(notebook, script, slugs, pattern):
    (shown,) = re.findall(pattern, prose(notebook))
    assert_means(committed_by_name(), script, [shown] if isinstance(shown, str) else shown, slugs)


def test_what_notebook_7_says_of_masked_diffusion_is_in_the_records():
    runs = committed_by_name()
    (p,) = re.findall(r"with every seed, though not significantly \(p = ([\d.]+)\)", prose("07_masked_diffusion"))
    difference = summary.difference(runs["mdm-blocks"], runs["mdm-baseline"], "bits_per_char", "lower is better")
    assert f"{difference[3]:.2g}" == p


def test_what_notebook_9_says_of_the_run_to_the_plateau_is_in_the_records():
    ((first, lead, way),) = re.findall(
        r"from ([\d,]+) steps on it is ahead of them, by ([\d.]+) at the end .* covers (\d+)% of the way",
        prose("09_what_does_it_buy"),
    )
    runs = committed_by_name()
    losses = {slug: plateau(runs, slug) for slug in summary.MAIN.values()}
    first = int(first.replace(",", ""))
    assert [step >= first for step in losses["baseline"]] == [
        loss < losses["blocks"][step] for step, loss in losses["baseline"].items()
    ]
    last = max(losses["baseline"])
    assert first in losses["baseline"]
    whole, blocks, one, several = (losses[slug][last] for slug in ("baseline", "blocks", "shallow", "ensemble"))
    assert (f"{blocks - whole:.4f}", f"{100 * (one - several) / (one - blocks):.0f}") == (lead, way)


def prose(notebook):
    """The text of a notebook, without line breaks."""
    cells = json.loads((ROOT / "notebooks" / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    return " ".join(" ".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown").split())


def committed(scale="laptop"):
    """{experiment: its records} of what is committed."""
    return summary.read_records(ROOT / "results" / scale, scale)[0]


def test_committed_results_are_those_of_todays_presets():
    """A preset that has changed since makes a file stale, although its command is still the same."""
    stale = []
    for experiment, records in committed().items():
        settings = settings_of(experiment)
        used = [f for f in dataclasses.fields(settings) if f.metadata["of"] in (None, settings.method)]
        today = {f.name: getattr(settings, f.name) for f in used if not f.metadata["resumable"] and f.name != "seed"}
        if experiment.script == "dit":  # where no flag has named them, the data has
            known = dict(zip(("p_mean", "sigma_data"), NOISE_LEVELS[settings.data], strict=True))
            today |= {name: value for name, value in known.items() if today[name] is None}
        for record in records:
            kept = record["settings"]
            if any(kept.get(name, value) not in (value, None) for name, value in today.items() if name != "init_from"):
                stale.append(f"{experiment.file(record['seed'])}.json")
    assert not stale, "delete these, and run them again"


def test_all_committed_results_are_of_one_version():
    versions = {r["result"]["versions"]["nano_db"] for records in committed().values() for r in records}
    assert versions <= {nano_db.__version__}


def test_each_method_trains_at_the_rate_that_is_best_on_the_validation_half():
    """Of three (or more) which have been tried; the best must not be the first or the last of them."""
    found = {}
    for experiment, records in committed().items():
        if experiment.group == "rates":
            script, method, rate = experiment.row.split(", ")
            name, column, _ = summary.QUALITY[script][0]
            found.setdefault((script, method, column), {})[float(rate)] = summary.values(records, f"validation_{name}")
    for (script, method, column), scores in found.items():
        chosen = next(e for e in experiments("laptop") if e.name == f"{script}-{method}")
        assert all(scores.values()) and summary.best_rate(scores, column) == settings_of(chosen).learning_rate
        assert settings_of(chosen).learning_rate in sorted(scores)[1:-1], "try a rate beyond it"


@pytest.mark.parametrize("path", ["pyproject.toml", "CITATION.cff"])
def test_the_version_is_the_same_everywhere(path):
    found = re.findall(r'^version[: =]+"?([\d.]+)', (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
    assert found == [nano_db.__version__]


def test_committed_summaries_are_those_of_their_files():
    folder = ROOT / "results" / "laptop"
    assert {path.name for path in (ROOT / "results").iterdir()} == {"laptop", "xeon", "gpu"}
    found, stale = summary.read_records(folder, folder.name)
    assert (folder / "summary.md").read_text(encoding="utf-8") == summary.summary(found, folder.name)
    known = {experiment.file(seed) for experiment in found for seed in range(experiment.seeds)}
    assert not stale and {path.stem for path in folder.glob("*.json")} <= known, "files of no experiment"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 3_000_000


@pytest.mark.slow
def test_the_whole_tiny_scale_runs(cli, tmp_path):
    where = ("--out", tmp_path / "out", "--results", tmp_path / "results")
    code, _, err = cli("--scale", "tiny", "--jobs", 2, *where, main=results.main)
    assert code == 0, err
    assert "not run" not in (tmp_path / "results" / "tiny" / "summary.md").read_text(encoding="utf-8")
