"""The adoption curve: as an SVG for people, and as rows for programs."""

from collections.abc import Sequence
from html import escape

from fleet.rollouts.simulation.scenario import Happening, Moment, Played

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, RIGHT = 960, 460, 70, 104, 46, 110
FACE = 'font-family="sans-serif" font-size="12" role="img"'
COLOURS = ("#94a3b8", "#2563eb", "#d97706", "#059669", "#9333ea", "#db2777")
MARKS = {"started": "#475569", "completed": "#047857", "halted": "#dc2626", "paused": "#b45309"}
LETTER = 6.2  # pixels, about


def rows(played: Played) -> list[dict[str, object]]:
    """One for each step: time, devices by version, devices that update, devices that failed."""
    return [
        {"at": moment.at.isoformat(), **moment.versions, "updating": moment.updating, "failed": moment.failed}
        for moment in played.moments
    ]


def svg(played: Played, title: str) -> str:
    """Devices by version over time; upright lines are what the engine did."""
    moments = _thinned(played.moments)
    most = max(sum(moment.versions.values()) for moment in moments) or 1
    versions = list(moments[0].versions)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {FACE} aria-label="{escape(title)}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="22" font-size="15" fill="#0f172a">{escape(title)}</text>',
        *_grid(moments, most),
        *_legend(versions),
        *(_happening(each, moments) for each in played.happenings),
        *_labels(played.happenings, moments),
        *(_line(moments, version, place, most) for place, version in enumerate(versions)),
        "</svg>",
    ]
    return "\n".join(parts)


def _thinned(moments: Sequence[Moment]) -> list[Moment]:
    """As many as there are pixels."""
    every = max(1, len(moments) // WIDTH)
    return [*moments[::every], moments[-1]]


def _x(place: float) -> float:
    return LEFT + place * (WIDTH - LEFT - RIGHT)


def _y(share: float) -> float:
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _share(moment: Moment | Happening, moments: Sequence[Moment]) -> float:
    span = (moments[-1].at - moments[0].at).total_seconds() or 1.0
    return (moment.at - moments[0].at).total_seconds() / span


def _grid(moments: Sequence[Moment], most: int) -> list[str]:
    found = []
    for quarter in range(5):
        y = _y(quarter / 4)
        found.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{_x(1):.1f}" y2="{y:.1f}" stroke="#e2e8f0"/>')
        label = f"{most * quarter / 4:,.0f}"
        found.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end" fill="#64748b">{label}</text>')
        at = moments[0].at + (moments[-1].at - moments[0].at) * quarter / 4
        x = _x(quarter / 4)
        found.append(f'<text x="{x:.1f}" y="{HEIGHT - 24}" text-anchor="middle" fill="#64748b">{at:%-d %b}</text>')
    return found


def _line(moments: Sequence[Moment], version: str, place: int, most: int) -> str:
    colour = COLOURS[place % len(COLOURS)]
    points = " ".join(
        f"{_x(_share(moment, moments)):.1f},{_y(moment.versions[version] / most):.1f}" for moment in moments
    )
    last = moments[-1].versions[version]
    label = f'<text x="{_x(1) + 8:.1f}" y="{_y(last / most) + 4:.1f}" fill="{colour}">{escape(version)} {last:,}</text>'
    return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>{label if last else ""}'


def _legend(versions: Sequence[str]) -> list[str]:
    found, x = [], float(LEFT)
    for place, version in enumerate(versions):
        colour = COLOURS[place % len(COLOURS)]
        found.append(f'<line x1="{x:.0f}" y1="40" x2="{x + 18:.0f}" y2="40" stroke="{colour}" stroke-width="3"/>')
        found.append(f'<text x="{x + 24:.0f}" y="44" fill="#334155">{escape(version)}</text>')
        x += 44 + LETTER * len(version)
    return found


def _labels(happenings: Sequence[Happening], moments: Sequence[Moment]) -> list[str]:
    """What began and how it ended, above its line, on the first of three rows that is free there; passed stages not."""
    free, found = [0.0] * 3, []
    for each in happenings:
        x, text = _x(_share(each, moments)), f"{each.version} {each.what}"
        row = next((place for place, end in enumerate(free) if end <= x), None)
        if each.what in MARKS and row is not None:
            free[row] = x + LETTER * len(text) + 10
            at = f'x="{x + 3:.1f}" y="{TOP - 34 + 14 * row}"'
            found.append(f'<text {at} font-size="11" fill="{MARKS[each.what]}">{escape(text)}</text>')
    return found


def _happening(each: Happening, moments: Sequence[Moment]) -> str:
    x, colour = _x(_share(each, moments)), MARKS.get(each.what, "#cbd5e1")
    said = escape(f"{each.version} {each.what}, stage {each.stage} {each.reason}".strip())
    return (
        f'<line x1="{x:.1f}" y1="{TOP - 4}" x2="{x:.1f}" y2="{_y(0):.1f}" stroke="{colour}" stroke-dasharray="3 3">'
        f"<title>{said}</title></line>"
    )
