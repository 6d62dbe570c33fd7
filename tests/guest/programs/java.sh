# Compiles a class, and runs it on threads, interpreted and compiled.
cd /tmp || exit
cat > Sums.java <<'EOF'
import java.security.MessageDigest;
import java.util.*;
import java.util.concurrent.*;
import java.util.concurrent.atomic.AtomicLong;
import java.util.stream.*;
import java.util.zip.CRC32;

public class Sums {
    public static void main(String[] arguments) throws Exception {
        long hash = 0xcbf29ce484222325L;
        double wave = 0;
        // Long enough for the optimising compiler.
        for (int n = 0; n < 1_000_000; n++) {
            hash = (hash ^ (n & 255)) * 0x100000001b3L;
            wave += Math.sqrt(n) * (n % 3 - 1);
        }
        System.out.printf(Locale.ROOT, "hash %016x, wave %.6f%n", hash, wave);
        byte[] data = "squib".repeat(100_000).getBytes("UTF-8");
        CRC32 crc = new CRC32();
        crc.update(data);
        byte[] digest = MessageDigest.getInstance("SHA-256").digest(data);
        System.out.printf("crc %08x, sha256 %s%n", crc.getValue(), HexFormat.of().formatHex(digest));
        AtomicLong total = new AtomicLong();
        ExecutorService pool = Executors.newFixedThreadPool(4);
        for (int from = 0; from < 4; from++) {
            long base = from;
            pool.submit(() -> { for (int n = 0; n < 20_000; n++) total.addAndGet(base + n); });
        }
        pool.shutdown();
        pool.awaitTermination(1, TimeUnit.HOURS);
        System.out.println("total " + total);
        Map<Integer, Long> tails = IntStream.range(0, 10_000).boxed()
            .collect(Collectors.groupingBy(n -> n * n % 10, TreeMap::new, Collectors.counting()));
        System.out.println("tails " + tails);
        try {
            System.out.println(((Object[]) null).length);
        } catch (NullPointerException caught) {
            System.out.println("caught a null pointer");
        }
        int kept = 0;
        for (int n = 0; n < 2000; n++) kept += new byte[1 << 16].length >> 16;
        System.out.println("garbage " + kept);
        System.exit(3);
    }
}
EOF
# The folder has a second name.
set -- /usr/lib/jvm/*/bin/java
java=$1
$java -m jdk.compiler/com.sun.tools.javac.Main -d classes Sums.java
for how in -Xint -Xmixed; do
    $java $how -cp classes Sums
    echo "$how: status $?"
done
