"""Trainers that stop, resume and fail without losing anything.

``reliable(SFTTrainer)`` is TRL's trainer (or transformers' ``Trainer``, or another one's subclass of it) with whole
checkpoints, an answer to signals, and diagnoses. Needs accelerate, as ``Trainer`` itself does.

reliable      the trainer
checkpoint    what a checkpoint is of, and whether it is whole
non_finite    where the first nan or infinity came from
memory        when memory runs out
signals       SIGTERM and Ctrl-C
"""

from .non_finite import Fault, first_non_finite
from .reliable import reliable

__all__ = ["Fault", "first_non_finite", "reliable"]
