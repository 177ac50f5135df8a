"""`python -m rewards` in this process: what it prints, and how it refuses."""

from __future__ import annotations

import pytest

from rewards.__main__ import main

Capture = pytest.CaptureFixture[str]


def run(capsys: Capture, *argv: str) -> str:
    """What a command prints on stdout."""
    main(argv)
    return capsys.readouterr().out


def fail(capsys: Capture, *argv: str) -> str:
    """The one line of a command that is refused."""
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    return told.removeprefix("error: ").strip()
