"""The rules of merging by name. Another rule is one file and one line of `RULES`."""

from lowrank.merging.rule import Rule
from lowrank.merging.rules.breadcrumbs import BREADCRUMBS
from lowrank.merging.rules.breadcrumbs_ties import BREADCRUMBS_TIES
from lowrank.merging.rules.dare_linear import DARE_LINEAR
from lowrank.merging.rules.dare_ties import DARE_TIES
from lowrank.merging.rules.della import DELLA
from lowrank.merging.rules.della_linear import DELLA_LINEAR
from lowrank.merging.rules.fisher import FISHER
from lowrank.merging.rules.greedy_soup import GREEDY_SOUP
from lowrank.merging.rules.karcher import KARCHER
from lowrank.merging.rules.linear import LINEAR
from lowrank.merging.rules.mats import MATS
from lowrank.merging.rules.model_stock import MODEL_STOCK
from lowrank.merging.rules.multislerp import MULTISLERP
from lowrank.merging.rules.nearswap import NEARSWAP
from lowrank.merging.rules.nuslerp import NUSLERP
from lowrank.merging.rules.passthrough import PASSTHROUGH
from lowrank.merging.rules.regmean import REGMEAN
from lowrank.merging.rules.sce import SCE
from lowrank.merging.rules.sequential_slerp import SEQUENTIAL_SLERP
from lowrank.merging.rules.slerp import SLERP
from lowrank.merging.rules.task_arithmetic import TASK_ARITHMETIC
from lowrank.merging.rules.ties import TIES
from lowrank.merging.rules.uniform_soup import UNIFORM_SOUP

RULES: dict[str, Rule] = {
    "linear": LINEAR,
    "uniform_soup": UNIFORM_SOUP,
    "greedy_soup": GREEDY_SOUP,
    "slerp": SLERP,
    "sequential_slerp": SEQUENTIAL_SLERP,
    "karcher": KARCHER,
    "nuslerp": NUSLERP,
    "multislerp": MULTISLERP,
    "nearswap": NEARSWAP,
    "task_arithmetic": TASK_ARITHMETIC,
    "ties": TIES,
    "dare_linear": DARE_LINEAR,
    "dare_ties": DARE_TIES,
    "della": DELLA,
    "della_linear": DELLA_LINEAR,
    "breadcrumbs": BREADCRUMBS,
    "breadcrumbs_ties": BREADCRUMBS_TIES,
    "sce": SCE,
    "model_stock": MODEL_STOCK,
    "fisher": FISHER,
    "regmean": REGMEAN,
    "mats": MATS,
    "passthrough": PASSTHROUGH,
}
