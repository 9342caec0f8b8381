"""From plain values (YAML, JSON, words of a command line) to frozen dataclasses, with messages that
name the field and the nearest name.

In: a dataclass type and a mapping. Out: the dataclass. Knows nothing about which fields there are;
kinds are `bdlm.core.validation`' business."""

from __future__ import annotations

from typing import Any

from bdlm.core.validation import read_record


def build(kind: Any, values: Any, path: str) -> Any:
    """A dataclass from a mapping, field by field. path: of the record itself, for messages. Raises
    ConfigError."""
    return read_record(kind, values, path)
