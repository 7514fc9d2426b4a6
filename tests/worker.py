"""The Python of xdist's workers, see `forked.work`."""

import sys

import forked

if __name__ == "__main__":
    sys.exit(forked.work(sys.argv))
