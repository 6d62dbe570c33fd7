//! The run-time folder: one directory a VM, held by a lock, with its control socket.
//!
//! ```text
//! RUN/vms/NAME/lock       held (flock) as long as the VM's process lives
//! RUN/vms/NAME/vm.json    process id and configuration, for `squib ps`
//! RUN/vms/NAME/api.sock   the control socket
//! STATE/disks/NAME/       disks that a restore made for this VM only
//! STATE/children/         where differences were written: see [`children`](crate::children)
//! ```
//!
//! `STATE` is `SQUIB_HOME`, else `squib` below `XDG_STATE_HOME` or `~/.local/state`: disks are too large for
//! a run-time folder, which often is memory. Both have to be the user's own, and closed to writes by others: see
//! [`folder`]. `RUN` is `SQUIB_HOME/run`, else `squib` below `XDG_RUNTIME_DIR`, else `STATE/run`. macOS has no
//! run-time folder of a user: below its `TMPDIR` a system service removes what has not been touched for days, and
//! the path would leave little of the 103 bytes of a socket's. A directory whose lock nobody holds is what a dead VM left:
//! the next start removes it.

pub(crate) mod folder;
mod socket;

use std::{
    fs::{self, File},
    io::{self, Read as _},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use squib_vmm::config::NAME_MAX;

pub use self::{folder::FolderError, socket::listen};
use self::{
    folder::Others,
    socket::{SOCKET_PATH_MAX, STAGE_MAX, STAGED},
};
use crate::children::Children;

/// Name of the control socket.
const SOCKET: &str = "api.sock";
/// What else lies in the directory of a VM. Of it, and of the folder of disks, nothing else is ever removed.
const LOCK: &str = "lock";
const RECORD: &str = "vm.json";
const RECORD_STAGED: &str = "vm.json.new";
/// How often the lock of a name is tried: another start may hold it for the moment that it takes to
/// clean up.
const LOCK_TRIES: u32 = 20;

/// Why a VM has no place in the run-time folder, or was not found there.
#[derive(Debug, thiserror::Error)]
pub enum HomeError {
    /// No variable names a folder.
    #[error("no run-time folder: set SQUIB_HOME, XDG_RUNTIME_DIR or HOME")]
    NoFolder,
    /// The name could lead out of the folder.
    #[error(
        "`{}` cannot be a VM's name: letters, digits, `.`, `_` and `-` after a letter or digit can, \
         {NAME_MAX} at most",
        name.escape_debug()
    )]
    Name {
        /// The name.
        name: String,
    },
    /// A VM of that name runs.
    #[error("a VM named `{name}` is already running (process {pid}): choose another with --name")]
    NameTaken {
        /// The name.
        name: String,
        /// The process that holds it, as far as known.
        pid: String,
    },
    /// No VM of that name runs.
    #[error("no VM named `{name}` is running; {running}")]
    NoSuchVm {
        /// The name.
        name: String,
        /// The names that do run, as a sentence.
        running: String,
    },
    /// The socket's path does not fit into a socket address.
    #[error(
        "the socket path {} has {} bytes, the system takes {SOCKET_PATH_MAX}: \
         set SQUIB_HOME to a shorter folder, or name one with --api-sock",
        path.display(), path.as_os_str().len()
    )]
    SocketPath {
        /// The path.
        path: PathBuf,
    },
    /// Somebody listens on the socket.
    #[error("the socket {} is in use by another process", path.display())]
    SocketInUse {
        /// The path.
        path: PathBuf,
    },
    /// The socket's path is taken by something else.
    #[error("{} exists and is not a socket", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// A folder cannot be made, or is not the user's own.
    #[error("{0}; or name another one with SQUIB_HOME")]
    Folder(#[from] FolderError),
    /// A file could not be read or written.
    #[error("{}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl HomeError {
    fn io(path: &Path, source: impl Into<io::Error>) -> Self {
        Self::Io { path: path.to_owned(), source: source.into() }
    }
}

/// What `vm.json` says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmRecord {
    /// The VM's name.
    pub name: String,
    /// The process that runs it.
    pub pid: u32,
    /// The control socket.
    pub socket: PathBuf,
    /// Start, seconds since 1970-01-01 00:00 UTC.
    pub started: u64,
}

/// The run-time folder.
#[derive(Debug, Clone)]
pub struct Home {
    vms: PathBuf,
    disks: PathBuf,
    children: PathBuf,
}

impl Home {
    /// The folder that the environment names; made, if it is not there, with mode 0700.
    pub fn open() -> Result<Self, HomeError> {
        let (run, state) = Self::folders()?;
        Self::at(&run, &state)
    }

    /// As [`open`](Self::open), but nothing is made: for what only looks.
    pub fn find() -> Result<Self, HomeError> {
        let (run, state) = Self::folders()?;
        let home = Self::below(&run, &state);
        for (dir, others) in home.rules(&run, &state) {
            folder::check(dir, others)?;
        }
        Ok(home)
    }

    /// The folders `run` and `state` that the environment names, whether they are there or not.
    pub fn folders() -> Result<(PathBuf, PathBuf), HomeError> {
        let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let state = var("SQUIB_HOME")
            .or_else(|| var("XDG_STATE_HOME").map(|dir| dir.join("squib")))
            .or_else(|| var("HOME").map(|dir| dir.join(".local/state/squib")))
            .ok_or(HomeError::NoFolder)?;
        let run = match var("XDG_RUNTIME_DIR") {
            Some(dir) if var("SQUIB_HOME").is_none() => dir.join("squib"),
            _ => state.join("run"),
        };
        Ok((run, state))
    }

    /// The folders `run` and `state`.
    pub fn at(run: &Path, state: &Path) -> Result<Self, HomeError> {
        let home = Self::below(run, state);
        for (dir, others) in home.rules(run, state) {
            folder::make(dir, others)?;
        }
        Ok(home)
    }

    fn below(run: &Path, state: &Path) -> Self {
        Self { vms: run.join("vms"), disks: state.join("disks"), children: state.join("children") }
    }

    /// What others may do in each folder, from the outside to the inside. A folder of the user's choice may be
    /// read; what squib makes in it is its own.
    fn rules<'a>(&'a self, run: &'a Path, state: &'a Path) -> [(&'a Path, Others); 5] {
        [
            (state, Others::MayRead),
            (run, Others::MayRead),
            (&self.vms, Others::MayNothing),
            (&self.disks, Others::MayNothing),
            (&self.children, Others::MayNothing),
        ]
    }

    /// Length of the longest name whose control socket has a path that the system takes in any case.
    pub fn longest_name(&self) -> usize {
        let around = self.vms.as_os_str().len() + "//".len() + SOCKET.len().max(STAGE_MAX);
        SOCKET_PATH_MAX.saturating_sub(around).min(NAME_MAX)
    }

    /// Below which restored disks lie, unless the user wants them elsewhere.
    pub fn disks(&self) -> &Path {
        &self.disks
    }

    /// Where differences were written.
    pub fn children(&self) -> Children {
        Children::at(self.children.clone())
    }

    /// Takes the name for this process; what dead VMs left is removed.
    pub fn claim(&self, name: &str) -> Result<VmDir, HomeError> {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        let starts_well = name.starts_with(|c: char| c.is_ascii_alphanumeric());
        if !starts_well || name.len() > NAME_MAX || !name.chars().all(plain) {
            return Err(HomeError::Name { name: name.to_owned() });
        }
        self.clean();
        let dir = self.vms.join(name);
        let mut tries = 0;
        loop {
            folder::make(&dir, Others::MayNothing)?;
            if let Some(lock) = lock(&dir)? {
                let disks = self.disks.join(name);
                // Left by a VM of this name whose directory is gone.
                remove_disks(&disks)?;
                return Ok(VmDir { dir, disks, lock, name: name.to_owned() });
            }
            tries += 1;
            if tries == LOCK_TRIES {
                let pid = fs::read_to_string(dir.join(LOCK)).unwrap_or_default();
                let pid = if pid.is_empty() { "unknown".to_owned() } else { pid };
                return Err(HomeError::NameTaken { name: name.to_owned(), pid });
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// The VMs that run, by name.
    pub fn running(&self) -> Result<Vec<VmRecord>, HomeError> {
        let mut records = Vec::new();
        for dir in dirs(&self.vms)? {
            // Whoever gets the lock has found a dead VM; it stays for the next start to clean.
            let Ok(file) = File::open(dir.join(LOCK)) else { continue };
            if flock(&file, FlockOperation::NonBlockingLockShared).is_ok() {
                continue;
            }
            let record = fs::read(dir.join(RECORD)).ok();
            if let Some(record) = record.and_then(|text| serde_json::from_slice(&text).ok()) {
                records.push(record);
            }
        }
        records.sort_by(|a: &VmRecord, b| a.name.cmp(&b.name));
        Ok(records)
    }

    /// The control socket of a running VM, by name, or by the socket's own path (with a `/` in it).
    pub fn socket(&self, name_or_socket: &str) -> Result<PathBuf, HomeError> {
        if name_or_socket.contains('/') {
            return Ok(name_or_socket.into());
        }
        let running = self.running()?;
        if let Some(vm) = running.iter().find(|vm| vm.name == name_or_socket) {
            return Ok(vm.socket.clone());
        }
        let names: Vec<&str> = running.iter().map(|vm| vm.name.as_str()).collect();
        let running = match names.as_slice() {
            [] => "none is".to_owned(),
            names => format!("there are: {}", names.join(", ")),
        };
        Err(HomeError::NoSuchVm { name: name_or_socket.to_owned(), running })
    }

    /// Removes what nobody holds. What cannot be removed is tried again another time.
    fn clean(&self) {
        let vms = dirs(&self.vms).unwrap_or_default();
        let disks = dirs(&self.disks).unwrap_or_default();
        let names = vms.iter().chain(&disks).filter_map(|dir| dir.file_name());
        for name in names {
            let dir = self.vms.join(name);
            if folder::make(&dir, Others::MayNothing).is_ok()
                && let Ok(Some(lock)) = lock(&dir)
            {
                let _ = remove_disks(&self.disks.join(name));
                remove(&dir, lock);
            }
        }
    }
}

/// The directory of a VM of this process; removed when it is dropped.
#[derive(Debug)]
pub struct VmDir {
    dir: PathBuf,
    disks: PathBuf,
    lock: File,
    name: String,
}

impl VmDir {
    /// Where the control socket belongs unless the user wants it elsewhere.
    pub fn socket(&self) -> PathBuf {
        self.dir.join(SOCKET)
    }

    /// A new directory for disks that live as long as the VM.
    pub fn make_disks(&self) -> Result<&Path, HomeError> {
        folder::make(&self.disks, Others::MayNothing)?;
        Ok(&self.disks)
    }

    /// Tells other processes about the VM.
    pub fn publish(&self, socket: &Path) -> Result<(), HomeError> {
        let started = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |d| d.as_secs());
        let record = VmRecord {
            name: self.name.clone(),
            pid: std::process::id(),
            socket: std::path::absolute(socket).map_err(|e| HomeError::io(socket, e))?,
            started,
        };
        let staged = self.dir.join(RECORD_STAGED);
        let path = self.dir.join(RECORD);
        let text = serde_json::to_vec(&record).expect("strings and numbers have a JSON form");
        fs::write(&staged, text)
            .and_then(|()| fs::rename(&staged, &path))
            .map_err(|e| HomeError::io(&path, e))
    }
}

impl Drop for VmDir {
    fn drop(&mut self) {
        // What stays because of an error is removed by the next start.
        let _ = remove_disks(&self.disks);
        if let Ok(lock) = self.lock.try_clone() {
            remove(&self.dir, lock);
        }
    }
}

/// Takes the lock of `dir`; `None` if somebody else holds it, or is removing the directory.
fn lock(dir: &Path) -> Result<Option<File>, HomeError> {
    let path = dir.join(LOCK);
    let opened = File::options().read(true).write(true).create(true).truncate(false).open(&path);
    let mut file = match opened {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(HomeError::io(&path, e)),
    };
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
        Err(e) => return Err(HomeError::io(&path, e)),
    }
    // A lock on a file that has been removed since it was opened holds nothing.
    let same = |a: &fs::Metadata, b: &fs::Metadata| a.ino() == b.ino() && a.dev() == b.dev();
    let ours = file.metadata().map_err(|e| HomeError::io(&path, e))?;
    if !fs::metadata(&path).is_ok_and(|there| same(&ours, &there)) {
        return Ok(None);
    }
    let mut before = String::new();
    if file.read_to_string(&mut before).is_err() || before != std::process::id().to_string() {
        fs::write(&path, std::process::id().to_string()).map_err(|e| HomeError::io(&path, e))?;
    }
    Ok(Some(file))
}

fn dirs(parent: &Path) -> Result<Vec<PathBuf>, HomeError> {
    let entries = match fs::read_dir(parent) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(HomeError::io(parent, e)),
    };
    Ok(entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()).collect())
}

/// Removes a directory of disks that a restore made, `ID.img` each. What else lies there stays, and so does the
/// directory then: squib did not make it.
fn remove_disks(dir: &Path) -> Result<(), HomeError> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(HomeError::io(dir, e)),
    };
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.extension().is_some_and(|end| end == "img") {
            fs::remove_file(&path).map_err(|e| HomeError::io(&path, e))?;
        }
    }
    match fs::remove_dir(dir) {
        Err(e) if e.kind() != io::ErrorKind::DirectoryNotEmpty => Err(HomeError::io(dir, e)),
        _ => Ok(()),
    }
}

/// Removes a directory whose lock is held; the lock file goes last, so that until then nobody takes
/// the name.
fn remove(dir: &Path, lock: File) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let (name, path) = (entry.file_name(), entry.path());
        if [SOCKET, RECORD, RECORD_STAGED].iter().any(|ours| name == *ours) {
            let _ = fs::remove_file(path);
        } else if name.to_string_lossy().starts_with('.') {
            // Where a start was killed while it made its socket.
            let _ = fs::remove_file(path.join(STAGED));
            let _ = fs::remove_dir(path);
        }
    }
    let _ = fs::remove_file(dir.join(LOCK));
    let _ = fs::remove_dir(dir);
    drop(lock);
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn home() -> (tempfile::TempDir, Home) {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::at(&dir.path().join("run"), &dir.path().join("state")).unwrap();
        (dir, home)
    }

    #[test]
    fn folders_are_closed_to_others() {
        let (dir, home) = home();
        let vm = home.claim("a").unwrap();
        for path in [dir.path().join("run"), home.vms.clone(), vm.dir.clone()] {
            assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o700, "{}", path.display());
        }
    }

    #[test]
    fn two_vms_of_one_name_are_refused() {
        let (_dir, home) = home();
        let first = home.claim("a").unwrap();
        match home.claim("a") {
            Err(HomeError::NameTaken { name, pid }) => {
                assert_eq!(name, "a");
                assert_eq!(pid, std::process::id().to_string());
            }
            other => panic!("{other:?}"),
        }
        drop(first);
        home.claim("a").unwrap();
    }

    #[test]
    fn a_vm_that_has_ended_leaves_nothing() {
        let (_dir, home) = home();
        let vm = home.claim("a").unwrap();
        let _listener = listen(&vm.socket()).unwrap();
        vm.publish(&vm.socket()).unwrap();
        assert_eq!(home.running().unwrap().len(), 1);
        drop(vm);
        assert_eq!(fs::read_dir(&home.vms).unwrap().count(), 0);
    }

    #[test]
    fn what_a_killed_vm_left_is_removed_by_the_next_start() {
        let (_dir, home) = home();
        // As after SIGKILL: the files are there, the lock is not held.
        let dead = home.vms.join("dead");
        folder::make(&dead, Others::MayNothing).unwrap();
        for file in ["lock", "vm.json", "api.sock"] {
            fs::write(dead.join(file), "1").unwrap();
        }
        let disks = home.disks.join("dead");
        fs::create_dir(&disks).unwrap();
        fs::write(disks.join("vda.img"), "1").unwrap();
        assert!(home.running().unwrap().is_empty());
        let _vm = home.claim("other").unwrap();
        assert!(!dead.exists() && !disks.exists());
    }

    #[test]
    fn the_longest_name_has_a_socket_and_a_longer_one_has_none() {
        let dir = tempfile::tempdir().unwrap();
        let pad = (SOCKET_PATH_MAX - 40).saturating_sub(dir.path().as_os_str().len());
        let run = dir.path().join("x".repeat(pad));
        let home = Home::at(&run, &dir.path().join("state")).unwrap();
        let most = home.longest_name();
        assert!((1..NAME_MAX).contains(&most), "{most}");
        let vm = home.claim(&"a".repeat(most)).unwrap();
        listen(&vm.socket()).unwrap();
        let more = most + STAGE_MAX - SOCKET.len() + 1;
        let vm = home.claim(&"a".repeat(more)).unwrap();
        assert!(matches!(listen(&vm.socket()), Err(HomeError::SocketPath { .. })));
    }

    #[test]
    fn a_name_does_not_lead_out_of_the_folder() {
        let (_dir, home) = home();
        for name in ["", ".", "..", "../x", "a/b", ".a", "a b", &"x".repeat(NAME_MAX + 1)] {
            assert!(matches!(home.claim(name), Err(HomeError::Name { .. })), "{name}");
        }
    }

    #[test]
    fn the_disks_of_a_running_vm_stay_and_go_with_it() {
        let (_dir, home) = home();
        let vm = home.claim("a").unwrap();
        let disk = vm.make_disks().unwrap().join("vda.img");
        fs::write(&disk, "1").unwrap();
        let _other = home.claim("b").unwrap();
        assert!(disk.exists());
        drop(vm);
        assert!(!disk.exists());
    }

    #[test]
    fn a_running_vm_is_found_by_name_and_by_socket() {
        let (_dir, home) = home();
        let vm = home.claim("a").unwrap();
        vm.publish(&vm.socket()).unwrap();
        assert_eq!(home.socket("a").unwrap(), vm.socket());
        assert_eq!(home.socket("/tmp/x.sock").unwrap(), Path::new("/tmp/x.sock"));
        let error = home.socket("b").unwrap_err().to_string();
        assert_eq!(error, "no VM named `b` is running; there are: a");
    }

    #[test]
    fn a_folder_that_others_can_write_to_is_refused_and_left_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
        for (name, given, taken) in
            [("a", 0o777, false), ("b", 0o1777, false), ("c", 0o770, false), ("d", 0o755, true)]
        {
            let real = dir.path().join(name);
            fs::create_dir(&real).unwrap();
            fs::set_permissions(&real, fs::Permissions::from_mode(given)).unwrap();
            let link = dir.path().join(format!("link-{name}"));
            std::os::unix::fs::symlink(&real, &link).unwrap();
            for path in [&real, &link] {
                let home = Home::at(&path.join("run"), path);
                assert_eq!(home.is_ok(), taken, "{home:?}");
                if let Err(error) = home {
                    let said = error.to_string();
                    assert!(said.contains(&format!("chmod go-w {}", path.display())), "{said}");
                    assert_eq!(fs::read_dir(&real).unwrap().count(), 0);
                }
            }
            assert_eq!(mode(&real), given);
        }
    }

    #[test]
    fn what_squib_did_not_make_stays() {
        let (_dir, home) = home();
        let own = home.disks.join("mine");
        fs::create_dir_all(own.join("below")).unwrap();
        fs::write(own.join("notes.txt"), "precious").unwrap();
        let vm = home.vms.join("gone");
        fs::create_dir(&vm).unwrap();
        fs::write(vm.join("notes.txt"), "precious").unwrap();
        drop(home.claim("other").unwrap());
        drop(home.claim("mine").unwrap());
        assert_eq!(fs::read(own.join("notes.txt")).unwrap(), b"precious");
        assert!(own.join("below").exists());
        assert_eq!(fs::read(vm.join("notes.txt")).unwrap(), b"precious");
    }

    #[test]
    fn a_disks_folder_of_the_users_own_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let disks = dir.path().join("disks");
        fs::create_dir(&disks).unwrap();
        fs::set_permissions(&disks, fs::Permissions::from_mode(0o755)).unwrap();
        let error = Home::at(&dir.path().join("run"), dir.path()).unwrap_err();
        assert!(matches!(error, HomeError::Folder(FolderError::Shared { .. })), "{error}");
        assert_eq!(fs::metadata(&disks).unwrap().mode() & 0o777, 0o755);
    }
}
