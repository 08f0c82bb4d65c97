"""A run's trace holds the steps that were asked for, under their numbers."""

import jax
import pytest

from lowrank.core.errors import UserError, plural
from lowrank.training import loop
from lowrank.training.profile import Profile
from tests.support.tiny_runs import config_of


def traced_steps(folder):
    (path,) = (folder / "profile").rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(path)).planes
    events = [event for plane in planes for line in plane.lines for event in line.events if event.name == "train"]
    return sorted(int(dict(event.stats)["step_num"]) for event in events)


def test_a_run_traces_the_steps_after_its_first(files, tmp_path):
    config = config_of(files, steps=5, mesh__data=1)
    loop.run(config, tmp_path / "run", profile=2)
    assert traced_steps(tmp_path / "run") == [1, 2]


def test_steps_that_end_with_the_run_are_traced_and_none_is_traced_unless_asked(tmp_path):
    for steps in (0, 2):
        with Profile(tmp_path / str(steps), steps, remaining=3) as profile:
            for step in range(7, 10):
                with profile.before(step):
                    jax.numpy.zeros(3)
    assert traced_steps(tmp_path / "2") == [8, 9]
    assert not (tmp_path / "0").exists()


@pytest.mark.parametrize(("steps", "remaining"), [(3, 3), (1, 1), (-1, 9), (1, 0)])
def test_more_steps_than_the_run_has_are_refused(steps, remaining, tmp_path):
    left = plural(remaining, "step")
    with pytest.raises(UserError, match=f"--profile={steps} is not in 0..{max(0, remaining - 1)}: {left}"):
        Profile(tmp_path, steps, remaining)
