"""Files that are fetched once, over https, and trusted by their checksum: also where the network is bad."""

import hashlib
import http.client
import io
import os
import urllib.error
import urllib.request

import pytest

from data import download, shakespeare
from data.download import fetch
from nano_db.errors import UsageError

CONTENT = bytes(range(256)) * 20
SHA256, SIZE = hashlib.sha256(CONTENT).hexdigest(), len(CONTENT)


class Answer(io.BytesIO):
    """What a server sends: `content`, of which it breaks off after `cut` bytes, by an error or in silence."""

    def __init__(self, content, status=200, cut=None, error=None):
        super().__init__(content[:cut])
        self.status, self.error = status, error

    def read(self, size=-1):
        chunk = super().read(min(size, 1000))
        if not chunk and self.error:
            raise self.error
        return chunk


@pytest.fixture
def server(monkeypatch):
    """server(answers): what it answers, in turn; an exception is raised. Returns the ranges that were asked for."""
    monkeypatch.setattr(download, "PAUSE", 0)

    def serve(*answers):
        answers, asked = list(answers), []

        def urlopen(request, timeout):
            asked.append(request.get_header("Range"))
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(urllib.request, "urlopen", urlopen)
        return asked

    return serve


def test_a_file_is_downloaded_once_and_verified_each_time(tmp_path, server):
    path, asked = tmp_path / "new" / "y", server(Answer(CONTENT))
    for _ in range(2):
        assert fetch("https://x/y", path, SHA256, SIZE).read_bytes() == CONTENT
    assert asked == [None] and list(path.parent.iterdir()) == [path]
    path.write_bytes(b"tampered")
    with pytest.raises(UsageError, match=r"y is not the expected file \(its sha256 .*: delete it to download it again"):
        fetch("https://x/y", path, SHA256, SIZE)


@pytest.mark.parametrize(
    "error", [None, http.client.IncompleteRead(b""), TimeoutError("timed out"), ConnectionResetError(104, "reset")]
)
def test_a_download_that_was_cut_short_resumes_where_it_stopped(tmp_path, server, capsys, error):
    asked = server(Answer(CONTENT, cut=3000, error=error), Answer(CONTENT[3000:], status=206))
    assert fetch("https://x/y", tmp_path / "y", SHA256, SIZE).read_bytes() == CONTENT
    assert asked == [None, "bytes=3000-"] and "trying again" in capsys.readouterr().err


def test_a_server_that_cannot_begin_in_the_middle_begins_anew(tmp_path, server):
    asked = server(Answer(CONTENT, cut=3000), Answer(CONTENT))
    assert fetch("https://x/y", tmp_path / "y", SHA256, SIZE).read_bytes() == CONTENT
    assert asked == [None, "bytes=3000-"]


@pytest.mark.parametrize(
    "answer, reason",
    [
        (lambda: Answer(CONTENT, cut=3000), "cut short, after 3,000 of 5,120 bytes"),
        (lambda: Answer(CONTENT, cut=0), "cut short, after 0 of 5,120 bytes"),
        (lambda: Answer(CONTENT[::-1]), "the server sent a different file: its sha256"),
        (lambda: Answer(CONTENT + b"more"), "the server sent a different file: its sha256"),
        (lambda: urllib.error.URLError("no route"), "no route"),
        (lambda: TimeoutError("timed out"), "timed out"),
        (lambda: http.client.RemoteDisconnected("Remote end closed"), "Remote end closed"),
    ],
)
def test_after_three_tries_one_line_says_why_and_nothing_is_left(tmp_path, server, capsys, answer, reason):
    asked = server(answer(), answer(), answer())
    with pytest.raises(UsageError) as error:
        fetch("https://x/y", tmp_path / "y", SHA256, SIZE)
    assert reason in str(error.value) and f"put it at {tmp_path / 'y'}" in str(error.value)
    assert "\n" not in str(error.value) and "delete" not in str(error.value)
    assert len(asked) == 3 and capsys.readouterr().err.count("trying again") == 2 and not list(tmp_path.iterdir())


def test_a_finished_download_that_a_virus_scanner_holds_is_not_downloaded_again(tmp_path, server, monkeypatch):
    replace, tried = os.replace, []

    def held(*paths):
        tried.append(paths)
        if len(tried) <= 2:
            raise PermissionError(13, "Access is denied")
        replace(*paths)

    monkeypatch.setattr(os, "replace", held)
    asked = server(Answer(CONTENT))
    assert fetch("https://x/y", tmp_path / "y", SHA256, SIZE).read_bytes() == CONTENT
    assert asked == [None] and len(tried) == 3


def test_what_ends_before_its_announced_length_is_downloaded_from_the_start_again(tmp_path, server):
    nothing_more = urllib.error.HTTPError("https://x/y", 416, "Range Not Satisfiable", {}, None)
    asked = server(Answer(CONTENT[::-1], cut=3000), nothing_more, Answer(CONTENT))
    assert fetch("https://x/y", tmp_path / "y", SHA256, SIZE).read_bytes() == CONTENT
    assert asked == [None, "bytes=3000-", None]


def test_a_long_download_says_how_far_it_is(tmp_path, server, capsys, monkeypatch):
    monkeypatch.setattr(download, "REPORT_EVERY", -1)
    server(Answer(CONTENT))
    fetch("https://x/archive.tar.gz", tmp_path / "archive.tar.gz", SHA256, SIZE)
    assert "archive.tar.gz: 0 of 0 MB" in capsys.readouterr().err


def test_an_interruption_leaves_nothing_half(tmp_path, server):
    server(Answer(CONTENT, cut=3000, error=KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        fetch("https://x/y", tmp_path / "y", SHA256, SIZE)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, server):
    (tmp_path / "file").touch()
    server(Answer(CONTENT))
    with pytest.raises(UsageError, match="cannot write"):
        fetch("https://x/y", tmp_path / "file" / "y", SHA256, SIZE)


def test_no_network_is_one_line_that_says_where_to_put_the_file(tmp_path, server):
    server(urllib.error.URLError("no route"))
    with pytest.raises(UsageError, match=r"no route.*put it at .*tinyshakespeare\.txt"):
        shakespeare.text(tmp_path)
