"""`lockstep platform`: packages for devices that Lockstep does not know."""

from __future__ import annotations

from pathlib import Path

import click

from lockstep.cli.options import SectionedCommand, section
from lockstep.cli.table import print_json


@click.group("platform", short_help="Start a package for a device that Lockstep does not know.")
def command() -> None:
    """Packages that teach Lockstep a device, installed beside it."""


@command.command("new", cls=SectionedCommand, short_help="Write the skeleton of a platform package.")
@click.argument("name", metavar="NAME")
@section("Output")(
    "--path",
    "parent",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(),
    metavar="DIR",
    help="Directory to write lockstep-NAME into; the present one when omitted.",
)
@section("Output")("--json", "as_json", is_flag=True, help="Print JSON.")
def new_platform(name: str, parent: Path, as_json: bool) -> None:
    """Write lockstep-NAME: a platform that computes on the processor, an example kernel and their tests.

    Install it and run its tests; they pass. Then replace it piece by piece by what your device does.
    """
    from lockstep.platforms.skeleton import write_skeleton

    written = write_skeleton(name, parent)
    if as_json:
        print_json([str(path) for path in written])
        return
    for path in written:
        click.echo(path)
    directory = parent / f"lockstep-{name}"
    click.echo(f'\nnext: pip install -e "{directory}[test]" && pytest {directory}')
