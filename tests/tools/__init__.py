"""Scripts that test the tests: sanitizers, fuzzing, mutants, other versions of Python and torch. docs/promises.md
explains how to run each, with results."""
