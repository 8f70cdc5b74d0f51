"""The gate for times and memory: two versions of the code, measured against each other.

`snapshots` puts the two side by side and builds them, `worker` is the process that runs one of
them, in which `imports` sees to it that it runs no other, `sides` talks to it, `sampling` lets two
of them take turns, `decision` says what the numbers prove, `gate` brings it together and `report`
tells of it.
"""
