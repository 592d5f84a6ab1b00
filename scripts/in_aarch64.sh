#!/bin/sh
# Runs a command in a root file system for arm64, emulated by qemu-user; FOLDER is /work there.
#
#   unshare --map-root-user --mount sh scripts/in_aarch64.sh ROOT FOLDER COMMAND...
#
# Nothing of the machine changes. Since Linux 6.7 a user namespace has a binfmt_misc of its own, which tells the kernel
# to start arm64 programs by qemu. Older kernels take the machine's, which Debian's qemu-user-static fills in.
set -e
root=$1 folder=$2
shift 2
# It must stay mounted. Unmounted, it forgets.
if mount -t binfmt_misc none "$root/formats" 2>/dev/null; then
  printf '%s' ':arm64:M::\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00:\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff:/usr/bin/qemu-aarch64-static:FPOC' >"$root/formats/register"
fi
# Without /sys, because ONNX Runtime ends in a segmentation fault where it finds the processors of x86 there.
for place in proc dev; do
  mount --rbind "/$place" "$root/$place"
done
mount --bind "$folder" "$root/work"
cd /
exec chroot "$root" /usr/bin/env -i -C /work HOME=/root PATH=/usr/bin:/bin LANG=C.UTF-8 PYTHONPATH=/opt/site "$@"
