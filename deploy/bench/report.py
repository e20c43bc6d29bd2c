"""The table, for the terminal and as the page that is committed."""

import os
import platform
import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from deploy.bench.measure import Row, Section

COLUMNS = ("What", "Figure", "Baseline", "Of what", "Compared", "Bar", "")
PACKAGES = ("onnxruntime", "numpy", "django", "djangorestframework", "tuf", "cryptography", "granian", "requests")


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


def page(sections: Sequence[Section]) -> str:
    """Markdown. A figure without its machine says little, so that comes first."""
    judged = [row for section in sections for row in section.rows if row.met is not None]
    missed = sum(row.met is False for row in judged)
    head = [
        "# What it costs",
        "",
        f"Written by `make bench` on {datetime.now(UTC):%Y-%m-%d}. {len(judged)} bars, {missed} missed.",
        "",
        "**Absolute figures move between machines, and with what else runs on them; compare within a row.** Each",
        "baseline was measured in the same run as its figure. CPU time, unless a section says otherwise.",
        "",
        *(f"- {line}" for line in machine()),
    ]
    return "\n".join([*head, *(line for section in sections for line in _section(section)), ""])


def renewed(old: str, sections: Sequence[Section]) -> str:
    """A page with these sections in place of what it had under their titles; each says that it was measured alone."""
    head, *parts = old.rstrip("\n").split("\n## ")
    kept = {part.partition("\n")[0]: part for part in parts}
    alone = f"Measured by itself on {datetime.now(UTC):%Y-%m-%d}, load average at the end {os.getloadavg()[0]:.1f}."
    for section in sections:
        lines = _section(replace(section, notes=(*section.notes, alone)))
        kept[section.title] = "\n".join(lines[1:]).removeprefix("## ")
    text = "\n\n## ".join(part.strip("\n") for part in (head, *kept.values())) + "\n"
    missed = text.count("| **missed** |")
    return re.sub(r"\d+ bars, \d+ missed", f"{missed + text.count('| met |')} bars, {missed} missed", text)


def machine() -> list[str]:
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    cores = _field("/proc/cpuinfo", "processor", count=True)
    return [
        f"CPU: {_field('/proc/cpuinfo', 'model name')}, {cores} cores, shared",
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        packages,
        f"Load average at the end of the run: {os.getloadavg()[0]:.1f}; what others ran shows in every wall time",
    ]


def _section(section: Section) -> list[str]:
    return [
        "",
        f"## {section.title}",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---|--:|--:|---|--:|---|---|",
        *(f"| {' | '.join(_cells(row))} |" for row in section.rows),
        *_beside(section.beside),
        *(line for note in section.notes for line in ("", note)),
    ]


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
