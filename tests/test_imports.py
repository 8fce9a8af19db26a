"""Starting fast, and importing in one direction."""

import json
import subprocess
import sys

HEAVY = {"torch", "numpy", "h5py", "pyarrow", "dask", "distributed", "transformers", "timm",
         "lightning", "pydantic", "yaml", "sklearn"}  # fmt: skip


def modules_after(statement: str) -> set[str]:
    code = f"import json, sys; {statement}; print(json.dumps([*sys.modules]))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(out.stdout.splitlines()[-1]))


def test_the_command_line_imports_nothing_heavy():
    assert not HEAVY & modules_after("import featcache.cli")


def test_the_package_imports_nothing_heavy():
    assert not HEAVY & modules_after("import featcache")


def test_verify_needs_neither_torch_nor_transformers():
    assert not {"torch", "transformers", "timm", "dask"} & modules_after(
        "import featcache.cache.check"
    )


def test_public_names_are_few_and_importable():
    import featcache

    assert len(featcache.__all__) <= 12
    for name in featcache.__all__:
        assert getattr(featcache, name) is not None


def test_every_module_is_free_of_assert_and_blanket_except():
    import ast
    from pathlib import Path

    import featcache

    for path in Path(featcache.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, ast.Assert), f"{path}:{node.lineno}"
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{path}:{node.lineno}"
