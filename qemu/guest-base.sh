#!/bin/sh
# Makes the part of a guest's initramfs that does not change: busybox, python3 with its library, and
# the kernel modules. Runs inside the L1 image, so that versions match.
#
#   guest-base.sh OUT.cpio
set -eu
out=$1
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
kernel=$(basename /lib/modules/*)
python=$(readlink -f /usr/bin/python3)

mkdir -p "$tree"/bin "$tree"/dev "$tree"/etc "$tree"/lib "$tree"/lib64 "$tree"/modules "$tree"/proc \
    "$tree"/root "$tree"/run "$tree"/sys "$tree"/tmp "$tree"/usr/bin "$tree"/usr/lib
cp /bin/busybox "$tree/bin/busybox"
for applet in $(busybox --list | grep -v "^busybox$"); do
    ln -s busybox "$tree/bin/$applet"
done

cp "$python" "$tree/usr/bin/python3"
cp -R "/usr/lib/$(basename "$python")" "$tree/usr/lib/"
cd "$tree/usr/lib/$(basename "$python")"
rm -rf config-* distutils ensurepip idlelib lib2to3 pydoc_data test tkinter turtledemo venv wsgiref xmlrpc
rm -f lib-dynload/_curses* lib-dynload/_dbm* lib-dynload/_gdbm* lib-dynload/_sqlite3* \
    lib-dynload/_test* lib-dynload/audioop* lib-dynload/readline*
# An initramfs need not keep file times, and Python compiles again what looks changed: have it not look.
find . -name __pycache__ -prune -exec rm -rf {} +
python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash .

# Shared libraries of all that was copied, at the paths the loader looks in. The named ones are for
# wheels, which are built to run on older systems too.
{
    for binary in "$tree/usr/bin/python3" lib-dynload/*.so; do ldd "$binary"; done
    for name in libgcc_s.so.1 libpthread.so.0 libdl.so.2 librt.so.1 libutil.so.1; do
        echo "/lib/$(uname -m)-linux-gnu/$name"
    done
} | grep -o '/[^ ]*' | grep '^/lib' | sort -u | while read -r library; do
    mkdir -p "$tree$(dirname "$library")"
    cp -L "$library" "$tree$library"
done

# The modules in the order they load in, each after what it needs.
for module in virtio_pci virtio_console vmw_vsock_virtio_transport; do
    modprobe --show-depends --set-version "$kernel" "$module"
done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }' | while read -r path; do
    cp "$path" "$tree/modules/"
    basename "$path" >>"$tree/modules/order"
done

cp /usr/local/lib/hostd-lab/agent.py "$tree/usr/lib/lab_agent.py"
cat >"$tree/init" <<'INIT'
#!/bin/sh
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
while read -r module; do insmod "/modules/$module"; done </modules/order
export HOME=/root PATH=/usr/bin:/bin LANG=C.UTF-8
for port in /sys/class/virtio-ports/*; do
    if [ "$(cat "$port/name")" = org.hostd.lab ]; then
        python3 -I -S /usr/lib/lab_agent.py "/dev/${port##*/}"
    fi
done
poweroff -f
INIT
chmod 0755 "$tree/init"
cd "$tree"
find . -mindepth 1 | sort | cpio --quiet --create --format=newc --owner=0:0 --reproducible >"$out"
