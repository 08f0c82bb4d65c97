"""The processor's name, and the folder of programs that are compiled for it."""

import jax
import pytest

from lowrank.core.compilation_cache import keep_programs
from lowrank.core.processor import processor_name

CORE = "processor\t: {i}\nmodel name\t: AMD EPYC\nflags\t\t: fpu {flags}\n\n"


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("sse2", "AMD EPYC"),
        ("avx2", "AMD EPYC, AVX2"),
        ("avx2 avx512f", "AMD EPYC, AVX-512"),
        ("avx2 avx512f avx512_bf16", "AMD EPYC, AVX-512 with bfloat16"),
    ],
)
def test_a_processor_is_named_by_its_model_and_widest_instructions(flags, name):
    assert processor_name("".join(CORE.format(i=i, flags=flags) for i in range(2))) == name


def test_programs_are_kept_apart_by_processor(tmp_path, monkeypatch):
    settings = {}
    monkeypatch.setattr(jax.config, "update", settings.__setitem__)
    keep_programs(tmp_path)
    folder = settings["jax_compilation_cache_dir"]
    assert folder.startswith(str(tmp_path))
    assert folder != str(tmp_path)
