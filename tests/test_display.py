"""What moves in a notebook, in a real kernel: its messages are what a front end shows."""

from pathlib import Path

import pytest
from jupyter_client.manager import start_new_kernel

ROOT = Path(__file__).parent.parent
DRAW = """
import matplotlib.pyplot as plt
from experiments.display import explore

def draw(sigma):
    figure, ax = plt.subplots(figsize=(1, 1))
    print("drawn at", sigma)
    return figure

explore(draw, 1.0, sigma=[0.5, 1.0, 2.0])
"""


@pytest.fixture(scope="module")
def kernel():
    manager, client = start_new_kernel(cwd=str(ROOT))
    client.execute_interactive("%matplotlib inline", output_hook=lambda message: None, timeout=60)
    yield client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def run(kernel, code, somebody=True):
    """[(kind of message, its content)] of a cell."""
    messages = []
    reply = kernel.execute_interactive(code, allow_stdin=somebody, output_hook=messages.append, timeout=60)
    assert reply["content"]["status"] == "ok", reply["content"]
    return [(m["msg_type"], m["content"]) for m in messages]


def printed(messages):
    return "".join(content["text"] for kind, content in messages if kind == "stream")


def shown_lines(messages):
    """What a line that moves has said, in turn."""
    kinds = ("display_data", "update_display_data")
    return [content["data"].get("text/plain") for kind, content in messages if kind in kinds]


def test_somebody_gets_a_slider_with_every_picture(kernel):
    messages = run(kernel, DRAW)
    (page,) = [c["data"]["text/html"] for kind, c in messages if "text/html" in c.get("data", {})]
    assert printed(messages) == "drawn at 0.5\ndrawn at 1.0\ndrawn at 2.0\n"
    assert page.count("iVBOR") == 4 and "values = ['0.5', '1.0', '2.0']" in page and 'replaceChildren("sigma "' in page
    assert "Run this cell again" in page, "what stands there where scripts do not run"
    first = page.partition("base64,")[2].partition('"')[0]
    assert page.partition("pictures = [")[2].split("'")[3] == first, "the picture of the start"


def test_a_program_gets_the_first_picture_only(kernel):
    messages = run(kernel, DRAW, somebody=False)
    assert printed(messages) == "drawn at 1.0\n"
    assert [set(c["data"]) & {"image/png", "text/html"} for kind, c in messages if "data" in c] == [{"image/png"}]


def test_a_loop_says_how_far_it_is_and_in_the_end_nothing_that_changes_with_the_machine(kernel):
    code = """
import time
from experiments.display import Progress
progress = Progress("block 0", 4)
for step in progress:
    progress.loss = 1.5
    time.sleep(0.4)
"""
    lines = shown_lines(run(kernel, code))
    assert "block 0: step 1 of 4, loss 1.500, 1 s left" in lines and lines[-1] == "block 0: 4 steps"
    assert len(lines) >= 4 and "block 0: step 1 of 4" in lines, "at once, before the first step is done"


def test_what_a_run_prints_becomes_one_line_that_moves(kernel):
    code = """
from experiments.display import in_one_line
with in_one_line("all done"):
    print("block 0  step 50")
    print("block 0  step 100\\n")
print("after it")
"""
    messages = run(kernel, code)
    assert printed(messages) == "after it\n"
    assert shown_lines(messages)[1:] == ["block 0  step 50", "block 0  step 100", "all done"]


def test_without_a_notebook_there_is_the_first_picture(monkeypatch):
    from experiments import display

    drawn = []
    monkeypatch.setattr(display.plt, "show", lambda: None)
    display.explore(drawn.append, 4, blocks=range(1, 9))
    assert drawn == [4]
