"""The arrows of the design: who may import whom."""

import ast
import pathlib

from lowrank import methods

ROOT = pathlib.Path(__file__).parents[1]
TOPS = ("lowrank", "configs", "launch", "experiments")
CORE = "lowrank.core"
LEAVES = ("lowrank.core.errors", "lowrank.core.typing")  # modules that import nothing of the project's but each other
BASE = (CORE, "lowrank.kernels")
MODELS = (*BASE, "lowrank.models")
PRETRAINED = (*MODELS, "lowrank.weights", "lowrank.pretrained")
ADAPTERS = (*PRETRAINED, "lowrank.methods", "lowrank.adapters")
DATA = (CORE, "lowrank.data", "lowrank.pretrained.wheels")
GENERATION = (*MODELS, "lowrank.data", "lowrank.generation")
OBJECTIVES = (*GENERATION, "lowrank.metrics", "lowrank.objectives")
TRAINING = (*OBJECTIVES, *ADAPTERS, "lowrank.evaluation", "lowrank.training")
ALLOWED = {  # module -> the modules of the project that it may import (by prefix), as in the design
    "lowrank/core/errors": (),
    "lowrank/core/typing": (),
    "lowrank/core": (*BASE,),
    "lowrank/kernels": (*LEAVES, "lowrank.kernels"),
    "lowrank/weights": (*BASE, "lowrank.weights"),
    "lowrank/methods": (*BASE, "lowrank.weights", "lowrank.methods"),
    "lowrank/models": MODELS,
    "lowrank/data": DATA,
    "lowrank/pretrained": PRETRAINED,
    "lowrank/adapters": ADAPTERS,
    "lowrank/merging": (*ADAPTERS, "lowrank.merging"),
    "lowrank/quantization": (*PRETRAINED, "lowrank.data", "lowrank.quantization"),
    "lowrank/compression": (*PRETRAINED, "lowrank.data", "lowrank.quantization", "lowrank.compression"),
    "lowrank/generation": GENERATION,
    "lowrank/metrics": (CORE, "lowrank.metrics"),
    "lowrank/objectives": OBJECTIVES,
    "lowrank/evaluation": (*OBJECTIVES, "lowrank.evaluation"),
    "lowrank/training": TRAINING,
    "lowrank/memory": (*TRAINING, "lowrank.memory"),
    "lowrank/sweeps": (*TRAINING, "lowrank.sweeps"),
    "lowrank": (CORE, "lowrank.methods"),
    "configs": (CORE, "lowrank.methods", "configs"),
    "configs/sweeps": ("lowrank.sweeps", "configs"),
    "launch": ("lowrank", "launch", "experiments.plan"),
    "experiments": ("lowrank", "launch", "configs", "experiments"),
}


def imported(path: pathlib.Path) -> list[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    plain = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    source = [(node.module, alias.name) for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names]
    return plain + [f"{module}.{name}" for module, name in source]


def allowed(module: str) -> tuple[str, ...]:
    return next(ALLOWED[p] for p in sorted(ALLOWED, key=len, reverse=True) if f"{module}/".startswith(f"{p}/"))


def test_imports_point_one_way():
    wrong = []
    for path in sorted(p for top in TOPS for p in (ROOT / top).rglob("*.py")):
        module = str(path.relative_to(ROOT).with_suffix("")).removesuffix("/__init__")
        ours = [i for i in imported(path) if i.split(".")[0] in TOPS]
        for name in ours:
            if not any(f"{name}.".startswith(f"{a}.") for a in allowed(module)):
                wrong.append(f"{module} imports {name}")
    assert not wrong


def test_the_library_reads_no_flag_and_no_pickle():
    sources = {p: p.read_text() for p in (ROOT / "lowrank").rglob("*.py")}
    assert sources
    for word in ("absl.flags", "from absl import flags", "import pickle", "pickle.load", "torch.load"):
        assert not [str(p) for p, text in sources.items() if word in text], word


def test_a_method_is_found_in_the_file_of_its_name():
    assert {name: made.__module__ for name, made in methods.METHODS.items()} == {
        name: f"lowrank.methods.{name}" for name in methods.METHODS
    }
