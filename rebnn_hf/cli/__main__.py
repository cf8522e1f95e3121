"""`python -m rebnn_hf.cli`."""

import sys

from rebnn_hf.cli import main

sys.exit(main())
