"""The scale of LoRA: alpha over the rank, or over its square root, and the learning rate that each needs."""
