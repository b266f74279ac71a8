import json
import re
import sys
from dataclasses import dataclass, fields
from operator import attrgetter

import pytest
import torch
from conftest import ROOT
from test_run import Settings as RunSettings
from test_run import make_run, train

import train_dit
import train_gpt
import train_looped
import train_mdm
import train_vit
from nano_db.errors import UsageError
from nano_db.trainer.run import learning_rate
from nano_db.trainer.settings import (
    RENAMED,
    Discrete,
    Training,
    method,
    network,
    output,
    read_settings,
    shortened,
    training,
)

in_all_scripts = pytest.mark.parametrize(
    "script", [train_dit, train_gpt, train_looped, train_mdm, train_vit], ids=attrgetter("__name__")
)


@dataclass
class Settings(Discrete, Training):
    width: int = network(8, "features", at_least=2, below=100)
    hidden: int = network(1, "no user needs it", flag=False)
    sharpness: float = method(0.5, "of the head", above=0, of="blocks")
    ways: str = training("one", "to go", choices=("one", "two"))
    words: str = output("", "to print", once=True, needs="samples")


PRESETS = {
    "tiny": dict(width=2, steps=30, hidden=7, warmup=1),
    "tiny-baseline": dict(steps=4),
    "laptop": dict(width=16, learning_rate=0.25),
    "gpu": {},
    "paper": {},
}
RECIPES = {"nano": dict(noise="nano", warmup=10), "paper": dict(noise="paper", loss_weight="edm", warmup=20)}


@pytest.fixture
def read(monkeypatch):
    def read(*flags):
        monkeypatch.setattr(sys, "argv", ["train_toy.py", *map(str, flags)])
        return read_settings("toy", Settings, PRESETS, RECIPES, "A toy.")

    return read


def test_a_flag_beats_the_recipe_which_beats_the_preset_which_beats_the_default(read):
    usual = read()
    assert (usual.width, usual.learning_rate, usual.noise, usual.warmup) == (16, 0.25, "nano", 10)
    assert (usual.steps, usual.hidden, usual.preset, usual.recipe) == (1000, 1, "laptop", "nano")
    assert usual.device == ("cuda" if torch.cuda.is_available() else "cpu")
    tiny = read("--preset", "tiny", "--recipe", "paper", "--loss-weight", "none", "--width", 5)
    assert (tiny.width, tiny.steps, tiny.noise, tiny.loss_weight, tiny.warmup) == (5, 30, "paper", "none", 20)
    assert (tiny.preset, tiny.recipe, tiny.learning_rate) == ("tiny", "paper", 1e-3)


def test_a_baseline_has_a_presets_twin_and_no_recipe(read):
    baseline = read("--preset", "tiny", "--baseline")
    assert (baseline.steps, baseline.width, baseline.warmup, baseline.method) == (4, 2, 1, "baseline")
    assert read("--preset", "tiny").steps == 30 and read("--baseline").steps == 1000


def test_the_folder_is_named_after_script_and_method(read):
    assert (read().out, read("--baseline").out, read("--out", "x").out) == ("out/toy-blocks", "out/toy-baseline", "x")


def test_a_field_without_a_flag_is_for_presets_only(read, capsys):
    assert read("--preset", "tiny").hidden == 7
    for wrong in (["--hidden", "3"], ["--no-such-flag"], ["--wid", "3"], ["--width", "x"], ["--ways", "three"]):
        with pytest.raises(SystemExit) as stop:
            read(*wrong)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and wrong[0] in err and err.count("\n") == 1


def test_help_has_each_flag_under_its_heading_with_what_it_is_when_none_is_given(read, capsys):
    with pytest.raises(SystemExit):
        read("--help")
    help = " ".join(capsys.readouterr().out.split())
    expected = {
        "method": ["--baseline", "--recipe {nano,paper}", "--sharpness", "of the head [blocks only] (default 0.5)"],
        "network": ["--width", "features (default 16)"],
        "training": ["--ways {one,two}", "to go (default one)", "--steps", "--learning-rate", "(default 0.25)"],
        "output": ["--words", "--out", "--eval-only"],
    }
    starts = [help.index(f" {heading}: ") for heading in expected]
    assert starts == sorted(starts) and "A toy." in help and "--hidden" not in help
    for start, end, words in zip(starts, [*starts[1:], None], expected.values(), strict=True):
        assert all(word in help[start:end] for word in words), help[start:end]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--width", 1], "--width must be at least 2, not 1"),
        (["--width", 100], "--width must be at most 99, not 100"),
        (["--sharpness", 0], "--sharpness must be greater than 0, not 0.0"),
        (["--sharpness", "nan"], "--sharpness must be a finite number, not nan"),
        (["--learning-rate", "inf"], "--learning-rate must be a finite number, not inf"),
        (["--baseline", "--sharpness", 1], "--sharpness does nothing with the baseline method: drop it"),
        (["--baseline", "--recipe", "paper"], "--recipe does nothing with the baseline method: drop it"),
        (["--device", "mps"], "--device mps is not available on this machine"),
        (["--eval-only", "--preset", "tiny"], "--preset does nothing with --eval-only"),
        (["--eval-only", "--recipe", "paper"], "--recipe does nothing with --eval-only"),
        (["--eval-only", "--compile"], "--compile does nothing with --eval-only"),
        (["--eval-only", "--rounds", 3], "--rounds does nothing with --eval-only"),
        (["--eval-only", "--checkpoint-activations"], "--checkpoint-activations does nothing with --eval-only"),
        (["--out", ""], "--out is empty: give it a value, or drop it"),
        (["--words", "a", "--samples", 0], "--words does nothing with --samples 0: drop it"),
        (["--eval-only", "--out", "nowhere"], "nowhere holds no run"),
    ],
)
def test_what_is_out_of_its_limits_or_does_nothing_is_refused(read, tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path / "out/toy-blocks")  # for --eval-only
    with pytest.raises(UsageError) as error:
        read(*flags)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@in_all_scripts
def test_eval_only_refuses_what_only_training_uses(cli, tmp_path, script):
    values = {"preset": ["tiny"], "recipe": ["nano"], "rounds": [2], "only": [1]}
    write_config(tmp_path, script.__name__.removeprefix("train_"))
    refused = values.keys() & {f.name for f in fields(script.Settings)} | {"compile", "checkpoint_activations"}
    for name in refused:
        flag = "--" + name.replace("_", "-")
        code, _, err = cli("--eval-only", flag, *values.get(name, []), "--out", tmp_path, main=script.main)
        assert code == 2 and f"{flag} does nothing with --eval-only" in err and err.count("\n") == 1, err


@pytest.mark.parametrize(
    "script, flags, message",
    [
        (train_gpt, "--samples 0 --prompt ab", "--prompt does nothing with --samples 0"),
        (train_looped, "--samples 0 --prompt ab", "--prompt does nothing with --samples 0"),
        (train_mdm, "--samples 0 --fill a_", "--fill does nothing with --samples 0"),
        (train_gpt, "--samples 0 --temperature 1", "--temperature does nothing with --samples 0"),
        (train_looped, "--samples 0 --temperature 1", "--temperature does nothing with --samples 0"),
        (train_mdm, "--samples 0 --temperature 1", "--temperature does nothing with --samples 0"),
        (train_mdm, "--samples 0 --sampling-steps 9", "--sampling-steps does nothing with --samples 0"),
        (train_vit, "--data cifar10 --glyphs 200", "--glyphs does nothing with --data cifar10"),
    ],
)
def test_a_flag_that_another_one_leaves_without_effect_is_refused(cli, tmp_path, script, flags, message):
    code, _, err = cli(*flags.split(), "--out", tmp_path / "run", main=script.main)
    assert code == 2 and message in err and err.count("\n") == 1 and not (tmp_path / "run").exists(), err


@pytest.mark.parametrize("script", [train_gpt, train_looped], ids=attrgetter("__name__"))
def test_preset_paper_does_not_train_on_another_text_than_the_papers_unasked(cli, text_file, tmp_path, script):
    code, _, err = cli("--preset", "paper", "--out", tmp_path / "run", main=script.main)
    assert code == 2 and err.count("\n") == 1 and not (tmp_path / "run").exists(), err
    assert "--preset paper needs --data" in err and "LM1B or OpenWebText" in err
    sys.argv = ["train.py", "--preset", "paper", "--data", text_file]
    assert read_settings("x", script.Settings, script.PRESETS, script.RECIPES).data == text_file


NEW_NAMES = {
    "--walk": ("--predict", train_gpt, train_vit),
    "--calls": ("--sampling-steps", train_dit, train_looped),
    "--unmask-steps": ("--sampling-steps", train_mdm),
    "--turns": ("--recurrences", train_looped),
    "--backprop-turns": ("--backprop-depth", train_looped),
    "--start-from": ("--init-from", train_dit, train_gpt, train_mdm, train_vit),
    "--readout": ("--pooling", train_vit),
    "--micro-batch": ("--checkpoint-activations", train_dit, train_gpt, train_mdm, train_vit),
}


@pytest.mark.parametrize("old", NEW_NAMES | RENAMED)
def test_a_flag_of_an_earlier_edition_is_refused_by_the_name_of_the_new_one(cli, tmp_path, old):
    new, *scripts = NEW_NAMES[old]
    for script in scripts:
        assert new[2:].replace("-", "_") in {f.name for f in fields(script.Settings)}, "no such flag"
        for form in ([old, "4"], [f"{old}=4"], ["--eval-only", old, "4"], ["--no-such-flag", old, "4"]):
            code, out, err = cli(*form, "--out", tmp_path / "run", main=script.main)
            assert code == 2 and out == "" and err.count("\n") == 1 and not (tmp_path / "run").exists(), err
            assert re.search(rf"error: {old} .*use {new}\b", err), err


def write_config(folder, script="toy", **settings):
    config = {"script": script, "depends_on": {}, "versions": {}, "settings": settings}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))


def test_eval_only_inherits_no_flag_that_was_for_one_time(read, tmp_path):
    write_config(tmp_path, words="a", width=5)
    settings = read("--eval-only", "--out", tmp_path)
    assert (settings.width, settings.words) == (5, "")
    assert read("--eval-only", "--out", tmp_path, "--words", "b").words == "b"


@pytest.mark.parametrize("computes, dtype", [(True, "bfloat16"), (False, "float32")])
def test_the_dtype_is_settled_once_and_a_run_keeps_its_own_on_another_device(
    read, tmp_path, monkeypatch, computes, dtype
):
    assert read("--device", "cpu", "--out", tmp_path).dtype == "float32"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: computes)
    assert read("--device", "cuda", "--out", tmp_path).dtype == dtype
    for own in ("float32", "bfloat16"):
        write_config(tmp_path, dtype=own)
        assert read("--device", "cuda", "--out", tmp_path).dtype == own
        assert read("--device", "cpu", "--out", tmp_path).dtype == own
    assert read("--device", "cuda", "--out", tmp_path, "--dtype", "float32").dtype == "float32"


@in_all_scripts
def test_presets_and_recipes_set_fields_that_there_are_to_values_that_they_may_have(script, monkeypatch):
    names = {f.name for f in fields(script.Settings)}
    recipes = getattr(script, "RECIPES", None)
    for bundle in (*script.PRESETS.values(), *(recipes or {}).values()):
        assert bundle.keys() <= names
    for preset in ("tiny", "laptop", "gpu", "paper"):
        for flags in (["--baseline"], *(["--recipe", recipe] for recipe in recipes or {})):
            monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", "--preset", preset, *flags])
            read_settings("x", script.Settings, script.PRESETS, recipes)


@in_all_scripts
def test_there_is_no_setting_that_nothing_reads(script):
    paths = [ROOT / f"{script.__name__}.py", ROOT / "nano_db/language.py"]
    paths += ROOT.glob("nano_db/trainer/*.py")
    code = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    elsewhere = {"preset", "recipe", "ensemble", "blocks", "only"}  # on the command line, or by getattr
    for f in fields(script.Settings):
        assert re.search(rf"settings\.{f.name}\b", code) or f.name in elsewhere, f"nothing reads {f.name}"


def another(field, value):
    """Another value that the field may have."""
    if isinstance(value, str):
        return {"dtype": "bfloat16", "only": "0"}.get(field, "tiny")
    return not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else value / 2 + 0.1


@pytest.mark.parametrize(
    "field", [f for f in fields(RunSettings) if f.name not in ("out", "device", "init_from")], ids=attrgetter("name")
)
def test_a_run_resumes_with_other_resumable_settings_and_with_no_others(tmp_path, monkeypatch, field):
    monkeypatch.setattr("torch.nn.Module.compile", lambda self: None)
    options = {"steps": 4, "rounds": 2, "blocks": 1}
    train(make_run(tmp_path, **options), rounds=1)
    before = getattr(make_run(tmp_path, **options).settings, field.name)
    other = another(field.name, before)
    run = make_run(tmp_path, **{**options, field.name: other})
    if field.metadata["resumable"]:
        assert train(run) == ([] if run.settings.eval_only else [0])
    else:
        with pytest.raises(UsageError, match=f"{field.name} {before!r} there, {other!r} here"):
            train(run)


# --- runs of fewer steps than a preset's ---


@in_all_scripts
@pytest.mark.parametrize("preset", ["laptop", "gpu"])
@pytest.mark.parametrize("share", [0.5, 0.09, 0.01, 1.0, 2.0])
def test_a_shorter_run_warms_up_in_proportion_and_reaches_the_peak(script, preset, share, capsys, tmp_path):
    """So that its learning rate is that of the preset, seen through a smaller lens."""
    flags = ["--preset", preset, "--device", "cpu", "--out", str(tmp_path)]
    recipes = getattr(script, "RECIPES", None)
    whole, short = (
        read_settings("x", script.Settings, script.PRESETS, recipes, flags=[*flags, *more])
        for more in ([], ["--steps", str(max(1, round(script.PRESETS[preset]["steps"] * share)))])
    )
    rates = [learning_rate(step, short) for step in range(short.steps)]
    assert max(rates) == pytest.approx(short.learning_rate, rel=0.01 if short.steps > 20 else 0.2)
    assert short.warmup == round(whole.warmup * min(1, share)) and short.rounds == max(
        1, round(whole.rounds * min(1, share))
    )
    for name in ("eval_windows", "test_images", "frechet_images"):
        size = getattr(whole, name, 0)
        tenth = min(size, max(100, size // 10)) if share < 0.1 else size
        assert getattr(short, name, 0) == tenth, name
    out = capsys.readouterr().out
    assert (f"--steps {short.steps} in place of the preset's" in out) == (share < 1)
    assert (f"warmup {short.warmup} (of {whole.warmup})" in out) == (share < 1)


@pytest.mark.parametrize(
    "steps, expected",
    [
        (2000, {}),
        (1000, dict(warmup=50, rounds=2)),
        (400, dict(warmup=20, rounds=1)),
        (200, dict(warmup=10, rounds=1)),
        (199, dict(warmup=10, rounds=1, eval_windows=100)),
        (50, dict(warmup=2, rounds=1, eval_windows=100)),
        (1, dict(warmup=0, rounds=1, eval_windows=100)),
    ],
)
def test_what_a_gpt_of_fewer_steps_has_otherwise(steps, expected):
    whole = train_gpt.Settings(steps=2000, warmup=100, rounds=4, eval_windows=256)
    assert shortened(whole, steps) == expected
    everything = train_vit.Settings(steps=2000, warmup=100, test_images=0)
    assert "test_images" not in shortened(everything, steps), "0 is all, and stays"


def test_flags_win_over_what_fewer_steps_would_make_of_a_preset(read, capsys):
    given = read("--steps", 100, "--warmup", 60, "--rounds", 7)
    assert (given.warmup, given.rounds) == (60, 7) and "in place of" not in capsys.readouterr().out


@in_all_scripts
@pytest.mark.parametrize(
    "flags, message",
    [
        ("--steps 50 --warmup 51", "--warmup 51 is longer than --steps 50"),
        ("--steps 3 --rounds 4", "--rounds 4 is more than --steps 3"),
        ("--batch-size 3000000000", "--batch-size must be less than 2^31"),
        ("--steps 99999999999999999999", "--steps must be less than 2^31"),
    ],
)
def test_what_no_run_can_do_is_refused(cli, tmp_path, script, flags, message):
    code, _, err = cli(*flags.split(), "--out", tmp_path / "run", main=script.main)
    assert code == 2 and message in err and err.count("\n") == 1 and not (tmp_path / "run").exists(), err


def test_rounds_that_nobody_would_take_are_refused(cli, tmp_path, monkeypatch):
    code, _, err = cli("--only", 1, "--rounds", 2, "--out", tmp_path / "run")
    assert code == 2 and "--rounds does nothing with --only" in err and err.count("\n") == 1, err
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = cli("--rounds", 2, "--out", tmp_path / "run")
    assert code == 2 and "--rounds does nothing with torchrun" in err and err.count("\n") == 1, err
    monkeypatch.setenv("WORLD_SIZE", "many")
    code, _, err = cli("--out", tmp_path / "run")
    assert code == 2 and "WORLD_SIZE=many in the environment is not a number" in err and err.count("\n") == 1, err


def test_auto_never_takes_a_macs_gpu_and_help_says_so(read, monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert read().device == "cpu" and read("--device", "mps").device == "mps"
    with pytest.raises(SystemExit):
        read("--help")
    assert "mps, a Mac's GPU, only on request" in " ".join(capsys.readouterr().out.split())
