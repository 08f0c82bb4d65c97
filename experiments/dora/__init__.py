"""Whether DoRA learns more than LoRA, at the same and at half the rank, and how its updates resemble full tuning's."""
