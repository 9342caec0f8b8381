"""Imports code by a name that data may carry, "package.module:Name"; no other module does.

Importing a module runs it, so the caller says where the name comes from: typed by the user (a
decoder on the command line), or read from a file of unknown origin (the backbone in a model
folder's config.json). The second kind is refused unless the user trusts its author."""

from __future__ import annotations

import importlib
import re
from typing import Any

from bdlm.core.errors import BdlmError, ConfigError, shown

NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def import_object(
    kind: str, name: object, *, trusted: bool, error: type[BdlmError] = ConfigError
) -> Any:
    """Return the object of a name "package.module:Name".

    kind: what is imported, for messages ("decoder", "backbone"). trusted: whether the user chose
    this name, or trusts whoever did; otherwise nothing is imported.
    Raises `error` in one line if the name is not trusted, is not of that form, or cannot be
    imported.
    """
    if not trusted:
        raise error(
            f"{kind} names the code {shown(name)}; pass trust_code=True only if you know and trust"
            " who wrote it"
        )
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise error(f"{kind} is {shown(name)}; write it as package.module:Name")
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as failure:  # the module's own code may raise anything
        reason = " ".join(f"{type(failure).__name__}: {failure}".split())
        raise error(
            f"{kind} '{name}' cannot be imported ({reason}); write it as package.module:Name"
        ) from failure
