"""The notebooks as a student sees them: JupyterLab in a real browser, everything run, answers typed, sliders dragged.

It needs Chromium and Playwright's driver, which are no requirements of the project: `apt install chromium` and
`pip install playwright`. Without them it is skipped. Set NANO_DB_SCREENSHOTS to a folder to look at what was seen.
"""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import closing
from pathlib import Path

import nbformat
import pytest
from test_notebooks import answered, notebooks, tagged

playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="no Chromium: apt install chromium")]

ROOT = Path(__file__).parent.parent
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SHOWN = ".jp-NotebookPanel:not(.lm-mod-hidden)"
OPEN = """async path => {
  const panel = await jupyterapp.commands.execute("docmanager:open", {path});
  await panel.sessionContext.ready; await panel.revealed;
  panel.content.notebookConfig = {...panel.content.notebookConfig, windowingMode: "none"};
  await panel.content.contentFactory; }"""
RUN_ALL = """async () => jupyterapp.commands.execute("notebook:run-all-cells")"""
RUN = """async i => {
  const notebook = jupyterapp.shell.currentWidget.content;
  notebook.deselectAll(); notebook.activeCellIndex = i;
  await jupyterapp.commands.execute("notebook:run-cell"); }"""
OUTPUTS = """() => jupyterapp.shell.currentWidget.content.widgets.map(
  cell => cell.model.type === "code" ? cell.model.sharedModel.outputs : [])"""
SHOW = """i => {
  const notebook = jupyterapp.shell.currentWidget.content;
  notebook.activeCellIndex = i; notebook.widgets[i].node.scrollIntoView(); }"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab that was started in a copy of the repository's root, as the README says."""
    root, token = tmp_path_factory.mktemp("lab") / "nano_db", secrets.token_hex(8)
    shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(".git", "out", "__pycache__", "runs"))
    with closing(socket.socket()) as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        f"--port={port}",
        f"--IdentityProvider.token={token}",
    ]
    command += ["--LabApp.expose_app_in_browser=True", "--ServerApp.allow_root=True"]
    environment = os.environ | {"NANO_DB_REDUCED": "1", "OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(command, cwd=root, env=environment, **quiet)
    address = f"http://localhost:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/api?token={token}", timeout=1)
                break
            except OSError:
                time.sleep(0.25)
        yield f"{address}/lab?reset&token={token}"
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(scope="module")
def page(lab):
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1300, "height": 1000})
        page.set_default_timeout(300_000)
        page.goto(lab)
        page.wait_for_function("window.jupyterapp && jupyterapp.started")
        page.evaluate("jupyterapp.started")
        yield page
        browser.close()


class Notebook:
    """A notebook that is open in the browser."""

    def __init__(self, page, path):
        self.page, self.path, self.source = page, path, nbformat.read(path, as_version=4)
        for command in ("docmanager:save-all", "application:close-all"):  # what is not saved would be asked about
            page.evaluate("command => jupyterapp.commands.execute(command)", command)
        page.evaluate(OPEN, f"notebooks/{path.name}")

    def run_all(self):
        self.page.evaluate(RUN_ALL)
        self.page.wait_for_function(
            "() => jupyterapp.shell.currentWidget.sessionContext.session.kernel.status === 'idle'"
        )

    def texts(self):
        """What each cell shows, as text."""
        return ["".join(map(text_of, outputs)) for outputs in self.page.evaluate(OUTPUTS)]

    def errors(self):
        outputs = [output for outputs in self.page.evaluate(OUTPUTS) for output in outputs]
        return [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]

    def type(self, i, code):
        """Click into cell i and type, as a student does."""
        editor = self.page.locator(f"{SHOWN} .jp-Cell").nth(i).locator(".cm-content")
        editor.click()
        self.page.keyboard.press("Control+a")
        self.page.keyboard.insert_text(code)

    def run(self, *cells):
        for i in cells:
            self.page.evaluate(RUN, i)

    def picture(self, name):
        if folder := os.environ.get("NANO_DB_SCREENSHOTS"):
            self.page.screenshot(path=Path(folder) / f"{self.path.stem[:2]}_{name}.png")


def text_of(output):
    text = output.get("text", output.get("data", {}).get("text/plain", ""))
    return text if isinstance(text, str) else "".join(text)


def exercises(path):
    """[(name, index of the stub, index of the check, right answer)] of the notebook's exercises."""
    source = answered(nbformat.read(path, as_version=4))
    checks = tagged(source, "check")
    return [(name, stub, checks[name][0], cell.source) for name, (stub, cell) in tagged(source, "exercise").items()]


def drag_sliders(page):
    """Drag every slider with the mouse, from its left end to its right: at each of three stops, another picture?"""
    followed = []
    for slider in page.locator(f"{SHOWN} input[type=range]").all():
        slider.scroll_into_view_if_needed()
        box, pictures = slider.bounding_box(), []
        left, width, middle = box["x"] + 8, box["width"] - 16, box["y"] + box["height"] / 2
        page.mouse.move(left, middle)
        page.mouse.down()
        for share in (0, 0.5, 1):
            page.mouse.move(left + share * width, middle, steps=10)
            pictures.append(slider.locator("xpath=ancestor::div[1]").locator("img").get_attribute("src"))
        page.mouse.up()
        followed.append(len(set(pictures)) == 3)
    return followed


@pytest.mark.parametrize("path", notebooks(PATHS))
def test_a_student_goes_through_it(page, path):
    notebook = Notebook(page, path)
    notebook.run_all()
    assert notebook.errors() == []
    notebook.picture("run")
    followed = drag_sliders(page)
    assert all(followed) and len(followed) == sum(
        "explore(" in c.source and "def " in c.source for c in notebook.source.cells
    )
    if followed:
        notebook.picture("slider")
    for name, stub, check, answer in exercises(path)[:2]:
        assert f"{name}: not answered yet" in notebook.texts()[check], "after Run All of an untouched notebook"
        head, said = answer.partition(":\n")[0], []
        for wrong in ("nothing_of_this_name", "None", "0"):  # a slip, which is no attempt, and two wrong answers
            body = f"return {wrong}" if head.startswith("def") else f"def __init__(self, *_): self.edges = {wrong}"
            notebook.type(stub, f"{head}:\n    {body}\n")
            notebook.run(stub, check)
            said.append(notebook.texts()[check])
            assert f"{name}: not yet. " in said[-1]
        assert "Error: " in said[0] and "in line" in said[0] and said[1] != said[2], "another hint"
        notebook.type(stub, answer)
        notebook.run(stub, check)
        assert f"{name}: right." in notebook.texts()[check]
        notebook.picture(f"answered_{name}")


def test_a_saved_notebook_shows_its_picture_when_it_is_opened_again(page):
    notebook = Notebook(page, next(path for path in PATHS if path.stem.startswith("02")))
    notebook.run_all()
    page.evaluate("() => jupyterapp.commands.execute('docmanager:save')")
    again = Notebook(page, notebook.path)
    (i,) = (i for i, cell in enumerate(notebook.source.cells) if "explore(show" in cell.source)
    page.evaluate(SHOW, i)  # what is far away is not drawn
    page.locator(f"{SHOWN} .jp-OutputArea img").first.wait_for(state="attached", timeout=20_000)
    again.picture("again")
    assert page.locator("text=Error displaying widget").count() == 0
    assert drag_sliders(page) == [True], "it needs no kernel"
