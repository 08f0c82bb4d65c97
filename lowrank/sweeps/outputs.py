"""All that the results of a study are written as."""

from collections.abc import Sequence

from lowrank.core.paths import AnyPath
from lowrank.sweeps.folder import StudyFolder
from lowrank.sweeps.hparams import write_hparams
from lowrank.sweeps.report_page import write_page
from lowrank.sweeps.results import Result
from lowrank.sweeps.tables import write_tables


def write_outputs(study: StudyFolder, results: Sequence[Result], folder: AnyPath | None = None) -> list[AnyPath]:
    """Writes the tables, the page and TensorBoard's files in `folder`, by default the study's; returns their paths."""
    others = [write(study, results, folder) for write in (write_page, write_hparams)]
    return [*write_tables(study, results, folder), *others]
