"""The host's side of an enrolment: what a provider asks of this TPM, and the certificate that comes of it.

Officers carry the documents. A challenge is opened for this host's attestation key only, and what leaves is
a proof of the secret, not the secret.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, get_args

from guestlib.attest.credential import Credential
from guestlib.attest.hostcert import ek_digest, read_host_certificate
from guestlib.errors import ConflictError, DeniedError, HostdError, UnavailableError, VerificationError
from hostd.core import enrolment as docs
from hostd.ipc import enrolling as enr
from hostd.ipc import operating as adm
from hostd.platform.hostname import this_host
from hostd.platform.tpm_errors import TpmCredentialError, TpmError
from hostd.platform.tpm_worker import Priority
from hostd.vault.channelca import utc_now

if TYPE_CHECKING:
    from collections.abc import Callable

    from hostd.vault.tpmlink import Quoted, TpmLink

    Told = Callable[[object], None]
    """Gets the result, or the `HostdError`."""


class EnrolmentDesk:
    """Answers the operators' commands about enrolment."""

    COMMANDS: Final = get_args(enr.EnrolmentCommand)

    def __init__(self, tpm: TpmLink, record: Callable[..., int]) -> None:
        """`record` is the vault's: a durable entry in the ledger."""
        self._tpm = tpm
        self._record = record

    def answer(self, command: enr.EnrolmentCommand, officer: str, told: Told) -> None:
        """Takes one command; the result may come later.

        Raises:
            HostdError: it is refused at once.
        """
        match command:
            case enr.RequestHost():
                self._request(told)
            case enr.AnswerHost():
                self._open(command.challenge, officer, told)
            case enr.InstallHost():
                told(self._install(command.certificate, officer))
            case enr.ShowHost():
                told(self._report())

    def _request(self, told: Told) -> None:
        record = self._tpm.record
        identity = docs.Identity(this_host(), record.ak_public, record.ek_public, record.ek_certificate)

        def quoted(result: Quoted | TpmError) -> None:
            if isinstance(result, TpmError):
                told(UnavailableError(f"the TPM did not quote: {result}"))
                return
            request = docs.Request(
                format="hostd-host-request/1",
                identity=identity,
                pcrs={str(index): value for index, value in sorted(result.pcrs.items())},
                attest=result.quote.attest,
                signature=result.quote.signature,
            )
            told(_document(request))

        self._tpm.quote(identity.qualifying(), quoted, priority=Priority.OTHER)

    def _open(self, document: bytes, officer: str, told: Told) -> None:
        challenge = docs.parse(document, docs.Challenge)
        digest, own = docs.digest(document), self._tpm.record.ak_name
        if challenge.ak_name != own:
            raise ConflictError(
                f"the challenge is for the attestation key {challenge.ak_name.hex()}, and this host's is "
                f"{own.hex()}"
            )

        def opened(result: bytes | TpmError) -> None:
            if isinstance(result, TpmCredentialError):
                told(DeniedError(f"the TPM does not open the challenge: {result}"))
                return
            if isinstance(result, TpmError):
                told(UnavailableError(f"the TPM did not open the challenge: {result}"))
                return
            proof = docs.proof(result, digest)
            try:
                detail = f"challenge {digest.hex()}, to certify {challenge.host}"
                self._record("enrol", principal=officer, subject="answer", detail=detail)
            except HostdError as error:
                told(error)
                return
            told(_document(docs.Answer(format="hostd-host-answer/1", challenge=digest, proof=proof)))

        self._tpm.activate(Credential(challenge.credential, challenge.secret), opened)

    def _install(self, der: bytes, officer: str) -> enr.HostReport:
        record = self._tpm.record
        try:
            certificate = read_host_certificate(der)
            certificate.check_keys(record.ak_public, record.ek_public)
            certificate.check_valid(utc_now())
        except VerificationError as error:
            raise ConflictError(f"not a host certificate for this host: {error.message}") from error
        detail = (
            f"certificate {docs.digest(der).hex()} for {certificate.host} by {certificate.issuer}, until "
            f"{certificate.not_after:%Y-%m-%dT%H:%M:%SZ}"
        )
        self._record("enrol", principal=officer, subject="install", detail=detail)
        try:
            self._tpm.install_certificate(der)
        except OSError as error:
            raise UnavailableError(f"the host certificate was not stored: {error.strerror}") from error
        return self._report()

    def _report(self) -> enr.HostReport:
        record, der = self._tpm.record, self._tpm.host_certificate
        plain = enr.HostReport(
            host=this_host(),
            ak_name=record.ak_name.hex(),
            ek_digest=ek_digest(record.ek_public).hex(),
            maker=record.ek_certificate is not None,
        )
        if der is None:
            return plain
        certificate = read_host_certificate(der)
        now = utc_now()
        return enr.HostReport(
            host=plain.host,
            ak_name=plain.ak_name,
            ek_digest=plain.ek_digest,
            maker=plain.maker,
            certificate=der,
            certified=certificate.host,
            issuer=certificate.issuer,
            not_before=int(certificate.not_before.timestamp()),
            not_after=int(certificate.not_after.timestamp()),
            valid=certificate.not_before <= now <= certificate.not_after,
        )


def _document(document: docs.Request | docs.Answer) -> adm.Document:
    data = docs.encode(document)
    return adm.Document(data, docs.digest(data).hex())
