"""hostd: a privileged key service for KVM/QEMU hosts."""

__version__ = "0.1.0"
