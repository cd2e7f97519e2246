"""Scripts that check the checks: sanitizers, fuzzing, mutants, other versions of Python and torch. docs/promises.md says
how to run each and what it found."""
