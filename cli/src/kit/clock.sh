#!/bin/busybox sh
# Keeps the wall clock right when time has passed that this guest has not seen: it was a snapshot, its host was
# suspended, its process was stopped. Its RTC shows the host's time always, and Linux reads that at boot only.
#
# Twice a second it compares the RTC with the time since boot (not with the wall clock: a date that is set in the
# guest stays). If the RTC has gone ahead, or back, the wall clock is set: at once to the second, and exactly when
# the RTC's next second begins. All in this shell, and without a process but for the setting.
#
# It needs busybox: a shell that knows EPOCHREALTIME and `read -t` with a fraction.

rtc=/sys/class/rtc/rtc0/since_epoch
[ -r $rtc ] || exit 0

# Nothing writes to it, so that a read with a timeout is a sleep.
nothing=/tmp/.squib-clock.$$
busybox mkfifo -m 600 $nothing && exec 3<> $nothing || exit 1
busybox rm $nothing
nap() { read -r -t "$1" _ <&3; }

# $is: seconds of the RTC. $up: hundredths of a second since boot.
look() {
    read -r is < $rtc
    read -r up _ < /proc/uptime
    up=$((${up%.*} * 100 + 1${up#*.} - 100))
}

# Sets the wall clock to the RTC's second, and again if time has passed unseen before it was set.
set_clock() {
    tries=0
    busybox date -s @$is > /dev/null
    look
    while [ $((is - EPOCHSECONDS)) -gt 1 ] && [ $tries -lt 3 ]; do
        busybox date -s @$is > /dev/null
        look
        tries=$((tries + 1))
    done
}

# Waits for the RTC's next second, sets the wall clock by it if it is off by more than a tenth of a second, and
# remembers in $base what the RTC showed at boot, in hundredths of a second.
exact() {
    look
    was=$is tries=0
    while [ "$is" = "$was" ] && [ $tries -lt 200 ]; do
        nap 0.01
        look
        tries=$((tries + 1))
    done
    base=$((is * 100 - up))
    wall=$EPOCHREALTIME
    off=$((is * 1000000 - ${wall%.*}${wall#*.}))
    [ $off -gt -100000 ] && [ $off -lt 100000 ] || set_clock
}

# $ahead: by how much the RTC has gone ahead since `exact`, in hundredths of a second. It shows whole seconds, so that
# down to -100 it has not gone back.
compare() {
    look
    ahead=$((is * 100 - base - up))
}

exact
while :; do
    nap 0.5
    compare
    [ $ahead -gt -130 ] && [ $ahead -lt 30 ] && continue
    # Up to some seconds the host makes up for by moving the counter, and takes a second or two for it.
    if [ $ahead -gt -400 ] && [ $ahead -lt 400 ]; then
        nap 3
        compare
        [ $ahead -gt -130 ] && [ $ahead -lt 30 ] && continue
    fi
    set_clock
    exact
done
