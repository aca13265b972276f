"""The funnel as text and as one HTML page: what is left after each block, why, scores, the mix, and samples of texts."""

from html import escape

from megatron_llama3.curation.observe import Tally

_STYLE = """
:root { --ink: #1c2430; --soft: #5a6675; --line: #dde3ea; --box: #f4f6f9; --kept: #3b7dd8; --pale: #9cc0ee; --lost: #d9694f }
@media (prefers-color-scheme: dark) { :root { --ink: #dde3ea; --soft: #97a3b3; --line: #2c3642; --box: #1e252e; --pale: #35577f }
  body { background: #14181e } }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: var(--ink) }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem } h3 { font-size: 1rem; margin: 1rem 0 .3rem }
.note, .of { color: var(--soft) } a { color: var(--kept) } ul.notes { margin: .3rem 0; padding-left: 1.2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } table.wide { width: 100% }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: middle }
th { font-weight: 600; color: var(--soft) } th:first-child, td:first-child, td.why, th.why { text-align: left }
td.bar { width: 30%; min-width: 9rem } .track { background: var(--box); border-radius: 2px } .track div { border-radius: 2px }
.kept { background: var(--kept); height: .8rem } .characters { background: var(--pale); height: .35rem; margin-top: 2px }
.lost { background: var(--lost); height: .8rem }
section { border-top: 1px solid var(--line); margin-top: 2rem } details { margin: .25rem 0 } summary { cursor: pointer }
summary b { display: inline-block; min-width: 5rem; text-align: right; margin-right: .6rem }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--box); padding: .6rem; border-radius: 4px; margin: .2rem 0 .8rem;
  font-size: .82rem; max-height: 22rem; overflow-y: auto }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .6rem } .id { font: .82rem monospace; color: var(--soft); margin-top: .5rem;
  overflow-wrap: anywhere }
.threshold { position: absolute; top: 0; bottom: 0; border-left: 2px dashed var(--ink) }
.scores { position: relative; display: flex; align-items: flex-end; height: 7rem; gap: 1px; border-bottom: 1px solid var(--line);
  max-width: 44rem }
.scores div { flex: 1; display: flex; flex-direction: column; justify-content: flex-end; height: 100% }
.scores i { display: block; background: var(--kept) } .scores i.out { background: var(--lost) }
.axis { display: flex; justify-content: space-between; max-width: 44rem }
.key { display: inline-block; width: .7rem; height: .7rem; margin: 0 .3rem 0 .8rem; border-radius: 2px }
"""
_MOST_BARS = 60
_KINDS = {"language": "Languages", "domain": "Domains"}


def report_text(rows: list[Tally]) -> str:
    """A line a block, and what blocks have to say."""
    width = max(len(row.name) for row in rows)
    lines = []
    for row in rows:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in _by_count(row.reasons)[:4])
        more = f", and {len(row.reasons) - 4} more reasons" if len(row.reasons) > 4 else ""
        lines.append(
            f"{row.name:<{width}}  {row.documents_out:>11,} of {row.documents_in:>11,} documents ({_percent(row):5.1f}%)"
            f"  {row.characters_out:>14,} characters"
            + (f"  changed {row.changed:,}" if row.changed else "")
            + (f"  dropped: {reasons}{more}" if reasons else "")
        )
        lines += [f"{'':<{width}}  {note}" for note in row.notes]
    return "\n".join(lines)


def report_html(rows: list[Tally], title: str, pipeline: str = "") -> str:
    """A page without anything outside it. pipeline: the YAML. All texts are escaped: they come from the open web."""
    first, last = rows[0], rows[-1]
    removed = sum(row.characters_removed for row in rows)
    dropped = first.characters_in - last.characters_out - removed
    shares = (100 * part / max(first.characters_in, 1) for part in (last.characters_out, removed, dropped))
    note = (
        f"{first.documents_in:,} records in; {last.documents_out:,} documents with {last.characters_out:,} characters out "
        f"({100 * last.documents_out / max(first.documents_in, 1):.1f}% of the documents). Of the characters that came in, "
        "{:.1f}% are left, {:.1f}% were removed inside documents (markup, lines) and {:.1f}% went with documents that were dropped".format(
            *shares
        )
    )
    yaml = f"<details><summary>the pipeline</summary><pre>{escape(pipeline)}</pre></details>" if pipeline else ""
    sections = "".join(_section(row, number) for number, row in enumerate(rows))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style><body>'
        f'<h1>{escape(title)}</h1><p class="note">{note}</p>{yaml}{_funnel(rows)}{_reasons(rows)}{_mix(rows)}{sections}</body></html>'
    )


def _by_count(counts: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _percent(row: Tally) -> float:
    return 100 * row.documents_out / max(row.documents_in, 1)


def _bar(kind: str, share: float) -> str:
    return f'<div class="track"><div class="{kind}" style="width:{100 * min(share, 1.0):.2f}%"></div></div>'


def _funnel(rows: list[Tally]) -> str:
    most = max(1, *(row.documents_in for row in rows))
    most_characters = max(1, *(max(row.characters_in, row.characters_out) for row in rows))
    lines = [
        "<h2>Funnel</h2><table class='wide'><tr><th>block</th><th>documents in</th><th>dropped</th><th>changed</th><th>documents out</th>"
        "<th>kept</th><th>characters out</th>"
        '<th class="why"><span class="key kept"></span>documents<span class="key characters"></span>characters</th></tr>'
    ]
    for number, row in enumerate(rows):
        bars = _bar("kept", row.documents_out / most) + _bar("characters", row.characters_out / most_characters)
        lines.append(
            f'<tr><td><a href="#b{number}">{escape(row.name)}</a></td><td>{row.documents_in:,}</td><td>{sum(row.reasons.values()):,}</td>'
            f"<td>{row.changed:,}</td><td>{row.documents_out:,}</td><td>{_percent(row):.1f}%</td><td>{row.characters_out:,}</td>"
            f'<td class="bar">{bars}</td></tr>'
        )
    return "".join([*lines, "</table>"])


def _reasons(rows: list[Tally], shown: int = 25) -> str:
    """What was dropped, the most frequent reasons of all blocks first."""
    found = sorted(
        ((count, number, row, reason) for number, row in enumerate(rows) for reason, count in row.reasons.items()),
        key=lambda entry: (-entry[0], entry[1], entry[3]),
    )
    if not found:
        return "<h2>Dropped, by reason</h2><p>Nothing was dropped.</p>"
    lines = ["<h2>Dropped, by reason</h2><table class='wide'><tr><th>reason</th><th class='why'>block</th><th>documents</th><th></th></tr>"]
    for count, number, row, reason in found[:shown]:
        lines.append(
            f'<tr><td>{escape(reason)}</td><td class="why"><a href="#b{number}">{escape(row.name)}</a></td><td>{count:,}</td>'
            f'<td class="bar">{_bar("lost", count / found[0][0])}</td></tr>'
        )
    rest = f'<p class="note">and {len(found) - shown:,} more reasons, below</p>' if len(found) > shown else ""
    return "".join([*lines, f"</table>{rest}"])


def _mix(rows: list[Tally]) -> str:
    """Languages and domains: behind the block that names them first, and at the end."""
    parts = []
    for kind, heading in _KINDS.items():
        named = [row for row in rows if kind in row.kinds]
        if not named:
            continue
        begin, end = named[0].kinds[kind], rows[-1].kinds.get(kind, {})
        characters = [max(1, sum(counts[1] for counts in kinds.values())) for kinds in (begin, end)]
        lines = [
            f"<h2>{heading}</h2><table class='wide'><tr><th>{kind}</th><th>documents after {escape(named[0].name)}</th>"
            "<th>characters</th><th>share</th><th>documents at the end</th><th>characters</th><th>share</th><th></th></tr>"
        ]
        for value in sorted(begin.keys() | end.keys(), key=lambda value: (-end.get(value, [0, 0])[1], value)):
            cells = []
            for kinds, total in zip((begin, end), characters):
                documents, size = kinds.get(value, [0, 0])
                cells.append(f"<td>{documents:,}</td><td>{size:,}</td><td>{100 * size / total:.1f}%</td>")
            share = end.get(value, [0, 0])[1] / characters[1]
            lines.append(f'<tr><td>{escape(value)}</td>{"".join(cells)}<td class="bar">{_bar("kept", share)}</td></tr>')
        parts += [*lines, "</table>"]
    return "".join(parts)


def _section(row: Tally, number: int) -> str:
    parts = [
        f'<section id="b{number}"><h2>{escape(row.name)}</h2><p class="note">{row.documents_in:,} documents in, '
        f"{sum(row.reasons.values()):,} dropped, {row.changed:,} changed, {row.documents_out:,} out</p>"
    ]
    if row.notes:
        parts.append(f'<ul class="notes">{"".join(f"<li>{escape(note)}</li>" for note in row.notes)}</ul>')
    parts.append(_scores(row))
    for reason, count in _by_count(row.reasons):
        parts.append(_samples(f"dropped: {reason}", count, row.samples.get(reason, [])))
    if row.changed:
        parts.append(_samples("changed", row.changed, row.samples.get("changed", [])))
    if row.samples.get("kept"):
        parts.append(_samples("kept as it was", row.documents_out - row.changed, row.samples["kept"]))
    return "".join([*parts, "</section>"])


def _scores(row: Tally) -> str:
    """How the documents' scores lie, kept and dropped."""
    if not row.scores:
        return ""
    low, high = min(map(int, row.scores)), max(map(int, row.scores))
    step = -(-(high - low + 1) // _MOST_BARS)
    bars = [[0, 0] for _ in range((high - low) // step + 1)]
    for number, counts in row.scores.items():
        bar = bars[(int(number) - low) // step]
        bar[0], bar[1] = bar[0] + counts[0], bar[1] + counts[1]
    most = max(map(sum, bars))
    columns = []
    for number, (kept, dropped) in enumerate(bars):
        begin = (low + number * step) * row.score_width
        title = f"{begin:.4g} to {begin + step * row.score_width:.4g}: {kept:,} kept, {dropped:,} dropped"
        pieces = "".join(
            f'<i{kind} style="height:{100 * count / most:.2f}%"></i>' for kind, count in ((' class="out"', dropped), ("", kept)) if count
        )
        columns.append(f'<div title="{title}">{pieces}</div>')
    ends = low * row.score_width, (low + len(bars) * step) * row.score_width
    line = ""
    if row.threshold is not None and ends[0] <= row.threshold <= ends[1]:
        place = 100 * (row.threshold - ends[0]) / (ends[1] - ends[0])
        line = f'<b class="threshold" title="threshold {row.threshold:g}" style="left:{place:.2f}%"></b>'
    return (
        f'<h3>{escape(row.score)} <span class="key kept"></span>kept<span class="key lost"></span>dropped</h3>'
        f'<div class="scores">{"".join(columns)}{line}</div>'
        f'<div class="axis note"><span>{ends[0]:.4g}</span><span>{ends[1]:.4g}</span></div>'
    )


def _samples(heading: str, count: int, samples: list[list]) -> str:
    shown = "".join(_sample(*sample[1:]) for sample in samples)
    return f"<details><summary><b>{count:,}</b>{escape(heading)}</summary>{shown}</details>"


def _sample(identity: str, before: str, after: str) -> str:
    texts = f'<div class="pair"><pre>{escape(before)}</pre><pre>{escape(after)}</pre></div>' if after else f"<pre>{escape(before)}</pre>"
    return f'<div class="id">{escape(identity)}</div>{texts}'
