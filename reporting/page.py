"""A report's text, from `templates/report.md.jinja`, and the same as one page of HTML."""

import base64
import html
import re
import textwrap
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from reporting import comparison, methods, tables, words
from reporting.runs import Run, sections
from reporting.scores import count
from reporting.templates import fill
from utils import FEW, public_values


def write(
    runs: list[Run], absent: list[str], about: dict[str, Any], folder: Path
) -> None:
    """Draw the figures of a report into `folder`; write `report.md` and `report.html`.

    `absent`: a line on each run that is missing; `about`: the sweep's `environment.json`.
    """
    parts, cfg = sections(runs), runs[0].cfg
    headline = parts[0].headline
    if headline:
        comparison.draw_methods(parts, headline, folder / "methods.png")
    more = {}
    with_clients = []
    for number, section in enumerate(parts, start=1):
        comparison.draw_losses(section, folder / f"losses_{number}.png")
        if comparison.draw_clients(section, folder / f"clients_{number}.png"):
            with_clients.append(section.title)
            title = f"Every client, {section.title}".removesuffix(", ")
            more[title] = tables.client_table(section)
    text = fill(
        "report.md.jinja",
        runs=runs,
        cfg=cfg,
        seeds=sorted({run.cfg.seed for run in runs}),
        absent=absent,
        sections=parts,
        headline=headline and runs[0].named(headline),
        with_clients=with_clients,
        budgets=dict.fromkeys(map(words.budget, parts)),
        few=FEW,
        about=about,
        count=count,
        tables=tables,
        words=words,
    )
    finish("Federated, alone or pooled?", text, more, runs, headline, folder)


def write_methods(
    runs: list[Run], absent: list[str], about: dict[str, Any], folder: Path
) -> None:
    """Likewise, of a sweep that compares methods of federated learning."""
    parts = sections(runs)
    headline = parts[0].headline
    if headline:
        methods.draw_costs(parts, headline, folder / "costs.png")
    more = {}
    for section in parts:
        title = f"Every client, {section.title}".removesuffix(", ")
        more[title] = methods.client_table(section)
    text = fill(
        "methods.md.jinja",
        runs=runs,
        cfg=runs[0].cfg,
        seeds=sorted({run.cfg.seed for run in runs}),
        absent=absent,
        sections=parts,
        headline=headline and runs[0].named(headline),
        about=about,
        count=count,
        methods=methods,
        tables=tables,
    )
    finish("Which method, and at what cost?", text, more, runs, headline, folder)


def finish(
    title: str,
    text: str,
    more: dict[str, str],
    runs: list[Run],
    headline: str | None,
    folder: Path,
) -> None:
    """Write the text, and what is folded away below it, in both forms."""
    more = {"Every run": tables.run_table(runs, headline)} | more
    more["The command of every run"] = tables.commands(runs)
    whole = OmegaConf.create(public_values(OmegaConf.to_container(runs[0].cfg)))
    name = f"The whole configuration of run {runs[0].folder.name}"
    more[name] = textwrap.indent(OmegaConf.to_yaml(whole), "    ")
    folded = (
        f"<details><summary>{html.escape(what)}</summary>\n\n{part}\n\n</details>"
        for what, part in more.items()
    )
    (folder / "report.md").write_text("\n\n".join([text, *folded]) + "\n")
    (folder / "report.html").write_text(page(title, text, more, folder))


def page(title: str, text: str, more: dict[str, str], folder: Path) -> str:
    """The Markdown as one HTML file, with the figures of `folder` inside."""
    from markdown_it import MarkdownIt

    # HTML in the text stays text.
    render = MarkdownIt("commonmark", {"html": False}).enable("table").render

    def inside(match: re.Match) -> str:
        image = base64.b64encode((folder / match[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{image}"'

    folded = {title: render(part) for title, part in more.items()}
    shown = fill("report.html.jinja", title=title, body=render(text), folded=folded)
    return re.sub(r'src="(\w+\.png)"', inside, shown)
