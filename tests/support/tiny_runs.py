"""Runs on the files of the fixture `files`: their config, and a short one with its adapter."""

from configs import tiny as tiny_config
from lowrank.adapters import load
from lowrank.training import loop


def config_of(files, arg="", model="llama", **changes):
    """The tiny config on the files of the fixture; `changes` are `group__key=value` or `key=value`."""
    config = tiny_config.get_config(arg)
    config.model.name, config.data.source = str(files / model), f"jsonl:{files / 'records.jsonl'}"
    for path, value in changes.items():
        *groups, key = path.split("__")
        group = config
        for name in groups:
            group = group[name]
        group[key] = value
    return config


def train_shortly(files, arg, folder, **changes):
    """`(summary, the model as its adapter gives it back)` of a short run."""
    config = config_of(files, arg, optim__lr=0.05, mesh__data=1, checkpoint__every=0, steps=3, **changes)
    return loop.run(config, folder), load.load_adapted(folder / "adapter", str(files / "llama"))
