"""Bad and hostile inputs over every public entry point; see `docs/robustness.md`."""

from tests.bad_inputs.catalogue import CASES

__all__ = ["CASES"]
