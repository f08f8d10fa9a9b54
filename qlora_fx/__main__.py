"""``python -m qlora_fx`` is ``qlora-fx``."""

from .cli.main import main

if __name__ == "__main__":
    main()
