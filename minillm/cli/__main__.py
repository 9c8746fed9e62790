"""`python -m minillm.cli VERB`, where the console script is not installed."""

import sys

from minillm.cli import main

sys.exit(main())
