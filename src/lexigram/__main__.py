"""``python -m lexigram``: the same as the command `lexigram`."""

from lexigram.cli import main

main()
