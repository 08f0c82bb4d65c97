"""The documents of the language reference: prose by topic, in two splits without a common one."""

import json

from experiments.objectives import reference


def test_the_splits_hold_different_documents_of_prose(tmp_path):
    reference.main(str(tmp_path / "reference"))
    of = {}
    for split in ("train", "test"):
        lines = (tmp_path / "reference" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        of[split] = [part for line in lines for part in json.loads(line)["text"].split("\n\n")]
    assert len(of["train"]) > len(of["test"]) > 10
    assert not set(of["train"]) & set(of["test"])
    assert all(part.endswith(".") for parts in of.values() for part in parts)
