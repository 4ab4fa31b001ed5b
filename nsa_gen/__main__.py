"""``python -m nsa_gen``: the command line, also from a plain checkout."""

from __future__ import annotations

from .cli import main

if __name__ == "__main__":
    main()
