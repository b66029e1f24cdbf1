"""What libvirt's live XML of a domain says (pure). The format is libvirt's formatdomain.

The text comes from libvirt, and much in it from whoever defined the machine. A document type (and so any
entity), too much depth, too many elements or too long a text is refused; so is what libvirt would not
write. Devices that this module does not know are taken as they are called: nobody approves of them unseen.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Final, NamedTuple
from xml.etree import ElementTree

from hostd.core.reading_domain import MAX_ARGUMENT, MAX_PARTS, DomainPart

if TYPE_CHECKING:
    from collections.abc import Iterator
    from xml.etree.ElementTree import Element

MAX_XML_BYTES: Final = 1 << 20
"""A machine with a few disks has 8 kB; libvirt itself sends no more than 4 MiB."""
MAX_DEPTH: Final = 32
MAX_ELEMENTS: Final = 20_000
MAX_LABEL: Final = 256
QEMU: Final = "{http://libvirt.org/schemas/domain/qemu/1.0}"
_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_CID: Final = re.compile(r"[0-9]{1,10}")
_KIND: Final = re.compile(r"[^A-Za-z0-9_.-]")
_BOOT: Final = {"loader": "loader", "nvram": "nvram", "kernel": "kernel", "initrd": "initrd", "dtb": "dtb",
                "shim": "shim", "cmdline": "cmdline", "varstore": "nvram"}  # fmt: skip
_CONSOLES: Final = frozenset({"serial", "parallel", "console", "channel", "smartcard", "redirdev"})
_PLAIN: Final = frozenset(
    {"controller", "hub", "vsock", "memballoon", "watchdog", "panic", "iommu", "video", "sound", "nvram"}
)


class MalformedDomainError(Exception):
    """The text is not a domain as libvirt writes it, or over a bound."""


class Definition(NamedTuple):
    """A domain. The fields are those of `hostd.core.reading_domain.DomainReading`."""

    vm: str
    name: str
    virt: str
    emulator: str
    machine: str
    boot: tuple[DomainPart, ...]
    arguments: tuple[str, ...]
    environment: tuple[str, ...]
    cid: int
    labels: tuple[str, ...]
    memory: tuple[str, ...]
    devices: tuple[DomainPart, ...]
    digest: bytes
    """SHA-256 over the canonical XML."""


def parse_domain(xml: str) -> Definition:
    """Parses the XML of one domain.

    Raises:
        MalformedDomainError: see the module.
    """
    root = parse_tree(xml)
    vm = _text(root, "uuid").lower()
    if root.tag != "domain" or not _UUID.fullmatch(vm):
        raise MalformedDomainError("no domain with a UUID")
    arguments, environment = _passthrough(root)
    kind = root.find("./os/type")
    return Definition(
        vm,
        _short(_text(root, "name")),
        _short(root.get("type", "")),
        _bounded(_text(root, "devices/emulator")),
        "" if kind is None else _short(kind.get("machine", "")),
        _all(_boot(root)),
        arguments,
        environment,
        cid_of(root),
        tuple(sorted(set(_labels(root))))[:16],
        tuple(sorted(set(_memory(root)))),
        _all(_devices(root)),
        _digest(xml),
    )


def parse_cid(xml: str) -> int:
    """The vsock CID in a domain's live XML; 0 if it has none, or the XML is not what libvirt writes."""
    try:
        return cid_of(parse_tree(xml))
    except MalformedDomainError:
        return 0


def parse_tree(xml: str) -> Element:
    """The elements of a text that is XML without a document type, within the bounds.

    Raises:
        MalformedDomainError: it is not.
    """
    if len(xml) > MAX_XML_BYTES:
        raise MalformedDomainError(f"over {MAX_XML_BYTES} bytes of XML")
    try:
        # Whoever names entities needs a document type, and `_Builder` refuses that.
        parser = ElementTree.XMLParser(target=_Builder())  # noqa: S314
        parser.feed(xml)
        root: Element = parser.close()
    except (ElementTree.ParseError, ValueError) as error:
        raise MalformedDomainError(f"no XML: {error}") from None
    return root


class _Builder:
    """Builds the tree, as long as it is one that is wanted (the target of `XMLParser`)."""

    def __init__(self) -> None:
        self._builder = ElementTree.TreeBuilder()
        self._depth = self._count = 0

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        self._depth += 1
        self._count += 1
        if self._depth > MAX_DEPTH or self._count > MAX_ELEMENTS:
            raise MalformedDomainError("too deep, or too many elements")
        self._builder.start(tag, attributes)

    def end(self, tag: str) -> None:
        self._depth -= 1
        self._builder.end(tag)

    def data(self, text: str) -> None:
        self._builder.data(text)

    def doctype(self, name: str, public: str | None, system: str | None) -> None:
        raise MalformedDomainError("a document type")

    def close(self) -> Element:
        return self._builder.close()


def cid_of(root: Element) -> int:
    """The vsock CID of a domain; 0 if it has none, or more than one."""
    addresses = {cid.get("address", "") for cid in root.findall("./devices/vsock/cid")}
    address = addresses.pop() if len(addresses) == 1 else ""
    return int(address) if _CID.fullmatch(address) and 2 < int(address) < 2**32 - 1 else 0


# ── What it starts from ───────────────────────────────────────────────────────────────────────────────


def _boot(root: Element) -> Iterator[DomainPart]:
    for element in root.iterfind("./os/*"):
        kind, text = _BOOT.get(element.tag), _bounded(element.text or "")
        if kind is not None and text:
            yield DomainPart(kind, text)
        if kind == "nvram" and element.get("template"):
            yield DomainPart("template", _bounded(element.get("template", "")))
        for source in element.iter("source"):
            yield DomainPart(kind or _kind(element.tag), _bounded(_source(source)))
        for table in element.iterfind("./table"):
            yield DomainPart("acpi", _bounded(table.text or ""))
    for rom in root.iterfind("./devices//rom[@file]"):
        yield DomainPart("rom", _bounded(rom.get("file", "")))


def _passthrough(root: Element) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Arguments in their order, and after them what else stands in a foreign namespace; environment."""
    arguments: list[str] = []
    environment: list[str] = []
    for element in root:
        if not element.tag.startswith("{") or element.tag in (f"{QEMU}deprecation",):
            continue
        if element.tag == f"{QEMU}commandline":
            for item in element:
                if item.tag == f"{QEMU}arg":
                    arguments.append(_bounded(item.get("value", "")))
                elif item.tag == f"{QEMU}env":
                    environment.append(_bounded(f"{item.get('name', '')}={item.get('value', '')}"))
                else:
                    arguments.append(_canonical(item))
        else:
            arguments.append(_canonical(element))
    if len(arguments) > MAX_PARTS or len(environment) > MAX_PARTS:
        raise MalformedDomainError(f"over {MAX_PARTS} passed through")
    return tuple(arguments), tuple(sorted(set(environment)))


# ── How it is kept apart ──────────────────────────────────────────────────────────────────────────────


def _labels(root: Element) -> Iterator[str]:
    for element in root.iterfind("./seclabel"):
        if element.get("type") != "none" and element.get("model"):
            yield _short(f"{element.get('model')} {_text(element, 'label')}".strip())


def _memory(root: Element) -> Iterator[str]:
    for element in root.iterfind("./memoryBacking/*"):
        value = next((element.get(key) for key in ("type", "mode") if element.get(key)), "")
        plain = element.tag == "allocation" or not value
        yield _short(element.tag if plain else f"{element.tag}:{value}")
    for cell in root.iterfind("./cpu/numa/cell[@memAccess]"):
        yield _short(f"access:{cell.get('memAccess')}")


# ── What it has ───────────────────────────────────────────────────────────────────────────────────────


def _devices(root: Element) -> Iterator[DomainPart]:
    for element in root.iterfind("./devices/*"):
        if element.tag not in ("emulator", "redirfilter", "alias"):
            yield from _device(element)


def _device(element: Element) -> Iterator[DomainPart]:
    tag, kind = element.tag, element.get("type", "")
    if tag in _PLAIN:
        yield DomainPart(tag)
    elif tag in _CONSOLES:
        yield from _console(tag, kind or element.get("mode", ""), element)
    elif tag == "disk":
        raw = element.get("device") == "lun"
        backend = f"disk:{'lun' if raw else kind}"
        usual = kind in ("file", "block", "volume", "network") and not raw
        yield _part(backend, "" if usual else _first_source(element))
    elif tag == "interface":
        yield from _interface(kind, element)
    elif tag == "hostdev":
        yield _part(f"hostdev:{kind or element.get('mode', '')}", _address(element))
    elif tag == "input":
        yield _part("input" if kind in ("mouse", "tablet", "keyboard") else f"input:{kind}",
                    "" if kind in ("mouse", "tablet", "keyboard") else _first_source(element))  # fmt: skip
    elif tag == "audio":
        yield _part("audio" if kind in ("none", "spice") else f"audio:{kind}", "")
    elif tag == "graphics":
        yield _part(f"graphics:{kind}", "")
    elif tag in ("rng", "tpm", "crypto"):
        yield from _backed(element)
    elif tag == "memory":
        yield _part(f"memory:{element.get('model', '')}", _text(element, "source/path"))
    else:
        yield _part(f"{tag}:{kind}" if kind else tag, _first_source(element))


def _console(tag: str, kind: str, element: Element) -> Iterator[DomainPart]:
    """A character device. The terminal of a pty is made by the kernel, and is not judged."""
    yield _part(f"{tag}:{kind}", "" if kind == "pty" else _first_source(element))
    for log in element.iterfind("./log[@file]"):
        yield _part(f"{tag}:file", log.get("file", ""))


def _interface(kind: str, element: Element) -> Iterator[DomainPart]:
    reaches = kind not in ("network", "bridge", "user", "direct", "ethernet")
    yield _part(f"interface:{kind}", _address(element) if reaches else "")
    for script in (*element.iterfind("./script[@path]"), *element.iterfind("./downscript[@path]")):
        yield _part("interface:script", script.get("path", ""))


def _backed(element: Element) -> Iterator[DomainPart]:
    backends = element.findall("./backend")
    for backend in backends:
        kind = backend.get("model") or backend.get("type", "")
        target = (backend.text or "").strip() or _first_source(backend) or _text(backend, "device")
        device = backend.find("./device")
        if device is not None:
            target = device.get("path", "")
        yield _part(f"{element.tag}:{kind}", "" if kind == "emulator" else target)
    if not backends:
        yield _part(element.tag, "")


def _address(element: Element) -> str:
    """What a host device is: the attributes of its source and of the address in it."""
    source = element.find("./source")
    if source is None:
        return ""
    address = source.find("./address")
    plain = _source(source)
    if address is None:
        return plain
    pairs = sorted(address.attrib.items())
    return ",".join([*([plain] if plain else []), *(f"{name}={value}" for name, value in pairs)])


def _first_source(element: Element) -> str:
    source = element.find("./source")
    return "" if source is None else _source(source)


def _source(source: Element) -> str:
    for name in ("path", "file", "dev", "dir", "socket", "evdev", "name", "channel"):
        if source.get(name):
            return source.get(name, "")
    if source.get("host"):
        return f"{source.get('host')}:{source.get('service', '')}"
    return ",".join(f"{name}={value}" for name, value in sorted(source.attrib.items()))


# ── Texts ─────────────────────────────────────────────────────────────────────────────────────────────


def _part(kind: str, target: str) -> DomainPart:
    return DomainPart(_kind(kind), _bounded(target))


def _kind(text: str) -> str:
    return ":".join(_KIND.sub("_", piece) for piece in text.split(":"))[:64]


def _all(parts: Iterator[DomainPart]) -> tuple[DomainPart, ...]:
    found: set[DomainPart] = set()
    for part in parts:
        found.add(part)
        if len(found) > MAX_PARTS:
            raise MalformedDomainError(f"over {MAX_PARTS} devices or files")
    return tuple(sorted(found))


def _text(element: Element, path: str) -> str:
    return (element.findtext(path) or "").strip()


def _short(text: str) -> str:
    return text[:MAX_LABEL]


def _bounded(text: str) -> str:
    text = text.strip()
    if len(text) > MAX_ARGUMENT:
        raise MalformedDomainError(f"a text of over {MAX_ARGUMENT} characters")
    return text


def _canonical(element: Element) -> str:
    return _bounded(ElementTree.canonicalize(ElementTree.tostring(element, "unicode"), strip_text=True))


def _digest(xml: str) -> bytes:
    try:
        return hashlib.sha256(ElementTree.canonicalize(xml, strip_text=True).encode()).digest()
    except (ElementTree.ParseError, ValueError) as error:
        raise MalformedDomainError(f"no canonical form: {error}") from None
