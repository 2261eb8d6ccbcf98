"""Low-rank compression: linear layers become two factors, whose ranks are chosen under one budget of stored parameters."""

from regraft.compression.choices import RANK_CHOICES, rank_at_share, settle
from regraft.compression.contract import COMPRESSORS, Compressor, Evidence
from regraft.compression.decompose import Decomposed, decompose, decompose_one
from regraft.compression.gather import gather
from regraft.compression.saved_moments import SavedMoments, remembered
from regraft.compression.space import Priced, factor_plan, factor_space, with_damage

__all__ = [
    "COMPRESSORS",
    "RANK_CHOICES",
    "Compressor",
    "Decomposed",
    "Evidence",
    "Priced",
    "SavedMoments",
    "decompose",
    "decompose_one",
    "factor_plan",
    "factor_space",
    "gather",
    "rank_at_share",
    "remembered",
    "settle",
    "with_damage",
]
