"""Run the `diffusers-draft` command by `python -m diffusers_draft`."""

import sys

try:
    from .cli import main

    sys.exit(main())
except KeyboardInterrupt:  # before `main` runs, or when it is over
    sys.stderr.write("diffusers-draft: stopped\n")
    sys.exit(130)
