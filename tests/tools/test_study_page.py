"""A study's page in a browser: it opens from disk without a complaint, and a click on a heading sorts."""

from lowrank.sweeps.claims import Ledger
from lowrank.sweeps.report_page import write_page
from lowrank.sweeps.results import read_results
from tests.support import dummy_cells

COLUMN = "return [...document.querySelectorAll('table:nth-of-type(2) td:nth-child(4)')].map(cell => cell.textContent)"


def test_a_click_sorts_by_number_with_empty_cells_last(tmp_path, browser):
    study = dummy_cells.make_folder(tmp_path, count=4)
    ledger = Ledger(tmp_path, study.limits)
    for cell, loss in zip(study.cells, (9.5, 10.5, 8.5), strict=False):
        claim = ledger.claim(ledger.histories([cell.key])[cell.key], "me", 0.0)
        ledger.close(claim, "done", summary={"final_loss": loss})
    assert browser.open(write_page(study, read_results(study, 0.0)).as_uri()) == []
    assert browser.run(COLUMN) == ["9.5", "10.5", "8.5", ""]
    browser.run("document.querySelectorAll('table')[1].querySelectorAll('th')[3].click()")
    assert browser.run(COLUMN) == ["8.5", "9.5", "10.5", ""]
