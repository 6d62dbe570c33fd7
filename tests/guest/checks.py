"""What Debian's Python computes in the guest. Every line is the same on every correct CPU."""

import array, base64, bisect, collections, ctypes, datetime, decimal, fractions, functools, gzip, hashlib
import heapq, hmac, io, itertools, json, lzma, math, operator, os, pickle, random, re, statistics, string, struct
import sys, textwrap, threading, time, unicodedata, zlib


def digest(value):
    return hashlib.sha256(repr(value).encode()).hexdigest()[:32]


def check(name, value):
    print(f"{name}: {value if len(str(value)) < 60 else digest(value)}", flush=True)


rng = random.Random(20260101)
floats = [rng.uniform(-1e3, 1e3) for _ in range(2000)]
floats += [rng.uniform(-1, 1) * 10.0 ** rng.randint(-320, 308) for _ in range(2000)]
special = [0.0, -0.0, math.inf, -math.inf, 5e-324, -5e-324, 2.2250738585072014e-308, sys.float_info.max, math.nan]

# Floats: arithmetic, conversion, printing, parsing.
check("float repr", [repr(f) for f in floats])
check("float parse", [float(repr(f)) == f for f in floats].count(True))
check("float hex", [f.hex() for f in floats])
check("float add", [repr(a + b) for a, b in zip(floats, floats[1:])])
check("float sub", [repr(a - b) for a, b in zip(floats, floats[7:])])
check("float mul", [repr(a * b) for a, b in zip(floats, floats[3:])])
check("float div", [repr(a / b) for a, b in zip(floats, floats[5:]) if b])
check("float mod", [repr(math.fmod(a, b)) for a, b in zip(floats, floats[11:]) if b])
check("float int", [int(f) for f in floats[:2000]])
check("float round", [round(f, 3) for f in floats[:2000]])
check("float format", ["%.17g %.3e %10.4f" % (f, f, f) for f in floats[:500]])
check("float ratio", [f.as_integer_ratio() for f in floats[:500]])
check("special add", [repr(a + b) for a in special for b in special])
check("special mul", [repr(a * b) for a in special for b in special])
check("special order", [(a < b, a <= b, a == b) for a in special for b in special])
check("special max", [repr(max(a, b)) for a in special for b in special])
check("single", [struct.unpack("<f", struct.pack("<f", f))[0] for f in floats[:2000]])
check("half", [struct.unpack("<e", struct.pack("<e", f))[0] for f in floats[:2000]])

# Math: each function over its domain.
unit = [f / 1000 for f in floats[:1000]]
positive = [abs(f) + 1e-9 for f in floats[:1000]]
for name in "sin cos tan sinh cosh tanh atan asinh exp expm1 erf erfc ceil floor trunc degrees radians".split():
    values = unit if name in ("sinh", "cosh", "exp", "expm1") else floats[:1000]
    check("math " + name, [repr(getattr(math, name)(v)) for v in values])
for name in "sqrt log log2 log10 log1p lgamma cbrt".split():
    check("math " + name, [repr(getattr(math, name)(v)) for v in positive])
for name in "asin acos atanh".split():
    check("math " + name, [repr(getattr(math, name)(v * 0.999)) for v in unit])
check("math atan2", [repr(math.atan2(a, b)) for a, b in zip(unit, unit[1:])])
check("math hypot", [repr(math.hypot(a, b, c)) for a, b, c in zip(unit, unit[1:], unit[2:])])
check("math pow", [repr(math.pow(a, b)) for a, b in zip(positive, unit)])
check("math fsum", repr(math.fsum(floats[:2000])))
check("math frexp", [math.frexp(f) for f in floats])
check("math gamma", [repr(math.gamma(v / 10)) for v in range(1, 300)])
check("math isqrt", [math.isqrt(rng.getrandbits(200)) for _ in range(100)])
check("math comb", math.comb(300, 150))
check("complex", [repr(complex(a, b) ** 3 / complex(b, a)) for a, b in zip(unit, unit[1:])])

# Integers.
big = [rng.getrandbits(bits) for bits in range(1, 600, 7)]
check("int mul", math.prod(big[:40]))
check("int div", [divmod(a, b) for a, b in zip(reversed(big), big) if b])
check("int pow", [pow(a, 65537, b) for a, b in zip(big, big[1:]) if b > 1])
check("int str", [str(b) for b in big])
check("int bits", [(b.bit_length(), b.bit_count()) for b in big])

# Bytes: struct, hashes, compression.
data = bytes(rng.getrandbits(8) for _ in range(100_000)) + b"squib " * 20_000
for fmt in "<bBhHiIqQ", ">bBhHiIqQ", "<fd", ">fd", "<?c5s":
    size = struct.calcsize(fmt)
    if "f" not in fmt:
        check("struct " + fmt, [struct.unpack_from(fmt, data, n) for n in range(0, 5000, size)])
    else:
        check("struct " + fmt, [repr(struct.unpack_from(fmt, data, n)) for n in range(0, 5000, size)])
for name in "md5 sha1 sha224 sha256 sha384 sha512 sha3_256 blake2b blake2s".split():
    check("hash " + name, hashlib.new(name, data).hexdigest()[:32])
check("hash shake", hashlib.shake_128(data).hexdigest(16))
check("hash pbkdf2", hashlib.pbkdf2_hmac("sha256", b"key", b"salt", 2000).hex())
check("hash hmac", hmac.new(b"key", data, "sha256").hexdigest()[:32])
check("crc32", zlib.crc32(data))
check("adler32", zlib.adler32(data))
for level in 1, 6, 9:
    packed = zlib.compress(data, level)
    check(f"zlib {level}", (len(packed), digest(packed), zlib.decompress(packed) == data))
packed = gzip.compress(data, mtime=0)
check("gzip", (digest(packed), gzip.decompress(packed) == data))
packed = lzma.compress(data[:60_000], preset=3)
check("lzma", (len(packed), lzma.decompress(packed) == data[:60_000]))
check("base64", digest(base64.b64encode(data)))
check("translate", digest(data.translate(bytes(reversed(range(256))))))
check("find", (data.find(b"squib squib"), data.count(b"qui"), data.rfind(b"\x00")))

# Text, JSON, pickle.
text = "".join(chr(rng.choice([rng.randint(32, 126), rng.randint(0xa0, 0x24f), rng.randint(0x3040, 0x30ff)])) for _ in range(20_000))
check("utf8", digest(text.encode()))
check("utf16", digest(text.encode("utf-16-le")))
check("case", digest(text.upper() + text.lower() + text.title()))
check("normal", digest(unicodedata.normalize("NFKD", text)))
check("regex", digest(re.findall(r"[a-z]+\d*|[^\x00-\x7f]{2,}", text)))
document = {"floats": floats[:300], "ints": big[:20], "text": text[:2000], "nested": [{"n": n, "s": str(n)} for n in range(300)]}
encoded = json.dumps(document, sort_keys=True)
check("json", (len(encoded), digest(encoded), json.loads(encoded) == document))
check("pickle", (digest(pickle.dumps(document, 4)), pickle.loads(pickle.dumps(document)) == document))
check("wrap", digest(textwrap.wrap(text[:4000], 60)))

# Containers and numbers above the machine's.
values = [rng.random() for _ in range(20_000)]
check("sort", digest(sorted(values)))
check("heap", digest([heapq.heappop(h) for h in [values[:2000]] if not heapq.heapify(h) for _ in range(1000)]))
check("counter", collections.Counter(text).most_common(5))
check("statistics", (repr(statistics.mean(values)), repr(statistics.stdev(values)), repr(statistics.median(values))))
decimal.getcontext().prec = 60
check("decimal", (decimal.Decimal(2).sqrt(), decimal.Decimal(3).ln(), decimal.Decimal(1) / 7))
check("fraction", sum(fractions.Fraction(1, n) for n in range(1, 200)))
check("array", digest(array.array("d", values).tobytes()))
check("dates", [str(datetime.datetime(1970, 1, 1) + datetime.timedelta(days=n * 37, seconds=n)) for n in range(500)])

# Threads: locks, queues, and a sum that no update may be missing from.
total, lock = 0, threading.Lock()


def add(count):
    global total
    for _ in range(count):
        with lock:
            total += 1


threads = [threading.Thread(target=add, args=(3000,)) for _ in range(8)]
[t.start() for t in threads]
[t.join() for t in threads]
check("threads", total)
barrier, seen = threading.Barrier(4), []


def meet(n):
    barrier.wait()
    with lock:
        seen.append(n)


threads = [threading.Thread(target=meet, args=(n,)) for n in range(4)]
[t.start() for t in threads]
[t.join() for t in threads]
check("barrier", sorted(seen))
start = time.monotonic()
time.sleep(0.05)
check("sleep", 0.05 <= time.monotonic() - start < 30)

# Processes and signals.
reader, writer = os.pipe()
if (child := os.fork()) == 0:
    os.write(writer, hashlib.sha256(data).digest())
    os._exit(7)
_, status = os.waitpid(child, 0)
check("fork", (os.read(reader, 64).hex()[:16], os.waitstatus_to_exitcode(status)))

print("checks done", flush=True)
if os.getpid() == 1:
    os.sync()
    # RB_POWER_OFF
    ctypes.CDLL(None).reboot(ctypes.c_int(0x4321FEDC))
