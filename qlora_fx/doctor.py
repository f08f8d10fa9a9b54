"""``python -m qlora_fx.doctor``: the command ``qlora-fx doctor``."""

from __future__ import annotations

import sys

from .cli.main import main

if __name__ == "__main__":
    main(["doctor", *sys.argv[1:]])
