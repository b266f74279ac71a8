import json
import resource

import pytest
import torch

from nano_db.errors import UsageError
from nano_db.run import Run, read_config, read_metrics

SETTINGS = {"width": 8, "prompt": "a"}


def make_run(folder, **changes):
    return Run(folder, {**SETTINGS, **changes}, ["width"], {"data": "abc"})


def save(run, b=0, value=1.0):
    run.save_block(b, 5, 1.5, {"w": torch.full((4000,), value)}, {"state": {}})


def test_a_block_comes_back_as_it_was_saved(tmp_path):
    run = make_run(tmp_path)
    assert run.load_block(0) is None
    save(run)
    state = run.load_block(0)
    assert (state["step"], state["seconds"], state["settings"]) == (5, 1.5, {"width": 8, "data": "abc"})
    assert torch.equal(state["weights"]["w"], torch.ones(4000))


def test_a_folder_belongs_to_one_setting_and_one_text(tmp_path):
    save(make_run(tmp_path))
    make_run(tmp_path, prompt="b")  # weights do not depend on it
    with pytest.raises(UsageError, match="width 8 there, 9 here"):
        make_run(tmp_path, width=9)
    with pytest.raises(UsageError, match="data 'abc' there, 'xyz' here"):
        Run(tmp_path, SETTINGS, ["width"], {"data": "xyz"})


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint", "half", "flipped"])
def test_a_damaged_block_is_named(tmp_path, damage):
    run = make_run(tmp_path)
    save(run)
    content = bytearray(run.block_path(0).read_bytes())
    if damage == "half":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        content[len(content) // 2 : len(content) // 2 + 64] = bytes(64)
    run.block_path(0).write_bytes(damage if isinstance(damage, bytes) else content)
    with pytest.raises(UsageError, match=r"block_0\.pt"):
        run.load_block(0)


def test_foreign_and_misplaced_blocks_are_named(tmp_path):
    run = make_run(tmp_path / "a")
    save(run)
    run.block_path(0).rename(run.block_path(1))
    with pytest.raises(UsageError, match="holds block 0"):
        run.load_block(1)
    torch.save({"some": "tensors"}, run.block_path(0))
    with pytest.raises(UsageError, match="no block of nano_db"):
        run.load_block(0)
    other = make_run(tmp_path / "b", width=9)
    save(other)
    other.block_path(0).rename(run.block_path(0))
    with pytest.raises(UsageError, match="width 9 there, 8 here"):
        run.load_block(0)


def test_a_block_that_would_run_code_is_refused(tmp_path):
    class Attack:
        def __reduce__(self):
            return print, ("code ran",)

    run = make_run(tmp_path)
    torch.save({"format": "nano_db block 1", "weights": Attack()}, run.block_path(0))
    with pytest.raises(UsageError, match="damaged or no block"):
        run.load_block(0)


def test_a_full_disk_leaves_the_last_good_file(tmp_path):
    """The limit on file size stands in for the disk: writing past it fails in the same way."""
    run = make_run(tmp_path)
    save(run, value=1.0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(UsageError, match=r"cannot write .*block_0\.pt .*untouched"):
            save(run, value=2.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(run.load_block(0)["weights"]["w"], torch.ones(4000))
    assert sorted(path.name for path in tmp_path.glob("*")) == [".config.lock", "block_0.pt", "config.json"]


def test_a_folder_that_cannot_be_made_or_holds_strange_files_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot make the output folder"):
        make_run(tmp_path / "file" / "out")
    (tmp_path / "block_0.pt").write_text("")
    with pytest.raises(UsageError, match=r"no config\.json"):
        make_run(tmp_path)
    with pytest.raises(UsageError, match="holds no run"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match="damaged"):
        read_config(tmp_path)


def test_half_a_line_left_by_a_kill_is_skipped_and_repeated_steps_count_once(tmp_path):
    run = make_run(tmp_path)
    run.log(kind="train", block=0, step=1, loss=3.0)
    run.log(kind="train", block=0, step=2, loss=2.0)
    with open(tmp_path / "metrics_0.jsonl", "a") as file:
        file.write('{"kind": "tr')
    run.log(kind="train", block=0, step=2, loss=1.0)
    records = read_metrics(tmp_path, "train")
    assert [(r["step"], r["loss"]) for r in records] == [(1, 3.0), (2, 1.0)]


def test_result_is_plain_json(tmp_path):
    make_run(tmp_path).finish({"script": "gpt"})
    assert json.loads((tmp_path / "result.json").read_text())["script"] == "gpt"
