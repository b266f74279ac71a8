"""The schematics, the cheat sheet and the teacher's page: drawn from code, legible, and true to it."""

import math
import re
from html import unescape
from itertools import combinations

import pytest
import torch
from conftest import ROOT
from matplotlib.patches import FancyBboxPatch
from matplotlib.text import Text

import train_gpt
import train_vit
from experiments import schematics
from experiments.schematics import DOCS, PICTURES, draw_all, label_walks
from nano_db.heads import log_likelihood
from nano_db.partition import make_partition
from nano_db.sampler import euler_walk
from nano_db.schedule import LogNormal, edm_weight, quantiles
from nano_db.trainer.plots import plt

each_picture = pytest.mark.parametrize("name", PICTURES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two, with all pictures drawn into each."""
    both = [tmp_path_factory.mktemp("docs") for _ in range(2)]
    for folder in both:
        draw_all(folder)
    return both


def words(path):
    """The texts of an SVG; where text is drawn as shapes, matplotlib leaves it in a comment."""
    svg = path.read_text(encoding="utf-8").partition("<g id=")[2]
    found = re.findall(r"<!--(.*?)-->|<(?:text|tspan)\b[^>]*>([^<]*)<", svg, re.DOTALL)
    return [unescape(comment or text).strip() for comment, text in found]


@each_picture
def test_it_is_the_same_each_time_and_not_too_large(folders, name):
    first, second = (folder / name for folder in folders)
    assert first.read_bytes() == second.read_bytes()
    assert first.stat().st_size < (150_000 if name.startswith("pictures") else 400_000)


@each_picture
def test_the_committed_file_says_what_the_code_says_today(folders, name):
    """Its words, not its bytes: these depend on matplotlib's version."""
    assert words(DOCS / name) == words(folders[0] / name)
    assert len(words(DOCS / name)) > 10


@each_picture
def test_no_text_is_cut_off_overlaps_another_or_sticks_out_of_its_box(name):
    figure = PICTURES[name]()
    figure.canvas.draw()
    renderer, bounds = figure.canvas.get_renderer(), figure.bbox
    boxes = [patch.get_window_extent(renderer) for patch in figure.findobj(FancyBboxPatch)]
    texts = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    extents = {text: text.get_window_extent(renderer) for text in texts}
    for text, at in extents.items():
        assert bounds.x0 <= at.x0 and at.x1 <= bounds.x1 and bounds.y0 <= at.y0 and at.y1 <= bounds.y1, text
        for around in boxes:
            if around.contains((at.x0 + at.x1) / 2, (at.y0 + at.y1) / 2):
                assert around.x0 <= at.x0 and at.x1 <= around.x1, text
                assert around.y0 <= at.y0 and at.y1 <= around.y1, text
    for (text, one), (other, two) in combinations(extents.items(), 2):
        width = min(one.x1, two.x1) - max(one.x0, two.x0)
        height = min(one.y1, two.y1) - max(one.y0, two.y0)
        assert width < 1 or height < 1, (text, other)
    plt.close(figure)


def test_a_file_in_the_place_of_the_folder_gets_one_line(cli, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = cli("--out", tmp_path / "file", main=schematics.main)
    assert code == 2 and "choose another --out" in err and err.count("\n") == 1


def test_the_walks_of_a_label_hold_probabilities_and_end_decided():
    names, p = label_walks()
    assert p.shape == (60, 3, len(names)) and torch.allclose(p.sum(-1), torch.ones(60, 3))
    assert torch.allclose(p[0, 2], torch.tensor([0.42, 0.27, 0.16, 0.1, 0.05]))  # z = 0 says nothing: p(y | x)
    assert p[-1].max(-1).values.min() > 0.9 and p[-1, 2].argmax() == p[0, 2].argmax()


@pytest.mark.parametrize(
    "name, noise",
    [("text", train_gpt.NOISE["nano"]), ("labels", train_vit.NOISE["nano"]), ("the paper", LogNormal())],
)
def test_the_cheat_sheet_and_method_md_have_the_noise_levels_of_the_code(name, noise):
    of_sheet = rf"{name}: $m = {noise.p_mean:g},\ s = {noise.p_std:g}$, from {noise.sigma_min:g} to {noise.sigma_max:g}"
    assert f"- {of_sheet}\n" in (DOCS / "cheatsheet.md").read_text(encoding="utf-8")
    of_method = f"N({noise.p_mean:g}, {noise.p_std:g}²) on [{noise.sigma_min:g}, {noise.sigma_max:g}]"
    assert of_method.replace("-", "−") in (DOCS / "method.md").read_text(encoding="utf-8")


def test_what_method_md_says_of_the_papers_noise_levels_is_so():
    text = " ".join((DOCS / "method.md").read_text(encoding="utf-8").split())
    noise, levels = LogNormal(), quantiles(LogNormal(), 20_000)
    weight = edm_weight(levels, 0.5)
    assert f"factor of {(weight.max() / weight.min()).round(decimals=-2):,.0f}" in text
    assert f"({weight[levels < 0.2].sum() / weight.sum():.0%})" in text
    edges = [f"{edge:.3f}" for edge in make_partition(noise, 4).edges[1:-1]]
    assert f"σ = {edges[0]}, {edges[1]} and {edges[2]}" in text
    z = 0.2 * torch.randn(20_000, 96, generator=torch.Generator().manual_seed(0))  # <z - E[y], E> of 96 orthogonal E
    z[:, 0] += 1
    assert f"at least {int(100 * (z.argmax(1) == 0).double().mean())} of 100" in text


def test_the_step_by_hand_of_method_md_is_what_the_code_computes():
    angles = torch.arange(3) * 2 * math.pi / 3
    rows, prior = torch.stack([angles.cos(), angles.sin()], dim=1), torch.tensor([0.5, 0.3, 0.2]).log()

    def posterior(z, sigma):
        return (prior + log_likelihood(z, sigma, rows)).softmax(-1)

    z = torch.tensor([[0.4, 0.6]])
    (state,) = euler_walk(lambda z, sigma: posterior(z, sigma) @ rows, z, [1.0, 0.5])
    text = (DOCS / "method.md").read_text(encoding="utf-8").replace("−", "-")
    for numbers in (posterior(z, 1.0), state.denoised, state.z, posterior(state.z, 0.5)):
        assert f"({', '.join(f'{number:.3f}' for number in numbers[0].tolist())})" in text
    inner = log_likelihood(z, 1.0, rows)[0]
    for numbers in (inner, inner.exp()):
        assert ", ".join(f"{number:.3f}" for number in numbers.tolist()) in text


def test_the_account_is_named_only_where_the_teachers_command_finds_it():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        source = path.read_text(encoding="utf-8")
        message = source.count('/OWNER/\\" in ADDRESS') + source.count("in place of OWNER")  # where it is missing
        assert source.count("OWNER") == source.count("OWNER/nano_db") + message, path.name
