"""A review as Markdown: short, the most important first, nothing that a reader would skip."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from lockstep.ci.affected.repository import Change
from lockstep.ci.affected.review import Cover, Review
from lockstep.ci.affected.symbols import SymbolChange

SYMBOLS_SHOWN = 40
LISTED = 8
FAR_STEPS = 4
SIGNATURE_WIDTH = 100


def markdown(review: Review) -> str:
    """The page. Lists that would run long end with the number of what was left out; the JSON has everything."""
    if not review.changes:
        return f"# Review\n\nNothing differs from {review.base[:12]}.\n"
    sections = (_summary, _risks, _rooms, _touched, _suites, _uncovered, _symbols)
    return "\n".join(line for section in sections for line in section(review)).rstrip() + "\n"


def _summary(review: Review) -> Iterator[str]:
    added, removed = sum(each.added for each in review.changes), sum(each.removed for each in review.changes)
    files, risks = _counted(len(review.changes), "file"), _counted(len(review.risks), "risk")
    yield "# Review"
    yield ""
    yield f"{files} against {review.base[:12]}: {added} lines added, {removed} removed; {risks}."
    yield ""


def _risks(review: Review) -> Iterator[str]:
    if review.risks:
        yield from ("## Risks", "", *(f"- {risk.text}" for risk in review.risks), "")


def _rooms(review: Review) -> Iterator[str]:
    yield from ("## What changed", "")
    rows = [(room, *_room_cells(changes)) for room, changes in review.rooms.items()]
    yield from _table(("room", "files", "added", "removed", "most in"), rows)


def _room_cells(changes: Sequence[Change]) -> tuple[str, ...]:
    heaviest = sorted(changes, key=lambda each: -each.weight)[:3]
    added, removed = sum(each.added for each in changes), sum(each.removed for each in changes)
    names = ", ".join(f"`{each.path.rpartition('/')[2]}`" for each in heaviest)
    return str(len(changes)), str(added), str(removed), names


def _touched(review: Review) -> Iterator[str]:
    for title, names in (("Operators", review.operators), ("Models", review.models)):
        if names:
            yield from (f"{title} touched: {', '.join(names)}.", "")


def _suites(review: Review) -> Iterator[str]:
    yield from ("## Who checks it", "")
    if review.deciding:
        yield from (f"Everything, because of {_listed(f'`{path}`' for path in review.deciding)}.", "")
    if not review.suites:
        yield from ("No suite is touched.", "")
        return
    rows = [
        (suite.name, ", ".join(suite.stages), f"{len(suite.files)} of {suite.num_files}")
        for suite in review.suites
    ]
    yield from _table(("suite", "stages", "test files touched"), rows)
    yield from (f"Gates: {', '.join(review.gates) or 'none covers this change'}.", "")


def _uncovered(review: Review) -> Iterator[str]:
    by_registry = [cover for cover in review.covers if cover.by_registry and "/ops/" not in cover.path]
    for title, covers in (("No test runs", review.untested), ("Only a registry finds", by_registry)):
        if covers:
            yield from (f"{title}: {_listed(f'`{cover.path}`' for cover in covers)}.", "")
    far = [cover for cover in review.covers if cover.steps >= FAR_STEPS]
    if far:
        far.sort(key=lambda cover: (-cover.steps, cover.path))
        yield from ("Tested from afar:", "", *map(_far, far[:LISTED]), "")
    if review.unnamed:
        yield from (
            f"New, and no test names them: {_listed(f'`{symbol.name}`' for symbol in review.unnamed)}.",
            "",
        )


def _far(cover: Cover) -> str:
    return f"- `{cover.path}`: {cover.steps} imports away from `{cover.nearest}`"


def _symbols(review: Review) -> Iterator[str]:
    new_files = {change.path for change in review.changes if change.status == "added"}
    known = [symbol for symbol in review.symbols if symbol.path not in new_files]
    if not review.symbols:
        return
    yield from ("## Public names", "")
    for path, symbols in _by_file(known[:SYMBOLS_SHOWN]).items():
        yield from (f"`{path}`", "", *map(_symbol, symbols), "")
    if len(known) > SYMBOLS_SHOWN:
        yield from (f"and {len(known) - SYMBOLS_SHOWN} more.", "")
    if len(known) < len(review.symbols):
        yield from (f"New files add {_counted(len(review.symbols) - len(known), 'public name')}.", "")


def _symbol(symbol: SymbolChange) -> str:
    if symbol.before is None:
        return f"- added `{symbol.name}` {_code(symbol.after)}"
    if symbol.after is None:
        return f"- **removed** `{symbol.name}` {_code(symbol.before)}"
    before, after = _where_they_differ(_plain(symbol.before), _plain(symbol.after))
    return f"- **changed** `{symbol.name}` {_code(before)} to {_code(after)}"


def _where_they_differ(before: str, after: str) -> tuple[str, str]:
    """Both without what they begin with alike, from a word's start."""
    alike = next((at for at, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1]), 0)
    start = before.rfind(" ", 0, alike) + 1
    mark = "… " if start else ""
    return mark + before[start:], mark + after[start:]


def _code(signature: str | None) -> str:
    text = _plain(signature)
    return f"`{text if len(text) <= SIGNATURE_WIDTH else text[: SIGNATURE_WIDTH - 1] + '…'}`"


def _plain(signature: str | None) -> str:
    return " ".join((signature or "").split())


def _by_file(symbols: Iterable[SymbolChange]) -> dict[str, list[SymbolChange]]:
    found: dict[str, list[SymbolChange]] = {}
    for symbol in symbols:
        found.setdefault(symbol.path, []).append(symbol)
    return found


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(titles)} |"
    yield f"|{' --- |' * len(titles)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""


def _listed(texts: Iterable[str]) -> str:
    found = list(texts)
    more = len(found) - LISTED
    return ", ".join(found[:LISTED]) + (f" and {more} more" if more > 0 else "")


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
