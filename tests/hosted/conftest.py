"""One server for all hosted tests, fresh for each, and a disk that is not waited for."""

import os

import pytest

from flux2_pack.tests.hosted.server import Server


@pytest.fixture(scope="session")
def running():
    with Server() as server:
        yield server


@pytest.fixture
def server(running):
    running.reset()
    yield running
    running.reset()


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """No test cuts the power, and a busy disk takes most of their time."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
