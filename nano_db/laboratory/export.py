"""What is exported for judges of quality that are not among the requirements (docs/judging.md)."""

import json

from nano_db.errors import UsageError
from nano_db.language import EVALUATION_BATCH
from nano_db.machinery.files import write_text

SHOWN = 0.25  # the share of a text that is kept as its prompt


def refuse_old_images(folder):
    """Raise UsageError where the folder holds anything: images of two walks must not be mixed."""
    if folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"{folder} holds images already: move it away, or they would be mixed with the new ones")


def export_texts(run, text, write):
    """After the last round keep the first quarter of --export held-out windows, and write the rest anew: into
    texts.jsonl of the run, a line a window, its "prompt", what the network has "written", and the "original" of that.

    write: a function of tokens (n, m) that returns them continued, (n, settings.seq_len).
    """
    settings, path, lines = run.settings, run.folder / "texts.jsonl", []
    shown = max(1, round(SHOWN * settings.seq_len))
    windows = text.heldout_batches(EVALUATION_BATCH, settings.seq_len, settings.device, settings.export)
    for x, _ in windows if settings.export and run.last_round else ():
        for old, new in zip(x.tolist(), write(x[:, :shown]).tolist(), strict=True):
            parts = {"prompt": old[:shown], "written": new[shown:], "original": old[shown:]}
            lines.append(json.dumps({name: text.tokenizer.decode(tokens) for name, tokens in parts.items()}))
    if lines:
        write_text(path, "\n".join(lines) + "\n")
        print(f"exported: {path}")
