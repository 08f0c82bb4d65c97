"""The forms of attention by name, and the form that is taken where none is named."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from lowrank.core.errors import UserError, unknown
from lowrank.kernels.attention import blockwise, cudnn, dense
from lowrank.kernels.attention.mask import Mask

DENSE_SCORES = 1024 * 1024  # T * S up to which `auto` stores the scores


class Form(NamedTuple):
    """A form of attention."""

    attend: Callable[..., jax.Array]  # (q, k, v, mask, scale=, softcap=) -> [B, T, N, H]
    refusal: Callable[..., str] = lambda *inputs: ""  # (q, k, mask, softcap) -> why the form cannot compute this
    platform: str = ""  # the only platform of the form, as lax.platform_dependent names it; "": all


FORMS = {
    "dense": Form(dense.attend),
    "blockwise": Form(blockwise.attend),
    "cudnn": Form(cudnn.attend, cudnn.refusal, "cuda"),
}
IMPLEMENTATIONS = ("auto", *FORMS)
PLATFORMS = tuple(form.platform for form in FORMS.values() if form.platform)


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
    the name of a form, or `auto`, which takes the form that `choose` names for the platform that the program is
    compiled for.
    """

    def form(platform: str) -> Callable[..., jax.Array]:
        return FORMS[choose(platform, q, k, mask, softcap, implementation)].attend

    default, others = form(""), {platform: form(platform) for platform in PLATFORMS}
    differing = {
        platform: functools.partial(attend, scale=scale, softcap=softcap)
        for platform, attend in others.items()
        if attend is not default
    }
    default = functools.partial(default, scale=scale, softcap=softcap)
    return (
        jax.lax.platform_dependent(q, k, v, mask, default=default, **differing) if differing else default(q, k, v, mask)
    )


def choose(platform: str, q: Any, k: Any, mask: Mask, softcap: float = 0.0, implementation: str = "auto") -> str:
    """The name of the form for queries and keys (arrays or shapes) on a platform, as lax.platform_dependent names it.

    Raises UserError for a form that is unknown, or that is named and cannot compute this.
    """
    if implementation not in IMPLEMENTATIONS:
        raise unknown("form of attention", implementation, IMPLEMENTATIONS)
    if implementation != "auto":
        if refusal := FORMS[implementation].refusal(q, k, mask, softcap):
            raise UserError(f"attention={implementation}: {refusal}: use attention=blockwise, or auto")
        return implementation
    for name, form in FORMS.items():
        if form.platform and form.platform == platform and not form.refusal(q, k, mask, softcap):
            return name
    return "dense" if q.shape[1] * k.shape[1] <= DENSE_SCORES else "blockwise"
