"""What every reader must keep to; a test class per data set inherits it.

A subclass gives the fixtures `module`, `source` (what `read` is pointed at, synthetic or made by
hand) and `options`.
"""

import subprocess
import sys

import pytest

from featcache.config import Config
from featcache.manifest.table import check_funnel, open_manifest


class DatasetContract:
    @pytest.fixture
    def manifest(self, module, source, options, tmp_path):
        return module.read(source, tmp_path / "out" / "made", options=options)

    def test_it_describes_itself(self, module):
        assert module.DESCRIPTION.count("\n") == 0
        assert issubclass(module.Options, Config)
        module.Options()
        fields = module.Options.model_fields
        assert all(field.description for field in fields.values())

    def test_what_it_wrote_opens_as_what_it_returned(self, manifest):
        opened = open_manifest(manifest.folder)
        assert opened.meta == manifest.meta
        assert opened.images.equals(manifest.images)
        assert opened.texts.equals(manifest.texts)

    def test_a_second_reading_gives_the_same_bytes(
        self, module, source, options, manifest, tmp_path
    ):
        again = tmp_path / "again" / "made"
        module.read(source, again, options=options)
        files = sorted(path.name for path in manifest.folder.iterdir())
        assert files == sorted(path.name for path in again.iterdir())
        for name in files:
            assert (again / name).read_bytes() == (manifest.folder / name).read_bytes()

    def test_its_funnel_closes_on_the_images(self, manifest):
        assert len(manifest.meta.funnel) > 1
        assert check_funnel(manifest.meta.funnel, len(manifest.keys)) == []

    def test_every_image_is_there(self, manifest):
        assert all(manifest.image_file(row).is_file() for row in range(len(manifest.keys)))

    def test_it_needs_no_torch(self, module):
        code = f"import {module.__name__}, sys; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
