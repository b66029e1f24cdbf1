"""Naming the officers in the configuration, and (for development) making a key for one.

A configuration names its officers once: keys that it has are never replaced here. The vault records them
at the first unsealing, and refuses a configuration that names others later.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from typing import TYPE_CHECKING

from guestlib.errors import MalformedError
from guestlib.sshkeys import parse_public_key
from hostd.config import ConfigError, load_config

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def make_key(path: Path) -> Path:
    """Makes an Ed25519 key without a passphrase, for development; the public key's path. A key that is there
    stays.

    Raises:
        ConfigError: there is no ssh-keygen, or it failed.
    """
    public = path.with_name(path.name + ".pub")
    if path.exists() and public.exists():
        return public
    tool = shutil.which("ssh-keygen")
    if tool is None:
        raise ConfigError("ssh-keygen is not installed (Debian: openssh-client)")
    name = f"officer@{os.uname().nodename}"[:64]
    argv = [tool, "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(path)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise ConfigError(f"ssh-keygen made no key {path}: {done.stderr.strip() or done.stdout.strip()}")
    return public


def name_officers(config_path: Path, public_keys: Sequence[Path], quorum: int) -> str | None:
    """Adds an `[officers]` section with these `.pub` files to a configuration; what was done, if anything.

    Raises:
        ConfigError: a file is no public key, or the configuration names other officers.
        OSError: a file cannot be read or written.
    """
    lines = [path.read_text("utf-8").strip() for path in public_keys]
    keys = []
    for path, line in zip(public_keys, lines, strict=True):
        try:
            keys.append(parse_public_key(line))
        except MalformedError as error:
            raise ConfigError(f"{path}: {error.message}") from None
    before = load_config(config_path).officers
    if before.keys:
        same = {key.blob for key in before.public_keys} == {key.blob for key in keys}
        if not same or before.quorum != quorum:
            raise ConfigError(f"{config_path} names other officers already; nothing was changed")
        return None
    text = config_path.read_text("utf-8")
    listed = "".join(f"    {json.dumps(line, ensure_ascii=False)},\n" for line in lines)
    section = f"\n[officers]\nkeys = [\n{listed}]\nquorum = {quorum}\n"
    config_path.write_text(text + section, "utf-8")
    try:
        load_config(config_path)
    except ConfigError:
        config_path.write_text(text, "utf-8")
        raise
    return f"{', '.join(f'{key.name} ({key.fingerprint})' for key in keys)}; {quorum} must sign"
