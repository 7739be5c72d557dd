"""The one exception that this package raises for what a user can mend; its text is cause plus remedy."""


class LexigramError(Exception):
    """Something the user can mend. The message names the thing, its value and what to do."""
