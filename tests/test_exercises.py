import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from jupyter_client.manager import start_new_kernel

from experiments.exercises import check, explore, reduced

ROOT = Path(__file__).parent.parent


def unfinished():
    raise NotImplementedError


@pytest.mark.parametrize(
    "passed, line",
    [
        (lambda: True, "1.2: right"),
        (lambda: torch.tensor(True), "1.2: right"),
        (lambda: False, "1.2: not yet. Mind the sign."),
        (lambda: None, "1.2: not yet. Mind the sign."),
        (unfinished, "1.2: to do. Write your answer into the cell above, and run both again."),
        (lambda: 1 / 0, "1.2: not yet. Mind the sign. (ZeroDivisionError)"),
        (lambda: torch.tensor([True, True]), "1.2: not yet. Mind the sign. (RuntimeError)"),  # not one answer
    ],
)
def test_a_check_prints_one_line_and_never_raises(capsys, passed, line):
    check("1.2", passed, "Mind the sign.")
    assert capsys.readouterr().out == line + "\n"


def test_the_environment_reduces(monkeypatch):
    monkeypatch.delenv("NANO_DB_REDUCED", raising=False)
    assert reduced(2000, 50) == 2000
    monkeypatch.setenv("NANO_DB_REDUCED", "1")
    assert reduced(2000, 50) == 50


SHOW = """
from experiments.exercises import explore
explore(lambda sigma: print("drawn at", sigma), 1.0, sigma=[0.5, 1.0, 2.0])
"""


@pytest.fixture(scope="module")
def kernel():
    manager, client = start_new_kernel(cwd=str(ROOT))
    yield client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


@pytest.mark.parametrize("somebody", [True, False])
def test_a_slider_is_shown_to_somebody_and_only_a_picture_to_a_program(kernel, somebody):
    messages = []
    reply = kernel.execute_interactive(SHOW, allow_stdin=somebody, output_hook=messages.append, timeout=60)
    assert reply["content"]["status"] == "ok"
    widgets = ["application/vnd.jupyter.widget-view+json" in m["content"].get("data", {}) for m in messages]
    drawn = [m["content"]["text"] for m in messages if m["msg_type"] == "stream"]
    assert any(widgets) is somebody and drawn == ["drawn at 1.0\n"]


@pytest.mark.parametrize("missing", ["ipywidgets", "IPython", None])
def test_a_picture_is_shown_without_widgets_or_without_a_notebook(monkeypatch, missing):
    if missing:
        monkeypatch.setitem(sys.modules, missing, None)  # importing it raises ImportError
    drawn = []
    explore(drawn.append, 4, blocks=range(1, 9))
    assert drawn == [4]


def test_the_slider_draws_what_it_says(monkeypatch):
    somebody = SimpleNamespace(kernel=SimpleNamespace(get_parent=lambda _: {"content": {"allow_stdin": True}}))
    monkeypatch.setattr("IPython.get_ipython", lambda: somebody)
    sliders, drawn = [], []
    monkeypatch.setattr("ipywidgets.interact", lambda draw, blocks: (draw(blocks.value), sliders.append(blocks)))
    explore(drawn.append, 4, blocks=range(1, 9))
    (slider,) = sliders
    assert drawn == [4] and [*slider.options] == [*range(1, 9)]
