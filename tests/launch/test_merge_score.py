"""A greedy soup from the command: its members are chosen by the score of a run's config, and the report names them."""

import json
from pathlib import Path

import pytest
import yaml

from launch import combine, merge_score
from lowrank.core.errors import UserError
from lowrank.merging.recipe import parse_recipe
from tests.support import tiny_checkpoint
from tests.support.close import assert_close
from tests.support.merged_models import family, fine_tune, tensors

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections' own
CONFIG = """
from configs import common

def get_config(arg=None):
    data = {{"source": "jsonl:{records}", "template": "{{prompt}}", "completion": "{{completion}}"}}
    return common.new(
        steps=1, model={{"name": "nothing"}}, method={{"name": "lora"}},
        data=data | {{"seq_len": 32, "batch_size": 4}},
        mesh={{"data": 1}}, eval={{"split": "train", "max_examples": 4}},
    )
"""


@pytest.fixture
def folder(tmp_path):
    """Two close fine-tunes of a base, one that is far away, records, and a config of a run."""
    family(tmp_path, 2)
    fine_tune(tmp_path / "base", tmp_path / "far", 9, size=2.0)
    records = tiny_checkpoint.records(tmp_path / "records.jsonl", 6)
    (tmp_path / "config.py").write_text(CONFIG.format(records=records))
    return tmp_path


def recipe(folder, **score):
    models = [{"model": str(folder / name)} for name in ("a", "b", "far")]
    group = {"config": str(folder / "config.py"), **score}
    return yaml.safe_dump({"merge_method": "greedy_soup", "models": models, "score": group})


def test_the_command_takes_the_members_that_do_not_lower_the_score(folder, capsys):
    (folder / "recipe.yaml").write_text(recipe(folder))
    combine.main([f"--recipe={folder / 'recipe.yaml'}", f"--output={folder / 'soup'}"])
    soup = json.loads((folder / "soup/merge_report.json").read_text())["soup"]
    alone = {one["models"][0]: one["score"] for one in soup["tried"] if len(one["models"]) == 1}
    assert len(alone) == 3
    assert max(alone, key=alone.get) == soup["members"][0]
    best = alone[soup["members"][0]]
    for one in soup["tried"]:
        if len(one["models"]) > 1:
            assert (one["models"][-1] in soup["members"]) == (one["score"] >= best)
            best = max(best, one["score"])
    assert str(folder / "far") not in soup["members"]
    assert f"the soup of {', '.join(soup['members'])}" in capsys.readouterr().out
    assert f"Members of the soup: {', '.join(soup['members'])}." in (folder / "soup/README.md").read_text()
    members = [tensors(Path(name)) for name in soup["members"]]
    for name, x in tensors(folder / "soup").items():
        assert_close(x, sum(of[name] for of in members) / len(members), relative=1e-6)


def test_a_lower_perplexity_is_a_higher_score(folder):
    group = parse_recipe(recipe(folder, metric="perplexity")).score
    score = merge_score.scorer(group)
    assert 0 > score(folder / "a") > score(folder / "far")


def test_bad_scores_are_refused_before_a_model_is_read(folder):
    with pytest.raises(UserError, match=r"unknown metric of score.*'accuracy'"):
        merge_score.scorer(parse_recipe(recipe(folder, metric="accuracy")).score)
    with pytest.raises(UserError, match=r"nothing\.py' cannot be read"):
        merge_score.scorer({"config": "nothing.py"})
    with pytest.raises(UserError, match=r"linear selects no model by a score"):
        parse_recipe(recipe(folder).replace("greedy_soup", "linear"))
    with pytest.raises(UserError, match="score has no config"):
        parse_recipe(recipe(folder, config=""))
    with pytest.raises(UserError, match="the key 'splitt' is not supported"):
        parse_recipe(recipe(folder, splitt="train"))
