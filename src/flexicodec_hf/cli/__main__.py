"""`python -m flexicodec_hf.cli`, for launchers that start modules."""

import sys

from . import main


sys.exit(main())
