"""The choice among the bodies of an operation: by name, by the platform lowered for, and by the mesh's devices."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

from lowrank.core.errors import UserError
from lowrank.kernels import dispatch
from lowrank.kernels.dispatch import Operation

X = jnp.arange(4.0)


def constant(value):
    """A body that tells which one ran."""
    return lambda x, interpret=False: x * (value + interpret)


OPERATION = Operation("product", xla=constant(1.0), pallas_tpu=constant(2.0), pallas_gpu=constant(4.0))
ON_CPU = Operation("product", xla={"cpu": constant(7.0), "default": constant(1.0)})


def lowered(implementation, platform, operation=OPERATION):
    def run(x):
        return operation(x, implementation=implementation)

    return jax.jit(run).trace(X).lower(lowering_platforms=(platform,)).as_text()


def mesh_of(kind, size=1, axis=AxisType.Auto):
    platform = "tpu" if kind.startswith("TPU") else "gpu"
    device = AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    return AbstractMesh((size,), ("data",), axis_types=(axis,), abstract_device=device)


def test_each_implementation_runs_its_own_body():
    assert [float(OPERATION(X, implementation=i)[1]) for i in ("auto", "xla", "interpret")] == [1, 1, 3]
    assert [float(ON_CPU(X, implementation=i)[1]) for i in ("auto", "xla")] == [7, 7]
    assert "2.0" in lowered("pallas_tpu", "tpu")
    assert "4.0" in lowered("pallas_gpu", "cuda")


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit, jax.grad, jax.checkpoint, jax.vmap])
def test_a_named_body_fails_on_another_platform(transform):
    run = functools.partial(OPERATION, implementation="pallas_tpu")
    if transform is jax.grad:
        run = lambda x: jnp.sum(OPERATION(x, implementation="pallas_tpu"))  # noqa: E731
    with pytest.raises(UserError, match=r"only for tpu.* 'auto', 'xla', 'pallas_gpu'"):
        transform(run)(X)


@pytest.mark.parametrize(
    ("implementation", "mesh", "message"),
    [
        ("palas_tpu", mesh_of("TPU v5 lite"), "did you mean 'pallas_tpu'"),
        ("pallas_tpu", mesh_of("NVIDIA H200"), "does not run on NVIDIA H200"),
        ("pallas_gpu", mesh_of("NVIDIA A100-SXM4-80GB"), "does not run on NVIDIA A100"),
        ("pallas_tpu", mesh_of("TPU v5 lite", 4), "mesh of 4 devices: call it inside jax.shard_map"),
    ],
)
def test_a_named_body_that_these_devices_cannot_run_is_refused(implementation, mesh, message):
    with pytest.raises(UserError, match=message):
        OPERATION.resolve(implementation, mesh)


def test_an_operation_without_the_named_body_refuses_it():
    for name in ("pallas_gpu", "interpret"):
        with pytest.raises(UserError, match=r"product has no such body; its others are 'auto', 'xla'$"):
            ON_CPU(X, implementation=name)


def test_auto_takes_what_a_result_shows_for_that_kind_of_device(monkeypatch):
    monkeypatch.setitem(dispatch.SHOWN, "TPU v6 lite", {"product": "pallas_tpu"})
    shared = mesh_of("TPU v6 lite", 4, AxisType.Manual)
    taken = [OPERATION.resolve("auto", m) for m in (mesh_of("TPU v6 lite"), shared, mesh_of("TPU v6 lite", 4))]
    assert taken == ["pallas_tpu", "pallas_tpu", "xla"]
    assert OPERATION.resolve("auto", mesh_of("TPU v5 lite")) == "xla"
    x = jax.ShapeDtypeStruct(X.shape, X.dtype, sharding=NamedSharding(mesh_of("TPU v6 lite"), PartitionSpec()))
    text = jax.jit(OPERATION).trace(x).lower(lowering_platforms=("tpu",)).as_text()
    assert "2.0" in text
    assert dispatch.describe("TPU v6 lite") == "kernels on TPU v6 lite: product pallas_tpu; the others in plain JAX"
    assert dispatch.describe("NVIDIA L4") == "kernels on NVIDIA L4: all in plain JAX, as Mosaic GPU does not run there"


def test_a_body_that_partitions_itself_runs_on_a_mesh():
    operation = Operation("product", xla=constant(1.0), pallas_tpu=constant(2.0), partitions=True)
    assert operation.resolve("pallas_tpu", mesh_of("TPU v5 lite", 4)) == "pallas_tpu"
