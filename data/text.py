"""Texts behind one small interface: `load_text(name)` gives tokens for training, tokens held out, and the tokenizer."""

import codecs
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data import first_tenths, pydocs, python_source, shakespeare, text8
from nano_db.errors import UsageError

TEXTS = {  # each returns (text, the number of its training characters)
    "python": python_source.text, "pydocs": pydocs.text, "shakespeare": shakespeare.text, "text8": text8.text
}  # fmt: skip


class CharTokenizer:
    """One token per character. `vocabulary`: all characters of a text, ascending."""

    def __init__(self, text):
        self.vocabulary = "".join(sorted(set(text)))
        self.classes = len(self.vocabulary)
        codes = codes_of(self.vocabulary)
        self._tokens = np.full(int(codes.max()) + 2, -1, np.int32)  # by code point; the last: all above
        self._tokens[codes] = np.arange(self.classes)

    def encode(self, text):
        """Tokens of `text`, an array of integers. Raises UsageError for characters that are not in the data."""
        tokens = self._tokens[np.minimum(codes_of(text), len(self._tokens) - 1)]
        if (tokens < 0).any():
            unknown = sorted(set(text) - set(self.vocabulary))
            names = " ".join(map(repr, unknown[:10]))
            more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
            raise UsageError(
                f"characters that are not in the vocabulary of the training text, {names}{more}: leave them out"
            )
        return tokens

    def decode(self, tokens):
        return "".join(self.vocabulary[token] for token in tokens)


def codes_of(text):
    """The Unicode code points of a text, uint32."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding, through tiktoken, which downloads its table once."""

    vocabulary, classes = "", 50257

    def __init__(self):
        import tiktoken

        try:
            self._encoding = tiktoken.get_encoding("gpt2")
        except Exception as error:  # whatever its http library raises
            raise UsageError(
                f"--tokenizer gpt2: tiktoken cannot download its table ({type(error).__name__}): go online once, "
                "point TIKTOKEN_CACHE_DIR in the environment to a folder that holds it, or use --tokenizer char"
            ) from error

    def encode(self, text):
        return self._encoding.encode_ordinary(text)

    def decode(self, tokens):
        return self._encoding.decode(list(tokens))


@dataclass
class Text:
    """train, heldout: tokens, in the smallest integers that hold them. Settings may be chosen on the first half of the
    held-out tokens; scores are reported on the second. characters_per_token: the held-out text's. sha256: checksum of
    the whole text, and of where it is cut, unless that is after nine tenths. missing: why there is nothing to train or
    score on, if a run is to generate without the text that it was trained on; then heldout has only its opening.
    """

    train: torch.Tensor
    heldout: torch.Tensor
    tokenizer: CharTokenizer | GPT2Tokenizer
    characters_per_token: float
    sha256: str
    missing: str = ""

    @property
    def opening(self):
        """The first held-out tokens, which samples continue if there is no prompt."""
        return self.heldout[:16].tolist()

    def keeps(self):
        """What a run has to keep in order to generate, or to be trained further, without this text."""
        return {"vocabulary": self.tokenizer.vocabulary, "opening": self.tokenizer.decode(self.opening)}

    def frequencies(self):
        """Share of each class in the training text, (V,); a class that is not in it counts as one occurrence."""
        counts = torch.bincount(self.train.cpu(), minlength=self.tokenizer.classes).double().clamp(min=1)
        return counts / counts.sum()

    def batch(self, batch_size, seq_len, device="cpu"):
        """Random windows of the training text, from torch's global generator: x (B, T), and next tokens y (B, T)."""
        self.train = self.train.to(device)  # once: from then on a step copies nothing
        starts = torch.randint(len(self.train) - seq_len, (batch_size, 1), device=device)
        windows = self.train[starts + torch.arange(seq_len + 1, device=device)].long()
        return windows[:, :-1], windows[:, 1:]

    def half(self, name):
        """Half of the held-out tokens: "validation", to choose settings by, or "test", to report."""
        middle = len(self.heldout) // 2
        return {"validation": self.heldout[:middle], "test": self.heldout[middle:]}[name]

    def heldout_batches(self, batch_size, seq_len, device="cpu", windows=0, half=None):
        """The held-out text, or a half of it, in windows that do not overlap, each token predicted once; a shorter
        remainder is left out. windows: how many, evenly spaced; 0 for all.
        """
        tokens = self.half(half) if half else self.heldout
        there = (len(tokens) - 1) // seq_len
        count = min(windows or there, there)
        chosen = torch.arange(count) * there // max(1, count)
        x, y = (tokens[i : i + there * seq_len].view(there, seq_len)[chosen] for i in (0, 1))
        for i in range(0, count, batch_size):
            yield x[i : i + batch_size].long().to(device), y[i : i + batch_size].long().to(device)

    def bits_per_character(self, nats_per_token):
        return nats_per_token / math.log(2) / self.characters_per_token


def load_text(name="python", tokenizer="char", folder="data/cache", seq_len=1, export=0, kept=None):
    """A Text. name: one of TEXTS, or the path of a UTF-8 file: the first 90% of its characters are for training, and
    the rest is held out.

    kept: what a run has kept of its data (trainer/checkpoints.kept): its vocabulary. With a "sha256" the run is only to
    be used: if its text is not on this machine, the Text can neither train nor score, and says why (`missing`).

    Raises UsageError for an unknown name, a file that cannot be read, or a text that has only one distinct token, has
    characters outside a kept vocabulary, or is too short for two held-out windows of seq_len tokens, or for `export`.
    """
    kept = kept or {}
    try:
        text, cut, sha256 = read_text(name, folder)
        if kept.get("sha256", sha256) != sha256:
            raise UsageError(f"--data {name} is not the text that the run was trained on (or has changed since)")
    except UsageError as error:
        able = kept.keys() >= {"sha256", "opening", "vocabulary"} and (kept["vocabulary"] or tokenizer == "gpt2")
        if not able:
            raise
        if export:
            raise UsageError(f"--export needs the text that the run was trained on: {error}") from error
        tokens = GPT2Tokenizer() if tokenizer == "gpt2" else CharTokenizer(kept["vocabulary"])
        opening = torch.from_numpy(np.array(tokens.encode(kept["opening"]), np.int32))
        return Text(opening[:0], opening, tokens, math.nan, kept["sha256"], missing=str(error))
    tokens = GPT2Tokenizer() if tokenizer == "gpt2" else CharTokenizer(kept.get("vocabulary") or text)
    smallest = np.uint8 if tokens.classes <= 256 else np.int32  # a text of 10^8 characters then takes 10^8 bytes
    try:
        parts = [torch.from_numpy(np.array(tokens.encode(part), smallest)) for part in (text[:cut], text[cut:])]
    except UsageError as error:  # not in the kept vocabulary
        which = str(error).removesuffix(": leave them out")
        advice = "give the --preset and --data of that run, or replace them, or train without --init-from"
        raise UsageError(f"--data {name} has {which}: {advice}") from error
    train, heldout = parts
    for part, side, windows in ((heldout, "held-out", 2), (train, "training", 1)):  # two: for validation, and to report
        if len(part) < windows * (seq_len + 1):
            raise UsageError(
                f"--data {name}: {len(part)} {side} tokens are too few for --seq-len {seq_len}, which needs "
                f"{windows * (seq_len + 1)}: use a longer text, or a smaller --seq-len"
            )
    if (train == train[0]).all() and (heldout == train[0]).all():
        only = tokens.decode(train[:1].tolist())
        raise UsageError(f"--data {name} consists only of the token {only!r}: there is nothing to learn")
    if name not in TEXTS:
        print(f"{name}: {len(text):,} characters, {tokens.classes:,} different tokens, the last tenth is held out")
    if export > (windows := (len(heldout) - 1) // seq_len):
        raise UsageError(f"--export {export}: the held-out text has only {windows} windows of {seq_len} tokens")
    return Text(train, heldout, tokens, (len(text) - cut) / len(heldout), sha256)


def read_text(name, folder):
    """(text, the number of its training characters, its checksum) of one of TEXTS, or of a UTF-8 file."""
    if not name:
        raise UsageError(
            "--preset paper needs --data: the path of a UTF-8 text, such as the paper's LM1B or OpenWebText "
            f"(or one of {', '.join(TEXTS)})"
        )
    text, cut = TEXTS[name](folder) if name in TEXTS else _read_file(name)
    sha256 = hashlib.sha256(text.encode())
    if cut != first_tenths(text):  # a file of these very characters would be cut elsewhere
        sha256.update(f"cut at {cut}".encode())
    return text, cut, sha256.hexdigest()


def _read_file(name):
    """(a file's text, without a byte-order mark, with every line end as "\\n"; the number of training characters)."""
    try:
        content = Path(name).read_bytes()
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise ValueError("it is UTF-16: save it as UTF-8")
        text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or no path at all
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, UnicodeDecodeError):
            raise UsageError(f"--data {name} is not UTF-8: save it as UTF-8 ({reason})") from error
        raise UsageError(f"--data {name}: choose {', '.join(TEXTS)}, or the path of a UTF-8 text ({reason})") from error
    if not text:
        raise UsageError(f"--data {name} is empty")
    return text, first_tenths(text)
