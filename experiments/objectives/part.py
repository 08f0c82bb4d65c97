"""A part of the study: rows that differ from one config in a few keys, and what is measured of each trained model."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from experiments.protocol.measures import Heading
from experiments.protocol.model import Model

Changes = Mapping[str, Any]  # config keys and their values
Numbers = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Size:
    """A size of the study: the steps of a run, its seeds, and the records that are scored."""

    model: str
    steps: int
    seeds: int
    records: int
    start_steps: int  # of the supervised start of the preferences


@dataclasses.dataclass(frozen=True)
class Part:
    """One question. A row's model and the model that it started from are measured in the same way."""

    name: str
    question: str
    rows: Mapping[str, Changes]
    baseline: str  # the row that the others are compared with
    prepare: Callable[[Size], None]  # makes the files that the runs read
    config: Callable[[Size], ConfigDict]  # of a run, without the keys of its row
    measure: Callable[[Model, Size], Numbers]
    headings: Mapping[str, Heading]  # of the numbers that the table shows; the first is the one of the plot
