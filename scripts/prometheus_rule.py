"""Prometheus' rules as the Prometheus Operator takes them.

python scripts/prometheus_rule.py > deploy/kubernetes/components/prometheus-operator/rules.yaml
"""

from __future__ import annotations

from pathlib import Path

import yaml

RULES = Path(__file__).resolve().parents[1] / "deploy/prometheus/rules.yml"


class _Indented(yaml.SafeDumper):
    """Lists are indented, as everywhere else here."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def prometheus_rule(rules: str) -> str:
    """The manifest for a file of rules."""
    manifest = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "undertow"},
        "spec": yaml.safe_load(rules),
    }
    head = "# Made of deploy/prometheus/rules.yml by scripts/prometheus_rule.py. Change that file.\n"
    return head + yaml.dump(manifest, Dumper=_Indented, sort_keys=False, width=96)


if __name__ == "__main__":
    print(prometheus_rule(RULES.read_text()), end="")
