"""The one door to `tpm2_pytss`: a context that is rebuilt, deadlines, bounded retries, typed errors.

`tpm2_pytss` is untyped, so its objects are `Any` between here and the other `platform/tpm*` modules;
they give and take bytes. Not thread-safe: one thread owns an `Esys` (a context shared by threads
answers BAD_SEQUENCE).

After any error of the transport an ESAPI context answers BAD_SEQUENCE for ever. It is thrown away
then, with all handles and sessions in it; `generation` tells its users that theirs are gone.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar

# libtss2 reads it once, when it is loaded; without it each expected error is spelled out on stderr.
os.environ.setdefault("TSS2_LOG", "all+none")

from tpm2_pytss.constants import ESYS_TR, TPM2_ALG, TPM2_CAP, TPM2_RC, TPM2_SE, TPMA_SESSION
from tpm2_pytss.ESAPI import ESAPI
from tpm2_pytss.TCTI import PyTCTI
from tpm2_pytss.TSS2_Exception import TSS2_Exception as TSS2_Exception

from hostd.platform.tpm_errors import TpmBusyError, TpmCommandError, TpmError, TpmUnavailableError
from hostd.platform.tpm_tcti import MAX_RESPONSE_BYTES, Link, check_response

T = TypeVar("T")
Handle = Any
"""An ESYS_TR of the current context."""

RC_PCR_CHANGED: Final = 0x128
RC_NO_SUCH_HANDLE: Final = 0x18B
_FMT1: Final = 0x080
_PARAMETER: Final = 0x040
_RETRY: Final = frozenset(
    int(rc)
    for rc in (
        TPM2_RC.RETRY,
        TPM2_RC.YIELDED,
        TPM2_RC.TESTING,
        TPM2_RC.NV_RATE,
        TPM2_RC.NV_UNAVAILABLE,
    )
)
"""Warnings that pass by themselves. ESAPI has already sent the first three five times, without pause."""
_PAUSES_S: Final = (0.01, 0.05, 0.2, 0.5, 1.0, 2.0)
_TRANSIENT: Final = 0x80000000
_LOADED_SESSION: Final = 0x02000000
_SAVED_SESSION: Final = 0x03000000
_HANDLES_AT_ONCE: Final = 64


def base_error(rc: int) -> int:
    """The error without the number of the handle, parameter or session it is about."""
    return _FMT1 + (rc & 0x3F) if rc & _FMT1 else rc


def is_parameter_error(rc: int) -> bool:
    """Whether the TPM says that a parameter of the command is wrong."""
    return bool(rc & _FMT1 and rc & _PARAMETER)


class _Tcti(PyTCTI):  # type: ignore[misc]
    """Carries ESAPI's commands over a link, each within its deadline."""

    def __init__(self, link: Link, deadline: Callable[[], float]) -> None:
        super().__init__(max_size=MAX_RESPONSE_BYTES)
        self._link = link
        self._deadline = deadline
        self._command = b""
        self.failure: TpmError | None = None

    def do_transmit(self, command: bytes) -> None:
        self._command = command

    def do_receive(self, timeout: int) -> bytes:
        del timeout  # ESAPI always says -1: for ever
        try:
            response = self._link.exchange(self._command, self._deadline())
            # ESAPI takes a short response for its buffer, in which the command still lies, and reads that.
            check_response(response)
        except TpmError as error:
            # ESAPI turns every exception of a TCTI into one code; this one says what happened.
            self.failure = error
            raise
        return response


class Esys:
    """An ESAPI context on a link that `connect` opens, and opens again after it broke."""

    def __init__(self, connect: Callable[[], Link], command_s: float) -> None:
        self._connect = connect
        self._command_s = command_s
        self._esapi: Any = None
        self._tcti: Any = None
        self._link: Link | None = None
        self.generation = 1
        """Grows with every context that is given up: its handles are dead."""
        self._failure: TpmError | None = None
        self.deadline: float | None = None
        """Of the job at hand, monotonic seconds; no command and no pause outlives it."""

    def _command_deadline(self) -> float:
        end = time.monotonic() + self._command_s
        return end if self.deadline is None else min(end, self.deadline)

    def _context(self) -> Any:
        if self._esapi is None:
            self._link = self._connect()
            self._tcti = _Tcti(self._link, self._command_deadline)
            self._esapi = ESAPI(self._tcti)
            if not self._link.managed:
                self._flush_leftovers()
        return self._esapi

    def ready(self) -> int:
        """Makes sure that there is a context; returns its generation.

        Raises:
            TpmUnavailableError: no TPM.
        """
        self._context()
        return self.generation

    def close(self) -> None:
        """Gives the context up. The next call makes a new one."""
        esapi, tcti, link = self._esapi, self._tcti, self._link
        self._esapi = self._tcti = self._link = None
        if esapi is not None:
            self.generation += 1
            esapi.close()
            tcti.finalize()
        if link is not None:
            link.close()

    def call(self, command: str, function: Callable[[Any], T]) -> T:
        """Calls `function` with the ESAPI context; `command` names it in errors.

        Raises:
            TpmUnavailableError: the transport failed or the response is not the TPM's.
            TpmBusyError: the TPM went on asking to try again.
            TpmCommandError: the TPM refused.
        """
        pauses = iter(_PAUSES_S)
        while True:
            esapi = self._context()
            try:
                return function(esapi)
            except TSS2_Exception as error:
                problem = self._converted(command, error)
                if not isinstance(problem, TpmBusyError):
                    raise problem from (self._failure or error)
                pause = next(pauses, None)
                if pause is None or time.monotonic() + pause >= (self.deadline or float("inf")):
                    raise problem from error
            time.sleep(pause)

    def _converted(self, command: str, error: Any) -> TpmError:
        rc = int(error.rc)
        self._failure = self._tcti.failure if self._tcti is not None else None
        if self._failure is not None:
            self.close()
            return TpmUnavailableError(f"{command}: {self._failure}")
        if rc >> 16:
            # Not the TPM's own code: ESAPI or a layer below could not use what came back.
            self.close()
            return TpmUnavailableError(f"{command}: 0x{rc:x} ({error})")
        if rc in _RETRY:
            return TpmBusyError(f"{command}: 0x{rc:x} ({error})")
        return TpmCommandError(rc, command, str(error))

    # ── Handles ───────────────────────────────────────────────────────────────────────────────────

    def attach(self, tpm_handle: int) -> Handle:
        """A handle of the context for something that is in the TPM: a persistent key, a session."""
        return self.call("ReadPublic", lambda e: e.tr_from_tpmpublic(tpm_handle))

    def flush(self, handle: Handle) -> None:
        """Removes a transient object or a session from the TPM."""
        self.call("FlushContext", lambda e: e.flush_context(handle))

    @contextlib.contextmanager
    def flushing(self, handle: Handle) -> Iterator[Handle]:
        """Gives the handle and flushes it in the end, whatever happens; the first error is raised."""
        generation = self.generation
        try:
            yield handle
        except BaseException:
            if generation == self.generation:
                with contextlib.suppress(TpmError):
                    self.flush(handle)
            raise
        self.flush(handle)

    @contextlib.contextmanager
    def salted_session(self, salt_key: Handle, *, policy: bool, attributes: int) -> Iterator[Handle]:
        """A session whose parameter encryption is keyed by a salt that only `salt_key`'s TPM can read.

        Without the salt a passive listener decrypts it (TPM 2.0 part 1, section 21).
        """
        with self.flushing(self.start_session(salt_key, policy=policy, attributes=attributes)) as session:
            yield session

    def start_session(self, salt_key: Handle, *, policy: bool, attributes: int) -> Handle:
        """The same, for the caller to flush."""
        kind = TPM2_SE.POLICY if policy else TPM2_SE.HMAC
        session = self.call(
            "StartAuthSession",
            lambda e: e.start_auth_session(salt_key, ESYS_TR.NONE, kind, "aes128cfb", TPM2_ALG.SHA256),
        )
        flags = attributes | TPMA_SESSION.CONTINUESESSION
        try:
            self.call("SetAttributes", lambda e: e.trsess_set_attributes(session, flags))
        except TpmError:
            with contextlib.suppress(TpmError):
                self.flush(session)
            raise
        return session

    def handles(self, base: int) -> tuple[int, ...]:
        """TPM handles from `base` on, at most 64."""
        _more, data = self.call(
            "GetCapability", lambda e: e.get_capability(TPM2_CAP.HANDLES, base, _HANDLES_AT_ONCE)
        )
        return tuple(int(handle) for handle in data.data.handles)

    def leftovers(self) -> tuple[int, ...]:
        """Transient objects and sessions that are in the TPM now."""
        return tuple(
            handle for base in (_TRANSIENT, _LOADED_SESSION, _SAVED_SESSION) for handle in self.handles(base)
        )

    def _flush_leftovers(self) -> None:
        """What a client that was killed left behind: a TPM has room for three of each."""
        for handle in self.leftovers():
            with contextlib.suppress(TpmCommandError):
                self.flush(self.attach(handle))
