"""Convert a dense checkpoint to a sparse one: `samoyeds convert` as a script.

python scripts/convert_checkpoint.py SRC DST --pattern 1:2:64 [--recipe FILE] [--resume] ...
"""

import sys

from samoyeds_hf.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "convert")
    main()
