"""The products of one step with frozen weights, and nothing else, in torch: all of them for each line on stdin.

Forward `x @ W` and backward `g @ W.T` for every kernel of every layer and the head, 512 rows. A step of LoRA makes them
all, whatever computes it: on one machine they bound how much faster a step can become.
"""

import json
import sys

import torch

from experiments.bench.theirs import base
from experiments.bench.worker import serve

ROWS = 512


def main(dtype: str) -> None:
    """Loads the weights in `dtype`, then serves."""
    model = base(dtype)
    kernels = [m.weight.detach() for m in model.modules() if isinstance(m, torch.nn.Linear)]  # [out, in], head last
    rows = {size: torch.randn(ROWS, size, dtype=kernels[0].dtype) for w in kernels for size in w.shape}

    def every_product() -> float:
        with torch.inference_mode():
            for w in kernels:
                rows[w.shape[1]] @ w.T
            for w in reversed(kernels):
                rows[w.shape[0]] @ w
        return 0.0

    serve(every_product)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
