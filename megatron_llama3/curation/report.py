"""The funnel as text and as one HTML page: what is left after each block, reasons, and samples of what was dropped or changed."""

from html import escape

from megatron_llama3.curation.observe import Tally

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1c2430; background: #fff }
h1 { font-size: 1.5rem } .note { color: #5a6675 }
table { border-collapse: collapse; width: 100% } th, td { padding: .35rem .6rem; text-align: right; border-bottom: 1px solid #dde3ea }
th:first-child, td:first-child { text-align: left }
td.bar { width: 34%; min-width: 8rem } td.bar div { height: .95rem; border-radius: 2px }
.kept { background: #3b7dd8 } .characters { background: #9cc0ee; margin-top: 2px; height: .4rem !important }
section { margin-top: 2rem } h2 { font-size: 1.15rem; margin-bottom: .3rem } ul { margin: .3rem 0 } details { margin: .3rem 0 }
summary { cursor: pointer }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f4f6f9; padding: .6rem; border-radius: 4px }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .6rem } .id { font-family: monospace; font-size: .85rem; color: #5a6675 }
@media (prefers-color-scheme: dark) { body { background: #14181e; color: #dde3ea } pre { background: #1e252e }
  th, td { border-color: #2c3642 } }
"""


def report_text(rows: list[Tally]) -> str:
    """A line a block."""
    width = max(len(row.name) for row in rows)
    lines = []
    for row in rows:
        share = 100 * row.documents_out / max(row.documents_in, 1)
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(row.reasons.items(), key=lambda item: -item[1])[:4])
        more = f", and {len(row.reasons) - 4} more reasons" if len(row.reasons) > 4 else ""
        lines.append(
            f"{row.name:<{width}}  {row.documents_out:>11,} of {row.documents_in:>11,} documents ({share:5.1f}%)"
            f"  {row.characters_out:>14,} characters"
            + (f"  changed {row.changed:,}" if row.changed else "")
            + (f"  dropped: {reasons}{more}" if reasons else "")
        )
    return "\n".join(lines)


def report_html(rows: list[Tally], title: str) -> str:
    """A page without anything outside it. Raises nothing for odd texts: all are escaped."""
    most = max(max(row.documents_in for row in rows), 1)
    most_characters = max(max(row.characters_in for row in rows), 1)
    table = "".join(_row(row, number, most, most_characters) for number, row in enumerate(rows))
    sections = "".join(_section(row, number) for number, row in enumerate(rows) if row.samples)
    last = rows[-1]
    note = f"{rows[0].documents_in:,} records in, {last.documents_out:,} documents and {last.characters_out:,} characters out"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
        f'<h1>{escape(title)}</h1><p class="note">{note}</p><table><tr><th>block</th><th>documents in</th><th>dropped</th><th>changed</th>'
        f"<th>kept</th><th>characters out</th><th>of all documents, characters</th></tr>{table}</table>{sections}</html>"
    )


def _row(row: Tally, number: int, most: int, most_characters: int) -> str:
    name = f'<a href="#b{number}">{escape(row.name)}</a>' if row.samples else escape(row.name)
    dropped = sum(row.reasons.values())
    bar = "".join(
        f'<div class="{kind}" style="width:{100 * share:.2f}%"></div>'
        for kind, share in (("kept", row.documents_out / most), ("characters", row.characters_out / most_characters))
    )
    return (
        f"<tr><td>{name}</td><td>{row.documents_in:,}</td><td>{dropped:,}</td><td>{row.changed:,}</td><td>{row.documents_out:,} "
        f'({100 * row.documents_out / max(row.documents_in, 1):.1f}%)</td><td>{row.characters_out:,}</td><td class="bar">{bar}</td></tr>'
    )


def _section(row: Tally, number: int) -> str:
    parts = [f'<section id="b{number}"><h2>{escape(row.name)}</h2>']
    for reason in sorted(row.samples, key=lambda reason: -row.reasons.get(reason, row.changed)):
        count = row.reasons.get(reason, row.changed)
        samples = "".join(_sample(*sample[1:]) for sample in row.samples[reason])
        parts.append(f"<details><summary>{escape(reason)}: {count:,}</summary>{samples}</details>")
    return "".join([*parts, "</section>"])


def _sample(identity: str, before: str, after: str) -> str:
    texts = f'<div class="pair"><pre>{escape(before)}</pre><pre>{escape(after)}</pre></div>' if after else f"<pre>{escape(before)}</pre>"
    return f'<div class="id">{escape(identity)}</div>{texts}'
