"""Strictness for every test: eight simulated devices, and rank promotion raises."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import gc

import jax
import pytest

from tests.support.seconds import pytest_runtest_logstart, pytest_runtest_makereport, pytest_terminal_summary

__all__ = ["pytest_runtest_logstart", "pytest_runtest_makereport", "pytest_terminal_summary"]
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_traceback_in_locations_limit", 0)  # no program says where each operation comes from


def pytest_collection_finish():
    """The collector leaves alone what the imports made, and comes seldom: tracing makes little that is garbage."""
    gc.freeze()
    gc.set_threshold(100_000)


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A folder with a tiny `llama`, a tiny `bert`, `records.jsonl` and `pairs.jsonl`. Not to be changed."""
    from tests.support import tiny_checkpoint as tiny  # after the configuration above

    folder = tmp_path_factory.mktemp("tiny")
    tiny.bert(folder / "bert")
    tiny.llama(folder / "llama")
    tiny.records(folder / "records.jsonl")
    tiny.pairs(folder / "pairs.jsonl")
    return folder


@pytest.fixture(scope="session")
def bucket():
    """The URL of an empty bucket on a server of this machine."""
    from tests.support import bucket

    with bucket.serve_bucket() as address, bucket.environment(bucket.variables(address)):
        yield f"gs://{bucket.NAME}"
