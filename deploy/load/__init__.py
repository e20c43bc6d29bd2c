"""Many devices' polls against a server on this machine: what it answers, how fast, and what that costs it."""
