"""The table, for the terminal and as the page that is committed."""

import os
import platform
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from deploy.bench.measure import Row, Section

COLUMNS = ("What", "Figure", "Baseline", "Of what", "Compared", "Bar", "")
PACKAGES = ("onnxruntime", "numpy", "django", "djangorestframework", "tuf", "cryptography", "granian", "requests")

_MARK = "<!-- bench: {} -->"
_MARKED = re.compile(r"^<!-- bench: (\w+) -->$", re.MULTILINE)


def show(console: Console, section: Section) -> None:
    table = Table(*COLUMNS, title=section.title, title_justify="left")
    for row in section.rows:
        table.add_row(*(cell.replace("**", "") for cell in _cells(row)), style="red" if row.met is False else "")
    console.print(table)
    if section.beside:
        head, *lines = section.beside
        others = Table(*head)
        for line in lines:
            others.add_row(*line)
        console.print(others)


def page(parts: Mapping[str, str]) -> str:
    """Markdown, of sections as `written` gave them. A figure without its machine says little, so that comes first."""
    text = "".join(f"\n{_MARK.format(name)}\n{part}" for name, part in parts.items())
    met, missed = text.count("| met |\n"), text.count("| **missed** |\n")
    head = [
        "# What it costs",
        "",
        f"Written by `make bench`. {met + missed} bars, {missed} missed.",
        "",
        "**Absolute figures move between machines, and with what else runs on them; compare within a row.** Each",
        "baseline was measured in the same run as its figure. CPU time, unless a section says otherwise.",
        "",
        *(f"- {line}" for line in machine()),
    ]
    return "\n".join([*head, text])


def split(text: str) -> dict[str, str]:
    """The sections of a page, by name."""
    _, *found = _MARKED.split(text)
    return {name: part.strip("\n") + "\n" for name, part in zip(found[::2], found[1::2], strict=True)}


def machine() -> list[str]:
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    cores = _field("/proc/cpuinfo", "processor", count=True)
    return [
        f"CPU: {_field('/proc/cpuinfo', 'model name')}, {cores} cores, shared",
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        packages,
    ]


def written(section: Section) -> str:
    """Markdown. Says when it was measured, and what else the machine did: sections may be measured one by one."""
    load = f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    lines = [
        f"## {section.title}",
        "",
        f"Measured on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC; {load}, which shows in every wall time.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---|--:|--:|---|--:|---|---|",
        *(f"| {' | '.join(_cells(row))} |" for row in section.rows),
        *_beside(section.beside),
        *(line for note in section.notes for line in ("", note)),
    ]
    return "\n".join([*lines, ""])


def _beside(table: Sequence[tuple[str, ...]]) -> list[str]:
    if not table:
        return []
    head, *lines = (f"| {' | '.join(line)} |" for line in table)
    return ["", head, "|---" * len(table[0]) + "|", *lines]


def _cells(row: Row) -> list[str]:
    figures = [f"{_figure(value)} {row.unit}" for value in (row.value, row.baseline)]
    return [row.what, *figures, row.against, row.compared, row.bar, row.verdict]


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _field(path: str, name: str, *, count: bool = False) -> str:
    lines = [line for line in Path(path).read_text().splitlines() if line.startswith(name)]
    if count:
        return str(len(lines))
    return lines[0].partition(":")[2].strip() if lines else platform.machine()
