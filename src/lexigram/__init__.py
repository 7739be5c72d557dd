"""lexigram: language models made smaller after training, by factors that cost fewer stored bytes.

Importing it teaches transformers our checkpoint format, so that ``AutoModelForCausalLM.from_pretrained`` opens a compressed
folder.
"""

from importlib.metadata import version

from lexigram.comparison.order import Comparison, compare
from lexigram.comparison.planning import ComparisonSettings
from lexigram.comparison.table import Row
from lexigram.errors import LexigramError
from lexigram.evaluation import Evaluation, evaluate
from lexigram.healing import heal
from lexigram.merging import merge
from lexigram.methods import (
    CapConfig,
    CospadiConfig,
    DoubleSparseConfig,
    LowRankSparseConfig,
    MagnitudeConfig,
    OatsConfig,
    QuantizeConfig,
    SparseGptConfig,
    StructuredConfig,
    SvdConfig,
    WandaConfig,
)
from lexigram.pipeline import compress
from lexigram.planning import Plan, plan
from lexigram.recipe import Calibration, Recipe
from lexigram.records import RunRecord
from lexigram.reporting.heat_maps import plot_redundancy
from lexigram.source import Source
from lexigram.training import HealingSettings
from lexigram.transformers_io import export_dense, load, merge_adapters
from lexigram.verification import Verification, verify
from lexigram.workers import Workers

__version__ = version("lexigram")

__all__ = [
    "Calibration",
    "CapConfig",
    "Comparison",
    "ComparisonSettings",
    "CospadiConfig",
    "DoubleSparseConfig",
    "Evaluation",
    "HealingSettings",
    "LexigramError",
    "LowRankSparseConfig",
    "MagnitudeConfig",
    "OatsConfig",
    "Plan",
    "QuantizeConfig",
    "Recipe",
    "Row",
    "RunRecord",
    "Source",
    "SparseGptConfig",
    "StructuredConfig",
    "SvdConfig",
    "Verification",
    "WandaConfig",
    "Workers",
    "compare",
    "compress",
    "evaluate",
    "export_dense",
    "heal",
    "load",
    "merge",
    "merge_adapters",
    "plan",
    "plot_redundancy",
    "verify",
]
