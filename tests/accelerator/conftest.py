"""The tests in this folder run where `AFGSTUDY_DEVICE=npu` and this folder is on PYTHONPATH, as `make test` does it.

Elsewhere they are skipped: registering a device changes torch for the rest of the process.
"""

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def accelerator():
    "The device, which torch has found by its entry point."
    if os.environ.get("AFGSTUDY_DEVICE") != "npu":
        pytest.skip(
            "the pretend accelerator is not selected: AFGSTUDY_DEVICE=npu PYTHONPATH=tests/accelerator"
        )
