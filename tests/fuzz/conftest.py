"""How many inputs are tried: few, the same each time, in `make test`; and thousands, other ones each time, in
`make fuzz`."""

import tempfile

import hypothesis
from hypothesis import HealthCheck, Phase

hypothesis.configuration.set_hypothesis_home_dir(tempfile.mkdtemp(prefix="lowrank-hypothesis-"))
COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
hypothesis.settings.register_profile("check", max_examples=40, derandomize=True, phases=[Phase.generate], **COMMON)
hypothesis.settings.register_profile("fuzz", max_examples=3000, report_multiple_bugs=True, print_blob=True, **COMMON)
hypothesis.settings.load_profile("check")
