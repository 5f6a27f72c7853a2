"""What Linux says of the memory of this process."""

from pathlib import Path


def kibibytes(field: str) -> int:
    """``VmRSS``, what is resident now, or ``VmHWM``, the most there was: since the process began, or ``mark_here``.

    Unlike ``ru_maxrss`` neither begins with what the process that started this one had.
    """
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])


def mark_here() -> None:
    """Let ``VmHWM`` begin anew: what came before does not count."""
    Path("/proc/self/clear_refs").write_text("5")
