"""What the linters cannot see: public functions that take arrays say their shapes."""

import ast
from pathlib import Path

import featcache

ARRAYS = ("Tensor", "ndarray")
SOURCE = Path(featcache.__file__).parent


def public_functions():
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                yield path, node


def test_array_arguments_carry_a_shape():
    bare = []
    for path, node in public_functions():
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        for argument in arguments:
            text = ast.unparse(argument.annotation) if argument.annotation else ""
            if any(word in text for word in ARRAYS) and "'" not in text:
                bare.append(f"{path.relative_to(SOURCE)}:{node.lineno} {node.name}({argument.arg})")
    assert not bare, "\n".join(bare)


def test_modules_stay_readable():
    long = {
        str(path.relative_to(SOURCE)): lines
        for path in SOURCE.rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > 500
    }
    assert not long
