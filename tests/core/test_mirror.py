"""Files that grow are copied to a bucket, and lie in a local folder themselves."""

from lowrank.core import paths
from lowrank.core.mirror import Mirror


def test_a_local_folder_is_its_own_mirror(tmp_path):
    assert Mirror(tmp_path).local == tmp_path


def test_files_are_copied_whole_when_they_have_grown(bucket, tmp_path):
    folder = f"{bucket}/{tmp_path.name}"
    mirror = Mirror(folder)
    log = mirror.local / "sub" / "log"
    log.parent.mkdir()
    log.write_text("1\n")
    mirror.copy(every_seconds=60)
    log.write_text("1\n2\n")
    mirror.copy(every_seconds=60)  # too early
    assert paths.read_text(f"{folder}/sub/log") == "1\n"
    mirror.copy()
    assert paths.read_text(f"{folder}/sub/log") == "1\n2\n"
    local = mirror.local
    del mirror
    assert not local.exists()
