"""Run the `diffusers-draft` command by `python -m diffusers_draft`."""

import sys

from .cli import main

sys.exit(main())
