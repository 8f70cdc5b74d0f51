"""The commands of `jepa-fast` that measure. Each has `configure(parser)` and `run(options)`."""

EXIT_CODES = (
    "Exit codes of bench, audit and compare: 0 done, nothing got worse; 1 something did, or "
    "failed, or is wrong, or misses its floor; 2 the command asks for what does not exist; 3 no "
    "baseline; 4 a baseline of another version or machine; 5 uncommitted changes; 6 a version, or "
    "a kernel, cannot be built or run; 7 a file cannot be written, or a package is missing; 130 a "
    "signal stopped it, and bench and compare have written what they measured before."
)
