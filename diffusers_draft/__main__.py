"""`python -m diffusers_draft` is the `diffusers-draft` command."""

import sys

from .cli import main

sys.exit(main())
