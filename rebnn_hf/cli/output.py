"""How results are printed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any


def show(options: argparse.Namespace, result: Mapping[str, Any], text: str) -> None:
    """Print a result, as text or, with --json, as an object."""
    print(json.dumps(result) if options.json else text)
