"""The pages say what the program does."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from featcache.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
NAMED_FILE = r"`((?:docs|featcache|tests|configs)/[\w/.-]+\.\w+)`"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


def test_the_readme_is_short_and_starts_with_a_command():
    lines = README.splitlines()
    assert len(lines) <= 150
    assert any(line.startswith("make ") for line in lines[:25])


def test_contributing_is_short():
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 80


def test_the_command_page_is_what_the_program_prints():
    command = [sys.executable, "-m", "typer", "featcache.cli", "utils", "docs"]
    done = subprocess.run(
        [*command, "--name", "featcache"], capture_output=True, text=True, check=True
    )
    want = (ROOT / "docs" / "cli.md").read_text()
    assert done.stdout.strip() == want.strip(), "run `make docs`"


def commands():
    """Every `featcache ...` line inside a shell block of a page."""
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.splitlines():
                for part in re.split(r"&&|#", line):
                    if part.strip().startswith("featcache "):
                        yield pytest.param(part.split(), id=f"{page.stem}: {part.strip()}")


@pytest.mark.parametrize("words", list(commands()))
def test_a_command_on_a_page_exists_with_its_options(words):
    program = typer.main.get_command(app)
    command = program.commands[words[1]]
    known = {option for parameter in command.params for option in parameter.opts}
    for word in words[2:]:
        if word.startswith("--"):
            assert word.split("=")[0] in known


def test_every_command_has_a_help_text_on_each_option():
    for name, command in typer.main.get_command(app).commands.items():
        assert command.help, name
        for parameter in command.params:
            if "--help" not in parameter.opts:
                assert getattr(parameter, "help", None), f"{name} {parameter.name}"


def test_every_way_out_names_a_command_that_exists():
    known = set(typer.main.get_command(app).commands)
    for path in sorted((ROOT / "featcache").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "fix":
                for name in re.findall(
                    r"(?<!the )featcache ([a-z-]+) ", ast.unparse(node.value) + " "
                ):
                    assert name in known, f"{path.name}:{node.value.lineno} featcache {name}"


def test_every_make_target_of_a_page_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL):
            for target in re.findall(r"^make ([a-z-]+)", block, re.MULTILINE):
                assert target in targets


def test_every_file_that_a_page_names_exists():
    for page in PAGES:
        for name in re.findall(
            r"`((?:docs|featcache|tests|configs)/[\w/.-]+\.\w+)`", page.read_text()
        ):
            if "NAME" not in name and "/name." not in name:
                assert (ROOT / name).exists(), f"{page.name}: {name}"


@pytest.mark.weights
def test_the_notebook_block_of_the_readme_runs(extracted):
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    code = block.replace("featcache-data", str(extracted.root))
    code = code.replace("manifests/demo", "manifests/few").replace("batch_size=64", "batch_size=4")
    names: dict = {}
    exec(code, names)
    batch = names["batch"]
    assert batch.image_tokens.shape[1:] == (49, 1280)
    assert batch.text_valid.any(1).all()
