"""The name of a host, as host certificates and trust bundles have it."""

from __future__ import annotations

import re
from typing import Final

HOST_NAME: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")
"""At most 64 characters, what the kernel and a common name have room for."""
