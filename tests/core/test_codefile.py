"""Which files hold code."""

from __future__ import annotations

import pytest

from hostd.core.codefile import holds_code


@pytest.mark.parametrize(
    ("name", "mode", "code"),
    [
        (b"tool", 0o755, True),
        (b"tool", 0o644, False),
        (b"tool", 0o010, True),
        (b"lib.so", 0o644, True),
        (b"lib.so.6.0", 0o644, True),
        (b"kvm.ko.xz", 0o644, True),
        (b"a.py", 0o644, True),
        (b"bios.bin", 0o644, True),
        (b"efi-virtio.rom", 0o644, True),
        (b"OVMF_CODE.fd", 0o644, True),
        (b"notes.txt", 0o644, False),
        (b"x.so.conf", 0o644, False),
        (b"a\n.so", 0o644, True),
    ],
)
def test_holds_code(name: bytes, mode: int, code: bool) -> None:
    assert holds_code(name, mode) is code
