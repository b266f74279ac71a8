"""Many processes, one run. gloo on the CPU stands in for nccl on CUDA, which the tests do not have."""

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, SMALL, needs_fork, needs_namespaces, same, tensors
from test_run import make_run

import nano_db.masking
import nano_db.trainer.checkpoints
import train_dit
import train_gpt
import train_looped
import train_mdm
import train_vit
from nano_db.block import DiffusionBlock, EndToEnd
from nano_db.errors import UsageError
from nano_db.heads import DenoisingHead, PosteriorHead, make_target_embeddings
from nano_db.masking import MaskedBlock, MaskSchedule
from nano_db.schedule import LogNormal
from nano_db.trainer.checkpoints import lock, read_metrics
from nano_db.trainer.distributed import Group, Worker
from nano_db.trainer.run import Run, seed_from
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


def test_each_rank_gets_its_block_several_or_a_rank_in_a_group():
    batch = math.lcm(*range(1, 20))
    assigned = lambda ranks, blocks: [  # noqa: E731
        (mine, group.rank, group.size)
        for mine, group in (Worker(rank, ranks).assign(list(range(blocks)), batch) for rank in range(ranks))
    ]
    assert assigned(1, 3) == [([0, 1, 2], 0, 1)]
    assert assigned(3, 3) == [([0], 0, 1), ([1], 0, 1), ([2], 0, 1)]
    assert assigned(2, 5) == [([0, 2, 4], 0, 1), ([1, 3], 0, 1)]
    assert assigned(5, 2) == [([0], 0, 3), ([0], 1, 3), ([0], 2, 3), ([1], 0, 2), ([1], 1, 2)]
    for ranks in range(1, 20):
        for blocks in range(1, 9):
            found = assigned(ranks, blocks)
            assert sorted({b for mine, _, _ in found for b in mine}) == list(range(blocks))
            assert sum(rank == 0 for _, rank, _ in found) == min(ranks, max(blocks, ranks if ranks < blocks else 0))


def test_without_a_launcher_a_process_is_alone_and_half_a_launcher_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    run = make_run(tmp_path)
    assert (run.worker, run.group, run.batch_size) == (Worker(0, 1), Group(0, 1), 32)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UsageError, match="torchrun"):
        make_run(tmp_path)


@pytest.mark.parametrize("rank, size", [(0, 2), (1, 2), (2, 1)])
def test_a_batch_is_shared_evenly_or_not_at_all(small, tmp_path, monkeypatch, rank, size):
    """Three processes for two blocks: ranks 0 and 1 form a group."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(dist, "rendezvous", lambda url: iter([(dist.HashStore(), rank, 3)]))
    run = make_run(tmp_path / "shared", blocks=2, batch_size=8)
    assert (run.mine, run.group.rank, run.group.size) == ([rank // 2], rank % 2, size) and run.batch_size == 8 // size
    if size == 2:
        code, _, err = small("--blocks", "2", "--batch-size", "7", "--out", tmp_path / "run")
        assert code == 2 and "--batch-size 7 must be a multiple of the 2 processes" in err and err.count("\n") == 1
        assert not (tmp_path / "run").exists()


# --- groups ---


def as_group(size, work, folder):
    """What work(group) returns, by rank, in `size` forks of this process that are connected; a UsageError as text."""
    needs_fork()
    folder.mkdir()
    pids = []
    for rank in range(size):
        pids.append(os.fork())
        if pids[-1] == 0:
            code = 70
            try:
                os.environ.update(ENVIRONMENT)
                result = work(Group(rank, size, dist.FileStore(str(folder / "store"), size)))
                torch.save(result, folder / f"{rank}.pt")
                code = 0
            except UsageError as error:
                torch.save(str(error), folder / f"{rank}.pt")
                code = 0
            finally:
                os._exit(code)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return [torch.load(folder / f"{rank}.pt") if code == 0 else code for rank, code in enumerate(codes)]


def make_blocks():
    noise, target_embeddings = LogNormal(0.3, 0.8, 0.05, 20.0), make_target_embeddings(11, 16)
    gpt = Settings(width=16, heads=2, seq_len=10)
    looped = train_looped.Settings(width=16, heads=2, seq_len=10, prelude=1, core=1, coda=1, mean_recurrence=4.0)
    return {
        "block": DiffusionBlock(GPT(11, gpt, 1), DenoisingHead(target_embeddings), noise, (0.05, 20.0)),
        "two streams": DiffusionBlock(
            GPT(11, gpt, 1, sees_z=True), PosteriorHead(target_embeddings), noise, (0.1, 1.0), loss_weight="edm"
        ),
        "baseline": EndToEnd(GPT(11, gpt, 1), PosteriorHead(target_embeddings)),
        "masked": MaskedBlock(train_mdm.Unmasker(11, gpt, 1), MaskSchedule("cosine"), 11, (0.2, 0.7)),
        "huginn": train_looped.Huginn(train_looped.Looped(11, looped, False), PosteriorHead(target_embeddings), looped),
    }


DRAWS = [(torch, "rand"), (torch, "randn"), (torch, "randn_like"), (torch, "poisson")]
DRAWS += [(nano_db.masking, "low_discrepancy_times")]  # whose times are those of a whole batch


def losses_one_by_one(module, batch, monkeypatch):
    """The loss of each single sample of the batch, under the noise that the whole batch draws."""
    drawn, nested = [], []

    def recorded(function, *args, **kwargs):
        nested.append(function)
        result = function(*args, **kwargs)
        nested.pop()
        if not nested:
            drawn.append(result)
        return result

    with monkeypatch.context() as patch:
        for place, name in DRAWS:
            patch.setattr(place, name, partial(recorded, getattr(place, name)))
        module.loss(*batch)
    for i in range(len(batch[0])):
        again = iter([draw[i : i + 1] if draw.dim() else draw for draw in drawn])
        with monkeypatch.context() as patch:
            for place, name in DRAWS:
                patch.setattr(place, name, lambda *args, again=again, **kwargs: next(again))
            yield module.loss(*(part[i : i + 1] for part in batch))


@pytest.mark.parametrize("kind", make_blocks())
@pytest.mark.parametrize("size", [2, 3])
def test_the_averaged_gradients_of_a_group_are_those_of_the_joined_batch(kind, size, tmp_path, monkeypatch):
    """Against a slow loop over the samples of all members' batches, each with the noise that its member draws."""
    torch.manual_seed(0)
    module, run = make_blocks()[kind], make_run(tmp_path / "run")

    def draw(rank):
        seed_from(0, 1, 7, rank)
        x, y = torch.randint(11, (2, 12 // size, 10))
        return [x] if kind == "masked" else [x, y]

    def work(group):
        run.group = group
        with group.connected(1, "cpu", 7):
            loss = module.loss(*draw(group.rank))
            loss.backward()
            own = [p.grad.clone() for p in module.parameters() if p.grad is not None]
            run.average_gradients(module)
            return own, [p.grad for p in module.parameters() if p.grad is not None], group.mean(loss.detach().clone())

    members = as_group(size, work, tmp_path / "group")
    alone = [loss for rank in range(size) for loss in losses_one_by_one(module, draw(rank), monkeypatch)]
    assert len(alone) == 12
    joined = torch.stack(alone).mean()
    joined.backward()
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    own, averaged, mean = members[0]
    torch.testing.assert_close(mean, joined.detach())
    torch.testing.assert_close(averaged, gradients, rtol=1e-4, atol=1e-6)
    assert all(same(averaged, other) for _, other, _ in members), "all members go the same way"
    far = [(a - b).abs().max() > 1e-3 for a, b in zip(own, gradients, strict=True)]
    assert any(far), "a member's own gradients are others"


def test_a_step_on_which_the_members_do_not_agree_is_one_line(tmp_path):
    def work(group):
        with group.connected(3, "cpu", step=5 * group.rank):  # as where only one of them sees the block's file
            return "went on"

    for answer in as_group(2, work, tmp_path / "group"):
        assert "block 3's file is not the same for all processes" in answer and "\n" not in answer


def test_a_stop_asked_of_one_member_is_heard_by_all(tmp_path):
    def work(group):
        with group.connected(0, "cpu", 0):
            return [group.any(flags, "cpu") for flags in ([], [15] if group.rank == 1 else [])]

    assert as_group(3, work, tmp_path / "group") == [[False, True]] * 3


def test_a_member_that_dies_is_one_line_to_the_other(tmp_path):
    def work(group):
        with group.connected(0, "cpu", 0):
            if group.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            while True:
                group.average([torch.ones(1000)])

    answer, died = as_group(2, work, tmp_path / "group")
    assert "lost a process of its group: run the same command again to resume" in answer and "\n" not in answer
    assert died == -signal.SIGKILL


def test_a_lost_member_of_a_group_is_one_line_and_other_errors_stay_what_they_are(monkeypatch):
    group = Group(0, 2, dist.HashStore())
    for kind, text, expected, words in [
        (
            RuntimeError,
            "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234",
            UsageError,
            "lost",
        ),
        (dist.DistNetworkError, "timeout", UsageError, "lost a process"),
        (RuntimeError, "shapes do not fit", RuntimeError, "shapes"),
    ]:

        def fail(*args, kind=kind, text=text, **kwargs):
            raise kind(text)

        monkeypatch.setattr(dist, "all_reduce", fail)
        for use in (
            lambda: group.average([torch.ones(2)]),
            lambda: group.mean(torch.ones(2)),
            lambda: group.any([], "cpu"),
        ):
            with pytest.raises(expected, match=words):
                use()
    with pytest.raises(UsageError, match="mps"), group.connected(3, "mps", 0):
        pass


class Joined(Run):
    """A slow reference for a group of two: one process that plays both members in each step, averages their gradients
    by hand, and then lets the optimizer take the step.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.batch_size //= 2

    def steps(self, b, module, optimizer):
        for step in super().steps(b, module, optimizer):
            self.members = []
            for rank in range(2):
                seed_from(self.settings.seed, b, step, rank)
                yield step

    def average_gradients(self, module):
        """Puts the first member's aside: without gradients the optimizer does nothing."""
        trained = [p for p in module.parameters() if p.grad is not None]
        self.members.append([p.grad for p in trained])
        for p in trained:
            p.grad = None
        if len(self.members) == 2:
            for p, first, second in zip(trained, *self.members, strict=True):
                p.grad = (first + second) / 2

    def record(self, loss, norm):
        if len(self.members) == 1:
            self.first = loss.detach()
        else:
            super().record((self.first + loss) / 2, norm)


# --- torchrun ---


@pytest.mark.slow
def test_four_ranks_one_process_and_four_lone_runs_write_the_same_blocks_and_ranks_exchange_nothing(
    small, text_file, tmp_path, monkeypatch
):
    monkeypatch.setitem(train_gpt.PRESETS, "tiny", {**train_gpt.PRESETS["tiny"], "ema": 0.9})
    flags = ["--rounds", "1"]
    small("--out", tmp_path / "one", "--rounds", "2")
    for b in (2, 0, 3, 1):
        (tmp_path / f"only{b}").mkdir()
        small("--out", tmp_path / f"only{b}", *flags, "--only", b)
    done = torchrun(
        4,
        *("--out", tmp_path / "four", "--data", text_file, *flags),
        script=("tests/record_groups.py", "train_gpt.py"),
        RECORD=str(tmp_path / "record"),
        EMA="0.9",
    )
    for b in range(4):
        assert same(tensors(tmp_path / "one", b), tensors(tmp_path / "four", b))
        assert same(tensors(tmp_path / "one", b), tensors(tmp_path / f"only{b}", b))
        assert losses(tmp_path / "one", b)[-1] == losses(tmp_path / "four", b)[-1]
        sent = json.loads((tmp_path / f"record.{b}").read_text(encoding="utf-8"))
        assert sent["groups"] == [] and set(sent["store"]) == {"add"}  # one number: how many have finished
    assert done.stdout.count("bits per character") == 1
    one, four = (json.loads((tmp_path / name / "result.json").read_text(encoding="utf-8")) for name in ("one", "four"))
    assert one["metrics"] == four["metrics"]
    for b in (1, 2, 3):  # files trained apart, copied together
        shutil.copy(tmp_path / f"only{b}" / f"block_{b}.pt", tmp_path / "only0")
    code, out, err = small("--out", tmp_path / "only0", *flags)
    assert code == 0 and "bits per character" in out, err


@pytest.mark.slow
def test_three_ranks_for_two_blocks_the_group_averages_and_the_third_is_as_one_process(
    small, text_file, tmp_path, monkeypatch
):
    monkeypatch.setitem(train_gpt.PRESETS, "tiny", {**train_gpt.PRESETS["tiny"], "ema": 0.9})
    flags = ["--blocks", "2", "--layers", "4"]
    small("--out", tmp_path / "one", *flags, "--only", "1")
    torchrun(
        3,
        *("--out", tmp_path / "three", "--data", text_file, *flags),
        script=("tests/record_groups.py", "train_gpt.py"),
        RECORD=str(tmp_path / "record"),
        EMA="0.9",
    )
    records = [json.loads((tmp_path / f"record.{rank}").read_text(encoding="utf-8")) for rank in range(3)]
    groups = [record["groups"] for record in records]
    assert groups == [[[0, 1]], [[0, 1]], []]  # the group of block 0; block 1's process joins no group at all
    assert records[0]["weights"].keys() == {"0"} and records[2]["weights"].keys() == {"1"}
    assert records[0]["weights"] == records[1]["weights"], "the members of a group end with the same weights"
    assert same(tensors(tmp_path / "three", 1), tensors(tmp_path / "one", 1))
    monkeypatch.setattr(train_gpt, "Run", Joined)
    small("--out", tmp_path / "joined", *flags, "--only", "0")
    assert same(tensors(tmp_path / "three", 0), tensors(tmp_path / "joined", 0))
    assert losses(tmp_path / "three", 0) == losses(tmp_path / "joined", 0) and len(losses(tmp_path / "three", 0)) == 12


TEXT, IMAGES = ("--seq-len", "8"), ("--samples", "0")


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, flags",
    [
        (train_gpt, (*TEXT, "--blocks", "1", "--recipe", "paper")),
        (train_gpt, (*TEXT, "--blocks", "1", "--head", "posterior", "--predict", "active")),
        (train_gpt, (*TEXT, "--baseline")),
        (train_mdm, (*TEXT, "--blocks", "1")),
        (train_looped, TEXT),
        (train_looped, (*TEXT, "--baseline")),
        (train_vit, (*IMAGES, "--blocks", "1", "--glyphs", "150")),
        (train_dit, (*IMAGES, "--blocks", "1", "--frechet-images", "0")),
    ],
)
def test_a_group_goes_the_way_of_the_joined_batch_in_every_script(cli, text_file, tmp_path, monkeypatch, script, flags):
    shared = ["--preset=tiny", "--width=16", "--steps=12", "--warmup=2", "--device=cpu"]
    shared += [*(("--data", text_file) if "--seq-len" in flags else ()), *flags, "--out"]
    torchrun(2, tmp_path / "group", script=(f"{script.__name__}.py",), small=shared)
    monkeypatch.setattr(script, "Run", Joined)
    assert cli(*shared, tmp_path / "joined", main=script.main)[0] == 0
    assert losses(tmp_path / "group", 0) == losses(tmp_path / "joined", 0)
    assert same(tensors(tmp_path / "group", 0), tensors(tmp_path / "joined", 0))


@pytest.mark.slow
def test_two_ranks_for_three_blocks_take_turns(small, text_file, tmp_path):
    small("--out", tmp_path / "one", "--blocks", "3")
    torchrun(2, "--out", tmp_path / "two", "--data", text_file, "--blocks", "3")
    for b in range(3):
        assert same(tensors(tmp_path / "one", b), tensors(tmp_path / "two", b))


@pytest.mark.slow
@pytest.mark.parametrize("ranks, blocks", [(2, 2), (2, 1)])
def test_a_killed_rank_leaves_whole_files_and_the_same_command_resumes(text_file, tmp_path, ranks, blocks):
    """The victim is the process that trains the last block; torchrun then stops the others."""
    flags = ["--blocks", str(blocks), "--steps", "600", "--data", text_file]  # saved at 250, 500 and 600
    torchrun(ranks, *flags, "--out", tmp_path / "whole")
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
    owner = (tmp_path / "killed" / f".block_{blocks - 1}.lock").read_text(encoding="utf-8")
    os.kill(int(re.match(r"process (\d+) ", owner)[1]), signal.SIGKILL)
    job.communicate(timeout=60)
    assert job.returncode != 0
    for b in range(blocks):
        if (tmp_path / "killed" / f"block_{b}.pt").exists():
            tensors(tmp_path / "killed", b)  # whole
    assert int(tensors(tmp_path / "killed", blocks - 1)[-1]) < 600
    torchrun(ranks, *flags, "--out", tmp_path / "killed")
    for b in range(blocks):
        assert same(tensors(tmp_path / "killed", b), tensors(tmp_path / "whole", b))


@pytest.mark.slow
@needs_namespaces
def test_the_network_carries_gradients_within_a_group_and_nothing_between_blocks(text_file, tmp_path):
    """All bytes are counted: each job runs in a network of its own that has a loopback device and nothing else. Runs of
    10 and of 210 steps log equally often: 10 times.
    """

    def bytes_sent(steps, blocks):
        out = tmp_path / f"{blocks}-{steps}"
        flags = ["--steps", steps, "--blocks", blocks, "--data", text_file, "--out", out]
        flags = [*SMALL, *map(str, flags)]
        script = "ip link set lo up && \"$@\" >/dev/null 2>&1 && awk '/lo:/ {print $2}' /proc/net/dev"
        start = [*TORCHRUN, "--nproc-per-node", "2", "train_gpt.py", *flags]
        command = ["unshare", "-rn", "sh", "-c", script, "sh", *start]
        counted = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True, text=True)
        weights = torch.load(out / "block_0.pt", weights_only=True)["weights"]
        return int(counted.stdout), 4 * sum(tensor.numel() for tensor in weights.values())

    (short, gradient), (long, _) = bytes_sent(10, blocks=1), bytes_sent(210, blocks=1)
    assert long - short > 200 * gradient  # a group sends at least its gradient each step: the count sees it
    assert long - short < 2.2 * 200 * gradient  # and little more: once out of each of the two, in packets
    print(f"\n200 steps of a group: {long - short} bytes; its gradient has {gradient}")
    (short, gradient), (long, _) = bytes_sent(10, blocks=2), bytes_sent(210, blocks=2)
    print(f"200 steps of two blocks: {long - short} bytes; a gradient has {gradient}")
    assert long - short < gradient  # torchrun's own heartbeat, which goes by the second, not by the step


# --- two processes on one block ---


def test_a_second_process_on_a_block_is_refused_and_the_first_one_loses_nothing(small, tmp_path):
    small("--out", tmp_path / "run", "--only", "0")
    before = (tmp_path / "run" / "block_0.pt").read_bytes()
    with lock(tmp_path / "run" / ".block_1.lock", "block 1"):
        code, _, err = small("--out", tmp_path / "run")
        assert code == 2 and f"block 1 is held by process {os.getpid()}" in err and err.count("\n") == 1
        assert small("--out", tmp_path / "run", "--only", "2")[0] == 0  # the other blocks are free
    assert (tmp_path / "run" / "block_0.pt").read_bytes() == before
    assert small("--out", tmp_path / "run")[0] == 0


def test_a_folder_in_use_is_not_taken_by_other_settings(small, tmp_path):
    small("--out", tmp_path / "run", "--only", "0")
    (tmp_path / "run" / "block_0.pt").unlink()  # as before the first save
    config = (tmp_path / "run" / "config.json").read_bytes()
    code, _, err = small("--out", tmp_path / "run", "--seed", "1", "--only", "2")
    assert code == 2 and "seed 0 there, 1 here" in err
    assert (tmp_path / "run" / "config.json").read_bytes() == config


def test_a_lock_dies_with_its_owner(tmp_path):
    path = tmp_path / "lock"
    hold = f"with lock({str(path)!r}, 'it'):\n    print('held', flush=True); input()"
    hold = f"from nano_db.trainer.checkpoints import lock\n{hold}"
    owner = subprocess.Popen([sys.executable, "-c", hold], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert owner.stdout.readline() == b"held\n"
    with pytest.raises(UsageError, match=f"it is held by process {owner.pid} on"), lock(path, "it"):
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
        monkeypatch.setattr(nano_db.trainer.checkpoints, "fcntl", None)
    else:
        monkeypatch.setattr(nano_db.trainer.checkpoints.fcntl, "flock", refuse)
    with lock(tmp_path / "lock", "block 3"):
        assert "warning: no locks here" in (err := capsys.readouterr().err) and "block 3" in err


# --- blocks from several places, assembled ---


def test_blocks_that_are_missing_are_named_and_complete_ones_evaluated(small, cli, tmp_path):
    small("--out", tmp_path / "run", "--only", "0,1,3")
    code, out, err = cli("--eval-only", "--out", tmp_path / "run")
    assert code == 2 and "still to train: blocks 2 of" in err and err.count("\n") == 1 and "bits" not in out
    small("--out", tmp_path / "run", "--only", "2")
    code, out, _ = cli("--eval-only", "--out", tmp_path / "run", "--prompt", "the fox")
    assert code == 0 and "bits per character" in out and "the fox|" in out and "still to train" not in out


def test_files_that_do_not_belong_together_are_refused(small, cli, tmp_path):
    evaluate = lambda: cli("--eval-only", "--out", tmp_path / "a")  # noqa: E731
    small("--out", tmp_path / "a")
    small("--out", tmp_path / "b", "--seed", "7", "--overlap", "0.2", "--only", "1")
    good = (tmp_path / "a" / "block_1.pt").read_bytes()
    shutil.copy(tmp_path / "b" / "block_1.pt", tmp_path / "a")
    code, _, err = evaluate()
    assert code == 2 and "seed 7 there, 0 here; overlap 0.2 there, 0.1 here" in err and err.count("\n") == 1
    (tmp_path / "a" / "block_1.pt").write_bytes(good)
    config = tmp_path / "a" / "config.json"
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace('"script": "gpt"', '"script": "../../evil"'))
    assert evaluate()[0] == 2
    config.write_text(text)
    (tmp_path / "a" / "block_0.pt").write_bytes(good)
    code, _, err = evaluate()
    assert code == 2 and "block_0.pt holds block 1" in err
