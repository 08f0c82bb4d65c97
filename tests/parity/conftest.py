"""What is compared with another library is compiled as a user's programs are."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def full_compiles():
    """LLVM optimises, as it does not in the other tests."""
    jax.config.update("jax_disable_most_optimizations", False)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS")
        yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module")
def quick_compiles(full_compiles):
    """For modules that compile many small programs."""
    jax.config.update("jax_disable_most_optimizations", True)
