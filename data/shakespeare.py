"""Tiny Shakespeare: 1.1 million characters of the plays (A. Karpathy, char-rnn, 2015; public domain)."""

from pathlib import Path

from data import first_tenths
from data.download import fetch

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SIZE = 1_115_394  # bytes, and characters


def text(folder):
    """(the text, the number of training characters), from `folder`/tinyshakespeare.txt, downloaded if it is missing."""
    whole = fetch(URL, Path(folder) / "tinyshakespeare.txt", SHA256, SIZE).read_text(encoding="utf-8")
    return whole, first_tenths(whole)
