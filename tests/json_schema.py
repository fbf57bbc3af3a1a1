"""The part of JSON Schema (draft 2020-12) that leaderboard/schema.json uses; an unknown keyword is an error."""

import re

KINDS = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "null": type(None),
}
SILENT = {"$schema", "$id", "title", "description"}


def is_kind(value, kind):
    return isinstance(value, KINDS[kind]) and (kind == "boolean" or not isinstance(value, bool))


CHECKS = {
    "type": lambda v, kind: any(is_kind(v, k) for k in ([kind] if isinstance(kind, str) else kind)),
    "const": lambda v, other: v == other and type(v) is type(other),
    "enum": lambda v, listed: v in listed,
    "minimum": lambda v, least: not is_kind(v, "number") or v >= least,
    "maximum": lambda v, most: not is_kind(v, "number") or v <= most,
    "exclusiveMinimum": lambda v, least: not is_kind(v, "number") or v > least,
    "maxLength": lambda v, most: not isinstance(v, str) or len(v) <= most,
    "minLength": lambda v, least: not isinstance(v, str) or len(v) >= least,
    "pattern": lambda v, text: not isinstance(v, str) or re.search(text, v) is not None,
    "minItems": lambda v, least: not isinstance(v, list) or len(v) >= least,
    "maxItems": lambda v, most: not isinstance(v, list) or len(v) <= most,
    "minProperties": lambda v, least: not isinstance(v, dict) or len(v) >= least,
    "maxProperties": lambda v, most: not isinstance(v, dict) or len(v) <= most,
    "required": lambda v, names: not isinstance(v, dict) or set(names) <= set(v),
}


def faults(value, schema, path="$"):
    """Places and keywords that ``value`` breaks."""
    assert set(schema) <= {*SILENT, *CHECKS, "properties", "additionalProperties", "items"}, set(schema)
    found = [f"{path}: {key}" for key, check in CHECKS.items() if key in schema and not check(value, schema[key])]
    if isinstance(value, dict):
        known, rest = schema.get("properties", {}), schema.get("additionalProperties", True)
        for name, item in value.items():
            if name in known or isinstance(rest, dict):
                found += faults(item, known.get(name, rest), f"{path}.{name}")
            elif not rest:
                found.append(f"{path}.{name}: additionalProperties")
    if isinstance(value, list) and "items" in schema:
        for place, item in enumerate(value):
            found += faults(item, schema["items"], f"{path}[{place}]")
    return found
