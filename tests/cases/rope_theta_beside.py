import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lowrank import pretrained
from tests.cases import common

root = common.folder()
beside = common.llama(root / "a", rope_theta=500000.0, rope_parameters={"rope_type": "default"})
both = common.llama(
    root / "b",
    rope_scaling={"rope_type": "linear", "factor": 4.0},
    rope_parameters={"rope_type": "default", "rope_theta": 1e4},
)
theta, said = common.attempt(lambda: pretrained.load(str(beside)).config.rope_theta)
scaling, more = common.attempt(lambda: pretrained.load(str(both)).config.rope_scaling)
print(f"rope_theta 500000 beside rope_parameters without it: {said or theta}")
print(f"rope_scaling linear beside rope_parameters: {more or scaling}")
# An error that names the contradiction of the second would do.
common.verdict(theta == 500000.0 and (scaling is not None or more.startswith("error")), "the two configs above")
