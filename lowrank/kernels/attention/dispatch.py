"""The forms of attention by name, and the form that is taken where none is named.

`auto` takes splash on a TPU from 512 queries on: compiled for a v5e, a forward and a backward pass over a row of 512
tokens with 32 and 8 heads of 128 moves 390 MB densely, 483 MB blockwise and 111 MB with splash. On a GPU it takes
cuDNN where it can. All else is dense up to `DENSE_SCORES` scores a head and row, and blockwise beyond: on a CPU with
AVX-512, in float32, both passes over a row of 1024 tokens with 9 and 3 heads of 64 take 336 ms of processor time and
192 MB densely, 146 ms and 22 MB in blocks of 256; over 2048 tokens 1384 ms and 761 MB, 618 ms and 67 MB.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from lowrank.core.errors import UserError, unknown
from lowrank.kernels.attention import blockwise, cudnn, dense, sharded, splash
from lowrank.kernels.attention.mask import Mask
from lowrank.kernels.dispatch import mesh_of, refused

DENSE_SCORES = 512 * 512  # T * S up to which `auto` stores the scores


class Form(NamedTuple):
    """A form of attention."""

    attend: Callable[..., jax.Array]  # (q, k, v, mask, scale=, softcap=) -> [B, T, N, H]
    refusal: Callable[..., str] = lambda *inputs: ""  # (q, k, mask, softcap) -> why the form cannot compute this
    platform: str = ""  # the only platform of the form, as lax.platform_dependent names it; "": all
    least: int = 0  # the number of queries from which on `auto` takes it on its platform


FORMS = {
    "dense": Form(dense.attend),
    "blockwise": Form(blockwise.attend),
    "splash": Form(splash.attend, splash.refusal, "tpu", 512),
    "cudnn": Form(cudnn.attend, cudnn.refusal, "cuda"),
}
IMPLEMENTATIONS = ("auto", *FORMS)
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    implementation: str = "auto",
) -> jax.Array:
    """`softmax(scale * q k) v`, `[B, T, N, H]`, over the keys that `mask` describes, with the softmax in float32.

    `scale` is `H ** -0.5` if it is None. `softcap` > 0 maps a score to `cap * tanh(score / cap)`. `implementation` is
    the name of a form, or `auto`, which takes the form that `choose` names for the devices of the program's mesh; a
    program without a mesh has the forms of all platforms, of which lowering keeps one. Raises UserError for a named
    form that cannot run, when the program is traced or lowered.
    """
    device = mesh_of((q, k, v)).abstract_device

    def choice(platform: str) -> str | UserError:
        try:
            return choose(platform, q, k, mask, softcap, implementation)
        except UserError as error:
            if device:
                raise
            return error

    choices = {platform: choice(platform) for platform in ([platform_of(device)] if device else PLATFORMS)}
    bodies = [refused(dense.attend, c) if isinstance(c, UserError) else FORMS[c].attend for c in choices.values()]
    bound = [functools.partial(body, scale=scale, softcap=softcap) for body in bodies]
    if sharded.divides_tokens(jax.sharding.get_abstract_mesh(), q.shape[1]):
        bound = [functools.partial(sharded.over_mesh, body) for body in bound]
    if len(set(choices.values())) == 1:
        return bound[0](q, k, v, mask)
    return jax.lax.platform_dependent(q, k, v, mask, **dict(zip(choices, bound, strict=True)))


def choose(platform: str, q: Any, k: Any, mask: Mask, softcap: float = 0.0, implementation: str = "auto") -> str:
    """The name of the form for queries and keys (arrays or shapes) on a platform, as lax.platform_dependent names it.

    Raises UserError for a form that is unknown, or that is named and cannot compute this.
    """
    if implementation not in IMPLEMENTATIONS:
        raise unknown("form of attention", implementation, IMPLEMENTATIONS)
    T, S = q.shape[1], k.shape[1]
    if implementation == "auto":
        fast = [name for name, form in FORMS.items() if form.platform == platform and form.least <= T]
        able = [name for name in fast if not FORMS[name].refusal(q, k, mask, softcap)]
        return (*able, "dense" if T * S <= DENSE_SCORES else "blockwise")[0]
    form = FORMS[implementation]
    why = form.refusal(q, k, mask, softcap)
    if form.platform not in ("", platform):
        why = f"it is only for {form.platform}, not for {platform}"
    if why:
        raise UserError(f"attention={implementation} cannot run: {why}; use attention=blockwise, or auto")
    return implementation


def platform_of(device: Any) -> str:
    """The name that lax.platform_dependent gives to the platform of a device, which may be abstract."""
    names = {"gpu": "cuda" if "NVIDIA" in device.device_kind else "rocm"}
    return names.get(device.platform, device.platform)
