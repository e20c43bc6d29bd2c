"""`python -m tests.conformance`: one process for each step of the suite, so it starts as fast as on a device."""

import sys


def run() -> int:
    # Devices have no boto3. Where the tests' packages have it, securesystemslib spends half a second on loading it.
    sys.modules.setdefault("boto3", None)  # type: ignore[arg-type]
    from tests.conformance.client import main

    return main()


sys.exit(run())
