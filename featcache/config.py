"""YAML files and `--set` turned into checked values, and values turned into files.

A schema is a `Config` that stands beside what it configures; this module only loads. The order of
precedence is: defaults in the schema, then one YAML file, then `KEY=VALUE` overrides.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from featcache.errors import CacheError, ConfigError, UsageError, nearest
from featcache.partial import partial_path, remove_dead_partials

ConfigT = TypeVar("ConfigT", bound="Config")


class Config(BaseModel):
    """Base of every schema: frozen, no unknown keys, and errors that never show the input."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
        protected_namespaces=(),
        arbitrary_types_allowed=False,
    )


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with `1e-4` read as a number and a repeated key refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise yaml.constructor.ConstructorError(
                    None, None, f"line {line}: the key `{key}` stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML file of plain values.

    Raises:
        ConfigError: The file is missing, is no YAML, or holds no mapping.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506
    except FileNotFoundError:
        raise ConfigError("there is no such config file", where=path) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problem = getattr(error, "problem", None) or "not readable as text"
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark is not None else ""
        raise ConfigError(f"the config is no valid YAML: {problem}{line}", where=path) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"a config is a mapping of names to values, this is a {type(values).__name__}",
            where=path,
        )
    return values


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Lay `KEY=VALUE` settings over a mapping; dots go one level down.

    Args:
        values: What the file says; not changed.
        overrides: As typed, e.g. `adaptor.layers=1`. A value is read as YAML.

    Raises:
        ConfigError: An override has no `=`, no key, or no valid value.
    """
    merged: dict[str, Any] = json.loads(json.dumps(values))
    for text in overrides:
        key, equals, raw = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"`--set {text}` is not of the form KEY=VALUE", where="--set")
        try:
            value = yaml.load(raw, Loader=_Loader)  # noqa: S506
        except yaml.YAMLError:
            raise ConfigError(
                f"the value of `--set {key}` is no YAML value", where="--set"
            ) from None
        *parents, last = key.strip().split(".")
        target = merged
        for parent in parents:
            inner = target.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise ConfigError(
                    f"`{parent}` in `--set {key}` is a value, not a group", where="--set"
                )
            target = inner
        target[last] = value
    return merged


def _known_keys(schema: type[BaseModel], path: tuple[str | int, ...]) -> list[str]:
    """Field names at a place inside a schema, for the spelling hint."""
    current: Any = schema
    for part in path:
        field = getattr(current, "model_fields", {}).get(part)
        current = field.annotation if field is not None else None
    return list(getattr(current, "model_fields", {}))


def _sentence(schema: type[BaseModel], error: Mapping[str, Any]) -> str:
    """Turn one of pydantic's findings into a sentence that names the key."""
    place = ".".join(str(part) for part in error["loc"]) or "the whole"
    kind = str(error["type"])
    if kind == "extra_forbidden":
        parents = tuple(error["loc"][:-1])
        hint = nearest(str(error["loc"][-1]), _known_keys(schema, parents))
        return f"`{place}`: unknown key; {hint}"
    if kind == "missing":
        return f"`{place}`: a value is needed"
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"`{place}`: {message[:1].lower()}{message[1:]}"


def validate(
    schema: type[ConfigT], values: Mapping[str, Any], *, where: "str | Path" = "--set"
) -> ConfigT:
    """Check a mapping against a schema.

    Args:
        schema: What is expected.
        values: What was found.
        where: File or option that the values came from.

    Raises:
        ConfigError: One or more values do not fit; all of them are named at once.
    """
    try:
        return schema.model_validate(dict(values))
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        sentences = [_sentence(schema, item) for item in found]
        keys = "known keys: " + ", ".join(schema.model_fields) if schema.model_fields else None
        raise ConfigError("\n  ".join(sentences), where=where, fix=keys) from None


def load_config(
    schema: type[ConfigT],
    *,
    path: Path | None = None,
    overrides: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> ConfigT:
    """Build a config from a schema's defaults, one YAML file and overrides, in this order.

    Args:
        schema: The `Config` to fill.
        path: YAML file, or None for the defaults alone.
        overrides: `KEY=VALUE` texts, the last one of a key wins.
        defaults: Values that stand below the file, e.g. from other options of the command.

    Raises:
        ConfigError: The file, a key or a value does not fit.
    """
    values = dict(defaults or {})
    if path is not None:
        values |= read_yaml(path)
    values = apply_overrides(values, overrides)
    places = [str(path)] if path is not None else []
    places += ["--set"] if overrides or not places else []
    return validate(schema, values, where=", ".join(places))


def shipped(folder: str) -> Path:
    """A folder that travels with the package: beside it in a wheel, one up in a checkout."""
    here = Path(__file__).resolve().parent
    beside = here / folder
    return beside if beside.is_dir() else here.parent / folder


def list_configs(folder: str) -> list[str]:
    """Names of the shipped YAML files of one kind (`encoders`, `datasets`, `runs`), sorted."""
    return sorted(path.stem for path in (shipped("configs") / folder).glob("*.yaml"))


def find_config(folder: str, name: str) -> Path:
    """The YAML file of a shipped name.

    Raises:
        UsageError: There is none of that name; the nearest ones are offered.
    """
    known = list_configs(folder)
    if name not in known:
        raise UsageError(
            f"unknown name `{name}`; {nearest(name, known)}",
            where=f"configs/{folder}",
            fix="known names: " + ", ".join(known),
        )
    return shipped("configs") / folder / f"{name}.yaml"


def to_plain(model: BaseModel) -> dict[str, Any]:
    """A config as JSON-compatible values."""
    return model.model_dump(mode="json")


def canonical_json(values: Any) -> str:
    """The one spelling of a value that hashes are made over: sorted keys, no blanks, ASCII."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


@contextlib.contextmanager
def explained_refusals(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write into a sentence.

    Raises:
        CacheError: The disk is full, or the file cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CacheError(
                "the disk is full, or your quota is",
                where=path,
                fix="free some space and run the same command again: what is complete is kept",
            ) from None
        raise CacheError(f"the file cannot be written: {error.strerror}", where=path) from None


def replace_file(path: Path, content: bytes) -> None:
    """Write a small file beside its place, sync it, and rename: it is old or new, never half.

    Raises:
        CacheError: The disk is full, or the file cannot be written.
    """
    hidden = path.with_name(f".{path.name}")  # so that nobody reads it as a part of a table
    remove_dead_partials(path.parent, hidden.name)
    partial = partial_path(hidden)
    with explained_refusals(path):
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def write_json(path: Path, values: Any) -> None:
    """Write sorted, indented JSON in one step."""
    text = json.dumps(values, sort_keys=True, indent=1, ensure_ascii=False)
    replace_file(path, (text + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file of ours.

    Raises:
        CacheError: It is missing, or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CacheError("a file that should be here is missing", where=path) from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise CacheError("the file is damaged: it is no JSON", where=path) from None


def save_config(model: BaseModel, path: Path, *, comment: str = "") -> None:
    """Write a config as YAML that `load_config` reads back to an equal value."""
    head = "".join(f"# {line}\n" for line in comment.splitlines())
    body = yaml.safe_dump(to_plain(model), sort_keys=False, allow_unicode=True, width=100)
    replace_file(path, (head + body).encode())


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
