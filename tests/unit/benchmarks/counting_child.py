"""A variant that doubles numbers; the tests run it in a process of its own."""

import sys

from benchmarks.measured import answer_steps

if __name__ == "__main__":
    # Libraries write lines of their own.
    sys.stdout.write("a line of a library\n")
    answer_steps(lambda number: {"double": 2 * number}, mark_after_first=True)
