#!/bin/sh
# First program of the squib guest kit.
#
# Kernel command line words it knows:
#   root=DEVICE   mount that ext4 file system and run its /sbin/init (or init=PATH); `ro` mounts it read-only,
#                 and what stands behind `--` are its arguments
#   squib.clock=keep  leave the wall clock alone when the RTC has gone ahead (see squib-clock)
#   squib.size=ROWSxCOLUMNS  the size of the terminal behind the console, which a serial line does not tell
#   squib.demo    the job of `squib demo`: fill the disk, count, answer commands
# Without them: a shell on the console, which powers the machine off when it ends.

export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root TERM=linux
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null
mkdir -p /dev/pts
mount -t devpts devpts /dev/pts

while read -r module; do insmod "$module"; done < /lib/modules/squib-boot

root= init=/sbin/init mode=rw job=shell clock=rtc size=
read -r cmdline < /proc/cmdline
for word in $cmdline; do
    case $word in
        root=*) root=${word#root=} job=root ;;
        init=*) init=${word#init=} ;;
        ro) mode=ro ;;
        squib.clock=*) clock=${word#squib.clock=} ;;
        squib.size=*) size=${word#squib.size=} ;;
        squib.demo) job=demo ;;
    esac
done
read -r console < /sys/class/tty/console/active
console=/dev/${console##* }
[ -n "$size" ] && busybox stty -F "$console" rows "${size%x*}" columns "${size#*x}"

wait_for() {
    tries=0
    until [ -b "$1" ]; do
        tries=$((tries + 1))
        [ $tries -gt 100 ] && return 1
        sleep 0.05
    done
}

# The arguments are those of the new root's init.
switch() {
    wait_for "$root" || { echo "squib: no block device $root"; return 1; }
    mkdir -p /newroot
    mount -t ext4 -o $mode "$root" /newroot || return 1
    umount /dev/pts
    mount -o move /dev /newroot/dev
    mount -o move /sys /newroot/sys
    mount -o move /proc /newroot/proc
    exec switch_root /newroot "$init" "$@"
}

sum() {
    sync
    echo 3 > /proc/sys/vm/drop_caches
    set -- $(sha256sum /dev/vda)
    echo "sum $1"
}

# Counts on the console. `sum` prints the SHA-256 of the disk as the device gives it, `off` ends.
demo() {
    wait_for /dev/vda || { echo "demo failed: no disk"; return 1; }
    stty -F "$console" -echo
    dd if=/dev/urandom of=/dev/vda bs=64k count=32 conv=notrunc,fsync 2>/dev/null \
        || { echo "demo failed: cannot write the disk"; return 1; }
    echo "disk written"
    n=0
    while :; do
        n=$((n + 1))
        echo "count $n"
        sleep 0.1
        # A read with a timeout would lose the half of a line that it had when the time was up.
        if read -t 0; then
            read -r command
            case $command in
                sum) sum ;;
                off) return 0 ;;
            esac
        fi
    done < "$console" > "$console"
}

case $job in
    root) switch "$@" ;;
esac
# Another root file system has its own rule, or none.
[ "$clock" = keep ] || sh /sbin/squib-clock < /dev/null > /dev/null 2>&1 &
case $job in
    demo) demo; sync; busybox poweroff -f ;;
esac

busybox --install -s 2>/dev/null
hostname squib
ip link set lo up
# From here on busybox is init: it knows what `poweroff`, `halt` and `reboot` mean, and reaps orphans.
cat > /etc/shell <<'END'
#!/bin/sh
export HOME=/root TERM=linux
echo
echo "squib guest kit, Linux $(uname -r), $(nproc) CPU(s). \`poweroff\` or the end of this shell ends the machine."
sh -l
poweroff
END
chmod 755 /etc/shell
echo "${console#/dev/}::once:/etc/shell" > /etc/inittab
exec busybox init
