"""`lockstep suites affected`: what a change touches, as a page for the reviewer or as JSON for a workflow."""

from __future__ import annotations

from pathlib import Path

import click

from lockstep.cli.options import SectionedCommand, section
from lockstep.cli.table import print_json


@click.command(
    "affected", cls=SectionedCommand, short_help="What the changes since a commit touch, and their risks."
)
@section("Choice")(
    "--base",
    required=True,
    metavar="REV",
    help="Branch or commit to compare with: what changed since this checkout left it, uncommitted files included.",
)
@section("Choice")(
    "--root",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path(),
    metavar="DIR",
    help="A folder of the project; the present one when omitted.",
)
@section("Output")("--json", "as_json", is_flag=True, help="Print JSON.")
def command(base: str, root: Path, as_json: bool) -> None:
    """Print a review of the changes since REV: rooms, operators, models, suites, public names, cover and risks.

    Follows the imports and file names in the text of the project; runs and imports none of it.
    """
    from lockstep.ci.affected.page import markdown
    from lockstep.ci.affected.review import review

    found = review(root, base)
    if as_json:
        print_json(found.as_json())
    else:
        click.echo(markdown(found), nl=False)
