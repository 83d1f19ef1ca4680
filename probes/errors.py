"""The root of every error that Telltale raises on purpose; knows nothing of what may go wrong.

A message has four parts: where, what was found, what is allowed, and what to do. Subclasses live beside the code
that raises them and derive from `TelltaleError` and, where one fits, from the builtin of the same meaning.
"""

import difflib
from collections.abc import Iterable

__all__ = ["TelltaleError", "did_you_mean"]

_MAX_LISTED = 12


class TelltaleError(Exception):
    """Something is wrong that the user can put right; the text says how."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: the nearest known one, then all of them.

    Args:
        name: what was written.
        known: what is allowed; sorted and shortened here.

    Returns: `Did you mean 'deception'? Known: bio, deception.`, without the question where nothing is near.
    """
    names = sorted(set(known))
    if not names:
        return "Nothing is known by that kind of name."
    folded = {candidate.casefold(): candidate for candidate in names}
    near = difflib.get_close_matches(name.casefold(), list(folded), n=1, cutoff=0.6)
    question = f"Did you mean '{folded[near[0]]}'? " if near else ""
    listed = ", ".join(names[:_MAX_LISTED])
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return f"{question}Known: {listed}{more}."
