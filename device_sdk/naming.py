"""Names that nobody guesses. As `secrets` makes them, without the three modules that it brings to every start."""

import os


def token_hex(count: int) -> str:
    """`count` random bytes in hex digits, from the system."""
    return os.urandom(count).hex()
