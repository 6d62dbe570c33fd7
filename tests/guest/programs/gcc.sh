# Compiles a program without and with optimisation and runs both.
cd /tmp || exit
cat > sums.c <<'EOF'
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

static uint32_t words[1 << 16];
static atomic_ulong total;

static int compare(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static void *add(void *from)
{
    for (uint32_t *word = from; word < (uint32_t *)from + (1 << 14); word++)
        atomic_fetch_add(&total, *word);
    return 0;
}

int main(void)
{
    uint64_t state = 88172645463325252u, hash = 14695981039346656037u;
    for (unsigned n = 0; n < 1 << 16; n++) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        words[n] = state >> 32;
    }
    qsort(words, 1 << 16, sizeof *words, compare);
    for (unsigned n = 0; n < 1 << 16; n++)
        hash = (hash ^ words[n]) * 1099511628211u;
    double pi = 0;
    for (int n = 0; n < 100000; n++)
        pi += (n % 2 ? -4.0 : 4.0) / (2 * n + 1);
    pthread_t threads[4];
    for (int n = 0; n < 4; n++)
        pthread_create(&threads[n], 0, add, words + (n << 14));
    for (int n = 0; n < 4; n++)
        pthread_join(threads[n], 0);
    printf("hash %016llx, pi %.15f, total %lu\n", (unsigned long long)hash, pi, total);
    return 7;
}
EOF
for level in -O0 -O2; do
    gcc $level -Wall -pthread -o sums sums.c && ./sums
    echo "$level: status $?"
done
echo 'int main(void) { return undeclared; }' > wrong.c
LC_ALL=C gcc -o wrong wrong.c 2> complaint || grep -o "'undeclared' undeclared (first use" complaint
