"""The lab: a real KVM host in a virtual machine, for people and for the end-to-end tests.

``LabHost`` (``qemu.host``) is the host, L1: TPM 2.0, IMA, KVM, vsock, libvirt, systemd. ``Guest``
(``qemu.guest``) is a guest in it, L2. ``install_hostd`` (``qemu.install``) puts the project into L1.
Nothing here is installed with hostd, and nothing in hostd or guestlib imports it.
"""
