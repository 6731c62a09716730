"""Fixtures shared by all tests. Tests marked `real` run when the data and weights they need are there."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    "Threads decide the order of additions, and tests compare digits: one, unless `make test-elsewhere` asks for more."
    torch.set_num_threads(int(os.environ.get("AFGSTUDY_TEST_THREADS", "1")))


@pytest.fixture(scope="session")
def project() -> Path:
    "The project's root."
    return ROOT


def folder_named_by(variable: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set")
    if not Path(value).is_dir():
        pytest.fail(f"{variable}={value} is not a folder")
    return Path(value)


@pytest.fixture(scope="session")
def real_data() -> Path:
    "The folder of the real data sets; skips where there is none."
    return folder_named_by("AFGSTUDY_DATA")


@pytest.fixture(scope="session")
def real_weights() -> Path:
    "The folder of the pretrained weights; skips where there is none."
    return folder_named_by("AFGSTUDY_WEIGHTS")
