"""The names of an adapter's tensors, some of which have the adapter's own name in them.

`save_pretrained` writes `q_proj.lora_A.weight`. A state of the model as torch has it, which some trainers write, has
`q_proj.lora_A.default.weight`, and saved modules as `lm_head.modules_to_save.default.weight`.
"""

import re
from collections.abc import Collection

from lowrank.adapters.peft.forms import FORMS
from lowrank.core.errors import UserError
from lowrank.core.paths import PathLike

_SUFFIXES = {end for form in FORMS.values() for part in form.parts for end in (part.suffix, part.embedding) if end}
_PARTS = {end.split(".")[1] for end in _SUFFIXES} | {"trainable_tokens_delta"}
_MAGNITUDE = ".lora_magnitude_vector"  # in torch the weight of a module, and without `.weight` in a file
_OWN = re.compile(
    rf"(?P<part>.*\.({'|'.join(map(re.escape, sorted(_PARTS)))}))\.(?P<name>(?!weight$|bias$)[^.]+)(?P<end>\.\w+)?"
)
_SAVED = re.compile(r"(?P<part>.*)\.modules_to_save\.(?P<name>[^.]+)(?P<end>\.\w+)")


def plain_names(keys: Collection[str], directory: PathLike) -> dict[str, str]:
    """Each key, and the name that `save_pretrained` gives it; the originals of saved modules are left out.

    Raises UserError for the tensors of several adapters.
    """
    own = {key: match for key in keys if (match := _OWN.fullmatch(key))}
    if not own:
        return {key: key for key in keys}
    saved = {key: match for key in keys if (match := _SAVED.fullmatch(key))}
    names = sorted({match["name"] for match in (*own.values(), *saved.values())})
    if len(names) > 1:
        raise UserError(f"{directory} holds the adapters {' and '.join(names)}: save each in a folder of its own")
    plain = {key: match["part"] + match["end"] for key, match in saved.items()}
    for key, match in own.items():
        plain[key] = match["part"] + ("" if match["part"].endswith(_MAGNITUDE) else match["end"] or "")
    return {key: plain.get(key, key) for key in keys if ".original_module." not in key}
