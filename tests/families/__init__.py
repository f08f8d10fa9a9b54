"""Tiny models of many Hugging Face model types, built from their configs, and a batch for each.

What is random in train mode is off: dropout, dropped layers and paths, router noise, masked spectra.
"""

from __future__ import annotations

from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from .build import Family, build
from .causal import CAUSAL
from .causal_others import CAUSAL_OTHERS
from .encoder_decoders import ENCODER_DECODERS
from .encoders import ENCODERS
from .linear_attention import LINEAR_ATTENTION
from .mixtures import MIXTURES
from .mixtures_latent import MIXTURES_LATENT
from .mixtures_sliding import MIXTURES_SLIDING
from .not_tried import NOT_TRIED
from .speech import SPEECHES
from .state_space import STATE_SPACE
from .three_axes import PICTURES_OF_ANY_SIZE
from .towers import TOWERS
from .vision import VISION
from .vision_language import VISION_LANGUAGE
from .vision_pyramids import VISION_PYRAMIDS

__all__ = ["ALL", "FAMILIES", "NOT_TRIED", "Family", "build"]

ALL: tuple[Family, ...] = (
    *CAUSAL,
    *CAUSAL_OTHERS,
    *MIXTURES,
    *MIXTURES_LATENT,
    *MIXTURES_SLIDING,
    *ENCODERS,
    *ENCODER_DECODERS,
    *VISION,
    *VISION_PYRAMIDS,
    *SPEECHES,
    *VISION_LANGUAGE,
    *PICTURES_OF_ANY_SIZE,
    *TOWERS,
    *STATE_SPACE,
    *LINEAR_ATTENTION,
)
FAMILIES = tuple(f for f in ALL if f.model_type in CONFIG_MAPPING_NAMES)
"""Those that the installed transformers has."""
