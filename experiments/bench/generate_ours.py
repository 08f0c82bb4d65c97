"""This library's side of the benchmark of texts: answers each line on stdin with the texts of all prompts."""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from experiments.bench.generate import LENGTH, NEW
from experiments.bench.worker import serve
from lowrank import data, methods, models, pretrained
from lowrank.adapters import peft
from lowrank.generation.generator import Generator, Request, fit


def main(rows: int, folder: str) -> None:
    """Loads the model, leaves `prompts.npy` and the folder `adapter` for the other sides, then serves calls."""
    group = {"name": "dora", "rank": 8, "alpha": 16}
    base = pretrained.load("smollm2-135m")
    params = methods.attach(methods.build_method(group), base.params, jax.random.key(0))
    peft.save(params, base, Path(folder) / "adapter", method=group)
    articles = data.read_examples(data.DataConfig(source="bbc_news", max_examples=rows), base.tokenizer)
    prompts = [base.tokenizer.encode(article["prompt"])[:LENGTH] for article in articles]
    np.save(Path(folder) / "prompts.npy", np.array(prompts, np.int32))
    requests = [Request(ids, NEW) for ids in prompts]
    generator = Generator(models.build_model(base.config), params, fit(base.config, requests))

    def write_texts() -> float:
        texts = dict(generator.complete(requests))
        np.save(Path(folder) / "ours.npy", np.array([texts[i] for i in range(rows)], np.int32))
        return 0.0

    serve(write_texts)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
