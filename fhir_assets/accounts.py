"""The account of the operating system that this process runs as, and the name that its environment claims."""

import os
import pwd
from functools import cache

_CLAIMING_VARIABLES = ("LOGNAME", "USER", "LNAME", "USERNAME")
"""The variables that ``getpass.getuser`` believes, in its order."""

_MAX_CLAIM = 200
"""The maximum number of characters of a claimed name that is kept."""


@cache
def _find_account(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def find_account() -> str:
    """Return the name of the account by its uid, such as ``anna``; ``uid 1000`` if the system has no name for it."""
    return _find_account(os.getuid())


def find_claim(claimed: str | None = None) -> str | None:
    """Return the name that the caller claims: ``claimed``, or that of the environment. None if it is the account's.

    Nothing verifies it.
    """
    name = claimed or next((value for key in _CLAIMING_VARIABLES if (value := os.environ.get(key))), None)
    if not name or name == find_account():
        return None
    return name.encode(errors="backslashreplace").decode()[:_MAX_CLAIM]
