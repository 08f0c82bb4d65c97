"""The rank that LoRA needs, and the directions that it learns."""
