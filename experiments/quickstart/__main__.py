"""Fine-tunes SmolLM2-135M to write BBC headlines, in minutes on a CPU: `python -m experiments.quickstart [WORKDIR]`."""

import sys
import time
from pathlib import Path
from typing import Any

from configs import quickstart
from lowrank.core import files
from lowrank.core.errors import UserError
from lowrank.training import loop

WORKDIR = "runs/quickstart"
FILES = {
    "adapter": "adapter, PEFT format",
    "loss.png": "plot",
    "report.md": "report",
    "summary.json": "these numbers",
}


def run(directory: str | Path) -> dict[str, Any]:
    """Runs or continues the run in `directory`; returns what `summary.json` there holds."""
    started = time.monotonic()
    summary = loop.run(quickstart.get_config(), directory, command="make quickstart")
    if "after" in summary and "rougeL_after" not in summary:  # a run that had ended before is shown as it was
        summary |= {
            "rougeL_before": summary["before"]["rougeL"],
            "rougeL_after": summary["after"]["rougeL"],
            "seconds": time.monotonic() - started,
        }
        files.write_json(Path(directory) / loop.SUMMARY, summary)
    return summary


def shown(summary: dict[str, Any], directory: str | Path) -> str:
    """The text that the command prints at the end."""
    part, total = summary["trained_params"], summary["total_params"]
    headlines = [
        f"  reference  {s['reference']}\n  before     {s['before'].strip()}\n  after      {s['after'].strip()}\n"
        for s in summary["samples"]
    ]
    scores = f"{summary['rougeL_before']:.3f} before, {summary['rougeL_after']:.3f} after"
    return "\n".join(
        [
            "",
            *headlines,
            f"ROUGE-L on {summary['after']['examples']:.0f} held-out articles: {scores}",
            f"trained: {part:,} of {total:,} parameters ({100 * part / total:.2f} %), in {summary['seconds']:.0f} s",
            *(f"{what + ':':<22}{Path(directory) / name}" for name, what in FILES.items()),
        ]
    )


def main(argv: list[str]) -> int:
    """Runs the quickstart; returns 0 when the run is finished, 2 for bad input, 1 when SIGTERM stopped it."""
    directory = argv[1] if len(argv) > 1 else WORKDIR
    try:
        summary = run(directory)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    if "rougeL_after" not in summary:
        return 1
    print(shown(summary, directory))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
