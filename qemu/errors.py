"""What can go wrong in the lab, one class for each thing a caller may want to tell apart."""

from __future__ import annotations

from dataclasses import dataclass


class LabError(Exception):
    """Base of all lab errors; ``hint`` says what the person at the keyboard can do about it."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class MissingToolError(LabError):
    """A program or file of the build machine that the lab needs is not there."""


class BuildError(LabError):
    """A build step (image, wheel, initramfs) failed; the message ends with its last output."""


class BootError(LabError):
    """A machine did not come up in time, or died on the way; the message has its console's tail."""


class PowerStateError(LabError):
    """The call needs a running (or a powered-off) machine and this one is not."""


class ChannelClosedError(LabError):
    """The machine's agent went away while it was being talked to."""


class CommandTimeoutError(LabError):
    """A command did not end in time; it was killed. The message has what it had said so far."""


@dataclass(frozen=True, slots=True)
class Result:
    """How a command ended. ``rc`` is its exit status, or minus the signal that ended it."""

    argv: tuple[str, ...]
    rc: int
    stdout: bytes
    stderr: bytes

    @property
    def text(self) -> str:
        """Standard output as text, without the final newline."""
        return self.stdout.decode(errors="replace").rstrip("\n")


class CommandFailedError(LabError):
    """A checked command ended with another status than 0."""

    def __init__(self, result: Result) -> None:
        self.result = result
        said = (result.stderr or result.stdout).decode(errors="replace").strip()
        super().__init__(f"{' '.join(result.argv)!r} ended with {result.rc}: {said[-2000:]}")
