"""The moving parts of a notebook: a progress line while a cell computes, and a picture with a slider."""

import base64
import io
import time
import uuid
from contextlib import contextmanager, nullcontext, redirect_stdout

import matplotlib.pyplot as plt
from IPython import get_ipython
from IPython.display import HTML, display

EVERY = 0.3  # seconds between updates of a line
SLIDER = """
<div id="{id}"><img src="data:image/png;base64,{start}"><p>Run this cell again to get its slider.</p></div>
<script>
(() => {{
  const here = document.getElementById("{id}"), pictures = {pictures}, values = {values};
  const [picture, line] = here.children, slider = document.createElement("input"), value = document.createElement("b");
  Object.assign(slider, {{type: "range", min: 0, max: values.length - 1, value: {index}}});
  slider.style.cssText = "width: 500px; vertical-align: middle; margin: 0 1em";
  slider.oninput = () => {{
    picture.src = "data:image/png;base64," + pictures[slider.value];
    value.textContent = values[slider.value];
  }};
  value.textContent = values[{index}];
  line.replaceChildren("{name} ", slider, value);
}})();
</script>
"""


@contextmanager
def moving_line():
    """A line below the cell: `with moving_line() as say: say("half of it")`. The last text stays."""
    handle, shown = display({"text/plain": ""}, raw=True, display_id=True), ""

    def say(text):
        nonlocal shown
        if text != shown:
            handle.update({"text/plain": text}, raw=True)
            shown = text

    yield say


class Progress:
    """range(count), with a line that moves: name, step, loss and seconds left. The loop may set `loss`, a number.

    say: a moving_line()'s, if several loops share one; otherwise the loop has a line of its own.
    """

    def __init__(self, name, count, unit="step", say=None):
        self.name, self.count, self.unit, self.loss, self.say = name, count, unit, None, say

    def __iter__(self):
        began = shown = time.monotonic()
        with nullcontext(self.say) if self.say else moving_line() as say:
            if self.count:
                say(f"{self.name}: {self.unit} 1 of {self.count}")
            for step in range(self.count):
                yield step
                now = time.monotonic()
                if now - shown > EVERY:
                    loss = "" if self.loss is None else f", loss {float(self.loss):.3f}"
                    left = (now - began) / (step + 1) * (self.count - step - 1)
                    say(f"{self.name}: {self.unit} {step + 1} of {self.count}{loss}, {left:.0f} s left")
                    shown = now
            say(f"{self.name}: {self.count} {self.unit}{'s' * (self.count != 1)}")


@contextmanager
def in_one_line(afterwards):
    """Show printed text as one moving line, and finally `afterwards`, without the seconds that a run prints."""

    class Last(io.TextIOBase):
        def write(self, text):
            if lines := text.strip().splitlines():
                say(lines[-1])
            return len(text)

    with moving_line() as say:
        with redirect_stdout(Last()):
            yield
        say(afterwards)


def explore(draw, start, **values):
    """Show the figure that draw(start) returns; with a slider over `values` where somebody can move it.

    values: one list, under the name of draw's argument: explore(draw, 1.0, sigma=[0.1, 1.0]). All figures are drawn in
    advance, so that the slider needs no kernel, reacts at once, and works in a saved notebook. A program that executes
    a notebook allows no prompts (allow_stdin): it gets only draw(start), which is what GitHub shows.
    """
    ((name, choices),) = values.items()
    choices = list(choices)
    try:
        somebody = get_ipython().kernel.get_parent("shell")["content"]["allow_stdin"]
    except (AttributeError, KeyError):
        somebody = False
    if not somebody:
        draw(start)
        return plt.show()
    pictures = {}
    for i in Progress("pictures for the slider", len(choices), "picture"):
        buffer, figure = io.BytesIO(), draw(choices[i])
        figure.savefig(buffer, format="png")
        plt.close(figure)
        pictures[choices[i]] = base64.b64encode(buffer.getvalue()).decode()
    texts = {"name": name, "pictures": list(pictures.values()), "values": [str(choice) for choice in choices]}
    place = {"id": f"slider-{uuid.uuid4()}", "start": pictures[start], "index": choices.index(start)}
    display(HTML(SLIDER.format(**place, **texts)))
