"""guestlib: what a guest or an auditor installs to use and to verify hostd.

`import guestlib` costs nothing but this file; import what you use from its modules:
`guestlib.client` (standard library only) and `guestlib.attest` (needs `cryptography`).
"""
