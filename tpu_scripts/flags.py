"""Prints the compiler flags of a TPU generation as the value of LIBTPU_INIT_ARGS: ``python flags.py v5p``.

Those of a GPU (``python flags.py h100``) are the value of XLA_FLAGS.
"""

import sys

from metacanvas_jax.parallel.flags import libtpu_arguments

if __name__ == "__main__":
    print(libtpu_arguments(sys.argv[1]))
