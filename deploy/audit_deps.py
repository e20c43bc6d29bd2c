"""`make audit-deps`: are the locked packages pinned, hashed, and without known faults?

Without a network: every package of every lock is pinned with hashes, the locks agree, none lies below a floor of
`requirements/advisories.json`. With one: OSV is asked about all of them in one request. Exit 0: asked, and clean;
1: a finding; 3: what can be seen here is clean, but nobody could be asked about newer advisories, and why.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import requests

ROOT = Path(__file__).resolve().parent.parent
OSV = "https://api.osv.dev/v1/querybatch"
CLEAN, FOUND, NOT_ASKED = 0, 1, 3
_PIN = re.compile(r"([a-z0-9][a-z0-9._-]*)(?:\[[^]]*\])?==([0-9][0-9a-z.+!]*)\s*(?:;([^\\]*))?\\?$")


@dataclass(frozen=True)
class Pin:
    lock: str
    package: str
    version: str
    marker: str  # of Pythons and machines: a lock may name a package once for each
    hashes: int


class UnpinnedError(ValueError):
    """A line of a lock that is no pin."""


def pins(lock: Path) -> Iterator[Pin]:
    """The packages of a lock, as uv writes it. Raises UnpinnedError for any other line."""
    for block in re.split(r"\n(?=[^\s#])", lock.read_text()):
        lines = [line for line in block.splitlines() if line.strip() and not line.startswith("#")]
        if not lines:
            continue
        match = _PIN.fullmatch(lines[0].strip())
        if not match:
            raise UnpinnedError(f"{lock.name}: expected package==version with hashes; got {lines[0]!r:.100}")
        hashes = sum(bool(re.search(r"--hash=sha256:[0-9a-f]{64}", line)) for line in lines[1:])
        yield Pin(lock.name, match[1], match[2], (match[3] or "").strip(), hashes)


def offline_findings(found: Sequence[Pin], floors: Sequence[Mapping[str, object]]) -> Iterator[str]:
    versions: dict[str, set[str]] = {}
    alike: dict[tuple[str, str], set[str]] = {}
    for pin in found:
        versions.setdefault(pin.package, set()).add(pin.version)
        alike.setdefault((pin.package, pin.marker), set()).add(pin.version)
        if not pin.hashes:
            yield f"{pin.lock}: {pin.package} {pin.version} has no hash"
    for (package, _), several in alike.items():
        if len(several) > 1:
            yield f"{package}: the locks differ: {', '.join(sorted(several))}"
    for floor in floors:
        for version in sorted(versions.get(str(floor["package"]), ())):
            if number(version) < number(str(floor["fixed"])):
                yield f"{floor['package']} {version}: below {floor['fixed']}, see {floor['ids']} ({floor['source']})"


def number(version: str) -> tuple[int, ...]:
    """Good for comparing releases; a pre-release counts as its release."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0]))


def online_findings(found: Sequence[Pin], url: str) -> list[str]:
    """Raises OSError or ValueError when there is no answer, or none that can be understood."""
    unique = sorted({(pin.package, pin.version) for pin in found})
    queries = [{"package": {"name": name, "ecosystem": "PyPI"}, "version": version} for name, version in unique]
    answer = requests.post(url, json={"queries": queries}, timeout=30)
    answer.raise_for_status()
    results = answer.json()["results"]
    if len(results) != len(unique):
        raise ValueError(f"expected {len(unique)} answers; got {len(results)}")
    return [
        f"{name} {version}: {', '.join(sorted(item['id'] for item in result['vulns']))}"
        for (name, version), result in zip(unique, results, strict=True)
        if result.get("vulns")
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--locks", type=Path, default=ROOT / "requirements")
    parser.add_argument("--url", default=OSV, help="a database that speaks OSV's querybatch (default: OSV's)")
    given = parser.parse_args(argv)
    try:
        found = [pin for lock in sorted(given.locks.glob("*.txt")) for pin in pins(lock)]
    except UnpinnedError as error:
        print(error)
        return FOUND
    floors = json.loads((ROOT / "requirements" / "advisories.json").read_bytes())["floors"]
    findings = list(offline_findings(found, floors))
    try:
        findings += online_findings(found, given.url)
        asked = f"{given.url} was asked"
    except (OSError, ValueError, KeyError, TypeError) as error:
        asked = f"NOBODY WAS ASKED about newer advisories: {type(error).__name__}: {error!s:.200}"
    print("\n".join(findings) or "no findings")
    print(f"{len({pin.package for pin in found})} packages of {len({pin.lock for pin in found})} locks; {asked}")
    if findings:
        return FOUND
    return NOT_ASKED if asked.startswith("NOBODY") else CLEAN


if __name__ == "__main__":
    sys.exit(main())
