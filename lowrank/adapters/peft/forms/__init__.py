"""The forms of weights that PEFT's format can hold. A new form is one file and one line of `FORMS`."""

from lowrank.adapters.peft.forms.adalora import ADALORA
from lowrank.adapters.peft.forms.form import Layer, Part, PeftForm, Settings
from lowrank.adapters.peft.forms.hira import HIRA
from lowrank.adapters.peft.forms.ia3 import IA3
from lowrank.adapters.peft.forms.loha import LOHA
from lowrank.adapters.peft.forms.lokr import LOKR
from lowrank.adapters.peft.forms.lora import DORA, EDORA, LORA, LORA_XS
from lowrank.adapters.peft.forms.oft import BOFT_FORM, OFT_FORM
from lowrank.adapters.peft.forms.vera import VERA

FORMS: dict[str, PeftForm] = {
    "lora": LORA,
    "dora": DORA,
    "lora_xs": LORA_XS,
    "edora": EDORA,
    "adalora": ADALORA,
    "ia3": IA3,
    "loha": LOHA,
    "lokr": LOKR,
    "hira": HIRA,
    "vera": VERA,
    "oft": OFT_FORM,
    "boft": BOFT_FORM,
}

__all__ = ["FORMS", "Layer", "Part", "PeftForm", "Settings"]
