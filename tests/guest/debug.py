"""What debuggers do, in the guest: steps, breakpoints, watchpoints, probes. The same on every correct CPU."""

import ctypes, mmap, os, signal, struct, sys

libc = ctypes.CDLL(None, use_errno=True)
for name, place in ("proc", "/proc"), ("sysfs", "/sys"), ("tracefs", "/sys/kernel/tracing"), ("tmpfs", "/tmp"):
    if not os.path.ismount(place):
        libc.mount(name.encode(), place.encode(), name.encode(), 0, None)


def check(name, value):
    print(f"{name}: {value}", flush=True)


# Functions, by their offset in a page that is mapped from a file. Each takes an address.
BRK, RET, TO_X1 = 0xD4200000, 0xD65F03C0, 0xAA0003E1
COUNT, CALL, EXCLUSIVE, ACCESS, FAULT, CALLS = 0x000, 0x080, 0x100, 0x180, 0x280, 0x300
programs = {
    # 3: sub x0, x0, #1; cbnz x0, 3b
    COUNT: [0xD2800060, 0xD1000400, 0xB5FFFFE0, RET],
    # getpid
    CALL: [0xD2801588, 0xD4000001, RET],
    # 1: ldxr x3, [x1]; add x3, x3, #1; stxr w4, x3, [x1]; cbnz w4, 1b
    EXCLUSIVE: [TO_X1, 0xC85F7C23, 0x91000463, 0xC8047C23, 0x35FFFFA4, RET],
    # str x0, [x1]; strb w0, [x1, #1]; ldr w2, [x1, #4]; stp x0, x0, [x1, #8]; stur q0, [x1, #-8];
    # ldar x2, [x1]; dc zva, x1; yield
    ACCESS: [TO_X1, 0xF9000020, 0x39000420, 0xB9400422, 0xA9008020, 0x3C9F8020, 0xC8DFFC22, 0xD50B7421, 0xD503203F, RET],
    # str x1, [x2] with x2 = 0
    FAULT: [TO_X1, 0xD2800002, 0xF9000041, 0xD2800020, RET],
    # mov x5, x30; bl of a nop and a ret; then back
    CALLS: [0xAA1E03E5, 0x94000003, 0xD503201F, 0xD65F00A0, 0xD503201F, RET],
}
code = bytearray(4096)
for at, words in programs.items():
    struct.pack_into(f"<{len(words) + 1}I", code, at, BRK, *words)
with open("/tmp/code", "wb") as file:
    file.write(code)
file = os.open("/tmp/code", os.O_RDONLY)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
page = libc.mmap(None, 4096, mmap.PROT_READ | mmap.PROT_EXEC, mmap.MAP_PRIVATE, file, 0)
data = libc.mmap(None, 4096, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
DATA = data + 0x400


def call(at):
    """The function, without its BRK."""
    return ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_long)(page + at + 4)(DATA)


# ptrace.
libc.ptrace.restype = ctypes.c_long
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
TRACEME, CONT, STEP, GETSIGINFO, GETREGSET, SETREGSET = 0, 7, 9, 0x4202, 0x4204, 0x4205
PRSTATUS, HW_BREAK, HW_WATCH = 1, 0x402, 0x403


class Traced:
    """A child that stops at the BRK before the function at `at`, and goes on behind it."""

    def __init__(self, at, run=None):
        self.pid = os.fork()
        if self.pid == 0:
            libc.ptrace(TRACEME, 0, None, None)
            os.kill(os.getpid(), signal.SIGSTOP)
            if run is not None:
                run()
            else:
                ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_long)(page + at)(DATA)
            os._exit(42)
        self.wait()
        if run is None:
            self.go(CONT)
            self.set_pc(self.pc() + 4)

    def wait(self):
        _, status = os.waitpid(self.pid, 0)
        self.ended = os.waitstatus_to_exitcode(status) if not os.WIFSTOPPED(status) else None
        self.signal = os.WSTOPSIG(status) if self.ended is None else None

    def go(self, how):
        if libc.ptrace(how, self.pid, None, None) != 0:
            raise OSError(ctypes.get_errno(), "ptrace")
        self.wait()

    def regset(self, how, kind, data):
        buffer = ctypes.create_string_buffer(bytes(data), len(data))
        vector = struct.pack("<QQ", ctypes.addressof(buffer), len(data))
        vector = ctypes.create_string_buffer(vector, 16)
        if libc.ptrace(how, self.pid, kind, ctypes.addressof(vector)) != 0:
            raise OSError(ctypes.get_errno(), "regset")
        return bytearray(buffer.raw)

    def registers(self):
        return self.regset(GETREGSET, PRSTATUS, bytes(272))

    def pc(self):
        return struct.unpack_from("<Q", self.registers(), 256)[0]

    def set_pc(self, pc):
        registers = self.registers()
        struct.pack_into("<Q", registers, 256, pc)
        self.regset(SETREGSET, PRSTATUS, registers)

    def place(self):
        """Where it stands: an offset in the page, or None outside."""
        at = self.pc() - page
        return at if 0 <= at < 4096 else None

    def hardware(self, kind, address, control):
        """Sets breakpoint or watchpoint 0, as gdb does."""
        self.regset(SETREGSET, kind, struct.pack("<IIQII", 0, 0, address, control, 0))

    def cause(self):
        """si_code, and the address that is reported as an offset in the page of code or of data."""
        buffer = ctypes.create_string_buffer(128)
        libc.ptrace(GETSIGINFO, self.pid, None, ctypes.addressof(buffer))
        code, = struct.unpack_from("<i", buffer, 8)
        address, = struct.unpack_from("<Q", buffer, 16)
        base = page if 0 <= address - page < 4096 else DATA
        return code, address - base if -1024 <= address - base < 4096 else "elsewhere"

    def end(self):
        if self.ended is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()


def steps(at, most):
    child, places = Traced(at), []
    for _ in range(most):
        child.go(STEP)
        if child.signal != signal.SIGTRAP or child.place() is None:
            break
        places.append(child.place() - at)
    # And from there at full speed to the end.
    signals = child.signal
    child.go(CONT)
    result = places, int(signals), child.ended
    child.end()
    return result


check("step a loop", steps(COUNT, 100))
check("step a system call", steps(CALL, 100))
check("step calls", steps(CALLS, 100))
check("step loads and stores", steps(ACCESS, 100))
# Each step's exception clears the monitor: the loop goes on for ever while it is stepped, and ends by itself.
check("step an exclusive pair", steps(EXCLUSIVE, 10))

child = Traced(FAULT)
for _ in range(2):
    child.go(STEP)
before = child.place()
child.go(STEP)
check("step a fault", (before - FAULT, child.place() - FAULT, int(child.signal)))
child.set_pc(page + FAULT + 16)
child.go(STEP)
check("step behind a fault", (child.place() - FAULT, int(child.signal)))
child.go(CONT)
check("end behind a fault", child.ended)

child = Traced(0, run=lambda: sum(range(1000)))
taken = 0
for _ in range(800):
    child.go(STEP)
    taken += child.signal == signal.SIGTRAP
child.go(CONT)
check("800 steps of python", (taken, child.ended))


def tracer():
    child = Traced(0, run=lambda: os._exit(sum(n % 7 for n in range(200)) % 100))
    for _ in range(300):
        child.go(STEP)
        if child.signal != signal.SIGTRAP:
            os._exit(255)
    child.go(CONT)
    os._exit(child.ended)


pids = []
for _ in range(3):
    pid = os.fork()
    if pid == 0:
        tracer()
    pids.append(pid)
check("three tracers at once", [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids])

# Hardware breakpoints and watchpoints of ptrace: E, EL0, type and byte select.
ON, READ, WRITE = 1 | 2 << 1, 1 << 3, 2 << 3
child = Traced(COUNT)
child.hardware(HW_BREAK, page + COUNT + 8, ON | 0xF << 5)
found = []
for _ in range(4):
    child.go(CONT)
    if child.ended is not None:
        break
    found.append((child.place(), int(child.signal), child.cause()))
    child.hardware(HW_BREAK, page + COUNT + 8, 0)
    child.go(STEP)
    child.hardware(HW_BREAK, page + COUNT + 8, ON | 0xF << 5)
check("hbreak", (found, child.ended))

for kind, name in (READ, "read"), (WRITE, "write"), (READ | WRITE, "either"):
    for at, select in (0, 0xFF), (0, 0x02), (0, 0xF0), (8, 0x0F), (-8, 0x80), (24, 0xFF):
        child, found = Traced(ACCESS), []
        child.hardware(HW_WATCH, DATA + at, ON | kind | select << 5)
        for _ in range(20):
            child.go(CONT)
            if child.ended is not None:
                break
            found.append((child.place() - ACCESS, child.cause()))
            child.hardware(HW_WATCH, DATA + at, 0)
            child.go(STEP)
            child.hardware(HW_WATCH, DATA + at, ON | kind | select << 5)
        check(f"watch {name} {select:#x} at {at}", (found, child.ended))

# Breakpoints and watchpoints of perf, which the kernel counts and steps over by itself.
PERF_TYPE_BREAKPOINT, PERF_EVENT_OPEN, NO_KERNEL, NO_USER = 5, 241, 1 << 5, 1 << 4


def counted(kind, address, length, run, exclude=NO_KERNEL):
    attr = bytearray(112)
    struct.pack_into("<II", attr, 0, PERF_TYPE_BREAKPOINT, len(attr))
    struct.pack_into("<Q", attr, 40, exclude)
    struct.pack_into("<IQQ", attr, 52, kind, address, length)
    buffer = ctypes.create_string_buffer(bytes(attr), len(attr))
    # What happens in the kernel is counted for a CPU, not for a process.
    pid, cpu = (0, -1) if exclude == NO_KERNEL else (-1, 0)
    fd = libc.syscall(PERF_EVENT_OPEN, ctypes.byref(buffer), pid, cpu, -1, 0)
    if fd < 0:
        return os.strerror(ctypes.get_errno())
    for _ in range(10):
        run()
    count, = struct.unpack("<Q", os.read(fd, 8))
    os.close(fd)
    return count


R, W, RW, X = 1, 2, 3, 4
for at in 4, 8, 12, 16:
    check(f"perf break at {at}", counted(X, page + COUNT + at, 8, lambda: call(COUNT)))
for kind, name in (R, "r"), (W, "w"), (RW, "rw"):
    for at, length in (0, 8), (0, 1), (1, 1), (4, 4), (8, 8), (16, 8), (-8, 4), (24, 8):
        check(f"perf watch {name} {length} at {at}", counted(kind, DATA + at, length, lambda: call(ACCESS)))
os.sched_setaffinity(0, {0})
symbols = {}
with open("/proc/kallsyms") as names:
    for line in names:
        address, _, name = line.split()[:3]
        symbols.setdefault(name, int(address, 16))
check("perf break in the kernel", counted(X, symbols["__arm64_sys_getppid"], 8, os.getppid, NO_USER))

# Probes of the kernel's tracer.
TRACING = "/sys/kernel/tracing/"


def write(file, text):
    out = os.open(TRACING + file, os.O_WRONLY | os.O_APPEND)
    os.write(out, text.encode())
    os.close(out)


def profile(file):
    with open(TRACING + file) as lines:
        return sorted(tuple(field for field in line.split() if field != "/tmp/code") for line in lines)


for at in COUNT + 4, COUNT + 8, COUNT + 12, CALL + 4, CALLS + 8, ACCESS + 8:
    write("uprobe_events", f"p:squib/u{at:03x} /tmp/code:{at:#x}\n")
write("uprobe_events", f"r:squib/return /tmp/code:{COUNT + 4:#x}\n")
write("kprobe_events", "p:squib/kernel __arm64_sys_getpid\nr:squib/back __arm64_sys_getpid\n")
write("events/squib/enable", "1")
for _ in range(10):
    for at in COUNT, CALL, CALLS, ACCESS:
        call(at)
write("events/squib/enable", "0")
check("uprobes", profile("uprobe_profile"))
check("kprobes", profile("kprobe_profile"))
check("result under probes", (call(COUNT), call(CALL) == os.getpid()))
print("debug done", flush=True)
if os.getpid() == 1:
    # RB_POWER_OFF
    libc.reboot(ctypes.c_int(0x4321FEDC))
