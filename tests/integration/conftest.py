"""One mesh of the tiny model for all tests that only use it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.served import Served, served


@pytest.fixture(scope="session")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served("tiny", ["--dtype", "float32"], tmp_path_factory.mktemp("mesh") / "serve.log") as running:
        yield running
