"""One bench in a process of its own: `python -m featcache.bench.child`, a request on stdin.

A fresh process owes nothing to the bench before it: neither memory nor warm threads. What it found
goes to a file, so that whatever prints to stdout does no harm.
"""

import json
import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

from featcache.bench.case import Setting
from featcache.config import write_json
from featcache.console import set_quiet
from featcache.errors import FeatcacheError


def main() -> int:
    """Run the bench of the request; 1 when it cannot be measured here."""
    request = json.load(sys.stdin)
    setting = Setting(**{**request["setting"], "folder": Path(request["setting"]["folder"])})
    set_quiet(setting.quiet)
    group = import_module(request["group"])  # of ours alone: others may take seconds to import
    (bench,) = (one for one in group.BENCHES if one.name == request["name"])
    try:
        measured = bench.measure(setting)
    except FeatcacheError as error:
        write_json(Path(request["out"]), {"error": [error.what, error.fix]})
        return 1
    write_json(Path(request["out"]), asdict(measured))
    return 0


if __name__ == "__main__":
    sys.exit(main())
