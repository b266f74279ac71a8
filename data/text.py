"""Texts behind one small interface: `load_text(name)` gives tokens for training, tokens held out, and the tokenizer."""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data import pydocs, shakespeare, text8
from nano_db.errors import UsageError

TEXTS = {"pydocs": pydocs.text, "shakespeare": shakespeare.text, "text8": text8.text}


class CharTokenizer:
    """One token a character; the vocabulary is the text's own."""

    def __init__(self, text):
        self._codes = np.unique(np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32))  # ascending
        self.classes = len(self._codes)

    def encode(self, text):
        """Tokens of `text`, an array of whole numbers. Raises UsageError for characters that are not in the data."""
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        unknown = np.setdiff1d(codes, self._codes)
        if len(unknown):
            names = " ".join(repr(chr(code)) for code in unknown[:10])
            raise UsageError(f"the text has characters that are not in the data: {names}")
        return np.searchsorted(self._codes, codes)

    def decode(self, tokens):
        return "".join(chr(self._codes[token]) for token in tokens)


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding, through tiktoken, which downloads its table once."""

    classes = 50257

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
    """train, heldout: tokens, in the smallest integers that hold them. characters_per_token: of the held-out text.
    sha256: of the whole text (of text8 also of where it is cut).
    """

    train: torch.Tensor
    heldout: torch.Tensor
    tokenizer: CharTokenizer | GPT2Tokenizer
    characters_per_token: float
    sha256: str

    def frequencies(self):
        """Share of each class in the training text, (V,); a class that is not in it counts as one occurrence."""
        counts = torch.bincount(self.train.cpu(), minlength=self.tokenizer.classes).double().clamp(min=1)
        return counts / counts.sum()

    def batch(self, batch_size, seq_len, device="cpu"):
        """Random windows of the training text, by torch's global generator: x (B, T), and y (B, T) that follow."""
        self.train = self.train.to(device)  # once: from then on a step copies nothing
        starts = torch.randint(len(self.train) - seq_len, (batch_size, 1), device=device)
        windows = self.train[starts + torch.arange(seq_len + 1, device=device)].long()
        return windows[:, :-1], windows[:, 1:]

    def heldout_batches(self, batch_size, seq_len, device="cpu", windows=0):
        """The held-out text in windows that do not overlap, each token predicted once; a shorter rest is left out.
        windows: how many, 0 for all.
        """
        count = (len(self.heldout) - 1) // seq_len
        count = min(windows or count, count)
        x, y = (self.heldout[i : i + count * seq_len].view(count, seq_len) for i in (0, 1))
        for i in range(0, count, batch_size):
            yield x[i : i + batch_size].long().to(device), y[i : i + batch_size].long().to(device)

    def bits_per_character(self, nats_per_token):
        return nats_per_token / math.log(2) / self.characters_per_token


def load_text(name="pydocs", tokenizer="char", folder="data/cache", seq_len=1, export=0):
    """A Text. name: one of TEXTS, or the path of a UTF-8 file. The first 90% of the characters train, the rest is
    held out.

    Raises UsageError for an unknown name, a file that cannot be read, or a text in which fewer than `export` windows
    of seq_len tokens are held out, or none.
    """
    if not name:
        raise UsageError(
            "--preset paper needs --data: the path of a UTF-8 text, such as the paper's LM1B or OpenWebText "
            f"(or one of {', '.join(TEXTS)})"
        )
    text = TEXTS[name](folder) if name in TEXTS else _read_file(name)
    cut = text8.TRAIN if name == "text8" else len(text) * 9 // 10
    text = text[: text8.TRAIN + text8.VALIDATION] if name == "text8" else text
    tokens = GPT2Tokenizer() if tokenizer == "gpt2" else CharTokenizer(text)
    smallest = np.uint8 if tokens.classes <= 256 else np.int32  # a text of 10^8 characters then takes 10^8 bytes
    train, heldout = (torch.from_numpy(np.array(tokens.encode(part), smallest)) for part in (text[:cut], text[cut:]))
    if len(heldout) <= seq_len:
        raise UsageError(f"--data {name}: {len(heldout)} held-out tokens are too few for --seq-len {seq_len}")
    if export > (windows := (len(heldout) - 1) // seq_len):
        raise UsageError(f"--export {export}: the held-out text has only {windows} windows of {seq_len} tokens")
    sha256 = hashlib.sha256(text.encode())
    if name == "text8":  # a file of these very characters would be cut elsewhere
        sha256.update(f"cut at {cut}".encode())
    return Text(train, heldout, tokens, (len(text) - cut) / len(heldout), sha256.hexdigest())


def _read_file(name):
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or no path at all
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"--data {name}: choose {', '.join(TEXTS)}, or the path of a UTF-8 text ({reason})") from error
    if not text:
        raise UsageError(f"--data {name} is empty")
    return text
