# A session of gdb: breakpoints, steps, watchpoints.
cd /tmp || exit
cat > steps.c <<'EOF'
#include <stdio.h>

unsigned sum;

static unsigned mix(unsigned n)
{
    unsigned m = n * 2654435761u;
    return m ^ (m >> 15);
}

static void count(unsigned n)
{
    for (unsigned i = 1; i <= n; i++)
        sum += i;
}

int main(void)
{
    unsigned m = mix(7);
    count(3);
    printf("mixed %u, sum %u\n", m, sum);
    fflush(stdout);
    m = mix(m);
    return m % 64;
}
EOF
gcc -g -O0 -o steps steps.c || exit
cat > commands <<'EOF'
set style enabled off
set width 0
echo # break\n
break main
run
echo # next\n
next
print m
echo # watch\n
watch sum
continue
continue
continue
delete 2
echo # finish\n
finish
echo # hbreak\n
hbreak mix
continue
backtrace
print n
echo # stepi\n
set $at = $pc
stepi
print $pc - $at
stepi
print $pc - $at
echo # step\n
step
next
echo # finish\n
finish
next
echo # end\n
print m
continue
EOF
gdb -nx -batch -x commands ./steps 2>&1 | grep -v libthread_db
