"""The command line from the outside: codes, words, and its surface."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from featcache.cli import app, main

SURFACE = Path(__file__).parent / "golden" / "cli_surface.json"
SHARED = {"--root", "--config", "--set", "--seed", "--device", "--json", "--quiet", "--dry-run"}


def surface() -> dict[str, list[str]]:
    import typer

    command = typer.main.get_command(app)
    return {
        name: sorted(
            option
            for parameter in sub.params
            for option in (*parameter.opts,)
            if option != "--help"
        )
        for name, sub in sorted(command.commands.items())
    }


def test_the_surface_is_what_was_decided():
    """Rewrite the golden file by hand when an option is added: growth is a decision."""
    assert surface() == json.loads(SURFACE.read_text())


def test_a_command_has_at_most_twelve_options_of_its_own():
    # Stage one is the exception: encoders, what is stored of them, and where it runs.
    for name, options in surface().items():
        own = [o for o in options if o.startswith("--") and o not in SHARED]
        assert len(own) <= (16 if name == "extract" else 12), name


def run(capsys, *arguments) -> tuple[int, str]:
    code = main(list(map(str, arguments)))
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["extract", "--backbon", "vit-b"], 2, ["no such option", "--backbone"]),
        (["nonsense"], 2, ["nonsense", "featcache --help"]),
        (["train-adaptor"], 1, ["no manifest is current", "featcache demo"]),
        (["finetune"], 1, ["is current", "featcache"]),
        (["extract", "--backbone", "vit-b"], 1, ["no manifest is current", "featcache demo"]),
        (["manifest", "covid", "."], 2, ["unknown data set", "covidx"]),
        (["manifest", "covidx", "nowhere"], 2, ["no such file or folder", "nowhere"]),
        (["use", "--image", "vit-b"], 1, ["no image feature set `vit-b`"]),
        (["extract", "--set", "batch-sizes=3"], 2, ["unknown key", "batch_size"]),
    ],
)
def test_a_mistake_gives_its_code_and_three_lines(
    arguments, code, words, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEATCACHE_ROOT", raising=False)
    got, text = run(capsys, *arguments)
    assert got == code
    assert text.startswith("error: ")
    assert "\n  at: " in text
    assert "\n  try: " in text or code == 2
    for word in words:
        assert word in text


def test_help_is_quick_and_names_every_command():
    out = subprocess.run(
        [sys.executable, "-m", "featcache.cli", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    for name in surface():
        assert name in out.stdout
