"""Which kernels LoRA should adapt when the number of trained parameters is fixed."""
