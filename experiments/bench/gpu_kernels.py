"""The kernels of a GPU in JAX: compared with float64, or timed in every form (a part of `experiments.bench.gpu`)."""

import json
import sys
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import gpu_problems
from experiments.bench.gpu_problems import BODY, OURS, Arrays, Problem
from lowrank.core.weight import is_weight, materialize
from lowrank.kernels import dispatch

RELATIVE = 2e-2  # bfloat16 results of float32 sums, and gradients that are rounded once more
SECONDS = 0.05  # for which the calls of one measurement run
ROUNDS = 5
FAILURES = (jax.errors.JaxRuntimeError, NotImplementedError, ValueError)  # of a program, or of lowering a Pallas body


def main(check: bool, toy: bool) -> None:
    """Prints a JSON line per result."""
    device = jax.devices()[0]
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib")}
    print(json.dumps({"device": device.device_kind, "versions": versions}), flush=True)
    for name, problem in _problems(check, toy).items():
        inputs = jax.jit(problem.inputs)(jax.random.key(0))
        given = (*inputs, gpu_problems.cotangent(problem, inputs, jax.random.key(1)))
        if check:
            print(json.dumps({"correctness": {name: differences(problem, given)}}), flush=True)
        else:
            print(json.dumps({"kernels": {name: {"jax": times(problem, given)}}}), flush=True)


def _problems(check: bool, toy: bool) -> dict[str, Problem]:
    if check or not toy:
        return gpu_problems.CHECKS if check else gpu_problems.PROBLEMS
    return {"lora": gpu_problems.CHECKS["lora"]}


def differences(problem: Problem, given: Arrays) -> dict[str, Any]:
    """The largest relative difference to float64 of each form's result and gradients, and whether all are small.

    A Pallas body that fails or disagrees is reported and does not count: it is left out of what is timed.
    """
    want = problem.exact(*(_wide(x) for x in given))
    found: dict[str, Any] = {}
    for name, form in runnable(problem).items():
        try:
            got = jax.jit(gpu_problems.forward_and_backward(problem, form))(*given)
        except FAILURES as e:
            found[name] = str(e).splitlines()[0]
            continue
        found[name] = max(_difference(np.asarray(y, np.float64), z) for y, z in zip(got, want, strict=True))
    counted = [value for name, value in found.items() if name != BODY]
    return {"relative": found, "agrees": all(not isinstance(v, str) and v <= RELATIVE for v in counted)}


def runnable(problem: Problem) -> dict[str, Callable[..., jax.Array]]:
    """The forms that the device at hand has a program for."""
    kind = jax.devices()[0].device_kind
    return {name: form for name, form in problem.forms.items() if name != BODY or dispatch.runs_on(name, kind)}


def _wide(x: Any) -> np.ndarray:
    array = np.asarray(materialize(x) if is_weight(x) else x)
    return array if np.issubdtype(array.dtype, np.integer) else array.astype(np.float64)


def _difference(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def times(problem: Problem, given: Arrays) -> dict[str, Any]:
    """Milliseconds of each form, forward alone and with the backward pass: the median and the range of the rounds."""
    found: dict[str, Any] = {}
    for name, form in runnable(problem).items():
        try:
            if name == BODY and (difference := _to_ours(problem, given)) > RELATIVE:
                raise ValueError(f"it differs from ours by {difference:.1e}")
            forward = seconds(form, given[:-1])
            both = seconds(gpu_problems.forward_and_backward(problem, form), given)
        except FAILURES as e:  # a form that does not fit into the memory has no time
            found[name] = {"failed": str(e).splitlines()[0]}
            continue
        found[name] = {"forward": forward, "both": both}
    return found


def _to_ours(problem: Problem, given: Arrays) -> float:
    """The relative difference between the results of the Pallas body and of the form that users get."""
    body, ours = (np.asarray(jax.jit(problem.forms[name])(*given[:-1]), np.float64) for name in (BODY, OURS))
    return _difference(body, ours)


def seconds(call: Callable[..., Any], given: Arrays) -> dict[str, float]:
    """Milliseconds of one call inside a program that makes many, in which the launch of a program costs nothing."""
    program = jax.jit(_repeated(call))
    jax.block_until_ready(program(1, 0.0, *given))
    count = max(1, int(SECONDS / max(_timed(program, 1, given), 1e-6)))
    rounds = sorted(1e3 * _timed(program, count, given) / count for _ in range(ROUNDS))
    return {"median": rounds[ROUNDS // 2], "least": rounds[0], "most": rounds[-1], "calls": count}


def _repeated(call: Callable[..., Any]) -> Callable[..., Any]:
    """`run(count, zero, *given)`: as many calls, each of which waits for the one before it.

    An entry of the first input is changed by `zero` times an entry of the last result, of which the compiler does not
    know that it is 0.
    """

    def run(count: jax.Array, zero: jax.Array, *given: Any) -> Any:
        def again(_: jax.Array, carry: Any) -> Any:
            x, y = carry
            first = jnp.ravel(jax.tree.leaves(y)[0])[0]
            x = x.at[(0,) * x.ndim].add((zero * first).astype(x.dtype))
            return x, call(x, *given[1:])

        start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(call, *given))
        return jax.lax.fori_loop(0, count, again, (given[0], start))[1]

    return run


def _timed(program: Callable[..., Any], count: int, given: Arrays) -> float:
    """Seconds of one run of the compiled program."""
    start = time.perf_counter()
    jax.block_until_ready(program(count, 0.0, *given))
    return time.perf_counter() - start


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
