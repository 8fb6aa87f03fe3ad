"""What a test measured, for those who look: it is shown with -s or -rP, and beside a failure."""

from __future__ import annotations

import sys


def measured(what: str, value: object) -> None:
    sys.stdout.write(f"measured: {what}: {value}\n")
