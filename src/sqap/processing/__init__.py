"""What happens before and after the model, as data: lists of steps, read from and written to ``policy.json``.

A step is a frozen dataclass. A family, or a robot, is a list of them.
"""

from sqap.processing.actions import (
    ActionStep,
    ActionUnits,
    AddState,
    Binarize,
    Take,
    action_bounds,
    action_dim,
    unnormalize,
)
from sqap.processing.images import (
    WHOLE,
    Crop,
    ImageStep,
    ImageSteps,
    Normalize,
    ResizeWithPad,
    Scale,
    Stretch,
    Window,
    cropped,
    image_problems,
    pixel_values,
    stretched,
    window,
)
from sqap.processing.normalization import Clamp, MeanStd, Range
from sqap.processing.state import Pad, StateStep, normalize_state, state_dim
from sqap.processing.text import EndWith, Lower, PromptConfig, Spaces, Template, TextStep, prompt_ids

__all__ = [
    "WHOLE",
    "ActionStep",
    "ActionUnits",
    "AddState",
    "Binarize",
    "Clamp",
    "Crop",
    "EndWith",
    "ImageStep",
    "ImageSteps",
    "Lower",
    "MeanStd",
    "Normalize",
    "Pad",
    "PromptConfig",
    "Range",
    "ResizeWithPad",
    "Scale",
    "Spaces",
    "StateStep",
    "Stretch",
    "Take",
    "Template",
    "TextStep",
    "Window",
    "action_bounds",
    "action_dim",
    "cropped",
    "image_problems",
    "normalize_state",
    "pixel_values",
    "prompt_ids",
    "state_dim",
    "stretched",
    "unnormalize",
    "window",
]
