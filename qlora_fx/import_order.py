"""``TORCH_LOGS="+qlora_fx"`` makes PyTorch import this package before it is ready itself."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from .tested_versions import warn_if_untested


def torch_is_starting() -> bool:
    """True while ``import torch`` runs, as for whoever imported it: PEFT and bitsandbytes have no names yet."""
    spec = getattr(sys.modules.get("torch"), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))


class Deferred(ModuleType):
    """The package until one of its names is asked for: PyTorch only looks whether there is a package of that name."""

    @property
    def __path__(self) -> Any:  # type: ignore[override]
        if torch_is_starting():  # it would import all packages inside
            raise AttributeError("__path__")
        return vars(self)["__path__"]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        self.__class__ = ModuleType  # type: ignore[assignment]
        warn_if_untested()
        from . import public

        vars(self).update({n: getattr(public, n) for n in (*public.__all__, "__all__")})
        return getattr(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # Modules inside are imported and have the names of functions: ``transform`` is found above.
        if not isinstance(value, ModuleType):
            super().__setattr__(name, value)
