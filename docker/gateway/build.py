"""Write the plain manifests from the chart: `python docker/gateway/build.py`.

For clusters where Helm is not wanted. A test compares what is committed, so the two ways to install
cannot drift apart. Needs the packages `helm-python-sdk` and `pyyaml`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import helm_python
import yaml

HERE: Final = Path(__file__).parent
CHART: Final = HERE.parent / "helm" / "loraplex"

#: Templates of the chart, by the file that they are written to.
FILES: Final = {
    "loraplex.yaml": ("serviceaccount", "service", "statefulset", "poddisruptionbudget"),
    "picker.yaml": ("endpointpicker",),
    "gateway.yaml": ("gateway", "httproute", "inferencepool"),
}
_HEADER: Final = (
    "# Written by docker/gateway/build.py: change the chart, or values.yaml, and run it.\n"
)
#: Whatever says that Helm looks after an object.
_OF_HELM: Final = re.compile(
    r"^ *(helm\.sh/chart|app\.kubernetes\.io/managed-by):.*\n", re.MULTILINE
)


def manifests() -> dict[str, str]:
    """Return the text of each file by its name."""
    values = yaml.safe_load((HERE / "values.yaml").read_text(encoding="utf-8"))
    rendered = helm_python.Chart.load(CHART).render(values, name="loraplex", namespace="loraplex")
    texts = {Path(path).stem: text.strip() for path, text in rendered.items() if text.strip()}
    files = {
        name: _HEADER + "---\n".join(_OF_HELM.sub("", texts.pop(stem) + "\n") for stem in stems)
        for name, stems in FILES.items()
    }
    texts.pop("NOTES", None)
    assert not texts, f"no file for {texts.keys()}"
    return files


if __name__ == "__main__":
    for file_name, content in manifests().items():
        (HERE / file_name).write_text(content, encoding="utf-8")
