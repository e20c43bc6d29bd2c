"""The table of settings, read from the source of `fleet/settings.py`: names, types, defaults and their comments."""

import ast
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

INTRODUCTION = """# Settings

Every setting is an environment variable. `manage.py settings_reference --write` makes this page from
`fleet/settings.py`; a test fails when it is old. `manage.py check` says what is wrong with yours.
"""
SECTION = re.compile(r"# --- (.+?) -+$")
FIRST_SECTION = "basics"


@dataclass(frozen=True)
class Setting:
    name: str
    kind: str
    default: str
    text: str
    section: str


def settings_of(path: Path) -> list[Setting]:
    source = path.read_text()
    comments = _comments(path)
    return [
        Setting(
            name=str(ast.literal_eval(call.args[0])),
            kind={"dj_db_url": "url"}.get(kind, kind),
            default=_default(call, source),
            text=_text(call, comments),
            section=_section(call.lineno, comments),
        )
        for kind, call in _calls(ast.parse(source))
    ]


def render(settings: list[Setting]) -> str:
    parts = [INTRODUCTION]
    for section in dict.fromkeys(setting.section for setting in settings):
        rows = [setting for setting in settings if setting.section == section]
        parts.append(f"## {section.capitalize()}\n\n| variable | type | default | meaning |\n|---|---|---|---|")
        parts.extend(f"| `{row.name}` | {row.kind} | {row.default} | {row.text} |" for row in rows)
        parts.append("")
    return "\n".join(parts)


def _calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every `env.<kind>("FLEET_…", default)`, in the order of the source."""
    found = [
        (node.func.attr, node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "env"
    ]
    yield from sorted(found, key=lambda item: item[1].lineno)


def _default(call: ast.Call, source: str) -> str:
    text = ast.get_source_segment(source, call.args[1]) if len(call.args) > 1 else None
    if text is None:
        return "required"
    text = re.sub(r"\s+", " ", text)
    return {'""': "empty", "None": "empty", "False": "off", "True": "on"}.get(text, f"`{text}`")


def _comments(path: Path) -> dict[int, tuple[bool, str]]:
    """Line to (stands alone, text)."""
    with path.open("rb") as file:
        found = [token for token in tokenize.tokenize(file.readline) if token.type == tokenize.COMMENT]
    return {token.start[0]: (token.line.lstrip().startswith("#"), token.string) for token in found}


def _text(call: ast.Call, comments: dict[int, tuple[bool, str]]) -> str:
    """The comment at the end of the line, else the block right above."""
    beside = comments.get(call.end_lineno or call.lineno)
    if beside:
        return _plain([beside[1]])
    lines: list[str] = []
    number = call.lineno - 1
    while number in comments and comments[number][0] and not SECTION.match(comments[number][1]):
        lines.insert(0, comments[number][1])
        number -= 1
    return _plain(lines)


def _plain(lines: list[str]) -> str:
    text = " ".join(line.removeprefix("#").strip() for line in lines)
    return re.sub(r"\s*#?\s*noqa.*", "", text).replace("|", "\\|").rstrip(".")


def _section(line: int, comments: dict[int, tuple[bool, str]]) -> str:
    titles = [match[1] for number, (_, text) in comments.items() if number < line and (match := SECTION.match(text))]
    return titles[-1] if titles else FIRST_SECTION
