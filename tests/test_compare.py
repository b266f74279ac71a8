import json

import pytest

from experiments import compare


def write(folder, bits, script="gpt", **changes):
    folder.mkdir()
    result = {
        "script": script, "method": "blocks", "blocks": 4, "steps": 10, "parameters": 1000,
        "metrics": {"bits_per_char": bits, "nats_per_block": [1, 2]}, "memory_bytes": {"total": 2**20},
        "seconds_per_step": 0.1, "seconds_per_step_all_blocks": 0.4, **changes,
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))
    return str(folder)


def test_the_table_has_values_and_ratios_to_the_first(tmp_path, cli):
    folders = [write(tmp_path / "a", 2.0), write(tmp_path / "b", 3.0)]
    code, out, _ = cli(*folders, main=compare.main)
    header, _, first, second = out.splitlines()[:4]
    assert code == 0 and "bits_per_char" in header and "nats_per_block" not in header
    assert "| a | 4 | 10 | 2 (1.000) |" in first and "| b | 4 | 10 | 3 (1.500) |" in second and "400 (1.000)" in second


@pytest.mark.parametrize("content, message", [(None, "finish that run"), ("{", "damaged"), ("[]", "damaged")])
def test_folders_without_a_good_result_are_named(tmp_path, cli, content, message):
    (tmp_path / "a").mkdir()
    if content:
        (tmp_path / "a" / "result.json").write_text(content)
    code, _, err = cli(tmp_path / "a", main=compare.main)
    assert code == 2 and message in err and err.count("\n") == 1


def test_runs_of_different_scripts_are_not_compared(tmp_path, cli):
    code, _, err = cli(write(tmp_path / "a", 1.0), write(tmp_path / "b", 1.0, script="vit"), main=compare.main)
    assert code == 2 and "different scripts" in err
