"""What lies beside the tensors of a checkpoint, and goes with them into every checkpoint that is made of it.

The model card of the result is its own: it names the base, and leaves the license, which is the base's, to the user.
"""

import json
import shutil
from pathlib import Path
from typing import Any

GENERATION = "generation_config.json"
# The vocabularies that tokenizers without `tokenizer.json` read; `Tokenizer.save` writes the rest.
VOCABULARIES = ("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")

CARD = """---
base_model: {base}
library_name: transformers
license:  # fill it in; that of the base applies
---

# {title}

{made} of the base {base}, written by lowrank.
"""


def write(base: Any, directory: Path, title: str, made: str) -> None:
    """Copies the companions of `base`, a `Pretrained`, each from the first of its folders that has it.

    The vocabularies are those of the folder whose tokenizer it is. A model that ends at more than one token, and has no
    generation config, gets one that says so. The model card has the
    `title`, and says how it was `made`.
    """
    card = CARD.format(base=json.dumps(base.name), title=title, made=made)
    (directory / "README.md").write_text(card, encoding="utf-8")
    folders = [Path(folder) for folder in base.folders]
    owner = next((folder for folder in folders if (folder / "tokenizer.json").exists()), None)
    for name in VOCABULARIES if owner else ():
        if (owner / name).exists():
            shutil.copyfile(owner / name, directory / name)
    generation = next((folder / GENERATION for folder in folders if (folder / GENERATION).exists()), None)
    if generation:
        shutil.copyfile(generation, directory / GENERATION)
    elif len(base.tokenizer.stop_ids) > 1:
        stops = {"eos_token_id": list(base.tokenizer.stop_ids)}
        (directory / GENERATION).write_text(json.dumps(stops, indent=2) + "\n", encoding="utf-8")
