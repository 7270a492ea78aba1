"""Read and write the dashboard by Grafana's own schema: what it does not know would be lost.

    pip install 'grafana-foundation-sdk==1769699379!11.6.0'     # the schema of Grafana 11.6
    python scripts/docs/check_dashboard.py

Exit status: 0 if it comes back as it was, 1 if not; what was lost or changed is printed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).resolve().parents[2] / "dashboards" / "grafana.json"


def differences(given: Any, found: Any, where: str = "") -> Iterator[str]:
    """What of ``given`` is missing or other in ``found``; a null may be left out."""
    if isinstance(given, dict) and isinstance(found, dict):
        for key, value in given.items():
            if key in found:
                yield from differences(value, found[key], f"{where}.{key}")
            elif value is not None:
                yield f"{where}.{key} is lost"
    elif isinstance(given, list) and isinstance(found, list) and len(given) == len(found):
        for i, (one, other) in enumerate(zip(given, found, strict=True)):
            yield from differences(one, other, f"{where}[{i}]")
    elif given != found:
        yield f"{where} is {found!r}, not {given!r}"


def main() -> None:
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    register_default_plugins()  # the kinds of panels and queries
    given = json.loads(DASHBOARD.read_text())
    found = json.loads(JSONEncoder().encode(Dashboard.from_json(given)))
    lost = [*differences(given, found)]
    print("\n".join(lost) or f"{DASHBOARD.name}: {len(given['panels'])} rows and panels, all kept")
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
