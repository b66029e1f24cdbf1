"""The vault's desk on a real TPM, and the provider's answer to it."""

from __future__ import annotations

import datetime
import ssl
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support_tpm import Embedded

from guestlib.errors import HostdError
from hostd.admin import hostca
from hostd.config import Config, Host
from hostd.config import Tpm as TpmSettings
from hostd.core import enrolment as docs
from hostd.ipc import enrolling as enr
from hostd.ipc import operating as adm
from hostd.ipc.loop import Loop
from hostd.platform import swtpm
from hostd.platform.tpm_files import encode_blob, encode_record, write_file
from hostd.vault.counters import Counters
from hostd.vault.enrolment import EnrolmentDesk
from hostd.vault.tpmlink import TpmLink

OFFICER = 'Officer::"uid:0"'
NAME = "host1.example"


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def maker(host: Embedded) -> bytes:
    return ssl.PEM_cert_to_DER_cert((host.state / swtpm.CA_FILE).read_text())


class Desk:
    """The vault's side, as the operators' socket drives it."""

    def __init__(self, folder: Path, host: Embedded) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.host, self.loop = folder, host, Loop()
        self.recorded: list[dict[str, Any]] = []
        if not (folder / "root.json").exists():
            tpm = host.open()
            write_file(folder / "root.json", encode_blob(tpm.seal(bytes(32), tpm.read_pcrs((0, 7)))))
            tpm.close()
        write_file(folder / "tpm.json", encode_record(host.record))
        config = Config(
            host=Host(state_dir=str(folder), run_dir=str(folder)),
            tpm=TpmSettings(device=f"unix:{host.process.socket}"),
        )
        self.link = TpmLink(config, self.loop, Counters())
        self.desk = EnrolmentDesk(self.link, self.record)

    def record(self, event: str, **fields: Any) -> int:
        self.recorded.append({"event": event, **fields})
        return len(self.recorded) - 1

    def ask(self, command: enr.EnrolmentCommand) -> Any:
        """The result; refusals are raised."""
        told: list[object] = []
        self.desk.answer(command, OFFICER, told.append)
        end = time.monotonic() + 60
        while not told:
            assert time.monotonic() < end
            self.loop.run_once(0.1)
        (result,) = told
        if isinstance(result, HostdError):
            raise result
        return result

    def request(self) -> bytes:
        return self.document(enr.RequestHost())

    def answer(self, challenge: bytes) -> bytes:
        return self.document(enr.AnswerHost(challenge))

    def document(self, command: enr.EnrolmentCommand) -> bytes:
        found = self.ask(command)
        assert isinstance(found, adm.Document)
        assert found.digest == docs.digest(found.document).hex()
        return found.document

    def install(self, der: bytes) -> enr.HostReport:
        found = self.ask(enr.InstallHost(der))
        assert isinstance(found, enr.HostReport)
        return found

    def close(self) -> None:
        self.link.close()
        self.loop.close()


@dataclass
class Challenged:
    document: bytes
    pending: docs.Pending


def challenged(host: Embedded, request: bytes, **changes: Any) -> Challenged:
    arguments: dict[str, Any] = {"name": NAME, "ek_roots": [maker(host)], "intermediates": (), "now": now()}
    made, pending = hostca.challenge(request, **(arguments | changes))
    return Challenged(docs.encode(made), pending)


def certified(desk: Desk, ca: hostca.Ca, **changes: Any) -> bytes:
    """The whole of it."""
    made = challenged(desk.host, desk.request())
    arguments: dict[str, Any] = {"days": 30, "now": now()}
    return hostca.certify(desk.answer(made.document), made.pending, ca, **(arguments | changes))
