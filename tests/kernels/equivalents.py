"""Sites whose fault changes no result, and why: read by `test_mutants`, which seeds nothing there."""

from tests.kernels.mutants import Site

EQUIVALENT: dict[Site, str] = {}
