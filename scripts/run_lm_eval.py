"""lm-evaluation-harness on a sparse model beside its dense original: `samoyeds eval` as a script.

python scripts/run_lm_eval.py DIR --tasks T,... [--against DENSE] [--include-path TASKS] [--limit N]
"""

import sys

from samoyeds_hf.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "eval")
    main()
