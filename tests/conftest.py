"""Strictness for every test: eight simulated devices, and rank promotion raises."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# One module of machine code a program: 32 of them are for machines with as many cores.
os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"
# LLVM leaves small programs as they are, in processes that tests start as well: optimising takes half of the time.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

import functools
import gc

import jax
import pytest
from jax._src.interpreters import mlir

if jax.__version_info__ < (0, 11):  # the older code generator compiles in three fifths of the time
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_traceback_in_locations_limit", 0)  # no program says where each operation comes from
mlir.make_ir_context = functools.cache(mlir.make_ir_context)  # a new one takes a third of an eager operation's time


def pytest_collection_finish():
    """The collector leaves alone what the imports made, and comes seldom: tracing makes little that is garbage."""
    gc.freeze()
    gc.set_threshold(100_000)


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A folder with a tiny `llama`, a tiny `bert` and `records.jsonl`. Not to be changed."""
    from tests import tiny  # after the configuration above

    folder = tmp_path_factory.mktemp("tiny")
    tiny.bert(folder / "bert")
    tiny.llama(folder / "llama")
    tiny.records(folder / "records.jsonl")
    return folder
