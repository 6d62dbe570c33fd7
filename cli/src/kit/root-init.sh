#!/bin/sh
# First program of the squib root file system: a shell on the console, which powers the machine off
# when it ends. `squib.exec=PATH` on the kernel command line runs that program instead; `squib.clock=keep` leaves
# the wall clock alone when the RTC has gone ahead (see squib-clock); `squib.size=ROWSxCOLUMNS` is the size of the
# terminal behind the console.

export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=linux LANG=C.UTF-8
for place in "proc proc" "sysfs sys" "devtmpfs dev"; do
    set -- $place
    mountpoint -q /$2 || mount -t $1 $1 /$2
done
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
hostname -F /etc/hostname 2>/dev/null

program="bash -l" clock=rtc size=
read -r cmdline < /proc/cmdline
for word in $cmdline; do
    case $word in
        squib.exec=*) program=${word#squib.exec=} ;;
        squib.clock=*) clock=${word#squib.clock=} ;;
        squib.size=*) size=${word#squib.size=} ;;
    esac
done
[ "$clock" = keep ] || busybox sh /usr/sbin/squib-clock < /dev/null > /dev/null 2>&1 &
read -r console < /sys/class/tty/console/active
console=/dev/${console##* }
[ -n "$size" ] && stty -F "$console" rows "${size%x*}" columns "${size#*x}"

cd /root
# In the foreground: a shell that is started in the background ignores Ctrl-C, and so does all it starts.
setsid -c $program < "$console" > "$console" 2>&1
/sbin/poweroff
