//! QEMU's guest, its migration to a file and back, over QMP.

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::{NO_QEMU, QEMU, child::Vm, guest::Guest};

/// How long QEMU may take to open its control socket, and a command to be answered.
const PATIENCE: Duration = Duration::from_secs(300);
/// Bytes a second; the default of 128 MiB would be the limit that is measured.
const NO_LIMIT: u64 = 1 << 40;

/// How a guest's memory goes to a file and comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// The migration stream as it is.
    Plain,
    /// The migration stream through `zstd -1`.
    Zstd,
    /// Memory is a file, which is mapped copy-on-write; the stream holds the rest (x-ignore-shared).
    Shared,
}

/// A running QEMU.
pub(super) struct Qemu {
    /// Its process.
    pub(super) vm: Vm,
    qmp: Qmp,
}

/// A guest in files.
pub(super) struct Saved {
    way: Way,
    /// The migration stream.
    pub(super) stream: PathBuf,
    /// The memory of [`Way::Shared`].
    pub(super) memory: Option<PathBuf>,
    /// From the command to stop until the files are complete, all of which the guest stands still.
    pub(super) took: Duration,
}

impl Way {
    /// What a table calls it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Plain => "QEMU",
            Self::Zstd => "QEMU, zstd -1",
            Self::Shared => "QEMU, memory file",
        }
    }
}

impl Saved {
    /// All files.
    pub(super) fn files(&self) -> Vec<&Path> {
        let files = [Some(&self.stream), self.memory.as_ref()];
        files.into_iter().flatten().map(PathBuf::as_path).collect()
    }
}

/// The version, or why there is none.
pub(super) fn version() -> Result<String> {
    let output = super::child::run(Command::new(QEMU).arg("--version")).context(NO_QEMU)?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().next().unwrap_or_default().trim().to_owned())
}

impl Qemu {
    /// Boots the guest. `memory` is the file that its memory is to be; by default it is anonymous.
    pub(super) fn boot(guest: &Guest, dir: &Path, memory: Option<&Path>) -> Result<Self> {
        let mut command = command(guest.memory, memory.map(|file| (file, true)));
        command.arg("-kernel").arg(&guest.kernel).arg("-initrd").arg(&guest.initrd);
        command.arg("-append").arg(Guest::cmdline("ttyAMA0"));
        Self::start(command, dir)
    }

    fn start(mut command: Command, dir: &Path) -> Result<Self> {
        let socket = dir.join("qmp.sock");
        match std::fs::remove_file(&socket) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e.into()),
            _ => {}
        }
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", socket.display()));
        let vm = Vm::start(&mut command).context(NO_QEMU)?;
        let mut qmp = Qmp::connect(&socket, &vm)?;
        qmp.command("qmp_capabilities", json!({}))?;
        Ok(Self { vm, qmp })
    }

    /// Stops the guest and writes it to files whose names begin with `name`. It stays stopped.
    pub(super) fn save(&mut self, way: Way, memory: Option<&Path>, name: &Path) -> Result<Saved> {
        let stream = name.with_extension("stream");
        let done = name.with_extension("done");
        let writer = match way {
            Way::Plain | Way::Shared => format!("cat > {}", quoted(&stream)?),
            Way::Zstd => format!("zstd -q -1 -c > {}", quoted(&stream)?),
        };
        // QEMU is done with the last byte of its own; the file is complete a little later.
        let uri = format!("exec:{writer} && sync {} && : > {}", quoted(&stream)?, quoted(&done)?);
        self.qmp.command("migrate-set-parameters", json!({ "max-bandwidth": NO_LIMIT }))?;
        self.qmp.capabilities(way)?;
        let start = Instant::now();
        self.qmp.command("stop", json!({}))?;
        self.qmp.command("migrate", json!({ "uri": uri }))?;
        self.qmp.migrated()?;
        while !done.exists() {
            ensure!(start.elapsed() < PATIENCE, "QEMU's migration stream is not written");
            thread::sleep(Duration::from_millis(1));
        }
        let took = start.elapsed();
        std::fs::remove_file(&done)?;
        Ok(Saved { way, stream, memory: memory.map(Path::to_owned), took })
    }

    /// Lets the guest go on.
    pub(super) fn go_on(&mut self) -> Result<()> {
        self.qmp.command("cont", json!({}))?;
        Ok(())
    }

    /// Brings a saved guest back; also the time from the start of the process to its first instruction.
    pub(super) fn restore(guest: &Guest, saved: &Saved, dir: &Path) -> Result<(Self, Duration)> {
        let memory = saved.memory.as_deref().map(|file| (file, false));
        let mut command = command(guest.memory, memory);
        command.args(["-incoming", "defer"]);
        let mut qemu = Self::start(command, dir)?;
        let reader = match saved.way {
            Way::Plain | Way::Shared => format!("exec:cat {}", quoted(&saved.stream)?),
            Way::Zstd => format!("exec:zstd -q -d -c {}", quoted(&saved.stream)?),
        };
        qemu.qmp.capabilities(saved.way)?;
        qemu.qmp.command("migrate-incoming", json!({ "uri": reader }))?;
        qemu.qmp.migrated()?;
        // It was stopped when it was saved, and that is state too.
        qemu.go_on()?;
        qemu.qmp.event("RESUME")?;
        let took = qemu.vm.started().elapsed();
        Ok((qemu, took))
    }
}

/// A machine without devices but the console. `memory` is a file, and whether writes go to it.
fn command(bytes: u64, memory: Option<(&Path, bool)>) -> Command {
    let mut command = Command::new(QEMU);
    command.args(["-cpu", "cortex-a72", "-accel", "tcg", "-smp", "1"]);
    command.args(["-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"]);
    command.args(["-m", &format!("{}M", bytes >> 20)]);
    match memory {
        None => command.args(["-M", "virt,gic-version=3"]),
        Some((file, share)) => {
            let share = if share { "on" } else { "off" };
            // A comma in a value is doubled.
            let path = file.display().to_string().replace(',', ",,");
            command.args(["-M", "virt,gic-version=3,memory-backend=mem", "-object"]);
            command.arg(format!(
                "memory-backend-file,id=mem,size={bytes},mem-path={path},share={share}"
            ))
        }
    };
    command
}

/// A path as the shell takes it.
fn quoted(path: &Path) -> Result<String> {
    let text = path.to_str().with_context(|| format!("{} is no UTF-8", path.display()))?;
    Ok(format!("'{}'", text.replace('\'', r"'\''")))
}

/// A connection to QEMU's control socket.
struct Qmp {
    reader: BufReader<UnixStream>,
    events: Vec<Value>,
}

impl Qmp {
    fn connect(socket: &Path, vm: &Vm) -> Result<Self> {
        let stream = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(e) if vm.started().elapsed() > PATIENCE => {
                    return Err(e).context("QEMU does not open its control socket");
                }
                Err(_) if vm.ended() => {
                    bail!("QEMU has ended: {}", vm.log().messages.join("\n"));
                }
                Err(_) => thread::sleep(Duration::from_micros(200)),
            }
        };
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut qmp = Self { reader: BufReader::new(stream), events: Vec::new() };
        qmp.read()?;
        Ok(qmp)
    }

    fn capabilities(&mut self, way: Way) -> Result<()> {
        let shared = json!({ "capability": "x-ignore-shared", "state": way == Way::Shared });
        let events = json!({ "capability": "events", "state": true });
        let capabilities = json!({ "capabilities": [shared, events] });
        self.command("migrate-set-capabilities", capabilities).map(drop)
    }

    fn command(&mut self, name: &str, arguments: Value) -> Result<Value> {
        let line = json!({ "execute": name, "arguments": arguments }).to_string();
        self.reader.get_mut().write_all(line.as_bytes())?;
        loop {
            let mut answer = self.read()?;
            if let Some(answer) = answer.get_mut("return") {
                return Ok(answer.take());
            }
            if let Some(error) = answer.get("error") {
                bail!("QEMU: {name}: {error}");
            }
            self.events.push(answer);
        }
    }

    /// Waits until a migration is complete.
    fn migrated(&mut self) -> Result<()> {
        loop {
            let event = self.event("MIGRATION")?;
            match event["data"]["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => bail!("QEMU: the migration failed: {event}"),
                _ => {}
            }
        }
    }

    fn event(&mut self, name: &str) -> Result<Value> {
        loop {
            match self.events.iter().position(|event| event["event"] == name) {
                Some(at) => return Ok(self.events.remove(at)),
                None => {
                    let event = self.read()?;
                    self.events.push(event);
                }
            }
        }
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        let read = self.reader.read_line(&mut line).context("QEMU does not answer")?;
        ensure!(read > 0, "QEMU has closed its control socket");
        Ok(serde_json::from_str(&line)?)
    }
}
