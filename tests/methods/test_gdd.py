"""GDD's iteration against the numbers of the authors' code, its switches, and through the loop."""

from __future__ import annotations
