import copy
import hashlib
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import same, tensors
from test_run import build, make_run, train

import train_dit
import train_gpt
import train_vit
from nano_db import __version__
from nano_db.block import DiffusionBlock, EndToEnd
from nano_db.errors import UsageError
from nano_db.heads import DenoisingHead, EDMHead, PaperHead, PosteriorHead, make_target_embeddings
from nano_db.schedule import LogNormal
from nano_db.trainer.checkpoints import read_config
from nano_db.trainer.initial import initial_weights, layers_of

QUICK = ("--preset", "tiny", "--device", "cpu", "--layers", "4", "--steps", "6", "--samples", "0")
DIT = (*QUICK, "--blocks", "2", "--layer-split", "1,3", "--sampling-steps", "4", "--frechet-images", "0")


def filled(module, seed):
    """With values in all weights, zero-initialised ones, too."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=generator)
    return module.eval()


# --- which weights ---


@pytest.mark.parametrize("first, count", [(0, 1), (0, 4), (1, 2), (3, 1)])
def test_a_block_of_pixels_begins_as_the_network_without_its_other_layers(first, count):
    """The reference is the network itself, from which layers are cut out."""
    settings = train_dit.Settings(width=16, heads=2, patch=8)

    def make(layers, seed):
        network = train_dit.DiT((1, 32, 32), 10, settings, layers)
        return filled(DiffusionBlock(network, EDMHead(0.5), LogNormal(), (0.1, 1.0)), seed)

    network, block = make(4, 0), make(count, 1)
    block.load_state_dict(layers_of(network.state_dict(), block.state_dict(), first))
    cut = copy.deepcopy(network)
    cut.network.layers = network.network.layers[first : first + count]
    x, z = torch.arange(5), torch.randn(5, 1, 32, 32)
    torch.testing.assert_close(block(x, z, 0.5), cut(x, z, 0.5))
    assert torch.equal(block(x, z, 0.5), network(x, z, 0.5)) == (count == 4)


def test_of_a_denoising_head_the_output_projection_is_taken_and_the_rest_begins_as_always():
    settings, target_embeddings = train_gpt.Settings(width=16, heads=2), make_target_embeddings(11, 16)
    network = filled(EndToEnd(train_gpt.GPT(11, settings, 4), PosteriorHead(target_embeddings)), 0)
    block = DiffusionBlock(train_gpt.GPT(11, settings, 2), DenoisingHead(target_embeddings), LogNormal(), (0.1, 1.0))
    before = copy.deepcopy(block.state_dict())
    block.load_state_dict(layers_of(network.state_dict(), block.state_dict(), 2))
    x, z = torch.arange(10).view(1, 10), torch.randn(1, 10, 16)
    h = network.network.embedding(x)
    rotary = train_gpt.rotary_angles(torch.arange(10), 8)
    for i in (2, 3):
        h = network.network.layers[i](h, rotary, causal=True)
    expected = network.head.output_projection(train_gpt.rms_norm(h))
    torch.testing.assert_close(block.head.residual(block.features(x, z, torch.ones(1)), z, torch.ones(1)), expected)
    for name in ("head.up.weight", "head.out.weight", "head.noise_embedding.mlp.0.weight"):
        assert torch.equal(block.state_dict()[name], before[name])


def begun(block, network, first):
    block.load_state_dict(layers_of(network.state_dict(), block.state_dict(), first))
    return block.network.eval()


def test_a_gpt_of_two_streams_begins_as_the_network_it_starts_from():
    """Its layers are modulated, and the network's are not. The noisy copy at place t stands for token t + 1: given that
    token's own embedding as z, it finds what the network finds at place t + 1.
    """
    settings, target_embeddings = train_gpt.Settings(width=16, heads=2), make_target_embeddings(11, 16)
    network = filled(EndToEnd(train_gpt.GPT(11, settings, 2), PosteriorHead(target_embeddings)), 0)
    block = DiffusionBlock(
        train_gpt.GPT(11, settings, 2, sees_z=True), PaperHead(target_embeddings), LogNormal(), (0.1, 1.0)
    )
    two_streams = begun(block, network, 0)
    two_streams.from_z.weight.data = torch.eye(16)
    x = torch.randint(11, (3, 10), generator=torch.Generator().manual_seed(1))
    z = network.network.embedding(x[:, 1:])
    torch.testing.assert_close(two_streams(x[:, :-1], z, torch.zeros(3)), network.network(x)[:, 1:])


@pytest.mark.parametrize("first", [0, 2])
def test_a_vit_that_is_shown_z_begins_as_the_layers_it_takes(first):
    settings, target_embeddings = train_vit.Settings(width=16, heads=2, patch=8), make_target_embeddings(10, 16)
    network = filled(EndToEnd(train_vit.ViT((1, 32, 32), settings, 4), PosteriorHead(target_embeddings)), 0)
    vit = train_vit.ViT((1, 32, 32), settings, 2, sees_z=True)
    shown = begun(DiffusionBlock(vit, PaperHead(target_embeddings), LogNormal(), (0.1, 1.0)), network, first)
    shown.from_z.weight.data.zero_()
    network.network.layers, x = network.network.layers[first : first + 2], torch.randn(3, 1, 32, 32)
    torch.testing.assert_close(shown(x, torch.randn(3, 16), torch.zeros(3)), network.network(x))


def test_gates_stay_closed_where_no_layer_is_taken():
    own = {"network.layers.0.modulation.bias": torch.zeros(6)}
    assert not layers_of({"network.embedding.weight": torch.ones(3)}, own, 0)["network.layers.0.modulation.bias"].any()


def test_what_has_another_shape_stays():
    own, there = {"a": torch.zeros(2), "network.layers.0.b": torch.zeros(3)}, {"a": torch.ones(3)}
    begun = layers_of(there | {"network.layers.10.b": torch.ones(3)}, own, 10)
    assert torch.equal(begun["a"], own["a"]) and torch.equal(begun["network.layers.0.b"], torch.ones(3))


# --- runs ---


def start(folder):
    """What a run takes that is to start from the one in `folder`: (weights, sha256, step)."""
    weights, sha256, state = initial_weights(SimpleNamespace(init_from=str(folder)))
    return weights, sha256, state["step"]


@pytest.fixture
def dit(cli, tmp_path):
    """dit(name, *flags): a run in the folder `name`; "network" is a finished end-to-end run."""

    def run(name, *flags):
        return cli(*DIT, *flags, "--out", tmp_path / name, main=train_dit.main)

    code, _, err = cli(*QUICK, "--baseline", "--ema", "0.5", "--frechet-images", "0", "--sampling-steps", "4",
                       "--out", tmp_path / "network", main=train_dit.main)  # fmt: skip
    assert code == 0, err
    return run


def test_blocks_start_from_the_networks_averaged_layers_and_each_trains_by_itself(dit, tmp_path, monkeypatch):
    source, begun = tmp_path / "network", {}
    before = (source / "block_0.pt").read_bytes()

    def restore(run, b, module, optimizer, restore=train_dit.Run._restore):
        at = restore(run, b, module, optimizer)
        begun[b] = copy.deepcopy(module.state_dict())
        return at

    monkeypatch.setattr(train_dit.Run, "_restore", restore)
    code, _, err = dit("all", "--init-from", source)
    assert code == 0, err
    average = torch.load(source / "block_0.pt", weights_only=True)["ema"]
    for b, first, count in ((0, 0, 1), (1, 1, 3)):
        for name, tensor in begun[b].items():
            if name.startswith("network.layers"):
                _, _, layer, rest = name.split(".", 3)
                expected = average[f"network.layers.{int(layer) + first}.{rest}"]
                if rest in ("attention.out.weight", "mlp.2.weight"):  # layers of fewer divide these by less
                    expected = (count / 4) ** 0.5 * expected
                torch.testing.assert_close(tensor, expected)
            else:
                assert torch.equal(tensor, average[name])
        assert sum(name.endswith("attention.qkv.weight") for name in begun[b]) == count
    for b in (1, 0):  # alone, elsewhere, in the other order
        assert dit(f"alone-{b}", "--only", b, "--init-from", source)[0] == 0
        assert same(tensors(tmp_path / "all", b), tensors(tmp_path / f"alone-{b}", b))
        assert not (tmp_path / f"alone-{b}" / f"block_{1 - b}.pt").exists()
    dit("nothing")
    assert not same(tensors(tmp_path / "all", 1), tensors(tmp_path / "nothing", 1))
    assert (source / "block_0.pt").read_bytes() == before

    config = read_config(tmp_path / "all")
    assert config["settings"]["init_from"] == str(source)
    weights, sha256, _ = start(source)
    assert weights.keys() == average.keys() and same([*weights.values()], [*average.values()])
    content = b"".join(name.encode() + average[name].numpy().tobytes() for name in sorted(average))
    assert config["depends_on"]["init_from_sha256"] == sha256 == hashlib.sha256(content).hexdigest()
    code, _, err = dit("nothing", "--init-from", source)
    assert code == 2 and f"init_from '' there, '{source}' here" in err
    code, _, err = dit("all")
    assert code == 2 and f"init_from '{source}' there, '' here" in err


def test_without_the_networks_folder_begun_blocks_are_resumed_and_evaluated_and_others_are_refused(tmp_path):
    train(make_run(tmp_path / "network", baseline=True))
    options = {"init_from": str(tmp_path / "network"), "rounds": 2}
    train(make_run(tmp_path / "whole", **options))
    train(make_run(tmp_path / "cut", **options), rounds=1)
    train(make_run(tmp_path / "one", only="1", **options))
    shutil.move(tmp_path / "network", tmp_path / "gone")
    train(make_run(tmp_path / "cut", **options))
    for b in range(3):
        assert same(tensors(tmp_path / "whole", b), tensors(tmp_path / "cut", b))
        make_run(tmp_path / "whole", **options).trained_block(b, build)
    with pytest.raises(UsageError, match=r"network/block_0\.pt is missing"):
        train(make_run(tmp_path / "one", **options))
    train(make_run(tmp_path / "network", baseline=True, seed=1))  # another network in its place
    with pytest.raises(UsageError, match="its weights are not those with which this run began"):
        train(make_run(tmp_path / "one", **options))


def test_the_network_itself_can_be_trained_further(tmp_path):
    train(make_run(tmp_path / "network", baseline=True))
    train(make_run(tmp_path / "further", baseline=True, init_from=str(tmp_path / "network"), steps=1))
    weights, _, step = start(tmp_path / "network")
    further, _, _ = start(tmp_path / "further")
    assert step == 24 and all((further[name] - weights[name]).abs().max() < 1.5e-3 for name in weights)  # one of AdamW
    assert any((further[name] - weights[name]).abs().max() > 1e-4 for name in weights)


def test_a_shallow_network_too_can_be_trained_further(small, tmp_path):
    """Of fewer layers than a run of blocks would have blocks."""
    shallow = ("--baseline", "--layers", "2", "--samples", "0")
    assert small(*shallow, "--out", tmp_path / "network")[0] == 0
    code, _, err = small(*shallow, "--init-from", tmp_path / "network", "--out", tmp_path / "further")
    assert code == 0, err


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--width", "32"), "the same script, version and network (width 16 there, 32 here"),
        (("--layers", "5", "--layer-split", "2,3"), "layers 4 there, 5 here"),
        (("--patch", "4"), "patch 8 there, 4 here"),
        (("--init-from", "nowhere"), "nowhere holds no run"),
    ],
)
def test_a_network_that_does_not_fit_is_refused_in_one_line(dit, tmp_path, flags, message):
    code, _, err = dit("run", "--init-from", tmp_path / "network", *flags)
    assert code == 2 and message in err and err.count("\n") == 1, err
    assert "--init-from" in err and "--out" not in err and not (tmp_path / "run").exists()


def test_what_is_no_finished_end_to_end_run_is_refused_in_one_line(dit, cli, tmp_path):
    def refuses(message):
        code, _, err = dit("run", "--init-from", tmp_path / "network")
        assert code == 2 and message in err and err.count("\n") == 1, err

    source = tmp_path / "network" / "block_0.pt"
    state = torch.load(source, weights_only=True)
    for name, value, message in (
        ("steps", 12, "is not finished: block 0 is at step 6 of 12"),
        ("baseline", False, "blocks 3 there, 2 here"),
        ("version", "0.2.0", f"version '0.2.0' there, '{__version__}' here"),
        ("script", "vit", "(script 'vit' there, 'dit' here)"),
    ):
        torch.save({**state, "settings": {**state["settings"], name: value}}, source)
        refuses(message)
    for weights in ({1: 2, "a": None}, {"a": 3}, {"a": torch.ones(2, dtype=torch.bfloat16)}):
        torch.save({**state, "weights": weights, "ema": None}, source)
        refuses("block_0.pt holds no weights")
    source.unlink()
    refuses("block_0.pt is missing")


def test_the_block_of_another_network_in_the_folder_is_refused(dit, cli, tmp_path):
    """What counts is the file that is read, and not what its folder says."""
    code, _, err = cli(*QUICK, "--baseline", "--width", "24", "--frechet-images", "0", "--sampling-steps", "4",
                       "--out", tmp_path / "other", main=train_dit.main)  # fmt: skip
    assert code == 0, err
    shutil.copy(tmp_path / "other" / "block_0.pt", tmp_path / "network" / "block_0.pt")
    code, _, err = dit("run", "--init-from", tmp_path / "network")
    assert code == 2 and "width 24 there, 16 here" in err and err.count("\n") == 1, err


def test_networks_must_agree_in_tokenizer_and_length(small, tmp_path):
    source = tmp_path / "network"
    assert small("--baseline", "--out", source, "--samples", "0")[0] == 0
    code, _, err = small("--out", tmp_path / "run", "--init-from", source, "--seq-len", "4")
    assert code == 2 and "seq_len 8 there, 4 here" in err and err.count("\n") == 1, err
    state = torch.load(source / "block_0.pt", weights_only=True)
    torch.save({**state, "settings": {**state["settings"], "tokenizer": "gpt2"}}, source / "block_0.pt")
    code, _, err = small("--out", tmp_path / "run", "--init-from", source)
    assert code == 2 and "tokenizer 'gpt2' there, 'char' here" in err and err.count("\n") == 1, err


@pytest.mark.parametrize("recipe", ["nano", pytest.param("paper", marks=pytest.mark.slow)])
def test_labels_and_tokens_start_from_a_network_by_either_recipe(small, cli, tmp_path, recipe):
    assert small("--baseline", "--out", tmp_path / "gpt", "--samples", "0")[0] == 0
    begin = ("--recipe", recipe, "--samples", "0", "--out", tmp_path / "blocks", "--init-from")
    code, _, err = small(*begin, tmp_path / "gpt")
    assert code == 0, err
    assert cli(*QUICK, "--baseline", "--out", tmp_path / "vit", main=train_vit.main)[0] == 0
    begin = ("--recipe", recipe, "--out", tmp_path / "vit-blocks", "--init-from")
    code, _, err = cli(*QUICK, "--blocks", "2", *begin, tmp_path / "vit", main=train_vit.main)
    assert code == 0, err
