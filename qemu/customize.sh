#!/bin/sh
# Turns a fresh Debian tree into the lab's host image; run by mmdebstrap as a customize hook.
#
#   customize.sh ROOT LAB OUT     ROOT: the tree, LAB: this folder, OUT: where the results go
#
# Results: disk.img (ext4, whole disk), vmlinuz, initrd.img, guest-base.cpio (see guest-base.sh).
set -eu
root=$1 lab=$2 out=$3
size=8G # sparse; what L1 can fill, not what it takes here

cp -R "$lab/rootfs/." "$root/"
install -D -m 0644 "$lab/agent.py" "$root/usr/local/lib/hostd-lab/agent.py"
install -D -m 0755 "$lab/guest-base.sh" "$root/usr/local/lib/hostd-lab/guest-base.sh"
tr -d - </proc/sys/kernel/random/uuid >"$root/etc/machine-id" # else every boot is a first boot
chroot "$root" passwd --quiet --delete root

# What runs by itself makes IMA logs and timings differ from run to run.
chroot "$root" systemctl --quiet mask \
    apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer \
    logrotate.timer systemd-tmpfiles-clean.timer e2scrub_reap.service libvirt-guests.service \
    systemd-binfmt.service getty@tty1.service serial-getty@ttyS0.service
chroot "$root" systemctl --quiet enable \
    hostd-lab-agent.service hostd-lab-kvm.service serial-getty@ttyS1.service

# Only the drivers of the lab's own disk: a third of the time to load and unpack.
sed -i 's/^MODULES=.*/MODULES=list/' "$root/etc/initramfs-tools/initramfs.conf"
chroot "$root" update-initramfs -u >/dev/null

mkdir -p "$root/var/lib/hostd-lab"
chroot "$root" /usr/local/lib/hostd-lab/guest-base.sh /var/lib/hostd-lab/guest-base.cpio
cp "$root"/boot/vmlinuz-* "$root/var/lib/hostd-lab/vmlinuz"
cp "$root"/boot/vmlinuz-* "$out/vmlinuz"
cp "$root"/boot/initrd.img-* "$out/initrd.img"

# No package lists, and nothing that says where this machine gets its packages from.
chroot "$root" apt-get clean
rm -rf "$root"/var/lib/apt/lists/* "$root"/etc/apt/sources.list "$root"/etc/apt/sources.list.d/* \
    "$root"/etc/apt/apt.conf.d/99mmdebstrap "$root"/var/log/apt "$root"/var/log/dpkg.log
: >"$root/etc/resolv.conf"

# mmdebstrap has /proc, /sys and /dev mounted here: take them away in a namespace of our own, or they
# end up in the image.
root=$root out=$out size=$size unshare --mount sh -eu -c '
    for mounted in $(findmnt --raw --noheadings --output TARGET | grep "^$root/" | sort -r); do
        umount "$mounted" || umount --lazy "$mounted"
    done
    mke2fs -q -t ext4 -L lab-root -E lazy_itable_init=1,lazy_journal_init=1 -d "$root" "$out/disk.img" "$size"'
