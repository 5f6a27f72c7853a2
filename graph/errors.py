"""The exceptions a user sees.

QcError              one thing the user can fix
└── QcErrors         several of them, found in one go
"""

from __future__ import annotations

from collections.abc import Sequence


class QcError(Exception):
    """Something the user can fix: what went wrong, where, and what to do.

    Each layer on the way out adds what only it knows: a pass knows ``what`` and ``fix``, the runner
    knows the ``site`` and the pass, the recipe reader knows the ``line`` (``file:line:column``).
    """

    def __init__(self, what: str, *, fix: str, site: str | None = None, line: str | None = None):
        super().__init__(what)
        self.what, self.fix, self.site, self.line = what, fix, site, line

    def __str__(self) -> str:
        rows = {"site": self.site, "recipe": self.line, "fix": self.fix}
        return "\n".join([self.what, *(f"  {key:<7}{value}" for key, value in rows.items() if value)])

    def as_dict(self) -> dict[str, str | None]:
        """The same, for ``--json``."""
        return {"what": self.what, "site": self.site, "line": self.line, "fix": self.fix}


class QcErrors(QcError):
    """All the mistakes of one file or one check, in the order in which a reader meets them."""

    def __init__(self, errors: Sequence[QcError]):
        assert errors, "a report of no errors"
        super().__init__(f"{len(errors)} errors" if len(errors) > 1 else errors[0].what, fix=errors[0].fix)
        self.errors = tuple(errors)

    def __str__(self) -> str:
        return "\n\n".join(str(error) for error in self.errors)


def raise_all(errors: Sequence[QcError]) -> None:
    """Raise what was collected: nothing, the one error, or all of them together."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise QcErrors(errors)
