"""The skeleton of a platform package that lives outside of this repository."""

from __future__ import annotations

import re
from pathlib import Path
from string import Template

from lockstep.core.errors import ConfigError
from lockstep.platforms.registry import platform_names

TEMPLATES = Path(__file__).parent / "templates"
_SUFFIX = ".template"

RESERVED = {
    "auto": "a word of --device",
    "engine": "the name of this project's own package",
    **dict.fromkeys(
        ("reference", "torch", "triton", "native", "onednn", "numpy", "cublas", "cudnn", "flashinfer", "aiter"),
        "what kernels of this project are called",
    ),
}
"""Names that would be taken for something else, and for what."""


def write_skeleton(name: str, parent: Path) -> list[Path]:
    """Writes a package for the platform `name` into `parent`/lockstep-`name`; gives its files.

    The package passes its own tests as it is. Raises ConfigError for a name that cannot be one or is taken, and for a
    directory that is there already or cannot be written.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ConfigError(
            f"{name!r} cannot name a platform: take lower-case letters, digits and _, a letter first"
        )
    if name in RESERVED or name.startswith("native_"):
        raise ConfigError(f"{name!r} cannot name a platform: it is {RESERVED.get(name, RESERVED['native'])}")
    if name in platform_names():
        raise ConfigError(f"there is a platform {name!r} already; take another name")
    words = {"name": name, "package": f"lockstep_{name}", "class": f"{name.title().replace('_', '')}Platform"}
    directory = parent / f"lockstep-{name}"
    written = []
    try:
        directory.mkdir(parents=True)
        for template in sorted(TEMPLATES.rglob(f"*{_SUFFIX}")):
            relative = template.relative_to(TEMPLATES).as_posix().removesuffix(_SUFFIX)
            path = directory / relative.replace("PACKAGE", words["package"])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(Template(template.read_text("utf-8")).substitute(words), "utf-8")
            written.append(path)
    except FileExistsError as error:
        raise ConfigError(f"{directory} is there already; remove it, or take another --path") from error
    except OSError as error:
        raise ConfigError(f"{directory} cannot be written: {error.strerror}; take another --path") from error
    return written
