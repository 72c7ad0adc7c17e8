"""Kinds of adapters that are not served, each with the reason and the nearest way out.

What has no low rank would cost one tenant as much as a model of its own: a pair that holds it
exactly has rank min(in, out) in every linear. Approximations are not made silently.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

_FULL: Final = "its folded rank would be min(in, out), as large as the base's own weights"
_RETRAIN: Final = "retrain as LoRA or DoRA on the same modules"
_TRUNCATE: Final = (
    f"{_RETRAIN}, or merge it with PEFT, take the difference to the base and upload that, cut to a "
    "rank of your choice, as LoRA"
)


def _dense(form: str) -> str:
    return f"{form}, so {_FULL}; {_TRUNCATE}"


REFUSED: Final[Mapping[str, str]] = {
    "ADAMSS": "which rows it changes is not in the file, but found again by clustering singular "
    "vectors of the base, which differ between machines; " + _RETRAIN,
    "ADAPTION_PROMPT": "adds a second, gated attention over trained keys and values to each layer; "
    "retrain as prefix tuning (PREFIX_TUNING), which is served",
    "BOFT": _dense("rotates inputs by a butterfly of blocks"),
    "BOTTLENECK": "has an activation between its matrices, so it is no update of a weight; "
    + _RETRAIN,
    "C3A": _dense("adds block-circulant matrices"),
    "FOURIERFT": _dense("adds the transform of a sparse spectrum"),
    "FROD": _dense("trains the diagonal and some elements of a full decomposition"),
    "GLORA": _dense("scales and shifts the weight itself as well as adding to it"),
    "HIRA": _dense("multiplies the weight element by element with a low-rank matrix"),
    "LILY": "routes every token among shared matrices, so no one update is added; " + _RETRAIN,
    "MIXLORA": "routes every token among experts; upload its experts one by one as LoRA and mix "
    "them by request",
    "OFT": _dense("rotates inputs in blocks"),
    "OSF": _dense("replaces the weight's small singular vectors"),
    "PEANUT": "has activations between its matrices, so it is no update of a weight; " + _RETRAIN,
    "PSOFT": "its matrix stands between singular vectors of the base that the file does not hold, "
    "and whose signs differ between machines; " + _RETRAIN,
    "RANDLORA": _dense("sums scaled random bases up to full rank"),
    "ROAD": _dense("rotates and scales pairs of outputs"),
    "SFT": _dense("changes single elements of the weight, wherever training found them"),
    "SHADOW": "is a second network beside the base; serve the two as one model",
    "SHIRA": _dense("changes single elements of the weight, chosen by a mask"),
    "SUPERTUNING": _dense("changes the largest or smallest elements of the weight"),
    "WAVEFT": _dense("adds the wavelet transform of a sparse matrix"),
    "XLORA": "mixes adapters by a network that reads the base's hidden states; upload its adapters "
    "one by one as LoRA and mix them by request",
}
