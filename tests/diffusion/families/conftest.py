"""Small random pipelines of every family, made once."""

import pytest

from benchmarks.families import small


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Return the folder of a family's small pipeline, by its name and the settings of a variant."""
    folders = {}

    def folder(name, settings):
        key = (name, *settings.values())
        if key not in folders:
            folders[key] = small.write(name, tmp_path_factory.mktemp(name), **settings)
        return folders[key]

    return folder
