"""What a fuzzer's bytes mean: edits of valid files. Pure, so that a finding can be run again without the fuzzer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Files = Mapping[str, bytes]
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**63, -(2**63), 1e308, 1e-320, "", "x", "resid_post.0", "../../x", [], [0], {}, {"x": 1},
    [[1, 2], [3]], "NaN", "9" * 5000,
)  # fmt: skip


class Bytes:
    """Numbers out of a fuzzer's input; zeros once it is used up."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._place = 0

    @property
    def is_empty(self) -> bool:
        """Whether nothing is left."""
        return self._place >= len(self._data)

    def take(self, count: int) -> bytes:
        """The next bytes, fewer at the end."""
        taken = self._data[self._place : self._place + count]
        self._place += count
        return taken

    def below(self, limit: int) -> int:
        """A number from 0 to below the limit."""
        return int.from_bytes(self.take(1 if limit <= 256 else 3), "little") % limit


def damaged(bases: Sequence[Files], data: bytes) -> dict[str, bytes]:
    """Files that are like one of ``bases`` but for the edits that ``data`` stands for."""
    source = Bytes(data)
    files = dict(bases[source.below(len(bases))])
    names = sorted(files)
    while not source.is_empty:
        name = names[source.below(len(names))]
        files[name] = _edited(files[name], source)
    return files


def _edited(content: bytes, source: Bytes) -> bytes:
    kind = source.below(6)
    if kind == 0:
        return _with_another_value(content, source)
    at = source.below(len(content) + 1)
    if kind == 1:
        return content[:at]
    payload = source.take(source.below(16))
    if kind == 2:
        return content[:at] + payload + content[at:]
    if kind == 3:
        return content[:at] + content[at + len(payload) :]
    return content[:at] + payload + content[at + len(payload) :]


def _with_another_value(content: bytes, source: Bytes) -> bytes:
    """Of a JSON file: one value is another one, or missing."""
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        return content
    if not isinstance(tree, dict | list):
        return content
    node: Any = tree
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return json.dumps(tree).encode()
        key = keys[source.below(len(keys))]
        if isinstance(node[key], dict | list) and node[key] and source.below(4):
            node = node[key]
            continue
        choice = source.below(len(ODD) + 1)
        if choice < len(ODD):
            node[key] = ODD[choice]
        else:
            del node[key]
        return json.dumps(tree).encode()
