"""Write the dashboards: `python docker/grafana/build.py`. A test compares what is committed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).parent))

from adapters import ADAPTERS
from dashboard import Dashboard
from overview import OVERVIEW
from tenants import TENANTS

from memory import MEMORY

FOLDER: Final = Path(__file__).parent / "dashboards"

DASHBOARDS: Final = (OVERVIEW, ADAPTERS, MEMORY, TENANTS)


def written(dashboard: Dashboard) -> str:
    """Return a dashboard's file."""
    return json.dumps(dashboard.to_json(), indent=2) + "\n"


if __name__ == "__main__":
    for dashboard in DASHBOARDS:
        path = FOLDER / f"{dashboard.uid.removeprefix('loraplex-')}.json"
        path.write_text(written(dashboard), encoding="utf-8")
