"""Protobuf messages from a table of field numbers; the only module that imports protobuf.

A table names what this program reads or writes and nothing else: a field that a newer engine sends is skipped, as
protobuf's rules for unknown fields want it (Protocol Buffers, "Language Guide (proto 3)", "Updating A Message Type").
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

from oci_hook.documents import shown
from oci_hook.errors import EngineUnsupported

_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
    "string": _Field.TYPE_STRING,
    "bytes": _Field.TYPE_BYTES,
    "bool": _Field.TYPE_BOOL,
    "int32": _Field.TYPE_INT32,
    "int64": _Field.TYPE_INT64,
    "uint32": _Field.TYPE_UINT32,
    "uint64": _Field.TYPE_UINT64,
}
_WORD = re.compile(r"(?P<name>\w+)=(?P<number>\d+)(?::(?P<type>\w+))?(?P<kind>[*%]?)")


class Schema:
    """The messages of one protobuf package.

    Args:
        package: Its name, unique in the program.
        table: For each message its fields, one word each: `name=number`, a string; `name=number:type`, a scalar or a
            message of the same table; with `*` repeated; with `%` a map from string to string.
    """

    def __init__(self, package: str, table: Mapping[str, str]) -> None:
        file = descriptor_pb2.FileDescriptorProto(name=f"{package}.proto", package=package, syntax="proto3")
        for name, words in table.items():
            _describe(file.message_type.add(name=name), package, words)
        pool = descriptor_pool.DescriptorPool()
        pool.Add(file)
        found = {name: pool.FindMessageTypeByName(f"{package}.{name}") for name in table}
        self._classes = {name: message_factory.GetMessageClass(found[name]) for name in table}

    def new(self, name: str, **fields: object) -> Any:
        """An empty message, or one with these fields; a field that is None stays absent."""
        return self._classes[name](**{key: value for key, value in fields.items() if value is not None})

    def parse(self, name: str, data: bytes) -> Any:
        """A message from its bytes.

        Args:
            name: One of the table.
            data: The caller bounds it.

        Raises:
            EngineUnsupported: It is not protobuf, a field has another type, or a string is not UTF-8.
        """
        try:
            found = self._classes[name].FromString(data)
        except message.DecodeError as cause:
            raise EngineUnsupported(f"the engine's {name} is malformed: {shown(cause)}") from cause
        found.DiscardUnknownFields()
        return found


def _describe(target: Any, package: str, words: str) -> None:
    for word in words.split():
        found = _WORD.fullmatch(word)
        if found is None:
            raise ValueError(f"{word!r} does not describe a field")
        field = target.field.add(name=found["name"], number=int(found["number"]))
        field.label = _Field.LABEL_REPEATED if found["kind"] else _Field.LABEL_OPTIONAL
        kind = found["type"] or "string"
        if found["kind"] == "%":  # a map is a repeated message of key and value ("Maps", "Backwards Compatibility")
            entry = f"{found['name'].title().replace('_', '')}Entry"
            _describe(nested := target.nested_type.add(name=entry), package, "key=1 value=2")
            nested.options.map_entry = True
            kind = f"{target.name}.{entry}"
        if kind in _SCALARS:
            field.type = _SCALARS[kind]
        else:
            field.type, field.type_name = _Field.TYPE_MESSAGE, f".{package}.{kind}"
