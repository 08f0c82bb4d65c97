import re

from experiments import tables

TEXT = tables.README.read_text()


def test_every_table_of_the_readme_is_what_its_result_file_says():
    assert set(re.findall(r"<!-- table: (\S+) -->", TEXT)) == set(tables.TABLES)
    assert tables.filled(TEXT) == TEXT


def test_every_command_and_file_the_readme_names_exists():
    targets = re.findall(r"^([a-z]+):", (tables.ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert set(re.findall(r"make ([a-z]+)", TEXT)) <= set(targets)
    modules = re.findall(r"python -m ((?:launch|experiments|lowrank)[\w.]*)", TEXT)
    assert modules
    for module in modules:
        path = tables.ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    for name in re.findall(r"(configs/\w+\.py)", TEXT):
        assert (tables.ROOT / name).exists(), name
