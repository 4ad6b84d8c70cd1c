"""`asd-rt serve` before it serves: what it refuses, in one line."""

from __future__ import annotations

import socket

import pytest

from asd_rt.cli import main


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str]]:
    code = main(["serve", *arguments])
    return code, capsys.readouterr().err.splitlines()


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASD_RT_TOKEN", raising=False)


def test_without_its_packages_it_says_how_to_install_them(capsys, monkeypatch) -> None:
    monkeypatch.setattr("asd_rt.commands.serve.NEEDED", ("uvicorn", "no_such_package"))
    code, lines = refused(capsys)
    assert (code, len(lines)) == (1, 1)
    assert "needs no_such_package" in lines[0]
    assert "pip install 'asd-rt[serve]'" in lines[0]


def test_others_need_a_token(capsys) -> None:
    code, lines = refused(capsys, "--host", "0.0.0.0")
    assert (code, len(lines)) == (1, 1)
    assert "needs a token: set ASD_RT_TOKEN" in lines[0]


def test_all_that_is_wrong_is_said_at_once(capsys) -> None:
    flags = ("--sessions", "0", "--port", "x", "--latent-size", "3x4", "--refresh-every", "-1")
    flags += ("--workers", "0")
    code, lines = refused(capsys, *flags)
    assert code == 2
    assert [line.split()[2] for line in lines] == [
        "--port",
        "--sessions",
        "--workers",
        "--latent-size",
        "--refresh-every",
    ]


def test_a_port_that_is_taken(capsys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, lines = refused(capsys, "--port", str(taken.getsockname()[1]))
    assert (code, len(lines)) == (1, 1)
    assert "choose another --port" in lines[0]


def test_more_workers_than_threads_and_a_card_that_is_not_there(capsys) -> None:
    code, lines = refused(capsys, "--port", "0", "--threads", "2", "--workers", "3")
    assert (code, len(lines)) == (1, 1)
    assert "there are 2 threads to share" in lines[0]
    code, lines = refused(capsys, "--port", "0", "--device", "cuda")
    assert (code, len(lines)) == (1, 1)
    assert "cuda" in lines[0].lower()
