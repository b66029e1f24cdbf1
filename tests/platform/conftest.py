"""A real swtpm for the whole session, and a fresh connection to it for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support_tpm import Embedded, make_embedded

from hostd.platform.tpm import Tpm


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Embedded]:
    """One for all tests that do not break it."""
    embedded = make_embedded(tmp_path_factory.mktemp("tpm"))
    yield embedded
    embedded.process.stop()


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Embedded]:
    """Another machine's TPM, of another maker, for all tests that do not break it."""
    embedded = make_embedded(tmp_path_factory.mktemp("other"))
    yield embedded
    embedded.process.stop()


@pytest.fixture
def own_host(tmp_path: Path) -> Iterator[Embedded]:
    """One for a test that stops, kills or clears it."""
    embedded = make_embedded(tmp_path)
    yield embedded
    embedded.process.kill()


@pytest.fixture
def tpm(host: Embedded) -> Iterator[Tpm]:
    opened = host.open()
    yield opened
    opened.close()
