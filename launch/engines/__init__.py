"""Engines: each starts workers (`launch.worker`) on a study's folder in its own way. One file each, one line here.

An engine adds its flags to the parser of `launch.sweep`, and starts workers. Claims, retries and timeouts are the
workers' own, and the results are files: an engine has nothing else to do.
"""

from launch.engines import cluster, jobset, local, ray, skypilot, slurm, tpu_vm, xpk
from launch.engines.engine import Engine

ENGINES: dict[str, Engine] = {
    "local": Engine(local.add_flags, local.check, local.run),
    "jobset": jobset.ENGINE,
    "ray": ray.ENGINE,
    "skypilot": skypilot.ENGINE,
    "slurm": slurm.ENGINE,
    "tpu_vm": tpu_vm.ENGINE,
    "xpk": xpk.ENGINE,
}

HELP = "\n".join(part.__doc__ or "" for part in (local, ray, cluster))
