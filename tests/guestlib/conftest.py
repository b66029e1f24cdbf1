"""The client meets the real gateway."""

from tests.gateway.conftest import gateway, run_dir, start, vault

__all__ = ["gateway", "run_dir", "start", "vault"]
