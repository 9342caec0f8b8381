"""Which code a model folder's config.json may name: none, unless the user trusts its author.

This check reads the whole config and gives an early, clear refusal. What decides is
`bdlm.core.importing`: nothing else imports by a name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bdlm.core.errors import CheckpointError, shown

_CODE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_PUBLISHED_CLASSES = {"BD3LMConfig", "BD3LM", "MDLMConfig", "MDLM"}


def refuse_code(config: Mapping[str, Any], path: Path, trust_code: bool) -> None:
    """Raise CheckpointError if a config names code and `trust_code` is not set.

    Released configs name their own classes in auto_map: our transformer stands in for those.
    """
    if trust_code:
        return
    fix = "; pass trust_code=True only if you know and trust who wrote it"
    for name in _strings(config.get("auto_map", {})):
        if name.rsplit(".", 1)[-1] not in _PUBLISHED_CLASSES:
            raise CheckpointError(
                f"{path}: config.json's auto_map names the code {shown(name)}{fix}"
            )
    for name in _strings({k: v for k, v in config.items() if k != "auto_map"}):
        if _CODE.fullmatch(name):
            raise CheckpointError(f"{path}: config.json names the code {shown(name)}{fix}")


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, Mapping) else value
    return [s for v in inner for s in _strings(v)] if isinstance(value, Mapping | list) else []
