"""The forms that PEFT's format can hold. A further one is a file and a line of `FORMS`."""

from lowrank.peft_format.forms.adalora import ADALORA
from lowrank.peft_format.forms.form import Form, Layer, Settings
from lowrank.peft_format.forms.hira import HIRA
from lowrank.peft_format.forms.ia3 import IA3
from lowrank.peft_format.forms.loha import LOHA
from lowrank.peft_format.forms.lokr import LOKR
from lowrank.peft_format.forms.lora import DORA, EDORA, LORA, LORA_XS
from lowrank.peft_format.forms.oft import BOFT_FORM, OFT_FORM
from lowrank.peft_format.forms.vera import VERA

FORMS: dict[str, Form] = {
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

__all__ = ["FORMS", "Form", "Layer", "Settings"]
