"""The objectives by their names.

A new one is a class in a module of its own, and a line in `OBJECTIVES`. docs/objectives.md has the
formulas.
"""

from featcache.adaptor.allpairs import AllPairs
from featcache.adaptor.dual import Dual
from featcache.adaptor.model import AdaptorConfig
from featcache.adaptor.objective import Objective
from featcache.adaptor.paper import Paper
from featcache.errors import ConfigError, nearest

OBJECTIVES: dict[str, type[Objective]] = {
    "allpairs": AllPairs,
    "dual": Dual,
    "paper": Paper,
}


def build_objective(config: AdaptorConfig) -> Objective:
    """The objective that a config names.

    Raises:
        ConfigError: There is none of that name.
    """
    if config.objective not in OBJECTIVES:
        hint = nearest(config.objective, list(OBJECTIVES))
        raise ConfigError(
            f"unknown objective `{config.objective}`; {hint}",
            where="adaptor.objective",
            fix="known: " + ", ".join(OBJECTIVES),
        )
    return OBJECTIVES[config.objective].from_config(config)
