"""The kernel's list of symbols."""

from __future__ import annotations

import contextlib
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostd.platform.kallsyms import (
    MalformedSymbolsError,
    PackedSymbols,
    Symbols,
    pack_symbols,
    parse_symbols,
    scan_symbols,
)

GOOD = b"""0000000000000000 A fixed_percpu_data
ffffffff81000000 T _text
ffffffff81000000 T _stext
ffffffff81000040 t helper.constprop.0
ffffffff82000000 R sys_call_table
ffffffff82000100 r __ksymtab_helper
ffffffffc0001000 t svm_vcpu_run\t[kvm_amd]
ffffffffc0002000 d kvm_x86_ops\t[kvm]
ffffffffc0026d98 t bpf_prog_6deef7357e7b4530_sd_fw_ingress\t[bpf]
"""


def test_lines() -> None:
    lines = scan_symbols(GOOD)
    assert len(lines) == 9
    assert lines[6] == (0xFFFFFFFFC0001000, "t", b"svm_vcpu_run", b"kvm_amd")
    assert lines[1].module == b""


def test_names_and_functions() -> None:
    symbols = parse_symbols(GOOD)
    assert symbols.function(0xFFFFFFFF81000000) == "_stext"
    assert symbols.function(0xFFFFFFFF81000041) == ""
    assert symbols.function(0xFFFFFFFF82000000) == "", "data is no function"
    assert symbols.near(0xFFFFFFFF8200000C) == "sys_call_table+0xc"
    assert symbols.near(0xFFFFFFFFC0001012) == "svm_vcpu_run+0x12 [kvm_amd]"
    assert symbols.near(0xFFFFFFFF82000108) == "sys_call_table+0x108", "export tables name nothing"
    assert symbols.near(5) == ""
    assert symbols.is_code(0xFFFFFFFFC0001FFF)
    assert not symbols.is_code(0xFFFFFFFFC0002001)
    assert not symbols.is_code(1)


@pytest.mark.parametrize(
    "data",
    [
        GOOD.replace(b"ffffffff", b"00000000").replace(b"c000", b"0000").replace(b"8100", b"0000"),
        GOOD[:-1],
        GOOD + b"\n",
        GOOD.replace(b"[kvm]", b"[kvm"),
        GOOD.replace(b" T ", b" TT "),
        b"",
        b"xyz",
    ],
)
def test_anything_else_is_refused(data: bytes) -> None:
    if b"sys_call_table" in data and data.startswith(b"0000000000000000 A fixed_percpu_data\n0000"):
        data = b"".join(b"0" * 16 + line[16:] + b"\n" for line in GOOD.splitlines())
    with pytest.raises(MalformedSymbolsError):
        scan_symbols(data)


@given(st.binary(max_size=300))
def test_any_bytes(data: bytes) -> None:
    with contextlib.suppress(MalformedSymbolsError):
        scan_symbols(data)


def test_mutations_never_escape() -> None:
    rng = random.Random(3)
    for _ in range(2000):
        data = bytearray(GOOD[: rng.randrange(len(GOOD) + 1)])
        for _ in range(rng.randrange(4)):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        with contextlib.suppress(MalformedSymbolsError):
            parse_symbols(bytes(data))


@given(
    st.dictionaries(st.integers(1, 2**64 - 1), st.tuples(st.binary(min_size=1, max_size=9), st.booleans()))
)
def test_packing_loses_nothing(table: dict[int, tuple[bytes, bool]]) -> None:
    rows = [(address, name.replace(b"\0", b"x"), code) for address, (name, code) in table.items()]
    symbols = Symbols(pack_symbols(rows))
    assert len(symbols) == len(rows)
    for address, name, code in rows:
        text = name.decode("utf-8", "replace")
        assert symbols.function(address) == (text if code else "")


def test_packed_arrays_must_fit() -> None:
    packed = pack_symbols([(1, b"a", True), (2, b"b", False)])
    for broken in (
        packed._replace(addresses=packed.addresses[:8]),
        packed._replace(functions=b"\1"),
        packed._replace(names=b"a"),
        PackedSymbols(b"", b"\1", b""),
    ):
        with pytest.raises(MalformedSymbolsError):
            Symbols(broken)
