"""The page of all benchmarks, and the check of a step against its committed results."""

import copy

from experiments.bench import page
from experiments.bench.step_cases import CASES, slowed

RESULTS = {case.name: {"ratio": 0.9} for case in CASES} | {"machine": {"processor": "a processor"}}


def test_a_ratio_that_falls_by_more_than_a_tenth_is_reported():
    after = copy.deepcopy(RESULTS)
    after["lora bf16"]["ratio"], after["dora float32"]["ratio"] = 0.82, 0.80
    assert slowed(RESULTS, after) == ["dora float32: peft / ours was 0.90 and is 0.80"]
    assert slowed(None, after) == ["there are no results of a processor: run make bench first"]


def test_every_row_of_the_page_has_all_cells_and_a_command():
    _, _, *rows = page.table().splitlines()
    cells = [row.strip("| ").split(" | ") for row in rows]
    assert {row.count("|") for row in rows} == {len(page.Row._fields) + 1}
    assert all(row[-1].startswith("`") for row in cells)


def test_a_kernel_of_a_gpu_stands_beside_its_strongest_xla_form():
    time = lambda ms: {"forward": {"median": ms, "least": ms - 0.1, "most": ms + 0.1}}  # noqa: E731
    forms = {"jax": {"ours": time(1.0), "plain": time(1.5), "concatenated": time(1.2)}, "torch": time(2.0)}
    [row] = page._gpu_row("lora", "a GPU", forms, "forward")
    assert row[:8] == ("lora", "a GPU", "1.000 ms", "1.200 ms", "torch 2.000 ms", "", "2.00", "0.90–1.10 ms")
