"""Settings of all stages, with defaults and limits, defined once for recipes, the command line and the Python API.

Each section holds the settings of one stage; :mod:`regraft.settings.problems` describes wrong values in plain words. Other packages import
the names from this package.
"""

from regraft.settings.base import CALIBRATION_TOKENS, EVERY_PROJECTION, TRAINING_TOKENS, Memory, Positive, Settings, option_values
from regraft.settings.compression import CompressSettings
from regraft.settings.export import ExportSettings
from regraft.settings.keywords import takes_settings, with_keywords
from regraft.settings.measuring import CompletionSettings, EvaluateSettings, LabelSettings, SampleSettings, TaskSettings
from regraft.settings.problems import checked, problems_of
from regraft.settings.sections import AllocateSettings, LoadSettings, PruneSettings, RecoverSettings, Reduction, Target

# Every section: what the command line has options for, and recipes keys.
SECTIONS: tuple[type[Settings], ...] = (
    LoadSettings,
    PruneSettings,
    CompressSettings,
    RecoverSettings,
    AllocateSettings,
    EvaluateSettings,
    TaskSettings,
    LabelSettings,
    SampleSettings,
    CompletionSettings,
    ExportSettings,
)

__all__ = [
    "CALIBRATION_TOKENS",
    "EVERY_PROJECTION",
    "SECTIONS",
    "TRAINING_TOKENS",
    "AllocateSettings",
    "CompletionSettings",
    "CompressSettings",
    "EvaluateSettings",
    "ExportSettings",
    "LabelSettings",
    "LoadSettings",
    "Memory",
    "Positive",
    "PruneSettings",
    "RecoverSettings",
    "Reduction",
    "SampleSettings",
    "Settings",
    "Target",
    "TaskSettings",
    "checked",
    "option_values",
    "problems_of",
    "takes_settings",
    "with_keywords",
]
