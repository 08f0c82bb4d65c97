"""The name of the processor and its widest vector instructions, which decide how fast a program runs, and where."""

import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
# A flag of /proc/cpuinfo for each set of instructions, the widest first.
INSTRUCTIONS = {
    "amx_bf16": "AMX",
    "avx512_bf16": "AVX-512 with bfloat16",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
}


def processor_name(cpuinfo: str | None = None) -> str:
    """`AMD EPYC, AVX-512 with bfloat16`: the model and its instructions, from the text of Linux's /proc/cpuinfo.

    Without that file or the fields, it is what Python says of the platform.
    """
    text = CPUINFO.read_text() if cpuinfo is None and CPUINFO.exists() else cpuinfo or ""
    fields = dict(line.split(":", 1) for line in reversed(text.splitlines()) if ":" in line)  # of the first core
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    flags = fields.get("flags", "").split()
    found = [name for flag, name in INSTRUCTIONS.items() if flag in flags]
    return ", ".join([fields.get("model name", platform.processor() or platform.machine()), *found[:1]])
