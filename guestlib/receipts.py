"""What a client asks of the ledger: earlier receipts, and its tenant's entries. Nothing is verified here."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, TypeVar

from guestlib.errors import OverloadedError, TransportError
from guestlib.wire import messages

if TYPE_CHECKING:
    from collections.abc import Iterator

PAUSE_S: Final = 0.2
MAX_WAIT_S: Final = 10.0
"""For one page of the audit log; a host gives five a second."""

R = TypeVar("R", bound=messages.Result)


class ReceiptOperations:
    """Needs `_call` of `Client`."""

    def _call(self, kind: type[R], operation: str, **args: Any) -> R:
        raise NotImplementedError

    def redeem(self, receipt: messages.Receipt | int) -> messages.Receipt:
        """The receipt of an earlier answer with its document, unverified (`guestlib.attest.receipt`); a
        ledger entry's number does too.

        Raises:
            NotFoundError: no answer that this caller's tenant got.
        """
        known = messages.Receipt(receipt, 0) if isinstance(receipt, int) else receipt
        found = self._call(messages.ReceiptDocument, "GetReceipt", ledger=known.ledger)
        return replace(known, document=found.document)

    def audit_log(self, after: int | None = None) -> Iterator[messages.AuditPage]:
        """The ledger entries of the caller's tenant that come after entry `after`, page by page, unverified
        (`guestlib.attest.audit`). Waits where the host bounds how many pages it gives.

        Raises:
            OverloadedError: the host gave no further page for `MAX_WAIT_S`.
        """
        while True:
            page = self._page(after)
            yield page
            if page.next is None:
                return
            if after is not None and page.next <= after:
                raise TransportError("the host's audit log does not end")
            after = page.next

    def _page(self, after: int | None) -> messages.AuditPage:
        until = time.monotonic() + MAX_WAIT_S
        while True:
            try:
                return self._call(messages.AuditPage, "GetAuditLog", after=after)
            except OverloadedError:
                if time.monotonic() >= until:
                    raise
            time.sleep(PAUSE_S)
