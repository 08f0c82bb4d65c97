"""The config group of the method whose adapter a PEFT folder holds, so that a run may train the adapter further."""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from lowrank.adapters.peft import config as configs
from lowrank.adapters.peft import experts, initial, prompts, reading, tensors, tokens, wrapped
from lowrank.adapters.peft.forms import FORMS
from lowrank.adapters.peft.forms.ranked import undo_rounding
from lowrank.adapters.peft.modules import Base, Module, base_modules
from lowrank.core import bounded_regex
from lowrank.core.errors import UserError
from lowrank.core.paths import PathLike
from lowrank.weights.lora import RESIDUAL

RANKED = ("lora", "dora")  # the methods whose settings the files say in full
WHOLE_MODEL = {prompts.PROMPT: "prompt", "P_TUNING": "ptuning", prompts.PREFIX: "prefix", tokens.TYPE: "tokens"}
# What an adapter may have beside what the group of such a method says.
BESIDE = (experts.KEY, "trainable_token_indices")


@bounded_regex.budget()
def method_group(directory: PathLike, base: Base, folder: str | None) -> tuple[dict[str, Any], bool]:
    """`(the group, whether the files say its settings in full)` of the adapter in `directory`, for `base` in `folder`.

    Raises UserError as `peft.load` does.
    """
    raw = configs.parse_json(directory)
    if raw["peft_type"] in WHOLE_MODEL:
        return {"name": WHOLE_MODEL[raw["peft_type"]]}, False
    settings, form = configs.read_config(directory)
    name = next(name for name, known in FORMS.items() if known is form)
    if name not in RANKED or any(settings.get(key) for key in BESIDE):
        return {"name": name}, False
    init = settings.get(initial.KEY)
    settings, found = initial.as_plain_lora(settings, tensors.read_tensors(directory), directory, folder)
    settings, found = wrapped.language_model(settings, found, base_modules(base), directory)
    if any(map(reading.PER_EXPERT.search, found)):
        return {"name": name}, False
    targets, others = reading.find_places(settings, form, base_modules(base))
    group = {"name": name, **_ranks(settings, targets, base), "dropout": settings["lora_dropout"]}
    group |= {"rslora": True} if settings["use_rslora"] else {}
    group |= {"init": init} if init in RESIDUAL else {}
    biases = settings.get("bias", "none")
    saved = {place.leaf for key, place in others.items() if biases == "none" or not key.endswith(".bias")}
    if biases == form.own_bias and "rank_pattern" in group and 0 in group["rank_pattern"].values():
        raise UserError(
            f"the adapter in {directory} trains the biases of some layers alone, and a run those of all: set "
            "model.start=merge"
        )
    group |= {"bias": biases} if biases != "none" else {}
    return group | ({"also_train": tuple(map(re.escape, sorted(saved)))} if saved else {}), True


def _ranks(settings: Mapping[str, Any], targets: Mapping[str, Module], base: Base) -> dict[str, Any]:
    """`target`, and the rank and alpha of each layer: the most frequent ones, and patterns for the others."""
    form, power = FORMS["lora"], 0.5 if settings["use_rslora"] else 1.0
    ranks, alphas = dict[str, int](), dict[str, float]()
    for path, module in targets.items():
        assert module.weight is not None
        found = form.settings({**settings, initial.KEY: True}, path)
        name = _layer_name(module)
        ranks[name], alphas[name] = found["r"], undo_rounding(found["scale"] * found["r"] ** power)
    leaves = {module.weight.leaf for module in targets.values() if module.weight}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    layers = [_layer_name(m) for m in base_modules(base).values() if m.weight and m.weight.leaf in leaves]
    others = {name: ranks.get(name, 0) for name in layers if ranks.get(name, 0) != rank}
    patterns = {"rank_pattern": others, "alpha_pattern": {n: a for n, a in alphas.items() if a != alpha}}
    escaped = {key: {re.escape(name): x for name, x in values.items()} for key, values in patterns.items() if values}
    return {"target": _pattern(leaves), "rank": rank, "alpha": alpha, **escaped}


def _pattern(leaves: Collection[str]) -> str:
    """A regex of the names that ends in the name of a kernel, which `bias=lora_only` replaces by that of a bias."""
    parents = [re.escape(name.removesuffix("/kernel")) for name in sorted(leaves) if name.endswith("/kernel")]
    tables = [re.escape(name) for name in sorted(leaves) if not name.endswith("/kernel")]
    return "|".join([*tables, *([f"({'|'.join(parents)})/kernel"] if parents else [])])


def _layer_name(module: Module) -> str:
    """The name of a module's kernel, with the number of its layer after the first part."""
    assert module.weight is not None
    leaf, layer, _ = module.weight
    first, _, rest = leaf.partition("/")
    return leaf if layer is None else f"{first}/{layer}/{rest}"
