"""Adapters in and out of the Hugging Face PEFT format: `adapter_config.json` and `adapter_model.safetensors`.

What can be held is a table, `forms.FORMS`. Reading is strict where PEFT only warns: every tensor that the JSON calls
for must be there in its shape, and no other.
"""

from lowrank.peft_format.forms import FORMS
from lowrank.peft_format.reading import About, about, load
from lowrank.peft_format.writing import save

__all__ = ["FORMS", "About", "about", "load", "save"]
