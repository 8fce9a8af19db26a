"""Cache the tokens of frozen encoders once, then train small adaptors on them at memory speed."""

from importlib import import_module
from importlib.metadata import version as _version

__version__ = _version("featcache")

_PUBLIC = {
    "FeatcacheError": "featcache.errors",
    "Workspace": "featcache.workspace",
    "open_manifest": "featcache.manifest.table",
    "write_manifest": "featcache.manifest.table",
    "FeatureSet": "featcache.cache.reader",
    "open_cache": "featcache.cache.reader",
    "extract": "featcache.extract.command",
    "TokenLoader": "featcache.loader.gather",
    "train_adaptor": "featcache.adaptor.train",
    "load_adaptor": "featcache.adaptor.saved",
    "finetune": "featcache.heads.classify",
    "retrieve": "featcache.heads.retrieve",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> object:
    """Import a public name when it is first asked for, so that `import featcache` stays fast."""
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'featcache' has no attribute '{name}'")
