"""Errors that are the user's to mend."""

from __future__ import annotations


class UserError(Exception):
    """A file, an option or an input that cannot be used; its text is one sentence for the user.

    The command line prints it without a traceback and exits with code 2.
    """
