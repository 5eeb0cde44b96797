"""Distill a sparse checkpoint from its dense original: `samoyeds recover` as a script.

python scripts/recover_checkpoint.py SPARSE OUT --against DENSE --calibration FILE [--resume] ...
"""

import sys

from samoyeds_hf.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "recover")
    main()
