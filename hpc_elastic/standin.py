"""Stand-in: what a seed rank started without a launcher becomes when it leaves. Waits for the run's end, ends as it ended.

    python -S -E standin.py RUN
"""

import json
import os
import sys
import time


def main():
    run = sys.argv[1]
    while True:
        if os.path.exists(os.path.join(run, "failure.json")):
            sys.exit(1)
        try:
            with open(os.path.join(run, "status.json")) as file:
                state = json.load(file)["state"]
        except OSError:
            sys.exit(1)  # the run directory is gone: nothing to wait for
        if state in ("ended", "stopped"):
            sys.exit(0)
        time.sleep(0.1)


main()
