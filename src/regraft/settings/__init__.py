"""What a user can set, with defaults and limits, once for recipes, the command line and the Python API.

Sections hold the settings; :mod:`regraft.settings.problems` says in plain words what is wrong with given ones. Other rooms import from this
package by name.
"""

from regraft.settings.compression import CompressSettings
from regraft.settings.keywords import takes_settings, with_keywords
from regraft.settings.problems import checked, problems_of
from regraft.settings.sections import (
    CALIBRATION_TOKENS,
    EVERY_PROJECTION,
    TRAINING_TOKENS,
    AllocateSettings,
    EvaluateSettings,
    LabelSettings,
    LoadSettings,
    Positive,
    PruneSettings,
    RecoverSettings,
    Reduction,
    SampleSettings,
    Settings,
    Target,
    option_values,
)

__all__ = [
    "CALIBRATION_TOKENS",
    "EVERY_PROJECTION",
    "TRAINING_TOKENS",
    "AllocateSettings",
    "CompressSettings",
    "EvaluateSettings",
    "LabelSettings",
    "LoadSettings",
    "Positive",
    "PruneSettings",
    "RecoverSettings",
    "Reduction",
    "SampleSettings",
    "Settings",
    "Target",
    "checked",
    "option_values",
    "problems_of",
    "takes_settings",
    "with_keywords",
]
