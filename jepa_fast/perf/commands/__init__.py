"""The commands of `jepa-fast` that measure. Each has `configure(parser)` and `run(options)`.

Exit codes of all of them: 0 done, nothing got worse; 1 something did (or a floor is not met); 2 the
command asks for what does not exist; 3 no baseline; 4 a baseline of another version or machine; 5
uncommitted changes; 6 a version, or a kernel, cannot be built or run.
"""
