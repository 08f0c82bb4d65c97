"""Of several writers, one creates a file, and one replaces each generation of it."""

import threading
import time

import pytest

from lowrank.core import paths
from lowrank.core.errors import UserError
from lowrank.core.generations import create_exclusive, read_version, replace_if, store_time


@pytest.fixture(params=["local", "bucket"])
def folder(request, tmp_path):
    if request.param == "local":
        return str(tmp_path)
    return f"{request.getfixturevalue('bucket')}/{tmp_path.name}"


def race(count, act):
    """The results of `act(i)` in as many threads at once."""
    results, barrier = [None] * count, threading.Barrier(count)

    def run(i):
        barrier.wait()
        results[i] = act(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_a_file_is_created_once_and_keeps_its_content(folder):
    path = f"{folder}/new/a"
    assert read_version(path) is None
    generation = create_exclusive(path, b"first")
    assert create_exclusive(path, b"second") is None
    found = read_version(path)
    assert (found.data, found.generation) == (b"first", generation)
    assert [child.name for child in paths.children(f"{folder}/new")] == ["a"]


def test_one_of_many_writers_creates_a_file(folder):
    for n in range(5):
        made = race(6, lambda i, n=n: create_exclusive(f"{folder}/{n}", b"%d" % i))
        winner = next(i for i, generation in enumerate(made) if generation)
        assert sum(generation is not None for generation in made) == 1
        assert paths.read_bytes(f"{folder}/{n}") == b"%d" % winner


def test_a_generation_is_replaced_once(folder):
    path = f"{folder}/a"
    generation = create_exclusive(path, b"0")
    for n in range(5):
        made = race(6, lambda i, n=n, old=generation: replace_if(path, b"%d %d" % (n, i), old))
        winner = next(i for i, new in enumerate(made) if new)
        assert sum(new is not None for new in made) == 1
        assert made[winner] > generation
        generation = made[winner]
        assert (read_version(path).data, read_version(path).generation) == (b"%d %d" % (n, winner), generation)


def test_a_file_that_is_not_there_is_not_replaced(folder):
    assert create_exclusive(f"{folder}/a", b"") is not None
    assert replace_if(f"{folder}/b", b"x", 1) is None
    assert not paths.exists(f"{folder}/b")


def test_times_are_of_the_store(folder):
    before = store_time(folder)
    create_exclusive(f"{folder}/a", b"")
    time.sleep(0.05)
    assert before - 0.02 <= read_version(f"{folder}/a").modified < store_time(folder)
    assert [child.name for child in paths.children(folder)] == ["a"]


def test_a_store_that_cannot_be_written_is_named(bucket, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (f"{bucket}-none/a", str(tmp_path / "file" / "a")):
        with pytest.raises(UserError, match=f"cannot write {path}: (No such|Not a|File exists)"):
            create_exclusive(path, b"")
