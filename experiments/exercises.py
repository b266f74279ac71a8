"""What the notebooks of the course share: feedback on a student's answer, a slider, and the size of a run."""

import os


def check(name, passed, hint):
    """Print one line: "1.2: right", "1.2: not yet. <hint>", or that nothing has been tried yet, without the hint.

    passed: a function without arguments, so that an unfinished answer raises here and not in the notebook. An exception
    is "not yet", and its name is shown. NotImplementedError is the stub itself, which gets no hint: think first.
    """
    try:
        right, stopped_by = bool(passed()), ""
    except NotImplementedError:
        return print(f"{name}: to do. Write your answer into the cell above, and run both again.")
    except Exception as error:
        right, stopped_by = False, f" ({type(error).__name__})"
    print(f"{name}: right" if right else f"{name}: not yet. {hint}{stopped_by}")


def explore(draw, start, **values):
    """Show the picture that draw(start) makes; with a slider over `values` where somebody can move it.

    values: one list, under the name of draw's argument: explore(draw, 1.0, sigma=[0.1, 1.0]). The slider needs
    ipywidgets, and a front end that allows questions to its user (allow_stdin). A program that executes a notebook is
    no such front end, and leaves only the picture, which is what GitHub shows.
    """
    ((name, choices),) = values.items()
    try:
        from IPython import get_ipython
        from ipywidgets import SelectionSlider, interact

        somebody = get_ipython().kernel.get_parent("shell")["content"]["allow_stdin"]
    except (ImportError, AttributeError, KeyError):
        somebody = False
    if not somebody:
        return draw(start)
    interact(draw, **{name: SelectionSlider(options=choices, value=start, description=name, continuous_update=False)})


def reduced(full, small):
    """`full`, or `small` where the environment has NANO_DB_REDUCED set: for tests that have seconds."""
    return small if os.environ.get("NANO_DB_REDUCED") else full
