import sys

from tpinv.cli import main

sys.exit(main())
