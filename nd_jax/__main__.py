"""``python -m nd_jax`` is the ``nd-jax`` command."""

import sys

from nd_jax.cli import main

sys.exit(main())
