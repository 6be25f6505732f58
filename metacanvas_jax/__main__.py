"""``python -m metacanvas_jax`` is ``metacanvas``."""

import sys

from metacanvas_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
