"""The bases on `headlines`: SmolLM2-135M writes the title of an article."""

from experiments.protocol import tasks
from experiments.quantization.experiments import make_experiment
from lowrank.core.config_file import with_changes

CONFIG = with_changes(tasks.headlines(), {"eval.max_examples": 0})  # all of the splits
EXPERIMENT = make_experiment("headlines", CONFIG, tasks.HEADLINES_SPLITS, "perplexity")
get_study = EXPERIMENT.get_study
