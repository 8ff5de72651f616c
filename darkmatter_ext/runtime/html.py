"""A small table for notebooks: how an object displays itself there (`_repr_html_`)."""

from __future__ import annotations

import html
from collections.abc import Sequence


def html_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[object]], below: Sequence[str] = ()) -> str:
    """A titled table with lines of text below it; all arguments are text, not markup."""
    lines = [f"<b>{html.escape(title)}</b>"]
    if rows:
        head = "".join(f'<th scope="col">{html.escape(heading)}</th>' for heading in headings)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(str(entry))}</td>" for entry in row) + "</tr>" for row in rows
        )
        lines.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
    return "<div>" + "".join([*lines, *(f"<p>{html.escape(line)}</p>" for line in below)]) + "</div>"
