"""A real Prometheus, with deploy/prometheus' own configuration but for addresses and intervals.

with prometheus({"undertow:8081": "127.0.0.1:39201"}, token, folder) as found:
    found.query("up")
"""

from __future__ import annotations

import json
import re
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.ports import free_port
from tests.programs import program

DEPLOYED = Path(__file__).resolve().parents[2] / "deploy/prometheus"
INTERVAL = "250ms"
WAIT_S = 30.0


class QueryError(Exception):
    """Prometheus refused an expression; the message is its own."""


@dataclass(frozen=True)
class Prometheus:
    """One that runs."""

    url: str

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series that an expression has now. Raises QueryError where it is not one."""
        result = self._get("query", query=expression)["result"]
        return result if isinstance(result, list) else [result]

    def value(self, expression: str) -> float | None:
        """Of the only series; None where there is none."""
        found = self.query(expression)
        assert len(found) <= 1, expression
        return float(found[0]["value"][1]) if found else None

    def rules(self) -> list[dict[str, Any]]:
        """Every rule, and how its last evaluation went."""
        groups = self._get("rules")["groups"]
        return [rule for group in groups for rule in group["rules"]]

    def until(self, what: Callable[[], bool], told: str) -> None:
        """Wait for it."""
        deadline = time.monotonic() + WAIT_S
        while not what():
            assert time.monotonic() < deadline, f"not within {WAIT_S:g} s: {told}"
            time.sleep(0.1)

    def _get(self, path: str, **parameters: str) -> Any:
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            with error:
                raise QueryError(json.load(error)["error"]) from None


def configuration(targets: Mapping[str, str], token: str, folder: Path) -> Path:
    """deploy/prometheus' own, with other addresses, and looking more often."""
    text = (DEPLOYED / "prometheus.yml").read_text()
    text = re.sub(r"(scrape|evaluation)_interval: .*", rf"\1_interval: {INTERVAL}", text)
    for deployed, here in targets.items():
        assert f'"{deployed}"' in text
        text = text.replace(f'"{deployed}"', f'"{here}"')
    (job,) = [job for job in yaml.safe_load(text)["scrape_configs"] if "authorization" in job]
    (folder / "token").write_text(token)
    text = text.replace(job["authorization"]["credentials_file"], str(folder / "token"))
    file = folder / "prometheus.yml"
    file.write_text(text)
    for rules in yaml.safe_load(text)["rule_files"]:
        (folder / rules).write_bytes((DEPLOYED / rules).read_bytes())
    return file


@contextmanager
def prometheus(targets: Mapping[str, str], token: str, folder: Path) -> Iterator[Prometheus]:
    """Runs until the end; scrapes `targets` (address as deployed, address here) as the operators' token lets it."""
    port = free_port()
    log = folder / "prometheus.log"
    command = [
        str(program("prometheus")),
        f"--config.file={configuration(targets, token, folder)}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            found = Prometheus(f"http://127.0.0.1:{port}")
            found.until(lambda: process.poll() is not None or _ready(found.url), "Prometheus is ready")
            assert process.poll() is None, log.read_text()
            yield found
        finally:
            process.terminate()
            process.wait(10)


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/-/ready", timeout=1):
            return True
    except (OSError, urllib.error.URLError):
        return False
