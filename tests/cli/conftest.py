"""The command line, run in this process as a user would type it, in a folder of its own."""

import pytest

from instantas.cli import main


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def refused(capsys):
    """Runs a command that must fail in one line with exit code 2; the line."""

    def run(*arguments) -> str:
        with pytest.raises(SystemExit) as stop:
            main(list(arguments))
        assert stop.value.code == 2
        *shown, line = capsys.readouterr().err.splitlines()
        assert all("%|" in part for part in shown if part.strip())  # nothing before it but the progress bar
        assert line.startswith("instantas: ")
        return line

    return run
