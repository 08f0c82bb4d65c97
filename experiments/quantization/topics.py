"""The bases on `topics`: MiniLM-L6 names the section of an article."""

from experiments.protocol import tasks
from experiments.quantization.experiments import make_experiment

EXPERIMENT = make_experiment("topics", tasks.topics(), tasks.TOPICS_SPLITS, "accuracy")
get_study = EXPERIMENT.get_study
