"""What a user sees and may do while training: a progress bar, and a stop that cuts no step in half."""

import signal
import sys
import time
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def stop_requests():
    """Ctrl-C or SIGTERM fills the list that this yields, so that no step is cut in half. A second Ctrl-C kills."""
    stop = []

    def request(number, frame):
        stop.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread (a notebook's server, say): then signals go where they went
        before = {}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class ProgressBar:
    """A tqdm bar on a terminal, if the process has it for itself; elsewhere a plain line per logging interval."""

    def __init__(self, label, start, until, alone=True):
        self.label = label
        self.start, self.until, self.began = start, until, time.perf_counter()
        show = alone and sys.stderr.isatty()
        self.bar = tqdm(total=until, initial=start, desc=self.label, unit="step") if show else None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.bar is not None:
            self.bar.close()

    def update(self, step, loss):
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            self.bar.update(step - self.bar.n)
            return
        rate = (step - self.start) / max(1e-9, time.perf_counter() - self.began)
        left = (self.until - step) / rate
        print(
            f"{self.label}  step {step}/{self.until}  loss {loss:.4f}  {rate:.1f} steps/s  {left:.0f} s left",
            flush=True,
        )
