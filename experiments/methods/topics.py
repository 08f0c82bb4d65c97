"""The methods on `topics`: MiniLM-L6 names the section of an article, and forgets how to find one by its headline."""

from experiments.methods.experiments import make_experiment
from experiments.protocol import tasks

EXPERIMENT = make_experiment("topics", tasks.topics(), tasks.TOPICS_SPLITS, "accuracy")
get_study = EXPERIMENT.get_study
