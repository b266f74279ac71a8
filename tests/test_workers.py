"""Many processes, one run. gloo on the CPU stands in for nccl on CUDA, which the tests do not have."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, SMALL, needs_namespaces, same, tensors

import nano_db.lock
import train_dit
import train_gpt
import train_looped
import train_mdm
import train_vit
from nano_db import check, speedup
from nano_db.block import DiffusionBlock, EndToEnd
from nano_db.codebook import PosteriorHead, make_codebook
from nano_db.errors import UsageError
from nano_db.lock import lock
from nano_db.masking import MaskedBlock, MaskSchedule
from nano_db.run import read_metrics
from nano_db.schedule import LogNormal
from nano_db.workers import Team, Worker, join
from train_gpt import GPT, Settings

# What torchrun is started with. Addresses are given, since a machine's own name cannot be resolved everywhere.
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"} | ({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {})


def torchrun(ranks, *flags, script=("train_gpt.py",), small=SMALL, **environment):
    """Run a script in `ranks` processes on this machine; returns what subprocess.run does."""
    start = [*TORCHRUN, "--nproc-per-node", ranks, *script, *small, *flags]
    environment = {**ENVIRONMENT, **environment}
    done = subprocess.run(list(map(str, start)), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def losses(folder, b):
    return [r["loss"] for r in read_metrics(folder, "train") if r["block"] == b]


# --- who trains what ---


def test_each_rank_gets_its_block_several_or_a_place_in_a_team():
    shares = lambda ranks, blocks: [  # noqa: E731
        (mine, team.place, team.size)
        for mine, team in (Worker(rank, ranks).share(list(range(blocks))) for rank in range(ranks))
    ]
    assert shares(1, 3) == [([0, 1, 2], 0, 1)]
    assert shares(3, 3) == [([0], 0, 1), ([1], 0, 1), ([2], 0, 1)]
    assert shares(2, 5) == [([0, 2, 4], 0, 1), ([1, 3], 0, 1)]
    assert shares(5, 2) == [([0], 0, 3), ([0], 1, 3), ([0], 2, 3), ([1], 0, 2), ([1], 1, 2)]
    for ranks in range(1, 20):
        for blocks in range(1, 9):
            found = shares(ranks, blocks)
            assert sorted({b for mine, _, _ in found for b in mine}) == list(range(blocks))
            assert sum(place == 0 for _, place, _ in found) == min(ranks, max(blocks, ranks if ranks < blocks else 0))


def test_without_a_launcher_a_process_is_alone_and_half_a_launcher_is_named(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join() == Worker(0, 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UsageError, match="torchrun"):
        join()


def make_blocks():
    noise, codebook = LogNormal(0.3, 0.8, 0.05, 20.0), make_codebook(11, 16)
    gpt = Settings(width=16, heads=2, seq_len=10)
    looped = train_looped.Settings(width=16, heads=2, seq_len=10, prelude=1, core=1, coda=1, mean_recurrence=4.0)
    return {
        "block": DiffusionBlock(GPT(11, gpt, 1, True), PosteriorHead(codebook), noise, (0.05, 20.0)),
        "weighted": DiffusionBlock(
            GPT(11, gpt, 1, True), PosteriorHead(codebook), noise, (0.1, 1.0), loss_weight="edm"
        ),
        "baseline": EndToEnd(GPT(11, gpt, 1, False), PosteriorHead(codebook)),
        "masked": MaskedBlock(train_mdm.Unmasker(11, gpt, 1), MaskSchedule("cosine"), 11, (0.2, 0.7)),
        "huginn": train_looped.Huginn(train_looped.Looped(11, looped, False), PosteriorHead(codebook), looped),
    }


@pytest.mark.parametrize("kind", make_blocks())
@pytest.mark.parametrize("size", [2, 3])
def test_the_shares_of_a_team_add_up_to_the_whole_batch(kind, size, monkeypatch):
    """What DistributedDataParallel does, the mean of the members' gradients, done here by hand."""
    module = make_blocks()[kind]
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", lambda loss, **_: loss)
    x, y = torch.randint(11, (2, 8, 10), generator=torch.Generator().manual_seed(0))
    batch = x if kind == "masked" else (x, y)

    def step(team):
        torch.manual_seed(5)
        loss = team.loss(module, len(x))(batch)
        return loss.detach(), torch.autograd.grad(loss, list(module.parameters()), materialize_grads=True)

    whole, gradients = step(Team())
    parts = [step(Team(place, size)) for place in range(size)]
    torch.testing.assert_close(sum(loss for loss, _ in parts) / size, whole)
    for i, gradient in enumerate(gradients):
        torch.testing.assert_close(sum(g[i] for _, g in parts) / size, gradient, rtol=1e-4, atol=1e-6)


def test_a_team_is_refused_where_it_cannot_work():
    class Plain(torch.nn.Module):
        def loss(self, batch):
            return batch.mean()

    assert Team().loss(Plain(), 8)(torch.ones(3)) == 1
    with pytest.raises(UsageError, match="takes no rows"):
        Team(0, 2).loss(Plain(), 8)
    with pytest.raises(UsageError, match="--batch-size 2 is too small"):
        Team(0, 3).loss(make_blocks()["baseline"], 2)


def test_a_lost_member_of_a_team_is_one_line_and_other_errors_stay_what_they_are(monkeypatch):
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **kwargs: None)
    team = Team(0, 2, dist.HashStore())
    with pytest.raises(UsageError, match="block 3 lost a process"), team.connected(3, "cpu"):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234")
    with pytest.raises(UsageError, match="block 3 lost a process"), team.connected(3, "cpu"):
        raise dist.DistNetworkError("timeout")
    with pytest.raises(RuntimeError, match="shapes"), team.connected(3, "cpu"):
        raise RuntimeError("shapes do not fit")
    with pytest.raises(UsageError, match="mps"), team.connected(3, "mps"):
        pass


# --- torchrun ---


def test_four_ranks_one_process_and_four_lone_runs_write_the_same_blocks_and_ranks_exchange_nothing(
    small, text_file, tmp_path
):
    flags = ["--ema", "0.9", "--rounds", "2"]
    small("--out", tmp_path / "one", *flags)
    for b in (2, 0, 3, 1):
        (tmp_path / f"only{b}").mkdir()
        small("--out", tmp_path / f"only{b}", *flags, "--only", b)
    done = torchrun(
        4,
        *("--out", tmp_path / "four", "--data", text_file, *flags),
        script=("tests/record_groups.py", "train_gpt.py"),
        RECORD=str(tmp_path / "record"),
    )
    for b in range(4):
        assert same(tensors(tmp_path / "one", b), tensors(tmp_path / "four", b))
        assert same(tensors(tmp_path / "one", b), tensors(tmp_path / f"only{b}", b))
        assert losses(tmp_path / "one", b)[-1] == losses(tmp_path / "four", b)[-1]
        sent = json.loads((tmp_path / f"record.{b}").read_text())
        assert sent["groups"] == [] and set(sent["store"]) == {"add"}  # one number: how many have finished
    assert done.stdout.count("bits per character") == 1
    one, four = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "four"))
    assert one["metrics"] == four["metrics"]
    for b in (1, 2, 3):  # files trained apart, copied together
        shutil.copy(tmp_path / f"only{b}" / f"block_{b}.pt", tmp_path / "only0")
    code, out, err = small("--out", tmp_path / "only0", *flags)
    assert code == 0 and "bits per character" in out, err


def test_three_ranks_for_two_blocks_the_team_has_the_curve_of_one_process(small, text_file, tmp_path):
    flags = ["--blocks", "2", "--layers", "4", "--log-every", "1", "--ema", "0.9"]
    small("--out", tmp_path / "one", *flags)
    torchrun(
        3,
        *("--out", tmp_path / "three", "--data", text_file, *flags),
        script=("tests/record_groups.py", "train_gpt.py"),
        RECORD=str(tmp_path / "record"),
    )
    groups = [json.loads((tmp_path / f"record.{rank}").read_text())["groups"] for rank in range(3)]
    assert groups == [[[0, 1]], [[0, 1]], []]  # the team of block 0; block 1's process joins no group at all
    assert losses(tmp_path / "three", 0) == pytest.approx(losses(tmp_path / "one", 0), rel=1e-5)
    for ours, theirs in zip(tensors(tmp_path / "three", 0), tensors(tmp_path / "one", 0), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    assert same(tensors(tmp_path / "three", 1), tensors(tmp_path / "one", 1))


TEXT, IMAGES = ("--seq-len", "8"), ("--samples", "0", "--glyphs", "150")


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, ranks, flags",
    [
        (train_gpt, 3, (*TEXT, "--blocks", "1", "--recipe", "paper")),  # shares of 2, 3 and 3 rows
        (train_gpt, 2, (*TEXT, "--blocks", "1", "--z", "inside", "--walk", "last")),
        (train_gpt, 2, (*TEXT, "--baseline")),
        (train_mdm, 2, (*TEXT, "--blocks", "1")),
        (train_looped, 2, TEXT),
        (train_looped, 2, (*TEXT, "--baseline")),
        (train_vit, 2, (*IMAGES, "--blocks", "1")),
        (train_dit, 2, (*IMAGES, "--blocks", "1", "--frechet-images", "0")),
    ],
)
def test_a_team_has_the_curve_of_one_process_in_every_script(cli, text_file, tmp_path, script, ranks, flags):
    shared = ["--preset=tiny", "--width=16", "--steps=12", "--warmup=2", "--log-every=1", "--device=cpu"]
    shared += [*(("--data", text_file) if "--seq-len" in flags else ()), *flags, "--out"]
    torchrun(ranks, tmp_path / "team", script=(f"{script.__name__}.py",), small=shared)
    assert cli(*shared, tmp_path / "one", main=script.main)[0] == 0
    assert losses(tmp_path / "team", 0) == pytest.approx(losses(tmp_path / "one", 0), rel=1e-4)


@pytest.mark.slow
def test_two_ranks_for_three_blocks_take_turns(small, text_file, tmp_path):
    small("--out", tmp_path / "one", "--blocks", "3")
    torchrun(2, "--out", tmp_path / "two", "--data", text_file, "--blocks", "3")
    for b in range(3):
        assert same(tensors(tmp_path / "one", b), tensors(tmp_path / "two", b))


@pytest.mark.slow
@pytest.mark.parametrize("ranks, blocks", [(2, 2), (2, 1)])
def test_a_killed_rank_leaves_whole_files_and_the_same_command_resumes(small, text_file, tmp_path, ranks, blocks):
    """The victim is the process that trains the last block; torchrun then stops the others."""
    flags = ["--blocks", str(blocks), "--steps", "300", "--save-every", "4", "--data", text_file]
    small("--out", tmp_path / "whole", *flags)
    job = subprocess.Popen(
        [*TORCHRUN, "--nproc-per-node", str(ranks), "train_gpt.py", *SMALL, *flags, "--out", tmp_path / "killed"],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    victim, deadline = tmp_path / "killed" / f"block_{blocks - 1}.pt", time.monotonic() + 60
    while not victim.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    owner = (tmp_path / "killed" / f".block_{blocks - 1}.lock").read_text()
    os.kill(int(re.match(r"process (\d+) ", owner)[1]), signal.SIGKILL)
    job.communicate(timeout=60)
    assert job.returncode != 0
    for b in range(blocks):
        if (tmp_path / "killed" / f"block_{b}.pt").exists():
            tensors(tmp_path / "killed", b)  # whole
    assert int(tensors(tmp_path / "killed", blocks - 1)[-1]) < 300
    torchrun(ranks, *flags, "--out", tmp_path / "killed")
    for b in range(blocks):
        for ours, theirs in zip(tensors(tmp_path / "killed", b), tensors(tmp_path / "whole", b), strict=True):
            if ranks == blocks:
                assert torch.equal(ours, theirs)
            else:
                torch.testing.assert_close(ours, theirs, rtol=0.05, atol=1e-3)


@pytest.mark.slow
@needs_namespaces
def test_the_network_carries_gradients_within_a_team_and_nothing_between_blocks(text_file, tmp_path):
    """All bytes are counted: each job runs in a network of its own that has a loopback device and nothing else."""

    def bytes_sent(steps, blocks):
        out = tmp_path / f"{blocks}-{steps}"
        flags = ["--steps", steps, "--blocks", blocks, "--data", text_file, "--out", out, "--log-every", 10_000]
        flags = [*SMALL, *map(str, flags)]
        script = "ip link set lo up && \"$@\" >/dev/null 2>&1 && awk '/lo:/ {print $2}' /proc/net/dev"
        start = [*TORCHRUN, "--nproc-per-node", "2", "train_gpt.py", *flags]
        command = ["unshare", "-rn", "sh", "-c", script, "sh", *start]
        counted = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True, text=True)
        weights = torch.load(out / "block_0.pt", weights_only=True)["weights"]
        return int(counted.stdout), 4 * sum(tensor.numel() for tensor in weights.values())

    (short, gradient), (long, _) = bytes_sent(10, blocks=1), bytes_sent(210, blocks=1)
    assert long - short > 200 * gradient  # a team sends at least its gradient each step: the count sees it
    print(f"\n200 steps of a team: {long - short} bytes; its gradient has {gradient}")
    (short, gradient), (long, _) = bytes_sent(10, blocks=2), bytes_sent(210, blocks=2)
    print(f"200 steps of two blocks: {long - short} bytes; a gradient has {gradient}")
    assert long - short < gradient  # torchrun's own heartbeat, which goes by the second, not by the step


# --- two processes on one block ---


def test_a_second_process_on_a_block_is_refused_and_the_first_one_loses_nothing(small, tmp_path):
    small("--out", tmp_path / "run", "--only", "0")
    before = (tmp_path / "run" / "block_0.pt").read_bytes()
    with lock(tmp_path / "run" / ".block_1.lock", "block 1"):
        code, _, err = small("--out", tmp_path / "run")
        assert code == 2 and f"block 1 is in the hands of process {os.getpid()}" in err and err.count("\n") == 1
        assert small("--out", tmp_path / "run", "--only", "2")[0] == 0  # the other blocks are free
    assert (tmp_path / "run" / "block_0.pt").read_bytes() == before
    assert small("--out", tmp_path / "run")[0] == 0


def test_a_folder_in_use_is_not_taken_by_other_settings(small, tmp_path):
    small("--out", tmp_path / "run", "--only", "0")
    (tmp_path / "run" / "block_0.pt").unlink()  # as before the first save
    config = (tmp_path / "run" / "config.json").read_bytes()
    with lock(tmp_path / "run" / ".block_0.lock", "block 0"):
        code, _, err = small("--out", tmp_path / "run", "--seed", "1", "--only", "2")
    assert code == 2 and "block 0 is in the hands of" in err
    assert (tmp_path / "run" / "config.json").read_bytes() == config


def test_a_lock_dies_with_its_owner(tmp_path):
    path = tmp_path / "lock"
    hold = f"from nano_db.lock import lock\nwith lock({str(path)!r}, 'it'):\n    print('held', flush=True); input()"
    owner = subprocess.Popen([sys.executable, "-c", hold], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert owner.stdout.readline() == b"held\n"
    with pytest.raises(UsageError, match=f"it is in the hands of process {owner.pid} on"), lock(path, "it"):
        pass
    owner.kill()
    owner.wait()
    with lock(path, "it"):
        pass


@pytest.mark.parametrize("absent", ["on this file system", "on Windows"])
def test_where_there_are_no_locks_a_warning_says_so(tmp_path, monkeypatch, capsys, absent):
    def refuse(file, mode):
        raise OSError(errno.ENOLCK, "No locks available")

    if absent == "on Windows":
        monkeypatch.setattr(nano_db.lock, "fcntl", None)
    else:
        monkeypatch.setattr(nano_db.lock.fcntl, "flock", refuse)
    with lock(tmp_path / "lock", "block 3"):
        assert "warning: no locks here" in (err := capsys.readouterr().err) and "block 3" in err


# --- the check command ---


@pytest.fixture
def checked(cli):
    return lambda *args: cli(*args, main=check.main)


def test_check_counts_the_blocks_and_evaluates_when_all_are_there(small, checked, tmp_path):
    small("--out", tmp_path / "run", "--only", "0,1,3")
    code, out, _ = checked(tmp_path / "run")
    assert code == 1 and "block 2  step 0 of 12  missing" in out and "--only 2" in out
    small("--out", tmp_path / "run", "--only", "2")
    start = [sys.executable, "-m", "nano_db.check", tmp_path / "run", "--prompt", "the fox"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(start, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in ("block 2  step 12 of 12  complete", "bits per character", "the fox|"):
        assert word in done.stdout
    code, out, _ = checked(tmp_path / "run", "--files-only")
    assert code == 0 and "partition: the same" in out
    code, _, err = checked(tmp_path / "nowhere")
    assert code == 2 and "holds no run" in err


def test_check_refuses_files_that_do_not_belong_together(small, checked, tmp_path):
    small("--out", tmp_path / "a")
    small("--out", tmp_path / "b", "--seed", "7", "--overlap", "0.2", "--only", "1")
    good = (tmp_path / "a" / "block_1.pt").read_bytes()
    shutil.copy(tmp_path / "b" / "block_1.pt", tmp_path / "a")
    code, _, err = checked(tmp_path / "a")
    assert code == 2 and "overlap 0.2 there, 0.1 here; seed 7 there, 0 here" in err and err.count("\n") == 1
    (tmp_path / "a" / "block_1.pt").write_bytes(good)
    config = tmp_path / "a" / "config.json"
    text = config.read_text()
    sha256 = json.loads(text)["about"]["data_sha256"]
    config.write_text(text.replace(sha256, "0" * 64))
    code, _, err = checked(tmp_path / "a")
    assert code == 2 and f"data_sha256 '{sha256}' there, '{'0' * 64}' here" in err
    config.write_text(text.replace('"script": "gpt"', '"script": "../../evil"'))
    assert checked(tmp_path / "a")[0] == 2
    config.write_text(text)
    (tmp_path / "a" / "block_0.pt").write_bytes(good)
    code, _, err = checked(tmp_path / "a")
    assert code == 2 and "block_0.pt holds block 1" in err


def test_check_runs_no_script_but_our_own(tmp_path):
    with pytest.raises(UsageError, match=r"there are .*gpt"):
        check.script_path({"about": {"script": "../../evil"}})
    assert check.script_path({"about": {"script": "mdm"}}) == ROOT / "train_mdm.py"


# --- what more processes gain ---


def test_the_speedup_is_the_median_of_ratios_within_pairs(cli, monkeypatch):
    times = iter([(4.0, 1.0), (8.0, 2.0), (12.0, 6.0), (3.0, 2.0), (6.0, 3.0), (12.0, 6.0)])  # 2 first, then 1 first
    monkeypatch.setattr(speedup, "measure", lambda workers, script, flags: next(times))
    code, out, _ = cli("--pairs", "3", "train_gpt.py", "--steps", "5", main=speedup.main)
    assert code == 0 and "whole command: 2 workers are 2.00 times as fast" in out
    assert "training: 2 workers are 2.00 times as fast" in out
    assert cli("--workers", "1", "train_gpt.py", main=speedup.main)[0] == 2


@pytest.mark.slow
def test_the_speedup_is_measured_from_real_runs(text_file):
    for workers in (1, 2):
        whole, training = speedup.measure(workers, "train_gpt.py", [*SMALL, "--blocks", "2", "--data", text_file])
        assert 0 < training < whole
    with pytest.raises(UsageError, match="no such data set"):
        speedup.measure(1, "train_gpt.py", ["--data", "nowhere"])
